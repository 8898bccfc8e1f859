"""The part `sets` as a command: what it writes, and how a killed run goes on."""

from __future__ import annotations

import csv
import json

import pytest
import tiny
import yaml
from score_jobs import write_pairs
from study_run import goes_on, killed_at, run
from study_world import write_study

from mergekit_wp.study import set_curves, set_plan, set_rows
from mergekit_wp.study.set_plan import sizes_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    tiny.save_pair(folder, "llama")
    pairs = write_pairs(folder / "pairs.jsonl", tasks=("a", "b", "c"), rows=12)
    files = {"kl": {"tasks": ("a", "b")}, "staged": {"utility": "staged", "tasks": ("a",), "method": "ap"}}
    return write_study(folder, files, prompts={"pairs": pairs, "device": "cpu", "batch_size": 16})


def test_a_killed_run_goes_on_to_the_same_numbers(world, tmp_path, monkeypatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(set_curves, "values_of", killed_at(3, set_curves.values_of, tried, 1))
    monkeypatch.setattr(set_plan, "DRAWS", 2)
    for module in (set_plan, set_rows):
        monkeypatch.setattr(module, "sizes_of", lambda count, _shares=(): sizes_of(count, (0.05,)))
    out, _pieces = goes_on(world, "sets", tmp_path, tried, 3)
    _says_what_was_found(out)


def _says_what_was_found(out) -> None:
    found = json.loads((out / "sets/sets.json").read_text())
    assert [(each["task"], each["scores"], each["held_out"]) for each in found["questions"]] == [
        ("a", ["kl", "staged"], False), ("b", ["kl"], True),
    ]  # fmt: skip
    assert found["without_gap"] == []
    metrics = {(row["side"], row["metric"]) for row in found["curves"] if row["scores"] == "staged" and row["own"]}
    assert metrics == {("up", "anchor"), ("down", "kl")}
    for row in found["ceilings"]:
        if row["set"] == "everything":
            assert row["effect"] == pytest.approx(1, abs=1e-4)
    lines = list(csv.DictReader((out / "sets/sets.csv").open()))
    of = {(line["task"], line["direction"], line["kind"], line["set"], line["k"], line["draw"]): float(line["effect"])
          for line in lines if line["scores"] == "kl"}  # fmt: skip
    for row in (row for row in found["curves"] if row["scores"] == "kl"):
        place, last = (row["task"], row["direction"], row["kind"]), row["k"] == row["components"]
        assert row["effect"] == pytest.approx(of[*place, "all" if last else "top", str(row["k"]), "0"])
        if not last:
            assert row["random"] == pytest.approx([of[*place, "random", str(row["k"]), str(d)] for d in range(2)])
        if row["additive"] is not None:
            assert row["additive"] == pytest.approx(row["effect"] / row["sum_of_scores"])
        assert (row["additive"] is None) == (row["direction"] == "removed")
    assert all(row["additive"] is None for row in found["curves"] if row["scores"] == "staged"), "not off weights"
    for row in found["means"]:
        own = [
            r
            for r in found["curves"]
            if r["own"] and all(r[k] == row[k] for k in ("scores", "direction", "kind", "side", "k"))
        ]
        assert row["tasks"] == len(own)
        assert row["effect"] == pytest.approx(sum(r["effect"] for r in own) / len(own))
        assert row["low"] <= row["effect"] <= row["high"]
    page = (out / "study.html").read_text()
    assert "may be the ones that scores were read off" in page


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        (None, "`prompts`: the part sets needs them; give the study `prompts: {pairs: FILE}`."),
        ("z", "and the score files a, b; give prompts of a task that was scored."),
    ],
)
def test_without_prompts_of_a_scored_task(world, tmp_path, prompts, sentence) -> None:
    content = yaml.safe_load(world.read_text())
    content["prompts"] = {"pairs": write_pairs(tmp_path / "z.jsonl", tasks=(prompts,))} if prompts else {}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    said = run(tmp_path / "s.yaml", "--out", tmp_path / "out", "--only", "sets", code=2)
    assert sentence in said
