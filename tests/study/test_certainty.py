"""How sure scores are said to be: against loops over the same halves, and on scores of which the truth is known."""

from __future__ import annotations

import pytest
import torch
from audited import audit_of, file_of, populations
from prompt_scores import made
from score_example import GEOMETRY, example
from study_world import inputs_of

from mergekit_wp.console import no_progress
from mergekit_wp.geometry import Kind
from mergekit_wp.ranking import spearman
from mergekit_wp.scores import Scores
from mergekit_wp.study import certainty
from mergekit_wp.study.sets import Shared, top_set


def found(files, others=None):
    inputs = inputs_of(files, others)
    return certainty.work(inputs.study, inputs, no_progress)


@pytest.mark.parametrize("gap", ["sample", "mean"])
def test_halves_are_those_of_a_loop(gap):
    common = {kind: 0.5 * torch.randn(3, GEOMETRY.count(kind)) for kind in Kind}
    scores = made(prompts=11, gap=gap, shift=common)
    got = certainty.halved(scores, "a", Kind.NEURON, 8, seed=3)
    order_DP = torch.rand(certainty.HALVES, 11, generator=torch.Generator().manual_seed(3)).argsort(1)
    prompts, overlaps, correlations, chosen, anew = scores.tasks["a"].prompts, [], [], [], []
    for order_P in order_DP.tolist():
        halves = []
        for half in (order_P[:5], order_P[5:]):
            effects = sum(prompts.neurons[p] for p in half)
            of = len(half) if gap == "sample" else sum(prompts.gaps["kl"][p] for p in half) / prompts.gaps["kl"].mean()
            halves.append((effects / of).flatten())
        overlaps.append(Shared.of(*(top_set(half, 8) for half in halves)).share)
        correlations.append(spearman(*halves))
        for one, other in (halves, halves[::-1]):
            chosen += sorted(one.tolist())[-8:]
            anew += [float(other[n]) for n in one.argsort()[-8:]]
    assert got["overlap"] == pytest.approx(sum(overlaps) / len(overlaps), abs=1e-6)
    assert got["spearman"] == pytest.approx(sum(correlations) / len(correlations), abs=1e-5)
    assert got["by_chance"] == pytest.approx(8 / 30)
    assert got["leaders"] == pytest.approx(sum(chosen) / len(chosen), abs=1e-5)
    assert got["leaders_anew"] == pytest.approx(sum(anew) / len(anew), abs=1e-5)
    assert got["leaders_anew"] < got["leaders"]
    assert got["draws"] == certainty.HALVES


def test_noise_is_called_noise_and_what_is_sure_is_called_sure():
    generator = torch.Generator().manual_seed(1)
    common = {kind: 3 * torch.randn(3, GEOMETRY.count(kind), generator=generator) for kind in Kind}
    noise = found({"x": made(prompts=60, tasks=("a",))}).data["rankings"]
    signal = found({"x": made(prompts=60, tasks=("a",), shift=common)}).data["rankings"]
    for row in noise:
        assert row["above"] + row["below"] <= 0.2 * row["components"]
        assert abs(row["halves"]["spearman"]) < 0.35
        assert row["leaders"][0]["ranks"][1] > 3
    for row in signal:
        assert row["above"] + row["below"] > 0.75 * row["components"]
        assert row["halves"]["spearman"] > 0.95
        assert row["halves"]["overlap"] > 0.6 > row["halves"]["by_chance"]


def test_two_files_on_the_same_prompts_are_compared_by_what_surely_differs():
    one, other = (made(seed=seed, prompts=80, tasks=("a",)) for seed in (1, 2))
    moved = made(seed=2, prompts=80, tasks=("a",), shift=1.0)
    rows = found({"x": one}, {"y": other, "z": moved}).data["differences"]
    differ = {(row["one"], row["other"], row["kind"]): row["differ"] for row in rows}
    assert set(differ) == {("x", name, kind) for name in ("y", "z") for kind in ("heads", "neurons")}
    assert differ["x", "y", "neurons"] <= 6  # of 30, where 5 % are expected
    assert differ["x", "z", "neurons"] == 30
    assert not found({"x": one, "y": made(prompts=20, tasks=("a",))}).data["differences"]


def test_files_without_single_prompts_are_named_and_too_few_prompts_give_nothing():
    few, one = made(prompts=3, tasks=("a",)), made(prompts=3, dropped=2, tasks=("a",))
    result = found({"plain": example(), "few": few, "one": one})
    assert result.data["without"] == ["plain"]
    assert "wp-score --per-prompt" in result.section
    rows = {(row["scores"], row["kind"]): row for row in result.data["rankings"]}
    assert rows["few", "heads"]["leaders"]
    assert rows["few", "heads"]["halves"] is None
    assert not rows["one", "heads"]["leaders"]
    alone = found({"plain": example()})
    assert not alone.data["rankings"]
    assert not alone.pictures


def test_it_says_what_it_found():
    text = " ".join(certainty.findings(found({"x": made(prompts=60, tasks=("a",))}).data))
    assert "surely above zero (2.5 % would be if none was)" in text
    assert "Half of the prompts find" in text
    assert "The top neurons of half of the prompts score 0." in text
    assert certainty.of_whole(0.5) == pytest.approx(2 / 3)


def test_leaders_that_others_chose_are_no_sample_of_all_scores():
    scores = made(prompts=30, tasks=("a",))
    mask = {kind: torch.zeros_like(getattr(scores, kind)) for kind in Kind}
    for kind in Kind:
        mask[kind][0, :3] = 1.0
    part = Scores.from_tasks(scores.meta, scores.tasks, mask)
    alone, both = found({"part": part}), found({"part": part, "x": scores})
    assert not any(text.startswith("Of all scores") for text in certainty.findings(alone.data))
    assert certainty.findings(both.data)[0] == certainty.findings(found({"x": scores}).data)[0]
    assert all(note.text.endswith("of the 3 scored") for note in alone.notes)


def test_leaders_and_a_sample_say_what_top_sets_missed():
    exact, cheap = (file_of(table) for table in populations()["near"])
    result = found({"cheap": cheap, "audit": audit_of(cheap, exact, 20, "50%", 0), "exact": exact})
    (row,) = result.data["audits"]
    assert (row["scores"], row["kind"], row["k"], row["leaders"]) == ("audit", "neurons", 8, 20)
    assert set(row["overlap"]) == {"cheap", "exact"}
    low, high = row["overlap"]["exact"]
    assert low == 1 - row["at_most"] / 8
    assert high == 1.0
    assert row["sentence"] in result.section
    assert len(result.tables["audits"]) == 3
