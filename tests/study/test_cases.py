"""The part `cases`: chosen by its rule, with the verdicts of the checks."""

from __future__ import annotations

import json

import pytest
import yaml
from answer_world import answer_world, rows_of
from study_run import goes_on, killed_at

from mergekit_wp.scoring.anchor.graders import parse_check
from mergekit_wp.study import answer_run, cases
from mergekit_wp.study.answer_run import GradedTask, Said
from mergekit_wp.study.cases import WORDS, _chosen, _cut


def said(*passed: int) -> Said:
    return Said([[1]] * len(passed), ["w"] * len(passed), [bool(each) for each in passed])


def test_cases_are_the_first_that_the_patch_restores_and_the_first_that_it_does_not() -> None:
    numbers = [*range(6)]
    question = GradedTask("t", [f"p{i}" for i in numbers], [[i] for i in numbers], numbers, True, True)
    expert, base = said(1, 1, 1, 0, 1, 1), said(1, 0, 0, 0, 0, 0)
    found = _chosen(question, [base, expert, said(1, 0, 0, 1, 1, 1)])
    assert (list(found.numbers), found.firsts, found.shown.texts) == ([1, 2, 4, 5], [1, 4], ["p1", "p4"])
    assert (found.shown.prompts, found.shown.checks) == ([[1], [4]], [1, 4])
    assert _chosen(question, [base, expert, said(0, 1, 1, 1, 1, 1)]).firsts == [1]
    assert _chosen(question, [expert, expert, expert]).firsts == []


def test_an_answer_is_cut_after_its_words_with_its_lines() -> None:
    words = [f"w{i}" for i in range(WORDS + 1)]
    assert _cut("\n".join(words)) == "\n".join(words[:-1]) + " \u2026"
    assert _cut(" ".join(words[:-1]) + "\n") == " ".join(words[:-1]) + "\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return answer_world(tmp_path_factory.mktemp("cases"))


def test_what_is_shown_is_what_models_say(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cases, "KINDS", ("neurons", "both"))
    made: list[int] = []
    monkeypatch.setattr(answer_run, "generate_answers", killed_at(8, answer_run.generate_answers, made, 2))
    out, _pieces = goes_on(world, "cases", tmp_path, made, 8)  # 6 are of the choice, the rest of what is shown
    found = json.loads((out / "cases/cases.json").read_text())
    assert len(found["left_out"]) == 2
    content = yaml.safe_load(world.read_text())
    rows = {(row["task"], row["prompt"]): row for row in rows_of(content["prompts"]["pairs"])}
    assert [task["task"] for task in found["tasks"]] == ["a", "b"]
    for task in found["tasks"]:
        assert task["cases"] >= len(task["shown"]) >= 1
        for case in task["shown"]:
            check, by = parse_check(rows[task["task"], case["prompt"]]["check"], ""), {}
            for each in case["said"]:
                assert check.passes(each["answer"]) == each["passed"]
                by[each["model"]] = each["passed"]
            assert by["expert"]
            assert not by["base"]
            assert by[task["patch"]] == case["restored"]
            files = ("ap", "kl") if task["task"] == "a" else ("kl",)
            assert list(by) == [
                "base", *(f"base with {name}" for name in _sets(files, task["task"])),
                "expert", *(f"expert without {name}" for name in _sets(files, task["task"])),
            ]  # fmt: skip
    page = (out / "study.html").read_text()
    assert page.count("<h3>") == sum(len(task["shown"]) for task in found["tasks"])
    assert "Left out" in page


def _sets(files, task) -> list[str]:
    kinds = ("neurons", "heads and neurons")
    return [f"top 25 % of {kind} ({name}, {task})" for name in files for kind in kinds]
