"""Plans, intervals and permutation tests of the part `answers`, against their definitions."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import binomtest
from study_world import SHAPE, scores

from mergekit_wp.geometry import Kind
from mergekit_wp.recovery import RecoveryCurve, TaskRecovery
from mergekit_wp.study.answer_page import _polygons, result_of
from mergekit_wp.study.answer_plan import BASE, BOTH, EXPERT, chosen_files, models_of
from mergekit_wp.study.answer_rows import AnswerRows, Answers, _diagonal, _over, across_tasks, steered, wilson
from mergekit_wp.study.answer_run import GradedTask, Said
from mergekit_wp.study.set_effects import RESAMPLES
from mergekit_wp.study.set_plan import MATCHED, RANDOM, TOP, WHOLE
from mergekit_wp.study.study_spec import Answering

HOW = Answering(shares=[0.25, 0.5], draws=2)


def planned(**files):
    return models_of(files or {"kl": scores()}, "a", ["a", "b"], HOW, 0)


@pytest.mark.parametrize("utility", ["kl", "staged"])
def test_sets_are_the_shares_of_each_kind_and_side(utility) -> None:
    file = scores(utility=utility)
    models = planned(x=file)
    assert [(m.what, m.removed, m.subset.count) for m in models[:2]] == [(BASE, False, 0), (EXPERT, True, 0)]
    own = [m for m in models if m.of == "a"]
    for share in HOW.shares:
        (top, _removed) = [m for m in own if (m.what, m.kinds, m.share) == (TOP, BOTH, share)]
        # Of a staged file, as many of the layers up to the anchor (1) as of those above it.
        sides = [range(4)] if utility == "kl" else [range(2), range(2, 4)]
        for kind, count in ((Kind.HEAD, 4), (Kind.NEURON, 20)):
            table, mask = getattr(file.tasks["a"], kind), top.subset.masks[kind]
            for side in map(list, sides):
                k = int(share * count * len(side))
                assert mask[side].sum() == k
                assert set(table[side][mask[side]].tolist()) == set(table[side].flatten().topk(k).values.tolist())
        for matched in (m for m in own if (m.what, m.kinds, m.share) == (MATCHED, BOTH, share)):
            for kind in Kind:
                assert torch.equal(matched.subset.masks[kind].sum(1), top.subset.masks[kind].sum(1))
        drawn = [m for m in own if (m.what, m.kinds, m.share, m.removed) == (RANDOM, BOTH, share, False)]
        assert [m.subset.count for m in drawn] == [top.subset.count] * 2
        assert drawn[0].key != drawn[1].key
    small, large = (m.subset.masks for m in own if (m.what, m.kinds, m.removed, m.draw) == (RANDOM, BOTH, False, 0))
    assert all(bool((small[kind] <= large[kind]).all()) for kind in Kind)
    (whole, _removed) = [m for m in own if (m.what, m.kinds) == (WHOLE, BOTH)]
    assert whole.subset.whole
    assert [(m.kinds, m.share, m.removed) for m in models if m.of == "b"] == [
        ("neurons", 0.5, False), ("neurons", 0.5, True),
    ]  # fmt: skip


def test_equal_models_answer_once_and_files_are_chosen_by_side() -> None:
    one, other = scores(seed=0), scores(seed=1, method="ap")
    assert len({m.key for m in planned(x=one, y=one)}) == len({m.key for m in planned(x=one)})
    both = planned(wp=one, ap=other)
    tops = {m.scores: m.subset for m in both if (m.what, m.kinds, m.share, m.removed) == (TOP, BOTH, 0.5, False)}
    assert torch.equal(tops["wp + ap"].neurons, tops["wp"].neurons | tops["ap"].neurons)
    random = {m.key for m in both if m.what == RANDOM}
    assert random == {m.key for m in planned(wp=one) if m.what == RANDOM}, "draws do not hang on the file"
    files = {"ap": other, "one": one, "two": one}
    assert list(chosen_files(files, Answering())) == ["ap", "one"]
    assert list(chosen_files(files, Answering(scores=["two"]))) == ["two"]


def test_a_task_whose_scores_are_all_equal_has_no_top() -> None:
    file = scores()
    for table in (file.tasks["a"].heads, file.tasks["a"].neurons):
        table.zero_()
    assert {m.what for m in planned(x=file) if m.of != "b"} == {BASE, EXPERT, WHOLE}


@pytest.mark.parametrize(("right", "count"), [(0, 1), (0, 16), (3, 7), (31, 32), (64, 64)])
def test_intervals_are_wilsons(right, count) -> None:
    wanted = binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right / count, count) == pytest.approx((wanted.low, wanted.high), abs=1e-6)


def answers_of(task, seed, prompts=12):
    """As if models passed at random, the expert most often."""
    random = np.random.default_rng(seed)
    models = models_of({"x": scores(tasks=("a", "b", "c"))}, task, ["a", "b", "c"], HOW, 0)
    said = {}
    for model in models:
        passed = (random.random(prompts) < (0.9 if model.removed else 0.4)).tolist()
        said[model.key] = Said([[1, 2]] * prompts, ["w1"] * prompts, passed)
    question = GradedTask(task, [""] * prompts, [[1]] * prompts, [], True, True)
    return Answers(question, models, said)


def legs(value, drawn_R, spread_T):
    """The interval over prompts, and that over two random sets a task, in both of which the truth may lie elsewhere."""
    low, high = np.percentile(drawn_R, [2.5, 97.5])
    total, squares = sum(spread_T), sum(spread**2 for spread in spread_T)
    half = stats.t.ppf(0.975, total**2 / squares) * np.sqrt(total) if total else 0.0
    return value - np.hypot(value - low, half), value + np.hypot(high - value, half)


def test_differences_have_the_intervals_of_resampled_prompts() -> None:
    every = [answers_of("a", 0), answers_of("b", 1, prompts=9)]
    found = AnswerRows(3)
    for each in every:
        found.add(each)
    for direction in ("restored", "removed"):
        drawn, spreads, values = [], [], []
        for answers in every:
            task, removed = answers.question.task, direction == "removed"
            place = (removed, "x", "neurons", 0.5)
            (top,), matched = answers.find(TOP, *place), answers.find(MATCHED, *place)
            beyond_N = answers.passed_N(top) - sum(answers.passed_N(m) for m in matched) / 2
            count = len(beyond_N)
            counts = np.random.default_rng([3, *task.encode()]).multinomial(count, [1 / count] * count, size=RESAMPLES)
            drawn_R = np.array([np.repeat(beyond_N, row).mean() for row in counts])
            by_t = np.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1) / 1.959964
            drawn.append(beyond_N.mean() + by_t * (drawn_R - beyond_N.mean()))
            spreads.append(np.var([answers.passed_N(m).mean() for m in matched], ddof=1) * 1.5)
            values.append(beyond_N.mean())
            (row,) = [r for r in found.curves if r["task"] == task and _place(r) == (direction, "x", "neurons", 0.5)]
            assert row["beyond_matched"] == pytest.approx(beyond_N.mean())
            bounds = legs(values[-1], drawn[-1], spreads[-1:])
            assert (row["beyond_matched_low"], row["beyond_matched_high"]) == pytest.approx(tuple(bounds))
        (mean,) = [row for row in found.means() if _place(row) == (direction, "x", "neurons", 0.5)]
        bounds = legs(np.mean(values), np.mean(drawn, axis=0), np.array(spreads) / 4)
        assert (mean["beyond_matched_low"], mean["beyond_matched_high"]) == pytest.approx(tuple(bounds))
        assert mean["right_low"] < mean["right"] < mean["right_high"]
        assert mean["tasks"] == 2
    one = AnswerRows(0)
    one.add(answers_of("a", 0, prompts=1))
    assert one.curves[0]["gained_low"] is None
    assert 0 < one.curves[0]["right_high"] - one.curves[0]["right_low"] < 1


def test_a_random_set_is_seldom_said_to_answer_more() -> None:
    """Three sets whose models differ by chance, on prompts hard for all: nominally 2.5 %, without sets 14 %."""
    random, more = np.random.default_rng(1), 0
    for _world in range(300):
        able_31, hard_N = random.normal(0, 0.2, (3, 1)), random.normal(0, 1, 32)
        right_3N = (able_31 + hard_N + random.normal(0, 0.4, (3, 32)) > 0).astype(float)
        drawn_RN = random.multinomial(32, np.full(32, 1 / 32), size=300) / 32
        more += _over(right_3N[0], list(right_3N[1:]), drawn_RN, random_sets=True).interval[0] > 0
    assert more / 300 < 0.04


def _place(row):
    return tuple(row[key] for key in ("direction", "scores", "kinds", "share"))


def test_the_permutation_test_asks_how_often_other_sets_do_as_much() -> None:
    gained = np.random.default_rng(0).normal(size=(4, 4)) + np.eye(4)
    for removed, sign in ((False, 1), (True, -1)):
        found = _diagonal(gained, removed)
        own = sum(gained[i, i] for i in range(4)) / 4
        sums = [sum(gained[order[j], j] for j in range(4)) / 4 for order in permutations(range(4))]
        assert found["own"] == pytest.approx(own)
        assert found["others"] == pytest.approx((gained.sum() - 4 * own) / 12)
        assert found["p"] == pytest.approx(sum(sign * s >= sign * own - 1e-9 for s in sums) / 24)
    assert _diagonal(np.ones((3, 3)), False) == {"own": 1.0, "others": 1.0, "p": 1.0}
    sure = _diagonal(np.eye(9), False)
    assert sure["p"] == pytest.approx(1 / 5040), "of many tasks some orders are drawn, the own among them"


def test_loops_are_answers_that_repeat() -> None:
    said = Said([[1, 2] * 8, list(range(16)), [5], [7] * 12], ["x", "", " ", "y"], [True] * 4)
    assert said.loops == [True, False, False, True]
    assert said.empty == [False, True, True, False]


def test_steering_is_read_off_score_files() -> None:
    task = TaskRecovery("behaviour", 32, 0.1, 0.9, (0.2, 0.7, 0.5), (0.1, 0.7, 0.5))
    file = scores(utility="anchor", recovery=RecoveryCurve(
        (0, 1, 2), {"a": task, "b": TaskRecovery("kl", 4, 1, 0, (0, 0, 0), (0, 0, 0))}, (0.1, 0.7, 0.5), 1, "prompt", 64
    ))  # fmt: skip
    (row,) = steered({"x": file, "y": scores()})
    assert (row["base"], row["steered"], row["expert"], row["layer"]) == (0.1, 0.7, 0.9, 1)
    assert SHAPE.layers > row["layer"]


def test_the_radar_has_an_axis_a_task_and_the_page_says_what_changed() -> None:
    every = [answers_of(task, seed) for seed, task in enumerate("abc")]
    found = _of(every)
    across = across_tasks(every, {"x": scores(tasks=("a", "b", "c"))}, "neurons", 0.5)
    polygons = _polygons(found.curves)
    assert list(polygons) == ["x"]
    assert list(polygons["x"]) == ["base", "top 25 %", "top 50 %", "expert"]
    for what, values in polygons["x"].items():
        for answers, value in zip(every, values, strict=True):
            base, expert = answers.ends
            share = {"top 25 %": 0.25, "top 50 %": 0.5}.get(what, 0)
            model = {"base": base, "expert": expert}.get(what) or answers.find(TOP, False, "x", BOTH, share)[0]
            assert value == answers.passed_N(model).mean()
    result = result_of(found, every, across, [], ["d: its pairs carry no check."])
    assert set(result.pictures) == {"curves-x", "radar", "across-x"}
    mean = np.mean([answers.passed_N(answers.ends[1]).mean() for answers in every])
    assert f"the expert {100 * mean:.0f} %" in result.answers["behaviour"].text
    assert "d: its pairs carry no check." in result.section
    assert "radar" not in result_of(_of(every[:2]), every[:2], [], [], []).pictures, "two axes are none"


def _of(every) -> AnswerRows:
    found = AnswerRows(0)
    for each in every:
        found.add(each)
    return found
