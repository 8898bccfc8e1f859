"""Scores at a merge that is never written, against scores with mergekit's folder of that merge as the base."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import merge_world
import pytest
import tiny
import torch
import yaml
from lora_files import write
from merge_world import World
from score_jobs import Reference, assert_close, write_pairs
from tokenizers import models
from transformers import AutoModelForCausalLM
from where import DEVICE

from mergekit_wp.api import score as in_memory
from mergekit_wp.checkpoint.adapters import merge_lora
from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.errors import BadInput
from mergekit_wp.scores import ModelId, read_scores, write_scores
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.models.load import check_pair, load_pair
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.score import score

BASE = {"source": "base"}


def listed(world, weights, base=None, **more):
    """A recipe that names models with their weights; `base`: the base's, where that is listed."""
    models = [{"model": str(world.expert(k)), "parameters": {"weight": w}} for k, w in weights.items()]
    if base is not None:
        models.insert(0, {"model": str(world.base), "parameters": {"weight": base}})
    return {"models": models, **more}


def of_two(world, **more):
    """By the score files of the first two experts."""
    config = world.config([{"weight": 0.5, "scale": 1.5}, {"scale": 0.7}, {}], **more)
    return config | {"models": config["models"][:2]}


def fitted(world):
    world.write_fit([2, 0, 1])
    return world.fitted(scale=0.8)


# The first expert has two rows more than the base, which wp cuts and mergekit's own methods cut by tokens. Expert 2 is
# scored: it is in some of these merges, and in others not.
RECIPES = {
    "task": lambda w: listed(w, {1: 0.4, 2: -0.3}, merge_method="task_arithmetic", base_model=str(w.base)),
    "normalized task": lambda w: listed(
        w, {0: 0.4, 1: 0.8}, merge_method="task_arithmetic", base_model=str(w.base), tokenizer=BASE,
        parameters={"normalize": True, "lambda": 1.2},
    ),
    "mean": lambda w: listed(
        w, {0: 1, 2: 1}, 0, merge_method="linear", base_model=str(w.base), tokenizer_source="base"
    ),
    "linear with the base": lambda w: listed(
        w, {1: 0.3, 2: 0.5}, 0.2, merge_method="linear", parameters={"normalize": False}
    ),
    "linear without base_model": lambda w: listed(w, {1: 2, 2: 1}, merge_method="linear"),
    "scores": of_two,
    "fit": fitted,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("at"), "llama", 3, extra_rows=[2, 0, 0]).build()


def job_of(world, **fields):
    pairs = write_pairs(world.root / "pairs.jsonl", contrast=False)
    given = {"base": str(world.base), "expert": str(world.expert(2)), "pairs": pairs, "method": "attr", "batch_size": 2}
    return ScoringJob(**{**given, "device": DEVICE, "gap_floor": 0, **fields})


def both_ways(world, config, **fields):
    """(the job at the recipe, the job with its merge written and given as the base); written once."""
    text = yaml.safe_dump(config)
    recipe, out = world.root / "recipe.yaml", f"written-{zlib.crc32(text.encode())}"
    recipe.write_text(text)
    written = world.root / out
    if not written.exists():
        merge_world.merge(world, {**config, "out_dtype": "float32"}, out)
    return job_of(world, at=str(recipe), **fields), job_of(world, base=str(written), **fields)


def assert_same(got, wanted, close=2e-5):
    for name, tensor in wanted.tensors().items():
        assert (got.tensors()[name] - tensor).abs().max() <= close * tensor.abs().max(), name
    for task, about in wanted.meta.tasks.items():
        stats, other = about.utilities["kl"], got.meta.tasks[task].utilities["kl"]
        assert (stats.used, stats.dropped) == (other.used, other.dropped)
        assert other.mean_gap == pytest.approx(stats.mean_gap, rel=1e-5)


class TestIsTheWrittenMerge:
    @pytest.mark.parametrize("name", RECIPES)
    def test_by_every_kind_of_recipe(self, world, name):
        at, written = both_ways(world, RECIPES[name](world))
        wanted, got = score(written), score(at)
        assert_same(got, wanted)
        if name in ("mean", "fit"):  # of several kinds; how layers come does not depend on whose weights they are
            assert_same(score(replace(at, offload="stream")), wanted)
        plain = score(replace(at, at=None))
        assert (plain.neurons - got.neurons).abs().max() > 0.01 * got.neurons.abs().max()

    @pytest.mark.parametrize(
        ("method", "offload"),
        [("writeback", "none"), ("exact", "none"), ("exact", "stream"), ("atp", "none"), ("ap", "stream")],
    )
    def test_by_every_method(self, world, method, offload):
        at, written = both_ways(world, of_two(world), method=method, samples=2, offload=offload)
        assert_same(score(at), score(written), 1e-4)

    def test_over_whole_answers(self, world):
        at, written = both_ways(world, RECIPES["scores"](world), answer_tokens=3, parts=True)
        assert_same(score(at), score(written))

    def test_with_a_tied_head(self, tmp_path):
        small = World(tmp_path, "qwen2", 3, extra_rows=[2, 0, 0]).build()
        for offload in ("none", "stream"):
            at, written = both_ways(small, of_two(small), offload=offload)
            assert_same(score(at), score(written))

    def test_its_weights_are_not_rounded_again(self, tmp_path):
        """Products run in bfloat16, and what is merged of bfloat16 keeps its float32."""
        small = World(tmp_path, "llama", 2, dtypes=[torch.bfloat16] * 3).build()
        config = listed(small, {0: 0.37, 1: 0.41}, merge_method="task_arithmetic", base_model=str(small.base))
        at, written = both_ways(small, {**config, "dtype": "float32"}, dtype="bfloat16", expert=str(small.expert(0)))
        stack = load_pair(at, check_pair(at)).base
        tensors = merge_world.tensors_of(Path(written.base))
        for index, layer in enumerate(stack.layers(range(stack.depth))):
            for name, parameter in layer.named_parameters():
                assert not parameter.requires_grad
                wanted = tensors[f"model.layers.{index}.{name}"]
                torch.testing.assert_close(parameter.data.cpu(), wanted, rtol=1e-6, atol=1e-6)


def test_is_the_sum_over_a_component_of_its_change_times_the_gradient(world):
    """Autograd on the weights of the merge that mergekit wrote, component by component."""
    at, written = both_ways(world, of_two(world))
    reference = Reference(replace(written, layer=2))  # which kl has no use for
    got, wanted = score(at), reference.scores(reference.attr)
    for table, by_hand in zip((got.heads, got.neurons), wanted, strict=True):
        assert_close(table, by_hand)


def test_a_merge_that_takes_nothing_is_the_base(world):
    recipe = world.recipe(
        listed(world, {1: 0.0}, merge_method="task_arithmetic", base_model=str(world.base)), "nothing.yaml"
    )
    for offload in ("none", "stream"):
        plain = job_of(world, offload=offload)
        assert_same(score(replace(plain, at=str(recipe))), score(plain))


def test_models_in_memory(world):
    """By the API, on modules, is what the command writes of their folders."""
    at = job_of(world, at=str(world.recipe(RECIPES["task"](world))))
    live = [AutoModelForCausalLM.from_pretrained(name).to(DEVICE) for name in (at.base, at.expert)]
    fields = {"at": at.at, "method": "attr", "batch_size": 2, "gap_floor": 0, "device": DEVICE}
    got, wanted = in_memory(*live, at.pairs, progress=False, **fields), score(at)
    assert_same(got, wanted)
    assert got.meta.at == wanted.meta.at


def test_a_lora_is_merged_as_it_is_scored(tmp_path):
    """The same as with the folder of base and LoRA merged by peft; the LoRA itself is scored, too."""
    base = tiny.save(tiny.random_model("llama", seed=1), tmp_path / "base")
    lora = write(tmp_path / "lora", base)
    merged = merge_lora(read_reference(f"{base}+{lora}"), tmp_path / "merged", remote_code=False)
    other = tiny.save(tiny.fine_tuned(tiny.random_model("llama", seed=1), seed=4), tmp_path / "other")
    pairs = write_pairs(tmp_path / "pairs.jsonl", contrast=False)
    job = ScoringJob(str(base), f"{base}+{lora}", pairs, method="attr", device=DEVICE, gap_floor=0)
    found = []
    for name in (f"{base}+{lora}", str(merged)):
        models = [{"model": name, "parameters": {"weight": 0.6}}, {"model": str(other), "parameters": {"weight": 0.3}}]
        recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        at = replace(job, at=str(tmp_path / "recipe.yaml"))
        found += [score(at), score(replace(at, offload="stream"))]
    for got in found[1:]:
        assert_same(got, found[0])


def test_the_file_says_where_it_was_measured(world, tmp_path):
    """The base stays the base, for a merge by these scores; the merge is kept with its recipe."""
    at, _written = both_ways(world, RECIPES["task"](world))
    write_scores(score(at), tmp_path / "s.safetensors")
    meta = read_scores(tmp_path / "s.safetensors").meta
    assert meta.base == ModelId.of(at.base, check_pair(at).base_print)
    assert meta.at.recipe == RECIPES["task"](world)
    assert [expert.name for expert in meta.at.experts] == [str(world.expert(1)), str(world.expert(2))]
    other = world.recipe(listed(world, {1: 0.4, 2: -0.2}, merge_method="task_arithmetic", base_model=str(world.base)))
    assert check_pair(replace(at, at=str(other))).merge.weights.digest != meta.at.weights
    plain = score(replace(at, at=None))
    assert plain.meta.at is None
    assert '"at"' not in plain.meta.to_json()


def test_finished_layers_are_those_of_one_merge(world, tmp_path):
    """A run of exact goes on at the same merge, by whatever name and words, and at no other."""
    config = RECIPES["task"](world)
    one = world.recipe(config, "one.yaml")
    same = world.recipe({**config, "parameters": {"normalize": False}}, "same.yaml")
    config["models"][0]["parameters"]["weight"] = 0.5
    other = world.recipe(config, "other.yaml")
    job = job_of(world, method="exact", layers="3", samples=1)

    def found(at):
        resume = Resume(tmp_path / "out.safetensors")
        score(replace(job, at=at and str(at)), resume=resume)
        return resume.found

    assert [found(at) for at in (one, other, None)] == [0, 0, 0]
    assert [found(at) for at in (same, other, None)] == [2, 2, 2]


class TestIsRefused:
    def refusal(self, world, config, **fields):
        recipe = world.recipe(config, "refused.yaml")
        with pytest.raises(BadInput) as refused:
            check_pair(job_of(world, at=str(recipe), **fields))
        assert refused.value.message.startswith("at: ")
        return refused.value.message

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (lambda w: w.widen(), "merge_method widen is no sum of the experts' changes"),
            (lambda w: listed(w, {1: 1}, merge_method="ties", base_model=str(w.base)), "merge_method ties is no sum"),
            (lambda w: listed(w, {1: [0.1, 0.9]}, merge_method="task_arithmetic", base_model=str(w.base)),
             "a list over the layers"),
            (lambda w: listed(w, {1: [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]},
                              merge_method="task_arithmetic", base_model=str(w.base)), "or a filter"),
            (lambda w: w.config([{}, {"scale": [1, 2]}, {}]), "a list over the layers"),
            (lambda w: {"merge_method": "linear", "slices": [{"sources": [
                {"model": str(w.expert(1)), "layer_range": [0, 4], "parameters": {"weight": 1}}]}]}, "it has `slices`"),
            (lambda w: listed(w, {1: 1, 2: 1}, merge_method="linear", parameters={"normalize": False}), "sum to 2"),
            (lambda w: listed(w, {0: 1, 1: 1}, 0, merge_method="linear", base_model=str(w.base), tokenizer={
                "source": "union"}), "a vocabulary other than the base's"),
        ],
    )  # fmt: skip
    def test_what_has_no_weights(self, world, config, words):
        said = self.refusal(world, config(world))
        assert words in said
        assert said.endswith("write the merge (mergekit-yaml), and give its folder as the base.")

    def test_weights_that_sum_to_nothing(self, world):
        assert "sum to 0" in self.refusal(world, listed(world, {1: 1, 2: -1}, merge_method="linear"))

    def test_a_merge_into_another_base(self, world):
        config = listed(world, {1: 1}, merge_method="task_arithmetic", base_model=str(world.expert(2)))
        assert f"merges into {world.expert(2)}, which is another model than the base" in self.refusal(world, config)

    def test_a_missing_expert_and_a_missing_recipe(self, world):
        config = listed(world, {1: 1, 9: 1}, merge_method="task_arithmetic", base_model=str(world.base))
        assert "e9" in self.refusal(world, config)
        with pytest.raises(BadInput, match=r"none\.yaml"):
            check_pair(job_of(world, at=str(world.root / "none.yaml")))

    def test_scores_of_another_expert(self, world):
        config = world.config([{"scores": str(world.score(1))}, {}, {}])
        assert "these scores were made for the expert" in self.refusal(world, config)

    def test_the_expert_itself(self, world):
        for config in (
            listed(world, {2: 3}, merge_method="linear"),
            listed(world, {1: 0, 2: 1}, merge_method="task_arithmetic", base_model=str(world.base)),
        ):
            assert "this merge is the expert" in self.refusal(world, config)
        recipe = world.recipe(listed(world, {2: 3}, merge_method="linear"), "refused.yaml")
        check_pair(job_of(world, at=str(recipe), expert=str(world.expert(1))))  # of another it is a place like any

    def test_an_expert_of_another_shape(self, world, tmp_path):
        tiny.save(tiny.random_model("llama", intermediate_size=12), tmp_path / "narrow")
        config = {
            "merge_method": "linear",
            "parameters": {"weight": 1},
            "models": [{"model": str(tmp_path / "narrow")}],
        }
        assert "is not of the shape of the base" in self.refusal(world, config)

    def test_tokens_that_lie_elsewhere(self, tmp_path):
        """Their rows would be moved before they are merged."""
        small = World(tmp_path, "llama", 2).build()
        tokenizer = tiny.tokenizer()
        words = tokenizer.get_vocab()
        words["w1"], words["w2"] = words["w2"], words["w1"]

        tokenizer._tokenizer.model = models.WordLevel(words, unk_token="<unk>")
        tokenizer.save_pretrained(small.expert(0))
        config = listed(small, {0: 1, 1: 1}, 0, merge_method="linear", base_model=str(small.base), tokenizer=BASE)
        said = self.refusal(small, config, expert=str(small.expert(1)))
        assert "moves rows of" in said

    @pytest.mark.parametrize("utility", ["anchor", "projection", "staged"])
    def test_a_utility_that_reads_along_a_direction(self, world, utility):
        with pytest.raises(BadInput, match=f"at: the {utility} utility reads along a direction"):
            job_of(world, at="recipe.yaml", utility=utility)
