"""A set patch as a model against slices copied by hand into a model of transformers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import plain_patch
import pytest
import test_steering
import tiny
import torch
from fit_world import geometry_of
from merge_world import tensors_of
from streamed_world import PROMPTS, resident, streamed
from test_merged import logits_by_hand, logits_of
from transformers import AutoConfig

from mergekit_wp.scoring.anchor.steering import SteeredRows, Steering
from mergekit_wp.scoring.batching import batches
from mergekit_wp.scoring.greedy import Greedy, generate_answers
from mergekit_wp.scoring.models import merged
from mergekit_wp.scoring.models.exchanged import Exchange, ExchangedStack
from mergekit_wp.scoring.models.merged import MergedStack
from mergekit_wp.subset import Subset

HEADS, NEURONS = [(0, 1), (2, 3), (3, 0)], [(0, 4), (1, 0), (1, 19), (3, 7)]


def subset_of(geometry, heads, neurons) -> Subset:
    masks = [torch.zeros(geometry.layers, n, dtype=torch.bool) for n in (geometry.heads, geometry.neurons)]
    for mask, places in zip(masks, (heads, neurons), strict=True):
        for place in places:
            mask[place] = True
    return Subset(*masks)


def model_of(folder, tensors):
    config = AutoConfig.from_pretrained(folder)
    model = tiny.auto_class(config).from_config(config, attn_implementation="eager")
    model.load_state_dict(tensors, strict=not config.tie_word_embeddings)
    model.tie_weights()
    return model.eval()


def stack_of(folders, opened=resident) -> ExchangedStack:
    return ExchangedStack(*map(opened, folders), geometry_of(folders[0]))


@pytest.mark.parametrize("kind", [*tiny.ARCHITECTURES, "llama-biased", "olmo2", "phi3"])
def test_is_the_patch_made_by_hand(tmp_path, kind) -> None:
    folders = tiny.save_pair(tmp_path, kind)
    stack = stack_of(folders)
    heads, neurons = ([p for p in places if p[0] < stack.depth and p[1] < 5] for places in (HEADS, NEURONS))
    subset = subset_of(stack.geometry, heads, neurons)
    for in_expert in (False, True):
        recipient, donor = folders[::-1] if in_expert else folders
        stack.set(Exchange(subset, in_expert))
        want = logits_by_hand(model_of(recipient, plain_patch.patched(recipient, donor, heads, neurons)))
        torch.testing.assert_close(logits_of(stack), want, rtol=1e-4, atol=1e-4)
        plain = logits_by_hand(model_of(recipient, tensors_of(recipient)))
        assert (plain - want).abs().max() > 0.01


def test_nothing_and_everything_are_the_two_models(tmp_path) -> None:
    folders = tiny.save_pair(tmp_path, "llama-biased")
    stack = stack_of(folders)
    base, expert = (logits_of(resident(folder)) for folder in folders)
    nothing, everything = subset_of(stack.geometry, [], []), Subset.choose(stack.geometry)
    before = {name: tensor.clone() for name, tensor in stack.base.model.state_dict().items()}
    for exchange, want in ((Exchange(nothing), base), (Exchange(nothing, in_expert=True), expert)):
        stack.set(exchange)
        torch.testing.assert_close(logits_of(stack), want, rtol=1e-6, atol=1e-6)
    # All components of the one and the rest of the other: the same model from either side.
    stack.set(Exchange(everything))
    mixed = logits_of(stack)
    assert min(float((mixed - model).abs().max()) for model in (base, expert)) > 0.01
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.base.model.state_dict().items())


@pytest.mark.parametrize("parts", [("gate",), ("up",), ("down",), ("gate", "up"), ("q",)])
def test_some_slices_alone(tmp_path, parts) -> None:
    folders = tiny.save_pair(tmp_path, "llama-biased")
    stack = stack_of(folders)
    stack.set(Exchange(subset_of(stack.geometry, HEADS, NEURONS), parts=parts))
    own, whole = tensors_of(folders[0]), plain_patch.patched(*folders, HEADS, NEURONS)
    wanted = {name: (whole if any(f".{part}_proj." in name for part in parts) else own)[name] for name in own}
    list(stack.layers(range(stack.depth)))
    for name, tensor in stack.model.state_dict().items():
        if "layers" in name:
            assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("how", [resident, streamed])
def test_a_model_that_is_never_written_answers_steered_as_the_written_one(tmp_path, how) -> None:
    """Whatever the stack is, streams are changed above its own layers."""
    folders = tiny.save_pair(tmp_path, "llama")
    stack, v_D = stack_of(folders, how), torch.randn(24, generator=torch.Generator().manual_seed(5))
    stack.set(Exchange(subset_of(stack.geometry, HEADS, NEURONS), in_expert=True))
    written = model_of(folders[1], plain_patch.patched(folders[1], folders[0], HEADS, NEURONS))
    way = Steering(test_steering.LAYER, v_D, 30.0)
    rules = replace(Greedy.of([stack.model], tiny.tokenizer(), test_steering.LENGTH, 2), vocabulary=97)
    wanted = [
        test_steering.alone(written, prompt, way.clamp, lambda at, length=length: at < length)
        for prompt, length in zip(PROMPTS, map(len, PROMPTS), strict=True)
    ]
    found = generate_answers(stack, rules, PROMPTS, change=SteeredRows([way], [0] * len(PROMPTS)))
    assert found == wanted
    assert generate_answers(stack, rules, PROMPTS) != found


@pytest.mark.parametrize("room", [1 << 40, 0])
@pytest.mark.parametrize("how", [resident, streamed])
def test_layers_below_a_set_are_its_recipients_and_run_once(tmp_path, monkeypatch, how, room) -> None:
    """Sets that begin in any layer, in both directions, in any order: to the bit as each from the bottom."""
    folders = tiny.save_pair(tmp_path, "llama", extra_rows=3)
    stack = stack_of(folders, how)
    monkeypatch.setattr(merged, "free_memory", lambda _device: room)
    sets = [subset_of(stack.geometry, [], [(layer, 3)]) for layer in (2, 0, 3, 3, 1)]
    sets += [subset_of(stack.geometry, [(2, 1)], [(3, 5)]), subset_of(stack.geometry, [], [])]
    exchanges = [Exchange(each, in_expert) for each in sets for in_expert in (False, True)]
    parts = list(batches(PROMPTS, 2, stack))
    calls = Counter()
    plain_call = stack.call
    monkeypatch.setattr(
        stack,
        "call",
        lambda layer, *rest: calls.update([list(stack.tower.layers).index(layer)]) or plain_call(layer, *rest),
    )

    def swept():
        calls.clear()
        rows = {}
        for layer, branch, i, stream_BTD in stack.branch_sweep(exchanges, parts):
            rows[layer, branch, i] = parts[i].at_anchor(stream_BTD).clone()
            if layer == stack.depth - 1:
                rows["logits", branch, i] = stack.logits(rows[layer, branch, i], 97)
        return rows

    found, run = swept(), dict(calls)
    monkeypatch.setattr(ExchangedStack, "alike_below", MergedStack.alike_below)
    wanted = swept()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], want) for key, want in wanted.items())
    lowest = [0 if room == 0 and how is resident else each.lowest for each in exchanges]
    assert [each.lowest for each in exchanges[::2]] == [2, 0, 3, 3, 1, 2, 4]
    # In either direction one pass of the recipient's own layers for all, and each set's own from there.
    own = [sum(low <= layer for low in lowest) + 2 * any(low > layer for low in lowest) for layer in range(3)]
    assert [run[layer] for layer in range(3)] == [count * len(parts) for count in own]
    assert run[3] == len(exchanges) * len(parts)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_branches_streamed_are_resident(tmp_path, kind) -> None:
    folders = tiny.save_pair(tmp_path, kind, extra_rows=3)
    found = []
    for opened in (resident, streamed):
        stack = stack_of(folders, opened)
        subset = subset_of(stack.geometry, HEADS, NEURONS)
        everything = Subset.choose(stack.geometry)
        candidates = [Exchange(subset), Exchange(subset, in_expert=True), Exchange(everything, in_expert=True)]
        parts = list(batches(PROMPTS, 2, stack))
        rows = {}
        for layer, branch, i, stream_BTD in stack.branch_sweep(candidates, parts):
            rows[layer, branch, i] = parts[i].at_anchor(stream_BTD)
            if layer == stack.depth - 1:
                rows["logits", branch, i] = stack.logits(rows[layer, branch, i], 97)
        assert len(rows) == (stack.depth + 1) * 3 * len(parts)
        found.append(rows)
    for key, want in found[0].items():
        torch.testing.assert_close(found[1][key], want, rtol=1e-5, atol=1e-5)
    for each in (stack, stack.base, *stack.experts):
        assert all(parameter.is_meta for layer in each.tower.layers for parameter in layer.parameters())
