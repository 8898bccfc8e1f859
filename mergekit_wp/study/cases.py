"""Cases: what models say to single prompts, side by side (Figs. 35 and 36 of arXiv 2604.13694).

Cases are chosen by rule. Of a task's prompts, in their order, those are cases that the expert answers right and the
base does not; of these two are shown: the first that the base answers right with the top heads and neurons of the first
score file restored, and the first that it does not. Beside base and expert stand, of each file, the base with its top
heads, its top neurons and both, and the expert without them, of the largest share of the study's `answers`; the paper
takes the size at which its curve has fallen by half, which differs by task and needs the curve first. What is shown is
cut to 60 words, as there; `cases.json` has all of it.

They are examples, chosen by what one patch does: how often it restores, of all cases, is said here, and how often every
set does, with controls, in the part `answers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from mergekit_wp.console import StartProgress
from mergekit_wp.page import render
from mergekit_wp.scores import Scores
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.study.answer_plan import BOTH, KINDS, Model, chosen_files, ends, top_models
from mergekit_wp.study.answer_run import CODE, GradedTask, Said, Speakers, answered, questions_of
from mergekit_wp.study.held_out import check_style
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.parts import Part, PartResult
from mergekit_wp.study.study_spec import Answering, Study

WORDS = 60


@dataclass(frozen=True)
class TaskCases:
    """The cases of a task. numbers: of all prompts that are any, and whether the patch restores them."""

    question: GradedTask
    numbers: dict[int, bool]

    @property
    def firsts(self) -> list[int]:
        """The first that the patch restores and the first that it does not, as far as there are such, in order."""
        found = (next((i for i, right in self.numbers.items() if right == wanted), None) for wanted in (True, False))
        return sorted(number for number in found if number is not None)

    @property
    def shown(self) -> GradedTask:
        """The question of the prompts that are shown alone, in their order."""
        question, own = self.question, self.firsts
        texts, prompts = [question.texts[i] for i in own], [question.prompts[i] for i in own]
        return replace(question, texts=texts, prompts=prompts, checks=[question.checks[i] for i in own])


def work(study: Study, inputs: Inputs, progress: StartProgress) -> PartResult:
    """The part: base, expert and one patch answer all prompts of a task; the others those that are shown."""
    check_style(inputs, inputs.ready[1].style)
    how = study.answering()
    files = chosen_files(inputs.scores, how)
    questions, left_out = questions_of(inputs, files, how)
    first, then = (Resume(inputs.kept and inputs.kept / f"{PART.name}-{name}", "run") for name in ("choice", "shown"))

    def forget() -> None:
        first.forget()
        then.forget()

    if not questions:
        return _result([], left_out)
    speakers = Speakers.of(inputs, how)
    deciding = [_deciding(files, each.task, how) for each in questions]
    asked = [{model.key: model for model in models} for models in deciding]
    said = answered(speakers, questions, asked, first, progress)
    chosen = [
        _chosen(each, [own[model.key] for model in models])
        for each, models, own in zip(questions, deciding, said, strict=True)
    ]
    shown = [each for each in chosen if each.numbers]
    models = [_models(files, each.question.task, how) for each in shown]
    asked = [{model.key: model for model in own} for own in models]
    said = answered(speakers, [each.shown for each in shown], asked, then, progress)
    every = [*zip(shown, models, said, strict=True)]
    without = [f"{each.question.task}: there is no prompt that the expert answers right and the base does not."
               for each in chosen if not each.numbers]  # fmt: skip
    rows = [_row(*each) for each in every]
    return replace(_result(rows, [*left_out, *without]), finished=forget)


def cost(study: Study, inputs: Inputs) -> str:
    """How much is to be generated, in words; at most, since there need not be cases."""
    how = study.answering()
    files = chosen_files(inputs.scores, how)
    questions, _left_out = questions_of(inputs, files, how)
    answers = sum(
        len({m.key for m in _deciding(files, each.task, how)}) * len(each.prompts)
        + len({m.key for m in _models(files, each.task, how)}) * min(2, len(each.prompts))
        for each in questions
    )
    return f"at most {answers:,} answers of at most {how.tokens} tokens"


def _deciding(files: Mapping[str, Scores], task: str, how: Answering) -> list[Model]:
    """Base, expert, and the base with the top of the first file that ranks the task."""
    name, scores = next((name, scores) for name, scores in files.items() if task in scores.tasks)
    return [*ends(scores.meta.geometry), top_models(name, scores, task, BOTH, how.shares[-1])[0]]


def _models(files: Mapping[str, Scores], task: str, how: Answering) -> list[Model]:
    """All whose answers are shown, in order: base and what it gets, expert and what it loses."""
    base, expert = ends(next(iter(files.values())).meta.geometry)
    patched = [
        top_models(name, scores, task, kinds, how.shares[-1])
        for name, scores in files.items() if task in scores.tasks for kinds in KINDS
    ]  # fmt: skip
    return [base, *(restored for restored, _removed in patched), expert, *(removed for _restored, removed in patched)]


def _chosen(question: GradedTask, said: Sequence[Said]) -> TaskCases:
    base, expert, patched = (each.passed for each in said)
    return TaskCases(question, {i: patched[i] for i in range(len(question.prompts)) if expert[i] and not base[i]})


def _row(chosen: TaskCases, models: Sequence[Model], said: Mapping[str, Said]) -> dict[str, Any]:
    """A task with its cases, each with all that was said."""
    question, shown = chosen.question, chosen.shown
    patch = next(model for model in models if model.kinds == BOTH)
    return {
        "task": question.task, "held_out": question.held_out, "prompts": len(question.prompts),
        "cases": len(chosen.numbers), "restored": sum(chosen.numbers.values()), "patch": patch.called,
        "shown": [
            {
                "number": number, "restored": chosen.numbers[number], "prompt": shown.texts[place],
                "check": {"grader": check.grader, "name": check.name, "kwargs": check.kwargs},
                "said": [
                    {"model": model.called, "size": model.subset.count, "answer": said[model.key].texts[place],
                     "passed": said[model.key].passed[place], "loops": said[model.key].loops[place]}
                    for model in models
                ],
            }
            for place, (number, check) in enumerate(zip(chosen.firsts, shown.checks, strict=True))
        ],
    }  # fmt: skip


def _result(rows: Sequence[dict[str, Any]], left_out: Sequence[str]) -> PartResult:
    found = findings(rows)
    lines = [
        [row["task"], case["number"], case["restored"], said["model"], said["size"], said["passed"], said["loops"],
         said["answer"]]
        for row in rows for case in row["shown"] for said in case["said"]
    ]  # fmt: skip
    head = ["task", "prompt", "restored", "model", "size", "passed", "loops", "answer"]
    return PartResult(
        {"tasks": list(rows), "left_out": list(left_out)}, {"cases": [head, *lines]} if lines else {}, {},
        _section(rows, left_out, found), headline=next(iter(found), ""),
    )  # fmt: skip


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How often the patch restores, in sentences made from the numbers."""
    return [
        f"{row['task']}: of {row['prompts']} prompts the expert answers {row['cases']} right that the base does not; "
        f"the {row['patch']} answers {row['restored']} of these."
        for row in rows
    ]


def _section(rows: Sequence[Mapping[str, Any]], left_out: Sequence[str], found: Sequence[str]) -> Markup:
    shown = [
        {**case, "task": row["task"], "check": _check(case["check"]),
         "said": [{**each, "answer": _cut(each["answer"])} for each in case["said"]]}
        for row in rows for case in row["shown"]
    ]  # fmt: skip
    seen = [row["task"] for row in rows if not row["held_out"]]
    return render("study_cases.html", findings=found, cases=shown, left_out=left_out, seen=", ".join(seen), words=WORDS)


def _check(check: Mapping[str, Any]) -> str:
    given = ", ".join(f"{name} {value}" for name, value in check["kwargs"].items())
    return f"{check['grader']}: {check['name']}{f' ({given})' if given else ''}"


def _cut(answer: str) -> str:
    """The first words of an answer, with its lines."""
    ends = [word.end() for word in re.finditer(r"\S+", answer)]
    return answer if len(ends) <= WORDS else f"{answer[: ends[WORDS - 1]]} …"


PART = Part(
    name="cases",
    title="What they say to single prompts",
    work=work,
    settings=("prompts", "answers", "seed"),
    models=True,
    prompts=True,
    grades=True,
    cost=cost,
    code=("study/cases.py", *CODE),
)
