"""Scores over whole answers: every token of an answer counts as the next token of a prompt that ends before it."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamed_world import resident
from test_rotary import ROPES, rope_model, rope_model_config

from mergekit_wp.console import no_progress
from mergekit_wp.scoring import metrics
from mergekit_wp.scoring.anchor.directions import Directions
from mergekit_wp.scoring.batching import Lengths, TaskTokens, batches
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.models.load import check_pair, load_pair
from mergekit_wp.scoring.passes import PATCHING
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.score import _patch, sweep_down, task_run
from mergekit_wp.scoring.sweep import forward_sweep
from mergekit_wp.subset import Subset

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3], [3, 4]]
ANSWERS = [[20, 21, 22], [23], [24, 25, 26, 27, 2], [28, 2]]
METHODS = ("writeback", "attr", "atp", "exact", "ap")
ANCHOR = 1


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    folders = {kind: tiny.save_pair(root / kind, kind) for kind in ("llama-biased", "olmo2", "gemma2")}

    @cache
    def load(kind, offload="none"):
        base, expert = map(str, folders[kind])
        job = ScoringJob(base, expert, "-", offload=offload, device="cpu", dtype="float32")
        return load_pair(job, check_pair(job))

    return load


def sums(pair, method, utility, prompts, answers, batch_size=3):
    """Scores of one task before they are divided by gaps, and the sum of these, by metric."""
    job = ScoringJob("b", "e", "p", method=method, utility=utility, gap="mean", gap_floor=0.0, batch_size=batch_size)
    shape = pair.geometry
    v_LD = torch.randn(shape.layers, shape.d_model, generator=torch.Generator().manual_seed(3))
    task = TaskTokens("t", [], None, prompts, answers=answers)
    run = task_run(job, pair, task, ANCHOR, Directions(v_LD, v_LD))
    rest = [Resume(), no_progress] if method in PATCHING else [no_progress]
    sweep = _patch if method in PATCHING else sweep_down
    sweep(job, pair, [task], [run], Subset.choose(shape), ProcessGroup(), *rest)
    tables = {f"{kind}/{part}": table for kind, parts in run.sums.items() for part, table in parts.items()}
    return tables | {name: torch.tensor(ledger.total) for name, ledger in run.ledgers.items()}


def assert_close(got, wanted):
    for name in wanted:
        assert wanted[name].any(), name
        assert (got[name] - wanted[name]).abs().max() <= 2e-5 * wanted[name].abs().max(), name


@pytest.mark.parametrize(
    ("method", "utility"), [*((method, "kl") for method in METHODS), ("attr", "projection"), ("exact", "projection")]
)
def test_an_answer_counts_as_the_mean_over_prompts_that_end_before_each_of_its_tokens(pair_of, method, utility):
    """Ragged prompts and answers in one batch, against runs of the next token of one prompt each."""
    pair = pair_of("llama-biased")
    got = sums(pair, method, utility, PROMPTS, ANSWERS, batch_size=4)
    wanted = dict.fromkeys(got, torch.tensor(0.0))
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        for end in range(len(answer)):
            for name, table in sums(pair, method, utility, [prompt + answer[:end]], []).items():
                wanted[name] = wanted[name] + table / len(answer)
    assert_close(got, wanted)


@pytest.mark.parametrize("method", ["writeback", "exact"])
def test_staged_reads_the_anchor_at_the_prompt_and_kl_over_the_answer(pair_of, method):
    pair = pair_of("llama-biased")
    staged = sums(pair, method, "staged", PROMPTS, ANSWERS)
    anchor, kl = sums(pair, method, "anchor", PROMPTS, []), sums(pair, method, "kl", PROMPTS, ANSWERS)
    for name, table in kl.items():
        if name != "kl":
            kl[name] = torch.cat([anchor[name][: ANCHOR + 1], table[ANCHOR + 1 :]])
    assert_close(staged, kl | {"anchor": anchor["anchor"]})


@pytest.mark.parametrize(
    ("kind", "method"), [("olmo2", "writeback"), ("olmo2", "exact"), ("gemma2", "attr"), ("gemma2", "ap")]
)
def test_streamed_one_by_one_and_few_positions_at_a_time(pair_of, monkeypatch, kind, method):
    whole = sums(pair_of(kind), method, "kl", PROMPTS, ANSWERS, batch_size=4)
    monkeypatch.setattr(metrics, "_MOST_NUMBERS", 97 * 5)
    assert_close(sums(pair_of(kind, "stream"), method, "kl", PROMPTS, ANSWERS, batch_size=3), whole)
    assert_close(sums(pair_of(kind), method, "kl", PROMPTS, ANSWERS, batch_size=1), whole)


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_an_answers_logits_are_those_of_prompt_and_answer_alone(tmp_path, name):
    """Whatever the batch is padded to: some pass the rotary embedding's threshold with their answer, or another's."""
    stack = resident(tiny.save(rope_model(name), tmp_path / "m"))
    prompts = [list(range(5, 5 + n)) for n in (3, 5, 4, 2, 4)]
    answers = [list(range(40, 40 + n)) for n in (2, 1, 6, 3, 2)]
    found = 0
    for part in batches(prompts, 8, stack, answers=answers):
        *_below, (_layer, (stream_BTD,)) = forward_sweep(stack, [stack.start(part)], stack.depth, at=[part.reads_BA])
        logits_BAV = stack.logits(part.at_reads(stream_BTD), 97)
        for b, (last, count) in enumerate(zip(part.last_B, part.answer_B, strict=True)):
            row_1T = part.ids_BT[b : b + 1, : last + count]
            wanted_AV = rope_model(name)(row_1T, use_cache=False).logits[0, last:]
            torch.testing.assert_close(logits_BAV[b, :count], wanted_AV, rtol=1e-4, atol=1e-4)
            found += int(count)
    assert found == sum(map(len, answers))


class Blind:
    device = torch.device("cpu")

    def __init__(self, name):
        self.lengths = Lengths(rope_model_config(name))


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.sampled_from(sorted(ROPES)),
)
@settings(max_examples=60, deadline=None)
def test_every_row_has_its_own_different_positions(sizes, most, name):
    """Within the batch, weights that sum to 1 over the answer, and no length that the model would treat apart."""
    stack = Blind(name)
    prompts = [[*range(10, 10 + n)] for n, _answer in sizes]
    answers = [[*range(50, 50 + n)] for _prompt, n in sizes]
    found = 0
    for part in batches(prompts, most, stack, answers=answers):
        rows, width = part.ids_BT.shape
        assert rows <= most
        found += rows
        assert part.reads_BA.shape[1] == part.answer_B.max()
        assert int(part.reads_BA.max()) < width
        assert (part.reads_BA.diff(dim=1) == 1).all()
        torch.testing.assert_close(part.weights_BA.sum(1), torch.ones(rows, dtype=torch.float64))
        for ids_T, last, read in zip(part.ids_BT, part.last_B, part.answer_B, strict=True):
            length = int(last + read)
            assert ids_T[:length].tolist() == [*range(10, 11 + last), *range(50, 49 + read)]
            assert not ids_T[length:].any()
            assert stack.lengths.group(length) == stack.lengths.group(width)
    assert found == len(sizes)
