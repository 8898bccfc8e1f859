"""How sure a score is: bootstrap intervals over the prompts, of scores, of their ranks, and of differences.

A score is a mean over prompts, as far as they can be told from one another; other prompts of the same kind would have
given another. The paired bootstrap draws as many prompts as there are, with replacement, the same ones for every
component, and scores again from what each prompt gives (`wp-score --per-prompt`); the interval holds the middle
95 % of the draws (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13). Draws of few prompts lie too
near to the score, so all are moved away from it as far as Student's t asks (`widened`). Two experts, or two methods,
that were scored on the same prompts are drawn together, so what is hard about a prompt cancels.

What the interval does not hold is what the prompts share: how they were written, and what was held fixed, such as the
direction of an anchor.

Legend: D draws, P prompts, L layers, n heads or neurons of a layer, C components.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import Component, Kind
from mergekit_wp.scores import Scores, TaskScores

DRAWS, LEVEL = 1000, 0.95
LEAST = 2
"""Prompts of a task, the fewest of which there is an interval."""


@dataclass(frozen=True)
class Interval:
    """A component, its score, the ends of its interval, and those of its rank (1 the highest) among those of its kind
    that were scored."""

    component: Component
    score: float
    low: float
    high: float
    best_rank: int
    worst_rank: int


class Bootstrap:
    """Draws of the prompts of a score file, of one task or (None) of the mean over all.

    draws, seed   how many, and which
    beside        a file of the same prompts, drawn together with this one
    Raises `BadInput` for a file without single prompts, or with fewer than two of a task.
    """

    def __init__(
        self, scores: Scores, task: str | None = None, draws: int = DRAWS, seed: int = 0, beside: Scores | None = None
    ) -> None:
        self.scores, self.tasks = scores, list(scores.tasks) if task is None else [task]
        self.draws, self._seed, self._files = draws, seed, [scores, *([] if beside is None else [beside])]
        for name in self.tasks:
            found = scores.tasks[name] if name in scores.tasks else scores[name].tasks[name]  # says that there is none
            if found.prompts is None:
                raise BadInput(
                    f"task {name}: the score file keeps no single prompts; make it again with wp-score --per-prompt."
                )
            if used_of(scores, name) < LEAST:
                raise BadInput(f"task {name}: one prompt was used, and an interval needs two; score with more.")

    @cached_property
    def _counts(self) -> dict[str, torch.Tensor]:
        """How often each draw takes each prompt, float32 [D, P], by task: the same for the same prompts.

        A draw in which some metric has no prompt that was used says nothing, and is drawn again.
        """
        found = {}
        for name in self.tasks:
            # Tasks have prompts of their own, so their draws must not go together.
            generator = torch.Generator().manual_seed(random.Random(f"{self._seed}/{name}").getrandbits(63))
            every = [scores.tasks[name].prompts for scores in self._files]
            used_UP = torch.stack([used_P for prompts in every if prompts for used_P in prompts.used.values()])
            kept_DP = torch.empty(0, used_UP.shape[1])
            while len(kept_DP) < self.draws:
                drawn_DP = torch.randint(used_UP.shape[1], (self.draws, used_UP.shape[1]), generator=generator)
                counts_DP = torch.zeros(drawn_DP.shape).scatter_add_(1, drawn_DP, torch.ones(drawn_DP.shape))
                kept_DP = torch.cat([kept_DP, counts_DP[(counts_DP @ used_UP.T > 0).all(1)]])
            found[name] = kept_DP[: self.draws]
        return found

    def layers(self, kind: Kind, level: float = LEVEL) -> Iterator[torch.Tensor]:
        """The scores of every draw, widened for intervals of this level, a layer at a time: float32 [D, n]."""
        return (self._layer(kind, layer, level) for layer in range(self.scores.meta.geometry.layers))

    def _layer(self, kind: Kind, layer: int, level: float) -> torch.Tensor:
        every = []
        for name in self.tasks:
            task, drawn_Dn = self.scores.tasks[name], rescored(self.scores, name, kind, layer, self._counts[name])
            assert task.prompts is not None
            used = int(task.prompts.used[self.scores.meta.metric_of(name, layer)].sum())
            every.append(widened(drawn_Dn, getattr(task, kind)[layer], used, level))
        return torch.stack(every).mean(0)

    def intervals(self, components: Sequence[Component], level: float = LEVEL) -> list[Interval]:
        """Of these components, in their order."""
        found: dict[tuple[Kind, int, int], Interval] = {}
        for kind in Kind:
            mine = [c for c in components if c.kind == kind]
            if mine:
                found |= {(kind, x.component.layer, x.component.index): x for x in self._of_kind(kind, mine, level)}
        return [found[Kind(c.kind), c.layer, c.index] for c in components]

    def _of_kind(self, kind: Kind, mine: Sequence[Component], level: float) -> list[Interval]:
        drawn_DC = torch.empty(self.draws, len(mine))
        for layer in {c.layer for c in mine}:  # one at a time: a layer's draws are 55 MB for a 13B
            places = [place for place, c in enumerate(mine) if c.layer == layer]
            drawn_DC[:, places] = self._layer(kind, layer, level)[:, [mine[place].index for place in places]]
        above_DC = torch.zeros(self.draws, len(mine), dtype=torch.long)
        seen_Ln = self.scores.seen(kind)
        for layer, scores_Dn in enumerate(self.layers(kind, level)):
            ordered_Dn = scores_Dn[:, seen_Ln[layer]].sort(1).values.contiguous()
            above_DC += ordered_Dn.shape[1] - torch.searchsorted(ordered_Dn, drawn_DC, right=True)
        low_C, high_C = ends(drawn_DC, level)
        best_C, worst_C = ends(above_DC.float() + 1, level)
        table_Ln = self._table(kind)
        scores_C = [float(table_Ln[c.layer, c.index]) for c in mine]
        numbers = zip(
            scores_C, low_C.tolist(), high_C.tolist(), best_C.int().tolist(), worst_C.int().tolist(), strict=True
        )
        return [Interval(component, *of_it) for component, of_it in zip(mine, numbers, strict=True)]

    def _table(self, kind: Kind) -> torch.Tensor:
        every: list[TaskScores] = [self.scores.tasks[name] for name in self.tasks]
        return torch.stack([getattr(task, kind) for task in every]).mean(0)


def used_of(scores: Scores, task: str) -> int:
    """How many prompts were used, by the metric that used fewest."""
    return min(stats.used for stats in scores.meta.tasks[task].utilities.values())


def rescored(scores: Scores, task: str, kind: Kind, layer: int, counts_DP: torch.Tensor) -> torch.Tensor:
    """The scores of a layer, float32 [D, n], had each prompt been there so often."""
    prompts = scores.tasks[task].prompts
    assert prompts is not None
    metric = scores.meta.metric_of(task, layer)
    used_P, gaps_P = prompts.used[metric], prompts.gaps[metric]
    values_Pn: torch.Tensor = getattr(prompts, kind)[:, layer]
    total_Dn = counts_DP @ values_Pn
    if scores.meta.gap == "sample":
        return total_Dn / (counts_DP @ used_P)[:, None]
    # The quotient of two sums: as a share of the mean gap of the prompts drawn.
    return total_Dn * (gaps_P.sum() / used_P.sum()) / (counts_DP @ gaps_P)[:, None]


def differences(
    one: Scores, other: Scores, kind: str, task: str | None = None, *, level: float = LEVEL, draws: int = DRAWS,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The ends of the interval of `one` - `other`, of every head or neuron: float32 [L, n] each.

    Drawn together where both were scored on the same prompts, which is what they are for: two experts, or two methods.
    Raises `BadInput` for files of other tasks, shapes or prompts, or without single prompts.
    """
    pair = [Bootstrap(a, task, draws, seed, beside=b) for a, b in ((one, other), (other, one))]
    if pair[0].tasks != pair[1].tasks:
        raise BadInput(f"the files have the tasks {', '.join(one)} and {', '.join(other)}; compare files of the same.")
    ids = [{name: (scores.meta.prompt_ids or {})[name] for name in pair[0].tasks} for scores in (one, other)]
    if ids[0] != ids[1]:
        raise BadInput("the files were scored on different prompts; score both with the same pairs, samples and seed.")
    if getattr(one, kind).shape != getattr(other, kind).shape:
        raise BadInput("the files are of models of different shapes, whose components cannot be compared.")
    both = [ends(a - b, level) for a, b in zip(*(each.layers(Kind(kind), level) for each in pair), strict=True)]
    low_Ln, high_Ln = (torch.stack(side) for side in zip(*both, strict=True))
    return low_Ln, high_Ln


def widened(drawn: Any, value: Any, prompts: int, level: float = LEVEL) -> Any:
    """Draws of `value`, a mean over so many prompts (two at least), moved away from it, so that their middle `level`
    is as wide as the interval of a mean by Student's t. For a mean over tasks each task's are, which is rather wide."""
    from scipy.special import ndtri, stdtrit

    # A resample's variance divides by P where an estimate divides by P - 1, and its quantiles are about the normal's.
    upper = (1 + level) / 2
    factor = math.sqrt(prompts / (prompts - 1)) * float(stdtrit(prompts - 1, upper) / ndtri(upper))
    return value + factor * (drawn - value)


def ends(drawn_DC: torch.Tensor, level: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The middle `level` of the draws of each column: float32 [C] each."""
    ordered_DC = drawn_DC.sort(0).values
    outside = round((1 - level) / 2 * (len(ordered_DC) - 1))
    return ordered_DC[outside], ordered_DC[len(ordered_DC) - 1 - outside]
