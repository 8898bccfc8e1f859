"""Maps of score files whose answer is known, or is found by sorting Python lists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from study_world import SHAPE, inputs_of, scores

from mergekit_wp.geometry import Kind
from mergekit_wp.scores import Scores, TaskScores
from mergekit_wp.study.maps import across_tasks, agreements, compared, task_groups, work
from mergekit_wp.study.maps_page import half_in


def tasks_of(found: Scores, **tables: TaskScores) -> Scores:
    meta = replace(found.meta, tasks=dict.fromkeys(tables, next(iter(found.meta.tasks.values()))))
    return Scores.from_tasks(meta, tables)


def test_a_utility_against_itself_and_a_constant_factor() -> None:
    one = scores(utility="staged")
    double = tasks_of(one, **{t: TaskScores(2 * s.heads, 2 * s.neurons, s.anchor) for t, s in one.tasks.items()})
    inputs = inputs_of({"one": one, "same": one, "double": double})
    rows = list(agreements(inputs.study, inputs))
    assert len(rows) == 3 * 2 * 2 * 3 * 2  # pairs, tasks, kinds, sides, keys
    for row in rows:
        assert row["overlap"] == 1
        assert row["spearman"] == pytest.approx(1)
        assert row["layers"]["one"] == row["layers"]["other"] == [0] * 4
        assert sum(row["layers"]["both"]) == row["in_both"] == row["k"]


def test_agreement_is_that_of_sorted_lists() -> None:
    one, other = scores(0, utility="anchor"), scores(1, utility="staged", method="ap")
    inputs = inputs_of({"wp": one, "ap": other})
    assert {side: at.tolist() for side, at in inputs.sides.items()} == {
        "all": [True] * 4, "up": [True, True, False, False], "down": [False, False, True, True],
    }  # fmt: skip
    rows = {(r["task"], r["kind"], r["side"], r["key"]): r for r in agreements(inputs.study, inputs)}
    for (task, kind, side, key), row in rows.items():
        layers = [0, 1] if side != "down" else []  # the anchor does not see what is above it
        tables = [getattr(s.tasks[task], kind) for s in (one, other)]
        places = [(layer, i) for layer in layers for i in range(tables[0].shape[1])]
        size = abs if key == "absolute" else float
        tops = [
            set(sorted(places, key=lambda at, t=table: -size(float(t[at])))[: inputs.study.top[kind]])
            for table in tables
        ]
        shared = tops[0] & tops[1]
        assert row["components"] == len(places)
        assert row["in_both"] == len(shared)
        assert row["overlap"] == (len(shared) / row["k"] if places else None)
        assert row["by_chance"] == (pytest.approx(row["k"] / len(places)) if places else 0)
        alone = [sum(at[0] == layer for at in tops[0] - tops[1]) for layer in range(4)]
        assert row["layers"]["one"] == alone
        assert row["compared"] == "AP and WP"
        assert row["differ"] == ["method", "utility"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 9}, "samples"),
        ({"method": "attr"}, "methods"),
        ({"method": "atp"}, "AP and WP"),
        ({"utility": "staged"}, "utilities"),
        ({"answer_tokens": 8}, "utilities"),
        ({"gap": "mean"}, "settings"),
    ],
)
def test_what_two_files_differ_in(changes: dict, what: str) -> None:
    assert compared(scores().meta, scores(**changes).meta) == what


def test_identical_tasks_and_all_components_give_equal_rows() -> None:
    one = scores()
    a, b = one.tasks["a"], one.tasks["b"]
    inputs = inputs_of({"f": tasks_of(one, x=a, b=b, y=a)})
    for row in across_tasks(inputs.study, inputs, task_groups(inputs, "f")[0]):
        shared, at = row["shared"], row["tasks"].index
        assert shared[at("x")] == shared[at("y")]
        assert shared[at("x")][at("y")] == row["k"] == shared[at("b")][at("b")]
        assert shared[at("x")][at("b")] < row["k"]
        assert sum(row["in_exactly"]) == row["components"] == pytest.approx(sum(row["in_exactly_by_chance"]))
        assert sum(m * count for m, count in enumerate(row["in_exactly"])) == sum(row["sizes"])
        assert row["shared_by_chance"][0][1] == pytest.approx(row["k"] ** 2 / row["components"])
    whole = inputs_of({"f": one}, heads=16, neurons=80)
    for row in across_tasks(whole.study, whole, task_groups(whole, "f")[0]):
        assert row["shared"] == [[row["components"]] * 2] * 2
        assert row["in_exactly"] == [0, 0, row["components"]]


def test_other_experts_join_where_they_were_scored_alike() -> None:
    files = {"kl": scores(0), "ap": scores(1, method="ap")}
    inputs = inputs_of(files, {"code": scores(2, tasks=("a", "code"))})
    assert list(task_groups(inputs, "kl")[0].tasks) == ["kl: a", "b", "code: a", "code"]
    assert list(task_groups(inputs, "ap")[0].tasks) == ["a", "b"]


def test_what_was_not_scored_is_in_no_set() -> None:
    mask = torch.zeros(SHAPE.layers, SHAPE.heads, dtype=torch.bool)
    mask[2, :2] = True
    found = scores(tasks=("a",))
    part = Scores.from_tasks(found.meta, found.tasks, {"heads": mask, "neurons": torch.zeros(4, 20).bool()})
    inputs = inputs_of({"part": part, "whole": found})
    rows = {(r["kind"], r["key"]): r for r in agreements(inputs.study, inputs)}
    assert rows["heads", "signed"]["components"] == 2
    assert rows["neurons", "signed"]["overlap"] is None
    assert rows["neurons", "signed"]["spearman"] is None
    result = work(inputs.study, inputs, lambda *_: lambda _done: None)
    top = result.data["files"]["part"]["tasks"]["a"][Kind.HEAD]["top"]["all"]["signed"]
    assert {name for name, _ in top} == {"L2H0", "L2H1"}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
def test_half_of_a_top_set_is_in_no_fewer_adjacent_layers(counts):
    first, last = half_in(np.array(counts))
    inside = sum(counts[first : last + 1])
    assert 2 * inside >= sum(counts)
    width = last + 1 - first
    assert all(sum(counts[i : i + width]) <= inside for i in range(len(counts) - width + 1))
    assert all(2 * sum(counts[i : i + width - 1]) < sum(counts) for i in range(len(counts) - width + 2))
