"""Models in memory: their scores are those of the folders they came from, and they stay as they are."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import transformers
from score_jobs import job_for
from where import DEVICE

from mergekit_wp import score
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.in_memory import held
from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.score import score as score_job

ALL = (*tiny.VARIANTS, *tiny.FAMILIES, *tiny.WRAPPERS)


def load(folder, **options):
    """Where jobs run: models in memory are scored where they are."""
    auto = tiny.auto_class(transformers.AutoConfig.from_pretrained(folder))
    return auto.from_pretrained(folder, **options).to(DEVICE)


def assert_same(one, other):
    ours, theirs = one.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert (one.meta.base, one.meta.expert) == (other.meta.base, other.meta.expert)


def state_of(model):
    """All of a module that scoring might touch."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return tensors, flags, hooks, [type(m) for m in model.modules()], model.training, model.config.to_dict()


@pytest.mark.parametrize("kind", ALL)
def test_scores_are_those_of_the_folders(kind, tmp_path):
    """To the bit, fingerprints and names included; fused projections and several towers too."""
    utility = {"llama": "anchor", "phi3": "staged"}.get(kind, "kl")
    job = job_for(tmp_path, kind, utility=utility, layer=1, rows=2, tasks=("first",), gap_floor=0.0)
    base, expert = load(job.base), load(job.expert).train()
    before = [state_of(model) for model in (base, expert)]
    fields = {name: getattr(job, name) for name in ("utility", "layer", "batch_size", "dtype", "gap_floor")}
    found = score(base, expert, job.pairs, progress=False, **fields)
    assert_same(found, score_job(job))
    for model, (tensors, *others) in zip((base, expert), before, strict=True):
        now = state_of(model)
        assert all(torch.equal(tensor, now[0][name]) for name, tensor in tensors.items())
        assert others == list(now[1:])


@pytest.mark.parametrize("kind", ALL)
def test_fingerprints_of_memory_alone_are_those_of_a_saved_folder(kind, tmp_path):
    """What `save_pretrained` writes, though nothing is written."""
    model = tiny.random_model(kind, seed=4)
    model.save_pretrained(tmp_path / "saved")
    with held(model, "base") as live:
        assert live.fingerprint == Checkpoint.open(str(tmp_path / "saved")).fingerprint


def test_a_wider_copy_of_a_folder_is_that_folder_until_a_number_changes(tmp_path):
    folders = tiny.save_pair(tmp_path, "llama", dtype=torch.bfloat16)
    model = load(folders[1], dtype=torch.float32)
    stored = Checkpoint.open(str(folders[1])).fingerprint
    with held(model, "expert") as live:
        assert live.fingerprint == stored
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3
    with held(model, "expert") as live:
        assert live.fingerprint.tensors != stored.tensors
        assert live.fingerprint.config == stored.config


def test_half_precision_in_memory_is_scored_as_its_folder(tmp_path):
    pair = tiny.save_pair(tmp_path, "llama", dtype=torch.bfloat16)
    job = job_for(tmp_path, "llama", pair=pair, utility="kl", tasks=("first",), gap_floor=0.0)
    found = score(load(pair[0]), load(pair[1]), job.pairs, progress=False, gap_floor=0.0, batch_size=2)
    assert found.meta.dtype == "float32"
    assert_same(found, score_job(job))


def test_one_in_memory_and_one_in_a_folder(tmp_path):
    job = job_for(tmp_path, "llama", utility="kl", tasks=("first",), gap_floor=0.0)
    found = score(job.base, load(job.expert), job.pairs, progress=False, gap_floor=0.0, batch_size=2)
    assert_same(found, score_job(job))


def test_a_model_without_a_folder_needs_a_tokenizer(tmp_path):
    base = tiny.random_model("llama", seed=1)
    expert = tiny.fine_tuned(base, seed=2).to(DEVICE)
    base.to(DEVICE)
    with pytest.raises(BadInput, match=r"base: no tokenizer .* give one with tokenizer="):
        score(base, expert, ["w1 w2"], progress=False)
    folders = tiny.save_pair(tmp_path, "llama")
    found = score(base, expert, ["w1 w2", "w3"], tokenizer=tiny.tokenizer(), progress=False, gap_floor=0.0)
    again = score(*map(str, folders), ["w1 w2", "w3"], device=DEVICE, progress=False, gap_floor=0.0)
    assert torch.equal(found.neurons, again.neurons)
    assert found.meta.base.name == "LlamaForCausalLM in memory"
    assert found.meta.expert.tensors == again.meta.expert.tensors


def test_what_is_no_whole_model_is_refused(tmp_path):
    base = tiny.random_model("llama", seed=1)
    with pytest.raises(BadInput, match=r"expert: found 'Linear', expected a model folder"):
        score(base, torch.nn.Linear(2, 2), ["w1"], tokenizer=tiny.tokenizer(), progress=False)
    with torch.device("meta"):
        empty = type(base)(base.config)
    with pytest.raises(BadInput, match="base: its weights are on meta, expected one device"):
        score(empty, base, ["w1"], tokenizer=tiny.tokenizer(), progress=False)
    with pytest.raises(BadInput, match="the weights equal those of the base"):
        score(base, copy.deepcopy(base), ["w1"], tokenizer=tiny.tokenizer(), progress=False)
    other = tiny.fine_tuned(base, seed=3)
    with torch.no_grad():
        other.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"lm_head\.weight holds a NaN"):
        score(base, other, ["w1 w2"], tokenizer=tiny.tokenizer(), progress=False)
    with pytest.raises(BadInput, match="offload: a model in memory is not streamed"):
        score(base, tiny.fine_tuned(base, 2), ["w1"], tokenizer=tiny.tokenizer(), offload="stream", progress=False)
    with pytest.raises(BadInput, match="unknown field 'methods'"):
        score(base, other, ["w1"], tokenizer=tiny.tokenizer(), methods="attr", progress=False)
