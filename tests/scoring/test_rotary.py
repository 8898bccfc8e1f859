"""Rotary embeddings that look at the length of a batch: every prompt's numbers are those of the prompt alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_commands import run
from score_jobs import write_pairs
from streamed_world import resident, streamed

from mergekit_wp.errors import BadInput
from mergekit_wp.scores import read_scores
from mergekit_wp.scoring.batching import Lengths, batches, together
from mergekit_wp.scoring.greedy import Greedy, generate_answers
from mergekit_wp.scoring.models.layerwise import ResidentStack
from mergekit_wp.scoring.sweep import forward_sweep

CPU = torch.device("cpu")
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 6.0, 8.0]}
ROPES = {
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 6, "factor": 8.0, **FACTORS},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6},
}


def rope_model(name, seed=0):
    rope = {"rope_theta": 10000.0, **ROPES[name]}
    context = 6 if name == "dynamic" else 48  # past 6 tokens, dynamic changes with every token
    return tiny.random_model("llama", seed, rope_parameters=rope, max_position_embeddings=context)


@torch.no_grad()
def logits_alone(name, prompt):
    """By transformers, of a model that has seen nothing else."""
    return rope_model(name)(torch.tensor([prompt]), use_cache=False).logits[0, -1]


@torch.no_grad()
def logits_batched(stack, prompts, size):
    """{prompt: next-token logits} through the stack, prompts in batches of `size`."""
    found = {}
    for part in batches(prompts, size, stack):
        *_below, (_layer, (stream_BTD,)) = forward_sweep(stack, [stack.start(part)], stack.depth)
        for row, ids in zip(stack.logits(part.at_anchor(stream_BTD), 97), part.ids_BT, strict=True):
            found[tuple(int(i) for i in ids if i)] = row
    return found


@pytest.mark.parametrize("size", [2, 16])
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_logits_are_those_of_each_prompt_alone(tmp_path, kind, name, size):
    stack = (resident if kind == "resident" else streamed)(tiny.save(rope_model(name), tmp_path / "m"))
    prompts = [list(range(5, 5 + n)) for n in (12, 3, 6, 7, 5, 9, 4)] + [list(range(30, 37))]
    for again in (prompts, prompts[1:3]):  # a second time, after longer batches
        for ids, got in logits_batched(stack, again, size).items():
            torch.testing.assert_close(got, logits_alone(name, ids), rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 9), st.integers(0, 12), st.sampled_from(sorted(ROPES)))
@settings(max_examples=60, deadline=None)
def test_no_batch_mixes_lengths_that_are_treated_apart(sizes, most, answer, name):
    lengths = Lengths(rope_model_config(name))
    found = list(together(sizes, most, [lengths.group_answered(n, answer) for n in sizes]))
    assert sorted(i for chosen in found for i in chosen) == list(range(len(sizes)))
    for chosen in found:
        assert len(chosen) <= most
        shortest, longest = (f(sizes[i] for i in chosen) for f in (min, max))
        for more in range(answer + 1):
            assert lengths.group(shortest + more) == lengths.group(longest + more)


def rope_model_config(name):
    return {"max_position_embeddings": 6 if name == "dynamic" else 48, "rope_parameters": ROPES[name]}


@pytest.mark.parametrize(
    ("config", "apart"),
    [
        ({"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 6}, [(6, 7)]),
        ({"rope_scaling": {"type": "su", **FACTORS}, "original_max_position_embeddings": 6}, [(6, 7)]),
        ({"rope_parameters": {"full": ROPES["longrope"], "sliding": {"rope_type": "default"}}}, [(6, 7)]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 6}, [(6, 7), (7, 8), (8, 9)]),
        ({"rope_parameters": {"rope_type": "of-tomorrow"}}, [(n, n + 1) for n in range(1, 9)]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, []),
        ({"text_config": {"rope_parameters": ROPES["longrope"]}}, [(6, 7)]),
        ({"rope_scaling": None}, []),
        ({}, []),
    ],
    ids=str,
)
def test_every_spelling(config, apart):
    lengths = Lengths({"max_position_embeddings": 64, **config})
    assert [(n, n + 1) for n in range(1, 9) if lengths.group(n) != lengths.group(n + 1)] == apart


def test_dynamic_stretches_the_context_and_others_do_not():
    assert Lengths(rope_model_config("dynamic")).limit == 24
    assert Lengths(rope_model_config("longrope")).limit == 48


def test_frequencies_of_a_longer_batch_are_forgotten():
    model = rope_model("dynamic")
    before = model.model.rotary_emb.inv_freq.clone()
    model(torch.tensor([list(range(5, 20))]))
    assert not torch.equal(model.model.rotary_emb.inv_freq, before)
    Lengths(model.config.to_dict()).forget(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert model.model.rotary_emb.max_seq_len_cached == 6


@pytest.mark.parametrize("method", ["writeback", "exact"])
def test_scores_do_not_depend_on_the_batch_size(tmp_path, method):
    """Through the command: gaps and scores of every batch size are those of one prompt at a time."""
    base = rope_model("longrope", seed=1)
    tiny.save(base, tmp_path / "base")
    tiny.save(tiny.fine_tuned(base, seed=2), tmp_path / "expert")
    write_pairs(tmp_path / "pairs.jsonl", tasks=("t",), rows=8)
    found = []
    for size in (1, 3, 16):
        flags = {"batch_size": size, "method": method, "layers": "1-2", "out": f"{size}.safetensors"}
        result, path = run(tmp_path, split="shared", **flags)
        assert result.exit_code == 0, result.output
        found.append(read_scores(path))
    for other in found[1:]:
        torch.testing.assert_close(other.heads, found[0].heads, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(other.neurons, found[0].neurons, rtol=1e-3, atol=1e-5)


def test_past_the_stretched_context_is_refused():
    stack = ResidentStack(rope_model("dynamic"), CPU, torch.float32)
    rules = Greedy.of([stack.model], tiny.tokenizer(), max_tokens=5, batch_size=8)
    assert stack.lengths.limit == rules.context == 24
    with pytest.raises(BadInput, match="a prompt of 25 tokens leaves no room to answer in 24"):
        generate_answers(stack, rules, [[5], [5] * 25])
    ((_token,),) = generate_answers(stack, rules, [[5] * 24])  # is never fed
