"""Which of the study's prompts no score was read off, as far as that can be told.

A score file says how many prompts of a task were drawn and by which seed, not which they were. So the draw is made
again from the study's own prompts: were they the file's, these are the ones. They are left out wherever enough others
remain; else all are used, and the page says that they may be those which made the ranking, whose curves flatter it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import logger
from mergekit_wp.scores import PromptStyle, ScoreMeta
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.pairs import by_task, load_pairs, shuffled
from mergekit_wp.scoring.score import pairs_of
from mergekit_wp.study.inputs import Inputs

LOG = logger(__name__)

LEAST = 8
"""Prompts of a task that are enough."""


@dataclass(frozen=True)
class Unseen:
    """Numbers of a task's prompts, and whether they are held out from every score file."""

    numbers: list[int]
    held_out: bool


def unseen(job: ScoringJob, metas: Iterable[ScoreMeta]) -> dict[str, Unseen]:
    """For every task of the job's prompts, in the order of `Prepared.tasks`. Raises `BadInput`."""
    metas, found = list(metas), {}
    for each in pairs_of(job):
        seen = {text for meta in metas for text in _drawn(job.pairs, each.task, meta)}
        others = [number for number, pair in enumerate(each.scoring) if pair.prompt not in seen]
        enough = len(others) >= LEAST
        found[each.task] = Unseen(others if enough else list(range(len(each.scoring))), enough)
    return found


def _drawn(source: str, task: str, meta: ScoreMeta) -> set[str]:
    """The prompts of a task that a job of these pairs draws, for its direction or its scores."""
    about = meta.tasks.get(task)
    if about is None:
        return set()
    count = about.scoring + (about.extraction if meta.split == "half" else 0)
    builtin = source.startswith("builtin:")
    rows = by_task(load_pairs(source, count if builtin else None, meta.seed)).get(task, [])
    return {pair.prompt for pair in shuffled(rows, meta.seed, task)[:count]}


def check_style(inputs: Inputs, style: PromptStyle | None) -> None:
    """Warn where the study's prompts are put otherwise than those that were scored."""

    def told(one: PromptStyle | None) -> tuple[str | None, ...]:
        return () if one is None else (one.template, one.chat_template, one.system)

    for name, scores in inputs.scores.items():
        if told(scores.meta.prompts) != told(style):
            LOG.warning(
                "prompts: they are put otherwise (template, chat_template, system) than those that %s was scored on.",
                name,
            )


def check_tasks(inputs: Inputs, tasks: Sequence[str], source: str) -> None:
    """Raises `BadInput` where the prompts are of no task that was scored."""
    scored = {task for scores in inputs.scores.values() for task in scores}
    if scored.isdisjoint(tasks):
        raise BadInput(
            f"prompts: {source} has the tasks {', '.join(tasks)}, and the score files {', '.join(sorted(scored))}; "
            "give prompts of a task that was scored."
        )
