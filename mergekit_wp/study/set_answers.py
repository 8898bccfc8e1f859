"""Answers: how much of a capability sets of components carry, by what models say (Figs. 12, 14, 16, 34 of arXiv
2604.13694).

The part `sets` reads the next token; this one has models answer the prompts, and runs the checks of the pairs. Which
models answer is in `answer_plan`, how in `answer_run`, the numbers in `answer_rows`, and what is said and drawn in
`answer_page`. The paper gives no controls, counts or intervals; here every set stands beside random ones of its size,
and every share of right answers beside how sure it is. An answer that runs in a loop may pass its check (the paper's
own example in Fig. 35 is one), so loops and empty answers are counted.

Where the paper is silent: knocking out is exchanging for the base's slices, not zeroing them; rankings are those of the
whole model, each side's share of its own; answers have at most 256 tokens (the paper: 512) unless the study says more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_wp.console import StartProgress
from mergekit_wp.scores import Scores
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.study.answer_page import result_of
from mergekit_wp.study.answer_plan import ACROSS, Model, chosen_files, models_of
from mergekit_wp.study.answer_rows import AnswerRows, Answers, across_tasks, steered
from mergekit_wp.study.answer_run import CODE, GradedTask, Speakers, answered, questions_of
from mergekit_wp.study.held_out import check_style
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.parts import Part, PartResult
from mergekit_wp.study.study_spec import Study


def work(study: Study, inputs: Inputs, progress: StartProgress) -> PartResult:
    """The part: every model answers the prompts of its task."""
    check_style(inputs, inputs.ready[1].style)
    how = study.answering()
    files = chosen_files(inputs.scores, how)
    questions, left_out = questions_of(inputs, files, how)
    found, every = AnswerRows(study.seed), list[Answers]()
    resume = Resume(inputs.kept and inputs.kept / PART.name, "run")
    if questions:
        models = _models(study, files, questions)
        speakers = Speakers.of(inputs, how)
        asked = [{model.key: model for model in own} for own in models]
        said = answered(speakers, questions, asked, resume, progress)
        every = [Answers(*each) for each in zip(questions, models, said, strict=True)]
    for each in every:
        found.add(each)
    across = across_tasks(every, files, ACROSS, how.shares[-1])
    result = result_of(found, every, across, steered(inputs.scores), left_out)
    return replace(result, finished=resume.forget)


def cost(study: Study, inputs: Inputs) -> str:
    """How much is to be generated, in words."""
    files = chosen_files(inputs.scores, study.answering())
    questions, _left_out = questions_of(inputs, files, study.answering())
    counts = [len({model.key for model in own}) for own in _models(study, files, questions)]
    answers = sum(count * len(each.prompts) for count, each in zip(counts, questions, strict=True))
    return f"{answers:,} answers of at most {study.answering().tokens} tokens, by {sum(counts)} models"


def _models(study: Study, files: Mapping[str, Scores], questions: Sequence[GradedTask]) -> list[list[Model]]:
    tasks = [each.task for each in questions]
    return [models_of(files, task, tasks, study.answering(), study.seed) for task in tasks]


PART = Part(
    name="answers",
    title="What models with sets of components answer",
    work=work,
    settings=("prompts", "answers", "seed"),
    models=True,
    prompts=True,
    grades=True,
    cost=cost,
    code=(
        "study/set_answers.py",
        "study/answer_rows.py",
        "study/answer_page.py",
        "study/set_rows.py",
        "study/drawings.py",
        "intervals.py",
        *CODE,
    ),
)
