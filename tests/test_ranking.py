"""What is said of score files, on made-up files whose answer is known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_wp.console import percent
from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import Geometry, Kind
from mergekit_wp.ranking import check_comparable, compare, findings, layer_shares_of, spearman, strongest
from mergekit_wp.score_tables import comparison
from mergekit_wp.scores import ModelId, ScoreMeta, Scores, TaskMeta, TaskScores, UtilityStats, write_scores
from mergekit_wp.scores_cli import main

GEOMETRY = Geometry("LlamaForCausalLM", 4, 2, 2, 8, 10, 16, 97)


def made(
    cells: dict[str, dict[str, float]], utility: str = "kl", geometry: Geometry = GEOMETRY, base: str = "a", **masks
) -> Scores:
    """A score file of tasks with these scores by name (L0N3), all others 0."""
    tasks = {}
    for task, named in cells.items():
        tables = {kind: torch.zeros(geometry.layers, geometry.count(kind)) for kind in Kind}
        for name, score in named.items():
            kind = Kind.HEAD if "H" in name else Kind.NEURON
            layer, index = map(int, name.removeprefix("L").replace("H", "N").split("N"))
            tables[kind][layer, index] = score
        anchor = None if utility == "kl" else torch.zeros(geometry.d_model)
        tasks[task] = TaskScores(tables[Kind.HEAD], tables[Kind.NEURON], anchor)
    read = {"kl": ("kl",), "staged": ("anchor", "kl")}[utility]
    about = TaskMeta(4, 4, dict.fromkeys(read, UtilityStats(3, 1, 0.25)))
    anchored = utility != "kl"
    meta = ScoreMeta(
        base=ModelId("base", None, "c" * 64, base * 64), expert=ModelId("user/expert", "main", "c" * 64, "b" * 64),
        geometry=geometry, tasks=dict.fromkeys(cells, about), method="writeback", utility=utility, gap="sample",
        split="half" if anchored else None, anchor_layer=1 if anchored else None, dtype="float32", device="cpu", seed=0,
        versions={"torch": "2"}, date="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return Scores.from_tasks(meta, tasks, masks or None)


def test_where_the_score_lies_and_who_carries_it():
    cells = {f"L0N{i}": 0.1 for i in range(5)} | {"L0H1": 0.12, "L1H0": 0.2, "L2N9": 0.08, "L3H1": 0.1, "L3N0": -0.25}
    assert findings(made({"t": cells}), "instruction") == [
        "62 % of the instruction score lies in layer 0.",
        "Five neurons carry 50 % (L0N0, L0N1, L0N2, L0N3, L0N4); the strongest head, L1H0, 20 %. All heads have 42 %, "
        "all neurons 58 %.",
        "Added up, the scores come to 75 % (100 % for, 25 % against) of the gap. A merge takes negative scores for 0. "
        "Each was measured alone: all components together may restore more or less than that.",
    ]


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ({"L3N1": 0.02}, "100 % of the score lies in layer 3."),
        ({"L3N1": 0.997, "L0H0": 0.003}, "over 99 % of the score lies in layer 3."),
        ({"L2N1": 0.4, "L1H1": 0.4, "L3N0": 0.2}, "80 % of the score lies in layers 1 and 2."),
        ({"L0N1": 0.5, "L1H1": 0.5}, "50 % of the score lies in layer 0."),  # a tie goes to the lower layer
        ({"L0N1": -0.5, "L1H1": 0.1}, "100 % of the score lies in layer 1."),
        ({"L0N1": -0.5}, "No component has a positive score"),
        ({}, "No component has a positive score"),
    ],
)
def test_the_first_finding(cells, sentence):
    assert findings(made({"t": cells}))[0].lower().startswith(sentence.lower())


def test_score_over_many_layers_is_called_spread():
    geometry = replace(GEOMETRY, layers=12)
    scores = made({"t": {f"L{layer}N0": 0.1 if layer != 7 else 0.15 for layer in range(12)}}, geometry=geometry)
    assert findings(scores)[0] == (
        "The score is spread: half of it takes 6 of 12 layers, and layer 7, the largest, has 12 %."
    )


def test_shares_of_two_gaps_are_not_added_up():
    scores = made({"t": {"L0N1": 0.3, "L1H0": 0.1, "L2N2": 0.5, "L3N2": -0.1}}, utility="staged")
    assert findings(scores)[-1].startswith(
        "Added up, the scores of layers 0 to 1 come to 40 % of the gap at layer 1, those above to 40 % (50 % for, 10 % "
        "against) of the gap at the end. A merge"
    )


def test_a_subset_says_so_and_its_zeros_lead_nothing():
    heads = torch.zeros(4, 2, dtype=torch.bool)
    heads[2, 1] = True
    scores = made({"t": {"L2H1": -0.1, "L0N3": 0.2}}, heads=heads, neurons=torch.ones(4, 10, dtype=torch.bool))
    assert [c.name for c in strongest(scores, Kind.HEAD, 5)] == ["L2H1"]
    assert "Only 41 components were scored; all shares are of these." in findings(scores)


def test_percent_does_not_round_to_nothing_or_to_all():
    shown = {0: "0 %", 1e-4: "under 1 %", 0.184: "18 %", 0.9951: "over 99 %", 1: "100 %", 1 - 1e-15: "100 %",
             -1e-3: "above -1 %", -0.25: "-25 %", 1.124: "112 %"}  # fmt: skip
    assert {value: percent(value) for value in shown} == shown
    assert [percent(0.0004, 2), percent(0.999, 1), percent(-0.5, 1)] == ["0.04 %", "99.9 %", "-50.0 %"]


values = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=30)


@settings(max_examples=60, deadline=None)
@given(values, st.randoms(use_true_random=False))
def test_spearman_is_pearson_of_mean_ranks(a, random):
    b = random.sample(a, len(a))
    got = spearman(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    if len(set(a)) == 1:
        assert got is None
        return

    def ranks(xs):
        return torch.tensor([sum(y < x for y in xs) + (sum(y == x for y in xs) + 1) / 2 for x in xs])

    assert got == pytest.approx(float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]), abs=1e-6)


def test_files_are_compared_by_task_and_kind():
    geometry = replace(GEOMETRY, neurons=500)  # 2,000 neurons: 1 % is 20, and 20 is 20
    one = made({"t": {f"L0N{i}": 1 - i / 100 for i in range(40)}, "u": {}}, geometry=geometry)
    other = made({"t": {f"L0N{i + 5}": 1 - i / 100 for i in range(40)}, "v": {}}, geometry=geometry)
    found = {(a.task, a.kind): a for a in compare(one, other)}
    assert set(found) == {("t", "heads"), ("t", "neurons")}  # of a single task in common the mean is that task
    assert found["t", Kind.NEURON].overlap == {20: 15 / 20}
    assert found["t", Kind.HEAD].overlap == {1: None, 8: None}  # nothing positive
    assert found["t", Kind.HEAD].spearman is None
    itself = next(a for a in compare(one, one) if a.kind == Kind.NEURON and a.task == "t")
    assert (itself.overlap, itself.spearman) == ({20: 1.0}, pytest.approx(1))


def test_a_mean_is_compared_over_the_tasks_of_both():
    """And not over each file's own, which would set other tasks against each other."""
    cells = {task: {f"L0N{i + 3 * n}": 1 - i / 10 for i in range(9)} for n, task in enumerate("abc")}
    geometry = replace(GEOMETRY, neurons=20)
    whole, part = (made({task: cells[task] for task in tasks}, geometry=geometry) for tasks in ("abc", "ab"))
    found = {(a.task, a.kind): a for a in compare(whole, part)}
    assert found[None, Kind.NEURON].spearman == pytest.approx(1)
    assert set(found[None, Kind.NEURON].overlap.values()) == {1.0}
    (line,) = [x for x in comparison({"x": whole, "y": part}) if x[2] == "neurons" and x[1] not in "ab"]
    assert line[1] == "tasks of both"
    apart = compare(whole, other := made({"d": cells["a"]}, geometry=geometry))
    assert [a.task for a in apart] == [None, None], "two experts, each by its own tasks"
    assert comparison({"x": whole, "y": other})[1][1] == "all tasks of each"


def test_chance_is_that_of_the_smaller_set():
    """Three positive scores against twenty, of 2,000: each of the three is hit by 20 in 2,000, and counts 1 in 20."""
    geometry = replace(GEOMETRY, neurons=500)
    many, few = (made({"t": {f"L0N{i}": 1 - i / 100 for i in range(n)}}, geometry=geometry) for n in (20, 3))
    (found,) = [a for a in compare(many, few) if a.kind == Kind.NEURON]
    assert (found.overlap, found.by_chance) == ({20: 3 / 20}, {20: 3 / 2000})
    (heads,) = [a for a in compare(many, few) if a.kind == Kind.HEAD]
    assert set(heads.by_chance.values()) == {None}


def test_only_positive_scores_are_among_the_best():
    one, other = made({"t": {"L0N1": 1.0, "L0N2": 0.5}}), made({"t": {"L0N1": 1.0, "L3N3": -1.0}})
    (agreement,) = [a for a in compare(one, other) if a.kind == Kind.NEURON]
    assert agreement.overlap == {1: 1.0, 2: 0.5}


def test_other_bases_and_shapes_are_refused_in_a_sentence():
    one = made({"t": {}})
    with pytest.raises(BadInput, match=r"y: scores on the base base, x on base, which is another model; .*--any-base"):
        check_comparable({"x": one, "y": made({"t": {}}, base="f")}, any_base=False)
    check_comparable({"x": one, "y": made({"t": {}}, base="f")}, any_base=True)
    deep = made({"t": {}}, geometry=replace(GEOMETRY, layers=5))
    with pytest.raises(BadInput, match="y: made for another shape than x"):
        check_comparable({"x": one, "y": deep}, any_base=True)


def test_layer_shares_sum_to_one():
    shares = layer_shares_of(made({"t": {"L0N1": 0.3, "L2H0": 0.1, "L2N0": -1.0}}))
    assert shares[Kind.NEURON].tolist() == pytest.approx([0.75, 0, 0, 0])
    assert shares[Kind.HEAD].tolist() == pytest.approx([0, 0, 0.25, 0])


def test_the_command_prints_tables_and_json(tmp_path):
    one = made({"t": {"L0N1": 0.3, "L2H0": 0.1}, "u": {"L0N1": 0.1}})
    for name in ("a", "b"):
        write_scores(one, tmp_path / f"{name}.safetensors")
    files = [f"x\x1b={tmp_path / 'a.safetensors'}", f"{tmp_path / 'b.safetensors'}"]
    text = CliRunner().invoke(main, files)
    assert text.exit_code == 0, text.output
    assert "\x1b" not in text.output
    lines = text.output.splitlines()
    assert any(line.split() == ["0", "0.0", "%", "80.0", "%", "80.0", "%"] for line in lines)
    assert any("top 1: 1.00" in line and "1.000" in line for line in lines)
    data = json.loads(CliRunner().invoke(main, [*files, "--json", "--top", "1"]).output)
    assert data["files"]["x\x1b"]["tasks"]["t"]["top"]["neurons"] == [{"name": "L0N1", "score": pytest.approx(0.3)}]
    assert data["files"]["x\x1b"]["all_tasks"]["layers"]["neurons"][0] == pytest.approx(0.8)
    assert len(data["comparison"]) == 6
    twice = CliRunner().invoke(main, [files[1], files[1]])
    assert twice.exit_code == 2
    assert "tell them apart with NAME=FILE" in twice.output
