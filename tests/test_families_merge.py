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
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
