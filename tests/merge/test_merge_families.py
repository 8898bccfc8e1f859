"""Merges of the families beyond the first five, through mergekit, against METHOD.md 4 written naively."""

from __future__ import annotations

import pytest
import tiny
import transformers
from merge_checks import assert_merged, written_config
from merge_world import World, merge, reference, tensors_of, write_random_scores

from mergekit_wp.errors import BadInput


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_every_family(kind, tmp_path):
    """With added token rows; what comes out loads whole."""
    world = World(tmp_path, kind, extra_rows=[0, 1]).build()
    out = merge(world)
    assert_merged(tensors_of(out), reference(world))
    assert written_config(out)["vocab_size"] == tiny.SHAPE["vocab_size"]
    assert_loads(transformers.AutoModelForCausalLM, out)


@pytest.mark.parametrize("kind", ["gemma3-wrapper", "mistral3-wrapper"])
def test_wrappers(kind, tmp_path):
    """The text tower by component; the vision tower and what connects the two by the plain average."""
    world = World(tmp_path, kind).build()
    out = merge(world)
    want = reference(world)
    assert any(name.startswith("vision_tower.") for name in want)
    assert_merged(tensors_of(out), want)
    assert_loads(transformers.AutoModelForImageTextToText, out)


@pytest.mark.parametrize(
    ("start", "instead"),
    [("language_model.model.", "model.language_model."), ("vision_tower.vision_model.", "vision_tower.")],
    ids=["text", "vision"],
)
def test_a_wrapper_in_names_that_mergekit_does_not_know(start, instead, tmp_path):
    """transformers 5 reads these, and writes the second for a model made from a config."""
    world = World(tmp_path, "gemma3-wrapper", experts=1).build()
    tiny.rename(world.expert(0), start, instead)
    write_random_scores(world.score(0), str(world.base), str(world.expert(0)), seed=0)
    with pytest.raises(BadInput, match="calls its tensors otherwise") as caught:
        merge(world)
    assert f"({instead}" in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_wrapper_without_a_definition_in_mergekit(tmp_path):
    world = World(tmp_path, "llava-wrapper", experts=1).build()
    with pytest.raises(BadInput, match=r"mergekit 0\.1\.5 has no definition of LlavaForConditionalGeneration"):
        merge(world)


def test_widen_and_a_convolution(tmp_path):
    world = World(tmp_path, "mistral3-wrapper", experts=1).build()
    with pytest.raises(BadInput, match=r"vision_tower\.patch_conv\.weight has 4 axes"):
        merge(world, world.widen())


def assert_loads(auto, out):
    _, info = auto.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
