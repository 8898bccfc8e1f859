"""Merges of the families beyond the first five, through mergekit, against METHOD.md 4 written naively."""

from __future__ import annotations

import pytest
import tiny
import transformers
from merge_world import World, merge, reference, tensors_of
from test_merge_method import assert_merged, written_config


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


def assert_loads(auto, out):
    _, info = auto.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
