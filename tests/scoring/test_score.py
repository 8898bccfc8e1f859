"""Scores against slow references written straight from the definitions.

The references run one prompt at a time on plain models: no hooks of ours, no batching, no padding, and slices
indexed by hand.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from score_jobs import LAYER, Reference, assert_close, job_for
from where import DEVICE

from mergekit_wp.choices import METHODS
from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.pairs import load_pairs, split_pairs
from mergekit_wp.scoring.score import anchor_layer, score

NARROW = {"intermediate_size": 7}  # each neuron is replaced in turn, for every prompt


@pytest.mark.parametrize(("method", "object"), [*((method, None) for method in METHODS), ("atp", "activation")])
@pytest.mark.parametrize("kind", tiny.VARIANTS)
def test_against_the_definition(tmp_path, kind, method, object):
    """Staged covers both utilities and the cut between them; ragged batches of 2 of 3 prompts; of two tasks once."""
    tasks = ("first", "second") if kind == "llama" else ("first",)
    options = {"method": method, "utility": "staged", "split": "shared", "object": object}
    job = job_for(tmp_path, kind, **options, tasks=tasks, shape=NARROW)
    reference = Reference(job)
    heads, neurons = reference.scores(getattr(reference, method))  # every head and every neuron
    got = score(job)
    assert_close(got.heads, heads)
    assert_close(got.neurons, neurons)


@pytest.mark.parametrize(
    "options",
    [
        {"utility": "anchor"},
        {"utility": "kl"},
        {"utility": "kl", "gap": "mean"},
        {"utility": "projection", "layer": None, "contrast": False, "gap_floor": 1e-2},
        {"utility": "projection", "layer": None, "method": "exact", "contrast": False, "gap_floor": 1e-2},
        {"utility": "anchor", "method": "exact", "gap": "mean", "contrast": False, "extra_rows": 1},
        {"utility": "kl", "method": "ap"},
        {"utility": "kl", "method": "ap", "object": "activation"},
        {"utility": "staged-projection", "contrast": False, "gap_floor": 1e-2},
        {"utility": "staged-projection", "method": "exact", "gap": "mean", "gap_floor": 1e-3},
        {"utility": "anchor", "gap": "mean", "contrast": False},
        {"utility": "staged", "contrast": False, "split": "half", "extra_rows": 1, "gap_floor": 3e-3},
    ],
    ids=str,
)
def test_options_against_the_definition(tmp_path, options):
    job = job_for(tmp_path, "llama", **{"split": "shared", "method": "writeback", "shape": NARROW, **options})
    reference = Reference(job)
    heads, neurons = reference.scores(getattr(reference, job.method))
    got = score(job)
    assert_close(got.heads, heads)
    assert_close(got.neurons, neurons)


def test_direction_is_the_reference_mean(tmp_path):
    job = job_for(tmp_path, "qwen3", split="half", utility="anchor")
    reference = Reference(job)
    got = score(job)
    for task in split_pairs(load_pairs(job.pairs, None, 0), "half", 0):
        torch.testing.assert_close(got.tasks[task.task].anchor, reference.direction(task)[LAYER], rtol=1e-4, atol=1e-5)


def test_the_object_of_ap_is_in_the_file_and_belongs_to_ap_and_atp_alone(tmp_path):
    job = job_for(tmp_path, "llama", method="atp")
    given = {each: score(replace(job, object=each)) for each in (None, "write", "activation")}
    assert [scores.meta.object for scores in given.values()] == ["write", "write", "activation"]
    assert torch.equal(given[None].heads, given["write"].heads)
    assert not torch.allclose(given["write"].heads, given["activation"].heads, rtol=1e-2)
    assert score(replace(job, method="attr")).meta.object is None
    with pytest.raises(BadInput, match="object: writeback patches weights"):
        replace(job, method="writeback", object="write")
    with pytest.raises(BadInput, match="expected one of write, activation"):
        replace(job, object="weights")


@pytest.mark.parametrize("method", ["exact", "ap"])
def test_patching_computes_no_gradient(tmp_path, monkeypatch, method):
    monkeypatch.setattr(torch.autograd, "grad", lambda *_a, **_k: pytest.fail("a gradient was computed"))
    assert score(job_for(tmp_path, "llama", method=method, utility="staged", layers="2-3")).heads.any()


@pytest.mark.parametrize("layer", [1, 2])
def test_a_direction_that_vanishes_is_refused_where_it_is_read(tmp_path, layer):
    """An expert that differs from layer 2 up: between the models, the direction after layer 1 is zero, after 2 not."""
    base, expert = tiny.random_model("llama", seed=1), tiny.random_model("llama", seed=1)
    for moved in expert.model.layers[2:]:
        moved.mlp.down_proj.weight.data *= 1.5
    job = job_for(tmp_path, "llama", utility="staged-projection", contrast=False, layer=layer, gap_floor=1e-6)
    tiny.save(base, Path(job.base))
    tiny.save(expert, Path(job.expert))
    if layer == 2:
        assert score(job).neurons[2:].all(1).all()
        return
    with pytest.raises(BadInput, match=r"same residual at layer 1, .* --utility kl"):
        score(job)


def test_a_base_nearer_to_the_experts_direction_than_the_expert_is_doubted(tmp_path, caplog):
    """The prompts are counted by the reference; of a pair one way round and the other, one is in doubt at least."""
    found = []
    job = job_for(tmp_path, "llama", utility="anchor", split="shared", gap_floor=0.0)
    for each in (job, replace(job, base=job.expert, expert=job.base)):
        caplog.clear()
        score(each)
        reference = Reference(each)
        for task in split_pairs(load_pairs(each.pairs, None, 0), "shared", 0):
            direction = reference.direction(task)
            negative = sum(reference.gap("anchor", pair.prompt, direction) < 0 for pair in task.scoring)
            doubted = f"task {task.task}: on {negative} of 3 prompts the base lies nearer" in caplog.text
            assert doubted == (negative > 1)
            found.append(doubted)
    assert any(found)
    assert not all(found)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_is_a_sentence(tmp_path, monkeypatch, error):
    from mergekit_wp.scoring import score as engine

    def full(*_args):
        raise error

    monkeypatch.setattr(engine, "sweep_down", full)
    with pytest.raises(BadInput, match=f"batch_size: 2 prompts do not fit on {DEVICE}.*; lower it"):
        score(job_for(tmp_path, "llama"))
    monkeypatch.setattr(engine, "sweep_down", lambda *_args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(job_for(tmp_path, "llama"))


def test_batch_size_does_not_matter(tmp_path):
    one, many = (score(job_for(tmp_path / str(size), "gemma2", batch_size=size)) for size in (1, 8))
    torch.testing.assert_close(one.heads, many.heads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.neurons, many.neurons, rtol=1e-4, atol=1e-6)


def test_anchor_runs_nothing_above_its_layer(tmp_path, monkeypatch):
    """A layer above the anchor that would raise is never called, in either model."""
    from mergekit_wp.scoring import score as engine

    job = job_for(tmp_path, "llama", utility="anchor")
    load = engine.load_pair

    def booby_trapped(*args):
        pair = load(*args)
        for stack in (pair.base, pair.expert):
            for layer in list(stack.model.model.layers)[LAYER + 1 :]:
                monkeypatch.setattr(layer, "forward", lambda *a, **k: pytest.fail("a layer above the anchor ran"))
        return pair

    monkeypatch.setattr(engine, "load_pair", booby_trapped)
    scores = score(job)
    assert not scores.heads[LAYER + 1 :].any()
    assert scores.heads[: LAYER + 1].all()


def test_no_weight_gradients_and_weights_untouched(tmp_path, monkeypatch):
    from mergekit_wp.scoring import score as engine

    job = job_for(tmp_path, "qwen2")
    pair = engine.load_pair(job, engine.check_pair(job))
    model = pair.base.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(engine, "load_pair", lambda *_args: pair)
    score(job)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {type(layer).__name__ for layer in model.model.layers} == {"Qwen2DecoderLayer"}


def test_bfloat16_agrees_in_ranking(tmp_path):
    """Rounding the run to bfloat16 perturbs scores, but not which components lead."""
    exact = score(job_for(tmp_path / "a", "llama"))
    rounded = score(job_for(tmp_path / "b", "llama", dtype="bfloat16"))
    correlation = torch.corrcoef(torch.stack([exact.neurons.flatten(), rounded.neurons.flatten()]))[0, 1]
    assert correlation > 0.9


@pytest.mark.parametrize(("layers", "wanted"), [(1, 0), (2, 1), (6, 4), (28, 19), (32, 21), (40, 27)])
def test_default_anchor_layer(layers, wanted):
    assert anchor_layer(None, layers) == wanted


@pytest.mark.parametrize("asked", [-1, 4, 99])
def test_anchor_layer_out_of_range(asked):
    with pytest.raises(BadInput, match="layers 0 to 3"):
        anchor_layer(asked, 4)
