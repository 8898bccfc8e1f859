"""The noise floor: scores of the expert beside those of its update shuffled (`wp-score --shuffles`).

A component of a shuffled update is changed as much as one of the expert is on average, without aim. The floor is a
percentile of the scores of all of these of a kind; a score above it is more than such a change gives by itself. If the
expert's scores were such noise, 5 % would lie above the 95th percentile; each shuffle against the percentile of the
others shows whether they do (`by_shuffles`, which takes two or more).

A shuffle levels sizes: a component that moved much more than others has more noise than the floor shows. And a score
below the floor may be real, and small: the floor is about single scores, not about what many do together.

Legend: S shuffles, L layers, n components of a kind in a layer, N those that were scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from mergekit_wp.console import percent
from mergekit_wp.geometry import Kind
from mergekit_wp.ranking import table_of, tasks_and_mean

if TYPE_CHECKING:
    from mergekit_wp.scores import Scores

SHARES = (0.95, 0.99)


@dataclass(frozen=True)
class Floor:
    """Of one task (None: the mean) and kind: how many of `components` score above the percentile `share`.

    threshold    the score there, of all shuffles
    by_shuffles  the share of a shuffle's components above the percentile of the others, mean; None of a single shuffle
    """

    task: str | None
    kind: Kind
    share: float
    components: int
    threshold: float
    above: int
    by_shuffles: float | None

    @property
    def sentence(self) -> str:
        """For people."""
        null = "" if self.by_shuffles is None else f", of another shuffle's {percent(self.by_shuffles, 1)}"
        return (
            f"Of {'all tasks' if self.task is None else self.task}, {percent(self.above / self.components)} of the "
            f"{self.kind} ({self.above:,}) score above {percent(self.share)} of those of the shuffled update{null}."
        )


def floors(scores: Scores) -> Iterator[Floor]:
    """Of every task and their mean, each kind, both percentiles; nothing of a file without shuffles."""
    for task in tasks_and_mean(scores) if scores.meta.shuffles else ():
        for kind in Kind:
            seen_Ln = scores.seen(kind)
            if seen_Ln.any():
                own_N, null_SN = table_of(scores, kind, task)[seen_Ln], _shuffled(scores, kind, task)[:, seen_Ln]
                yield from (_floor(task, kind, share, own_N, null_SN) for share in SHARES)


def _floor(task: str | None, kind: Kind, share: float, own_N: torch.Tensor, null_SN: torch.Tensor) -> Floor:
    threshold, held_out = _percentile(null_SN, share), []
    for number in range(len(null_SN) if len(null_SN) > 1 else 0):
        others = torch.cat([null_SN[:number], null_SN[number + 1 :]])
        held_out.append(float((null_SN[number] > _percentile(others, share)).double().mean()))
    above = int((own_N > threshold).sum())
    return Floor(task, kind, share, len(own_N), threshold, above, fmean(held_out) if held_out else None)


def _percentile(null_SN: torch.Tensor, share: float) -> float:
    """A number that `share` of the scores do not exceed, itself one of them."""
    values = null_SN.flatten().sort().values
    return float(values[min(len(values) - 1, int(share * len(values)))])


def _shuffled(scores: Scores, kind: Kind, task: str | None) -> torch.Tensor:
    """[S, L, n] float64, as `ranking.table_of`."""
    every = [each.shuffled[kind] for name, each in scores.tasks.items() if task in (None, name)]
    return torch.stack(every).double().mean(0)
