"""Which of the study's prompts no score was read off, as far as that can be told.

A score file says how many prompts of a task were drawn and by which seed, not which they were. So the draw is made
again from the study's own prompts: were they the file's, these are the ones. They are left out wherever enough others
remain; else all are used, and the page says that they may be those which made the ranking, whose curves flatter it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mergekit_wp.scores import ScoreMeta
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.pairs import by_task, load_pairs, shuffled
from mergekit_wp.scoring.score import pairs_of

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
