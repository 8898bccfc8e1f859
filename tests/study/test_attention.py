"""Shares of attention against the weights that transformers returns, ratios and sets against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.geometry import Geometry
from mergekit_wp.scoring.batching import TaskTokens
from mergekit_wp.scoring.models.layerwise import ResidentStack
from mergekit_wp.scoring.models.streaming import open_streamed
from mergekit_wp.study.attention import HeadSets
from mergekit_wp.study.regions import Attended, Spans, attended, beyond, log_ratios, spans_of

CPU = torch.device("cpu")
# Lengths that are padded; instructions in the middle, at the end, and far behind a window; frames or none.
PROMPTS = [
    Spans([1, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], (3, 5), (2, 1)),
    Spans([5, 20, 21, 22, 23], (3, 5), (0, 0)),
    Spans([1, 30, 31, 32, 33, 34, 35, 36], (4, 7), (1, 1)),
]


def swept(model, prompts=PROMPTS, batch_size=2) -> Attended:
    if getattr(model.config, "attn_logit_softcapping", None):  # as the loader does
        model.set_attn_implementation("eager")
    stack = ResidentStack(model.requires_grad_(False), CPU, torch.float32)
    geometry = Geometry.from_config(model.config.to_dict())
    return attended(stack, geometry, prompts, batch_size, lambda _n: None)


def expected(weight_HTT: np.ndarray, prompt: Spans, queries: list[int]) -> np.ndarray:
    """[H, 5] by adding up one number at a time."""
    found = np.zeros((len(weight_HTT), 5))
    for head in range(len(weight_HTT)):
        for query in queries:
            for key in range(query + 1):
                place = 4 if key == query else prompt.regions[key]
                found[head, place] += weight_HTT[head, query, key] / len(queries)
    return found


@pytest.mark.parametrize("kind", [*tiny.VARIANTS, *tiny.FAMILIES, "llava-wrapper"])
def test_shares_are_those_of_the_attention_weights(kind) -> None:
    model = tiny.random_model(kind)
    found = swept(model)
    model.set_attn_implementation("eager")
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            layers = model(input_ids=torch.tensor([prompt.ids]), output_attentions=True, use_cache=False).attentions
        for layer, weights in enumerate(layers):
            weight_HTT = weights[0].double().numpy()
            seen = weight_HTT > 0
            alike_HTT = seen / seen.sum(-1, keepdims=True)
            for reading, queries in (("anchor", [len(prompt.ids) - 1]), ("later", prompt.queries)):
                for table, want in ((found.shares, weight_HTT), (found.alike, alike_HTT)):
                    own = table[reading][i, layer].numpy()
                    np.testing.assert_allclose(own, expected(want, prompt, queries), atol=2e-6)
                    np.testing.assert_allclose(own.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3", "olmo2"])
def test_heads_that_ask_nothing_are_indifferent(kind) -> None:
    model = tiny.random_model(kind)
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.data.zero_()
    found = swept(model)
    for reading in ("anchor", "later"):
        for alone in (True, False):
            ratio = log_ratios(found, reading, alone)
            torch.testing.assert_close(ratio.nan_to_num(0), torch.zeros_like(ratio), atol=1e-4, rtol=0)
            # Gemma's window is 4: from the end of the first prompt its instruction cannot be seen.
            assert bool(ratio[0, 0].isnan().all()) == (kind == "gemma3" and reading == "anchor")
            assert not ratio[1].isnan().any()


def test_ratios_are_those_of_the_definition() -> None:
    found = swept(tiny.random_model("qwen3"), PROMPTS[:1])
    share, prompt = found.shares["anchor"][0, 2, 3].tolist(), PROMPTS[0]
    count = [prompt.regions[:-1].count(r) for r in range(4)]
    assert count == [1, 1, 2, 6]
    alone = math.log(share[2] / 2 / (share[3] / 6))
    assert float(log_ratios(found, "anchor", True)[0, 2, 3]) == pytest.approx(alone, abs=1e-4)
    everything = math.log(share[2] / 2 / (sum(share[r] for r in (0, 1, 3, 4)) / 9))
    assert float(log_ratios(found, "anchor", False)[0, 2, 3]) == pytest.approx(everything, abs=1e-4)


def test_streamed_is_resident_and_batches_do_not_matter(tmp_path) -> None:
    model = tiny.random_model("gemma2")
    folder = tiny.save(model, tmp_path / "m")
    stack = open_streamed("m", Checkpoint("m", folder), torch.float32, CPU)
    geometry = Geometry.from_config(model.config.to_dict())
    streamed = attended(stack, geometry, PROMPTS, 1, lambda _n: None)
    resident = swept(model, batch_size=3)
    for reading, table in resident.shares.items():
        torch.testing.assert_close(streamed.shares[reading], table, atol=1e-5, rtol=1e-4)


def test_where_the_instruction_is() -> None:
    assert beyond([1, 5, 6, 7, 8], [1, 5, 8]) == (2, 4)
    assert beyond([1, 5, 6], [1, 5]) == (2, 3)
    assert beyond([1, 9, 5, 5, 6], [1, 5, 5, 6]) == (1, 2)
    assert beyond([1, 5, 5, 6], [1, 5, 6]) == (2, 3)  # either of two equal tokens
    assert beyond([1, 5], [1, 5]) == (2, 2)
    tasks = [
        TaskTokens(
            "a", [], None, [[1, 2, 10, 11, 40, 3, 4], [1, 2, 12, 3, 4]], [], [[1, 2, 10, 11, 3, 4], [1, 2, 3, 4]]
        ),
        TaskTokens("b", [], None, [[1, 2, 13, 41, 42, 14, 3, 4]], [], [[1, 2, 13, 14, 3, 4]]),
        TaskTokens("maths", [], None, [[1, 2, 50, 3, 4]]),
    ]
    found = spans_of(tasks)
    assert list(found) == ["a", "b"]  # maths has no contrasts
    assert [each.regions for each in found["a"]] == [[0, 1, 3, 3, 2, 1, 1]]  # the second prompt has no content
    assert [each.regions for each in found["b"]] == [[0, 1, 3, 2, 2, 3, 1, 1]]
    assert found["b"][0].queries == [5, 6, 7]
    assert PROMPTS[1].queries == [4]  # the instruction ends the prompt: the anchor alone


def test_sets_of_heads() -> None:
    """Every head of layer 1 at 2, all others at 1; the base at 1 everywhere; one prompt knows nothing of a head."""
    expert_NLH = np.zeros((6, 3, 4))
    expert_NLH[:, 1] = math.log(2)
    expert_NLH[2, 1, 0] = np.nan
    top_LH = np.zeros((3, 4), dtype=bool)
    top_LH[1, :2] = True
    seen_LH = np.ones((3, 4), dtype=bool)
    seen_LH[2] = False
    row = HeadSets(top_LH, seen_LH, 0).row(np.zeros_like(expert_NLH), expert_NLH)
    for key in ("expert", "expert_low", "expert_high", "change", "expert_matched_low", "change_matched_high"):
        assert row[key] == pytest.approx(2), key  # what the layer explains, the matched draws have too
    assert row["base"] == row["base_high"] == pytest.approx(1)
    assert row["expert_random_low"] == pytest.approx(1)
    assert row["expert_random_high"] == pytest.approx(2)
    assert row["expert_rest"] == pytest.approx(math.exp(2 * math.log(2) / 6))  # two of the six others that were scored
    assert row["heads"] == 2


def test_intervals_are_those_of_the_prompts() -> None:
    random = np.random.default_rng(0)
    log_NLH = random.normal(size=(200, 1, 4))
    top_LH = np.array([[True, True, False, False]])
    row = HeadSets(top_LH, np.ones((1, 4), dtype=bool), 0).row(log_NLH, log_NLH + 0.5)
    error = log_NLH[:, 0, :2].mean(1).std(ddof=1) / math.sqrt(200)
    assert math.log(row["base_high"] / row["base_low"]) == pytest.approx(3.92 * error, rel=0.15)
    assert row["change_low"] == pytest.approx(row["change_high"]) == pytest.approx(math.exp(0.5))  # paired
    nothing = HeadSets(top_LH, np.ones((1, 4), dtype=bool), 0).row(log_NLH * np.nan, log_NLH * np.nan)
    assert nothing["expert"] is nothing["expert_low"] is nothing["expert_matched_low"] is None
