"""Sets: how much of a capability sets of components carry, by forward passes (Figs. 8-10, 16, 22-27 of arXiv
2604.13694).

For every score file and task, curves over the size of a set: restored in the base, and taken out of the expert
(`set_effects`); the top of the ranking beside random sets, random sets with as many in each layer, and the worst of the
ranking (`set_plan`). Each curve ends at all that its components can do, which is less than 1: keys, values, norms,
embeddings and the output head belong to no component. The paper prints neither these ceilings nor a spread of draws.

Prompts are those that no score was read off, where the study has enough of them (`held_out`). What was measured is kept
beside the output, `STEP` sets at a time, until the part is written.

Legend: C sets, N prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from mergekit_wp.console import StartProgress, Tick
from mergekit_wp.documents import now, versions
from mergekit_wp.errors import enough_memory
from mergekit_wp.foreign import logger
from mergekit_wp.scoring.batching import TaskTokens
from mergekit_wp.scoring.models.exchanged import Exchange, ExchangedStack
from mergekit_wp.scoring.models.load import ModelPair, load_pair
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.whole_answers import answers_for
from mergekit_wp.study.held_out import check_style, check_tasks, unseen
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.parts import Part, PartResult
from mergekit_wp.study.set_effects import (
    KL,
    STEP,
    Along,
    Passage,
    direction_of,
    key_of,
    metrics_of,
    values_of,
)
from mergekit_wp.study.set_page import result_of
from mergekit_wp.study.set_plan import Trial, ceilings, ranked
from mergekit_wp.study.set_rows import Measured, SetRows
from mergekit_wp.study.study_spec import Study

LOG = logger(__name__)


@dataclass(frozen=True)
class Question:
    """One task's prompts, and the score files whose rankings of it are tried on them."""

    tokens: TaskTokens
    files: list[str]
    held_out: bool
    known: bool

    @property
    def about(self) -> dict[str, object]:
        prompts, answers = len(self.tokens.scoring), bool(self.tokens.answers)
        return {"task": self.tokens.task, "scores": self.files, "prompts": prompts, "held_out": self.held_out,
                "known": self.known, "whole_answers": answers}  # fmt: skip


def work(study: Study, inputs: Inputs, progress: StartProgress) -> PartResult:
    """The part: one forward pass of every set over all prompts of its task."""
    job, ready = inputs.ready
    check_style(inputs, ready.style)
    check_tasks(inputs, [task.task for task in ready.tasks], job.pairs)
    pair = load_pair(job, ready.checked)
    LOG.info(pair.reason)
    resume = Resume(inputs.kept and inputs.kept / PART.name, "step")
    with enough_memory(f"prompts: batch_size {job.batch_size}: they do not fit on {pair.device}; lower it."):
        questions = _questions(inputs, pair, progress)
        found = _measured(study, inputs, pair, questions, resume, progress)
    return replace(result_of(found, [each.about for each in questions]), finished=resume.forget)


def _questions(inputs: Inputs, pair: ModelPair, progress: StartProgress) -> list[Question]:
    """The tasks that were scored, in the order of the prompts; one for each length of answer that files were read
    over."""
    job, ready = inputs.ready
    metas, found = (scores.meta for scores in inputs.scores.values()), []
    chosen = unseen(job, metas, ready.tasks, ready.style)
    for task in ready.tasks:
        files: dict[int, list[str]] = defaultdict(list)
        for name, scores in inputs.scores.items():
            if task.task in scores.tasks:
                files[scores.meta.answer_tokens or 0].append(name)
        of_task = chosen[task.task]
        tokens = TaskTokens(task.task, [], None, [task.scoring[number] for number in of_task.numbers])
        for length, names in files.items():
            asked = replace(job, utility=KL, answer_tokens=length)
            (answered,) = answers_for(asked, ready.checked, pair.expert, ready.tokenizer, [tokens], start=progress)
            found.append(Question(answered, names, of_task.held_out, of_task.known))
    return found


Plan = dict[str, Exchange]
"""Exchanges by what tells them apart: those that two score files have in common are tried once."""


def _measured(
    study: Study, inputs: Inputs, pair: ModelPair, questions: Sequence[Question], resume: Resume,
    progress: StartProgress,
) -> SetRows:  # fmt: skip
    job, _ready = inputs.ready
    stack, found = ExchangedStack(pair.base, pair.expert, pair.geometry), SetRows(study.seed, job.gap_floor)
    trials = [
        {n: [*ceilings(inputs.geometry), *ranked(inputs.scores[n], each.tokens.task, study.seed)] for n in each.files}
        for each in questions
    ]
    plans = [{removed: _plan(own, removed) for removed in (False, True)} for own in trials]
    along = [_along(inputs, each) for each in questions]
    resume.begin(_decides(inputs, pair, questions, plans, along), now())
    resume.spare_others()
    tick = progress(sum(len(plan) for own in plans for plan in own.values()), "exchanging sets", "set")
    for number, (each, own, plan) in enumerate(zip(questions, trials, plans, strict=True)):
        metrics = metrics_of(pair, along[number])
        for removed in (False, True):
            ends = (pair.expert, pair.base) if removed else (pair.base, pair.expert)
            direction = direction_of(*ends, each.tokens, metrics, job.batch_size)
            values = _in_steps(stack, list(plan[removed].values()), direction, resume, 2 * number + removed, tick)
            places = {key: place for place, key in enumerate(plan[removed])}
            for name in each.files:
                tried = [trial for trial in own[name] if trial.removed == removed]
                rows = [places[key_of(trial.exchange)] for trial in tried]
                for metric in (m for m in metrics if m in (KL, *_along_of(inputs, name, each.tokens.task))):
                    ends_N = direction.of_recipient[metric], direction.of_donor[metric]
                    measured = Measured(name, each.tokens.task, metric, removed, tried, values[metric][rows], *ends_N)
                    found.add(inputs.scores[name], measured)
    return found


def _plan(own: Mapping[str, list[Trial]], removed: bool) -> Plan:
    tried = (trial for trials in own.values() for trial in trials if trial.removed == removed)
    return {key_of(trial.exchange): trial.exchange for trial in tried}


def _in_steps(
    stack: ExchangedStack, exchanges: list[Exchange], direction: Passage, resume: Resume, number: int, tick: Tick
) -> dict[str, torch.Tensor]:
    """As `values_of`, some sets at a time; those that are kept are not tried again."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in direction.metrics}
    for step, begin in enumerate(range(0, len(exchanges), STEP)):
        some = exchanges[begin : begin + STEP]
        values = resume.load(number, step, direction.empty(len(some)))
        if values is None:
            values = values_of(stack, some, direction, tick)
            resume.save(number, step, values)
        else:
            tick(len(some))
        for name, values_CN in values.items():
            found[name].append(values_CN)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _along(inputs: Inputs, each: Question) -> dict[str, Along]:
    """The directions of the question's score files, by name of the metric."""
    return {m: v for name in each.files for m, v in _along_of(inputs, name, each.tokens.task).items()}


def _along_of(inputs: Inputs, name: str, task: str) -> dict[str, Along]:
    scores = inputs.scores[name]
    v_D, layer = scores.tasks[task].anchor, scores.meta.anchor_layer
    if v_D is None or layer is None:
        return {}
    metric = "projection" if scores.meta.utility == "projection" else "anchor"
    return {f"{metric} of {name}": (metric, layer, v_D)}


def _decides(
    inputs: Inputs, pair: ModelPair, questions: Sequence[Question], plans: Sequence[Mapping[bool, Plan]],
    along: Sequence[Mapping[str, Along]],
) -> dict[str, object]:  # fmt: skip
    """All that the values depend on, for `Resume`."""
    return {
        "models": [asdict(print_) for print_ in inputs.fingerprints.values()],
        "prompts": [(each.tokens.task, each.tokens.scoring, each.tokens.answers) for each in questions],
        "sets": [[list(plan) for plan in own.values()] for own in plans],
        "along": [{name: (m, layer, v_D.tolist()) for name, (m, layer, v_D) in own.items()} for own in along],
        "ran": [str(pair.device.type), str(pair.dtype), pair.offload],
        "versions": versions(),
    }


PART = Part(
    name="sets",
    title="How much sets of components carry",
    work=work,
    settings=("prompts", "seed"),
    models=True,
    prompts=True,
    code=(
        "study/set_curves.py", "study/set_plan.py", "study/set_effects.py", "study/set_rows.py", "study/set_page.py",
        "study/held_out.py", "study/sets.py", "study/drawings.py", "scoring/models/exchanged.py",
        "scoring/models/merged.py", "scoring/metrics.py", "intervals.py",
        "geometry.py",
    ),
)  # fmt: skip
