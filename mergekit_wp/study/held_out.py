"""Which of the study's prompts no score was read off, as far as that can be told.

A score file that keeps single prompts says which its scores were read off (`prompt_ids`). Another one says how many
prompts of a task were drawn and by which seed, not which they were, and no file says off which a direction was taken.
So there the draw is made again from the study's own prompts: were they the file's, these are the ones. They are left
out wherever enough others remain; else all are used, and the page says that they may be those which made the ranking,
whose curves flatter it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import logger
from mergekit_wp.scores import PromptStyle, ScoreMeta
from mergekit_wp.scoring.batching import TaskTokens
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.pairs import by_task, load_pairs, shuffled
from mergekit_wp.scoring.score import ids_of_prompts, pairs_of
from mergekit_wp.study.inputs import Inputs

LOG = logger(__name__)

LEAST = 8
"""Prompts of a task that are enough."""


@dataclass(frozen=True)
class Unseen:
    """Numbers of a task's prompts, whether they are held out from every score file, as far as that can be told, and
    whether every file says so itself."""

    numbers: list[int]
    held_out: bool
    known: bool


def unseen(
    job: ScoringJob, metas: Iterable[ScoreMeta], tasks: Sequence[TaskTokens] = (), style: PromptStyle | None = None
) -> dict[str, Unseen]:
    """For every task of the job's prompts, in the order of `Prepared.tasks`; `tasks`, `style`: these prompts as tokens,
    and how they are put. Raises `BadInput`."""
    tokens, metas, found = {each.task: each for each in tasks}, list(metas), {}
    for each in pairs_of(job):
        ids = ids_of_prompts(tokens[each.task]) if each.task in tokens else ()
        seen, known = set[int](), True
        for meta in (meta for meta in metas if each.task in meta.tasks):
            drawn, scored = _drawn(job.pairs, each.task, meta), (meta.prompt_ids or {}).get(each.task, ())
            again = {number for number, pair in enumerate(each.scoring) if pair.prompt in drawn}
            if ids and scored and _told(meta.prompts) == _told(style):
                own = {number for number, id_ in enumerate(ids) if id_ in scored}
                # The other half, off which a direction was taken, is in the draw, if that is the file's.
                seen |= own if meta.split != "half" else own | again
                same = own <= again and len(own) == len(set(scored)) and len(drawn) == len(again)
                known = known and (same or meta.split != "half")
            else:
                seen, known = seen | again, False
        others = [number for number in range(len(each.scoring)) if number not in seen]
        enough = len(others) >= LEAST
        found[each.task] = Unseen(others if enough else list(range(len(each.scoring))), enough, known)
    return found


def _drawn(source: str, task: str, meta: ScoreMeta) -> set[str]:
    """The prompts of a task that a job of these pairs draws, for its direction or its scores."""
    about = meta.tasks[task]
    count = about.scoring + (about.extraction if meta.split == "half" else 0)
    builtin = source.startswith("builtin:")
    rows = by_task(load_pairs(source, count if builtin else None, meta.seed)).get(task, [])
    return {pair.prompt for pair in shuffled(rows, meta.seed, task)[:count]}


def about_prompts(questions: Sequence[Mapping[str, Any]]) -> str:
    """On how many prompts, and whether scores were read off them; questions with `prompts`, `held_out` and `known`."""
    if not questions:
        return ""
    counts = sorted({each["prompts"] for each in questions})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    seen = sorted({each["task"] for each in questions if not each["held_out"]})
    if not seen and all(each["known"] for each in questions):
        return f"On {many} prompts a task that no score was read off."
    if not seen:
        return (
            f"On {many} prompts a task that no score was read off, if these were drawn from the study's own pairs: not "
            "every score file says off which it was read (wp-score --per-prompt)."
        )
    which = "They" if len(seen) == len({each["task"] for each in questions}) else f"Those of {', '.join(seen)}"
    return (
        f"On {many} prompts a task. {which} may be the ones that scores were read off, so that the top of a ranking "
        "looks better than on new ones; give the study more prompts than were scored, or others."
    )


def _told(style: PromptStyle | None) -> tuple[str | None, ...]:
    return () if style is None else (style.template, style.chat_template, style.system)


def check_style(inputs: Inputs, style: PromptStyle | None) -> None:
    """Warn where the study's prompts are put otherwise than those that were scored."""
    for name, scores in inputs.scores.items():
        if _told(scores.meta.prompts) != _told(style):
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
