"""The merge as a model against the same merge made by hand, tensor by tensor."""

from __future__ import annotations

import fit_example
import merge_world
import pytest
import tiny
import torch
from fit_world import geometry_of, merged_by_hand, random_weights, save_experts
from streamed_world import PROMPTS, resident, streamed

from mergekit_wp.fit_file import Fit
from mergekit_wp.merge.merging import merge
from mergekit_wp.scoring.batching import batches
from mergekit_wp.scoring.models.merged import MergedStack
from mergekit_wp.scoring.models.streaming import StreamedStack
from mergekit_wp.scoring.sweep import forward_sweep


def logits_of(stack):
    """Of the last token of every prompt, in batches of two."""
    found = []
    for part in batches(PROMPTS, 2, stack):
        *_, (_top, (stream_BTD,)) = forward_sweep(stack, [stack.start(part)], stack.depth)
        found.append(stack.logits(part.at_anchor(stream_BTD), 97))
    return torch.cat(found)


@torch.no_grad()
def logits_by_hand(model):
    ordered = [prompt for _ids, prompt in sorted((len(p), p) for p in PROMPTS)]
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1, :97] for prompt in ordered])


@pytest.mark.parametrize("kind", [*tiny.VARIANTS, *tiny.FAMILIES, "gemma3-wrapper"])
def test_is_the_merge_made_by_hand(tmp_path, kind):
    folders = save_experts(tmp_path, kind)
    geometry = geometry_of(folders[0])
    weights = random_weights(geometry, 2)
    base, *experts = (resident(folder) for folder in folders)
    by_hand = merged_by_hand(*(lambda b, *e: (b, e))(*(resident(f).model for f in folders)), weights, geometry)
    got = logits_of(MergedStack(base, experts, geometry, weights))
    torch.testing.assert_close(got, logits_by_hand(by_hand), rtol=1e-4, atol=1e-4)
    other = logits_of(MergedStack(base, experts, geometry, random_weights(geometry, 2, seed=1)))
    assert (other - got).abs().max() > 0.01


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama-biased", "gemma2", "phi3"])
def test_streamed_is_resident_and_leaves_nothing_behind(tmp_path, kind, stored):
    """Gemma multiplies its embeddings by a number that bfloat16 would round."""
    folders = save_experts(tmp_path, kind, extra_rows=3, dtype=stored)
    geometry = geometry_of(folders[0])
    weights = random_weights(geometry, 2)
    wanted = logits_of(MergedStack(*(lambda b, *e: (b, e))(*map(resident, folders)), geometry, weights))
    base, *experts = map(streamed, folders)
    merged = MergedStack(base, experts, geometry, weights)
    torch.testing.assert_close(logits_of(merged), wanted, rtol=1e-5, atol=1e-5)
    merged.forget_head()
    assert all(stack.model.lm_head.weight.is_meta for stack in (base, *experts))
    torch.testing.assert_close(logits_of(merged), wanted, rtol=1e-5, atol=1e-5)  # with the same weights, read again
    for stack in (merged, base, *experts):
        assert all(parameter.is_meta for layer in stack.tower.layers for parameter in layer.parameters())


def test_what_a_streamed_merge_is_made_of_lies_there_as_it_is_stored(tmp_path):
    """In bfloat16, half of what the merge itself takes, for products in float32."""
    folders = save_experts(tmp_path, "llama", dtype=torch.bfloat16)
    base, *experts = map(streamed, folders)
    merged = MergedStack(base, experts, geometry_of(folders[0]), random_weights(geometry_of(folders[0]), 2))
    for index, layer in zip((2, 1), merged.layers((2, 1)), strict=True):
        below, beside = merged.sources(index)
        assert {p.dtype for each in (below, *beside) for p in each.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
        for own in experts[0].layers([index]):  # which one that runs the expert then widens for both
            assert {p.dtype for p in own.parameters()} == {torch.float32}
            assert torch.equal(own.mlp.up_proj.weight, resident(folders[1]).tower.layers[index].mlp.up_proj.weight)
        assert torch.equal(beside[0].mlp.up_proj.weight, resident(folders[1]).tower.layers[index].mlp.up_proj.weight)
    assert all(parameter.is_meta for layer in experts[0].tower.layers for parameter in layer.parameters())


def test_is_the_merge_that_a_fit_file_makes(tmp_path):
    """With the same weights, the model that wp-fit reads is the one that merge_method wp writes, to the bit."""
    folders = save_experts(tmp_path, "qwen2", extra_rows=2)
    geometry = geometry_of(folders[0])
    weights = random_weights(geometry, 2)
    names = [str(folder) for folder in folders]
    about = fit_example.meta(merge_world.identity(names[0]), list(map(merge_world.identity, names[1:])), geometry)
    fit = Fit(about, weights.heads_KLH, weights.neurons_KLF, weights.rest_K)
    base, *experts = map(resident, folders)
    written = merge(base.model, [expert.model for expert in experts], fit=fit)
    merged = MergedStack(base, experts, geometry, weights)
    list(merged.layers(range(merged.depth)))
    merged.read_head()
    own = merged.model.state_dict()
    for name, tensor in written.items():
        if "embed_tokens" not in name:  # what enters layer 0 is merged instead
            assert torch.equal(own[name], tensor), name


def test_other_weights_make_another_merge(tmp_path):
    folders = save_experts(tmp_path, "llama")
    geometry = geometry_of(folders[0])
    base, *experts = map(resident, folders)
    one, other = random_weights(geometry, 2), random_weights(geometry, 2, seed=1)
    merged = MergedStack(base, experts, geometry, one)
    first = logits_of(merged)
    merged.set(other)
    second = logits_of(merged)
    merged.set(one)
    assert torch.equal(logits_of(merged), first)
    assert torch.equal(second, logits_of(MergedStack(base, experts, geometry, other)))
    before = logits_of(base)
    merged.set(one.scaled(0.0))
    torch.testing.assert_close(logits_of(merged), before)


def test_a_cpu_reads_the_layers_of_a_merge_when_their_turn_comes(tmp_path, monkeypatch):
    """Of one model the next layer is read ahead; of all models of a merge that would be most of the memory."""
    begun = []
    begin = StreamedStack._begin_reading

    def counted(self, upcoming, dtype):
        found = begin(self, upcoming, dtype)
        if found is not None:
            begun.append(found.index)
        return found

    monkeypatch.setattr(StreamedStack, "_begin_reading", counted)
    folders = save_experts(tmp_path, "llama")
    geometry, (base, *experts) = geometry_of(folders[0]), map(streamed, folders)
    merged = MergedStack(base, experts, geometry, random_weights(geometry, 2))
    for order in (range(base.depth), range(base.depth)[::-1]):
        begun.clear()
        for turn, _layer in enumerate(merged.layers(order), 1):
            assert begun == [index for index in order[:turn] for _ in folders]
        begun.clear()
        for turn, _layer in enumerate(base.layers(order), 1):
            assert begun == list(order[: turn + 1])
