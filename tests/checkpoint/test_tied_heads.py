"""Output head and embeddings as one tensor, stored once or twice, whatever the config says of them."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
import torch
import transformers
from merge_checks import assert_merged, edit_config, refused, rewrite
from merge_world import World, merge, tensors_of
from streamed_world import assert_same, resident, streamed

from mergekit_wp.calibrate import mean_inputs
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.vocabulary import head_against_config, head_equals_embeddings, head_is_tied, says_tied
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.backends import Backend
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.preflight import _check_head
from mergekit_wp.merge.audit import AuditFailed, audit
from mergekit_wp.scoring.batching import batches
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.models.load import check_pair

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED = ("embeddings", "head", "equal", "apart")
ALLOWED = {"parameters": {"allow_mismatch": True}}


def store(folder, what):
    """Store both ends of a tied model as `what` of STORED says."""

    def change(tensors):
        head = tensors.pop(HEAD, None)
        end = tensors.pop(EMBEDDINGS, head)
        own = end + torch.randn(end.shape, generator=torch.Generator().manual_seed(0))
        head = {"equal": end.clone(), "apart": own, "head": end}.get(what)
        both = ({} if what == "head" else {EMBEDDINGS: end}) | ({} if head is None else {HEAD: head})
        return tensors | both

    rewrite(folder, change)


def drop_field(folder, name):
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))


@pytest.mark.parametrize(("kind", "says"), [("llama", True), ("llama", False), ("llama", None), ("gemma2", None)])
def test_as_transformers_loads_it(tmp_path, kind, says):
    """What transformers makes of every combination is what is told here, and what is streamed."""
    model = tiny.random_model(kind, tie_word_embeddings=True, num_hidden_layers=1)
    folder = tiny.save(model, tmp_path / "m")
    for what in STORED:
        store(folder, what)
        edit_config(folder, tie_word_embeddings=says)
        if says is None:
            drop_field(folder, "tie_word_embeddings")
        checkpoint = Checkpoint.open(str(folder))
        model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        if report["missing_keys"]:  # filled with random numbers
            assert (kind, says) != ("gemma2", None)
            for refuses in (head_equals_embeddings, lambda it: streamed(it.folder)):
                with pytest.raises(BadInput, match=r"stores .* without .*tie_word_embeddings: true"):
                    refuses(checkpoint)
            continue
        assert head_equals_embeddings(checkpoint) == torch.equal(embeddings, head)
        assert head_is_tied(checkpoint) == (embeddings is head)
        assert bool(head_against_config(checkpoint)) == (model.config.tie_word_embeddings and embeddings is not head)
        stack = streamed(folder)
        assert_same(stack, resident(folder))
        assert (stack._source[HEAD] == stack._source[EMBEDDINGS]) == (embeddings is head)


def test_equal_in_two_dtypes(tmp_path):
    folder = tiny.save(tiny.random_model("qwen2"), tmp_path / "m", torch.bfloat16)
    rewrite(folder, lambda tensors: tensors | {HEAD: tensors[EMBEDDINGS].float()})
    assert head_is_tied(Checkpoint.open(str(folder)))
    rewrite(folder, lambda tensors: tensors | {HEAD: tensors[EMBEDDINGS].float() * (1 + 2**-20)})
    assert not head_is_tied(Checkpoint.open(str(folder)))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "w", "qwen2").build()


@pytest.mark.parametrize("method", ["wp", "widen"])
def test_a_head_that_the_base_stores_as_well_is_not_merged_on_its_own(world, method):
    """widen weighs the rows of embeddings and the columns of a head: the two would come apart."""
    config = world.config(**ALLOWED) if method == "wp" else world.widen()
    expected = tensors_of(merge(world, config, out="once"))
    store(world.base, "equal")
    store(world.expert(0), "equal")
    edit_config(world.expert(0), tie_word_embeddings=False)  # which changes nothing while the two are equal
    out = merge(world, config)
    assert_merged(tensors_of(out), expected)
    audit(out, None, say=print)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_base_that_keeps_them_apart(world):
    """The experts' heads are their embeddings; the merged head is the mean of those."""
    store(world.base, "apart")
    edit_config(world.base, tie_word_embeddings=False)
    out = tensors_of(merge(world, world.config(**ALLOWED)))
    experts = [tensors_of(world.expert(k))[EMBEDDINGS] for k in (0, 1)]
    torch.testing.assert_close(out[HEAD], torch.stack(experts).mean(0))
    torch.testing.assert_close(out[EMBEDDINGS], torch.stack(experts).mean(0))


@pytest.mark.parametrize("says", [True, False])
def test_an_experts_own_head_is_not_lost(world, says):
    store(world.expert(1), "apart")
    edit_config(world.expert(1), tie_word_embeddings=says)
    message = refused(world, world.config(**ALLOWED))
    assert "e1: has its own lm_head.weight" in message
    # The way out that the message names.
    store(world.base, "equal")
    edit_config(world.base, tie_word_embeddings=False)
    out = tensors_of(merge(world, world.config(**ALLOWED)))
    heads = [tensors_of(world.expert(0))[EMBEDDINGS], tensors_of(world.expert(1))[HEAD]]
    torch.testing.assert_close(out[HEAD], torch.stack(heads).mean(0))


@pytest.mark.parametrize("role", ["base", "e0"])
def test_a_head_that_is_nowhere(world, role):
    """Before this was looked at, the audit found out, or the wrong end was taken for the head."""
    edit_config(world.root / role, tie_word_embeddings=False)
    assert "without lm_head.weight" in refused(world, world.config(**ALLOWED))
    with pytest.raises(BadInput, match=f"{role}: stores .* without lm_head"):
        check_pair(ScoringJob(base=str(world.base), expert=str(world.expert(0)), pairs="unused"))


def test_embeddings_stored_as_the_head(world):
    store(world.expert(1), "head")
    message = refused(world, world.config(**ALLOWED))
    assert "e1: stores its embeddings under the name lm_head.weight" in message
    # The way out that the message names.
    transformers.AutoModelForCausalLM.from_pretrained(world.expert(1)).save_pretrained(world.expert(1))
    merge(world, world.config(**ALLOWED))


def test_a_base_whose_config_denies_its_own_head(world, caplog):
    """Its config would be the merged model's."""
    store(world.base, "apart")
    assert "the merge would inherit this" in refused(world, world.config(**ALLOWED))
    with caplog.at_level(logging.WARNING):
        check_pair(ScoringJob(base=str(world.base), expert=str(world.expert(0)), pairs="unused"))
    assert "set `tie_word_embeddings: false`" in caplog.text


def test_the_audit_sees_a_merge_whose_ends_came_apart(world):
    out = merge(world, world.config())
    store(out, "apart")
    with pytest.raises(AuditFailed, match="Do not use this merge"):
        audit(out, None, say=print)


@pytest.mark.parametrize("what", STORED)
def test_activations_have_a_head_where_it_is_a_tensor_of_its_own(tmp_path, what):
    folder = tiny.save(tiny.random_model("qwen2"), tmp_path / "m")
    store(folder, what)
    for stack in (resident(folder), streamed(folder)):
        means = mean_inputs(stack, list(batches([[3, 4, 5]], 1, stack)), lambda _done: None)
        assert (HEAD in means) == (what == "apart")


def test_evaluation_uses_the_head_that_is_stored(tmp_path):
    """transformers would make up a missing head, and vLLM leave out one that the config denies."""
    folder = tiny.save(tiny.random_model("qwen2"), tmp_path / "m")
    model = EvalModel("m", str(folder), folder, "")
    store(folder, "apart")
    _check_head(model, Backend("hf"))
    with pytest.raises(BadInput, match="which transformers uses and vLLM leaves out"):
        _check_head(model, Backend("vllm"))
    store(folder, "embeddings")
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(BadInput, match="without lm_head"):
        _check_head(model, Backend("hf"))


@pytest.mark.parametrize("kind", [*tiny.VARIANTS, *tiny.FAMILIES, *tiny.WRAPPERS])
@pytest.mark.parametrize("text", [None, True, False])
def test_a_config_that_leaves_the_field_out(tmp_path, kind, text):
    """Read as its class reads it: Gemma's default is tied, Llava takes its language model's word."""
    config = tiny._config(kind, {}).to_dict() | {"architectures": [type(tiny.random_model(kind)).__name__]}
    config.pop("tie_word_embeddings", None)
    if "text_config" in config:
        config["text_config"].pop("tie_word_embeddings", None)
        config["text_config"] |= {} if text is None else {"tie_word_embeddings": text}
    elif text is not None:
        config["tie_word_embeddings"] = text
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = transformers.AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    assert says_tied(Checkpoint("m", tmp_path)) is bool(wanted)
    assert text is None or "text_config" in config or wanted == text
