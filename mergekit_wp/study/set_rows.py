"""From the values of sets to rows: points of curves with their controls, ceilings, branches; means over tasks.

    up        read by the anchor, which is its own metric, and by kl        down, all      by kl (or projection)
    additive  effect of a set / sum of its components' own scores: 1 where effects add up

Intervals (95 %) are bootstraps over prompts, of one task or of the mean over tasks; of random sets the spread over
draws is given, and what the top has beyond those of the same layers has an interval over prompts and draws (`Beyond`).

Legend: C sets, N prompts, R resamples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch

from mergekit_wp.choices import ACTIVATION_SIDE
from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import Kind
from mergekit_wp.ranking import table_of
from mergekit_wp.scores import ScoreMeta, Scores
from mergekit_wp.scoring.metrics import GapLedger
from mergekit_wp.study.inputs import UP
from mergekit_wp.study.set_effects import KL, Beyond, Effects, interval_of
from mergekit_wp.study.set_plan import (
    BRANCH,
    BRANCH_SHARES,
    BRANCHES,
    BY_BRANCH,
    CEILINGS,
    MATCHED,
    RANDOM,
    TOP,
    WHOLE,
    WORST,
    Trial,
    by_branch_set,
    rankings_of,
    sizes_of,
)
from mergekit_wp.study.sets import Shared, top_among

RESTORED, REMOVED = "restored", "removed"
DIRECTIONS = {RESTORED: "restored in the base", REMOVED: "taken out of the expert"}
"""In words."""
SET_COLUMNS = (
    "scores", "task", "direction", "metric", "kind", "side", "set", "branch", "k", "size", "draw", "effect", "low",
    "high",
)  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What the trials of one score file on one task gave by one metric in one direction.

    values_CN: F of each; recipient_N, donor_N: of the models between which they lie
    """

    scores: str
    task: str
    metric: str
    removed: bool
    trials: Sequence[Trial]
    values_CN: torch.Tensor
    recipient_N: torch.Tensor
    donor_N: torch.Tensor

    @property
    def where(self) -> Row:
        direction = REMOVED if self.removed else RESTORED
        return {"scores": self.scores, "task": self.task, "direction": direction, "metric": self.called}

    @property
    def called(self) -> str:
        """The metric's own name."""
        return self.metric.partition(" of ")[0]


@dataclass
class SetRows:
    """All rows. without_gap: what could not be measured, since the models do not differ there."""

    seed: int
    floor: float
    sets: list[list[object]] = field(default_factory=list)
    curves: list[Row] = field(default_factory=list)
    ceilings: list[Row] = field(default_factory=list)
    branches: list[Row] = field(default_factory=list)
    without_gap: list[str] = field(default_factory=list)
    _drawn: dict[int, tuple[np.ndarray, Beyond | None]] = field(default_factory=dict)

    def add(self, scores: Scores, measured: Measured) -> None:
        """Take the rows of what was measured."""
        ledger = GapLedger(measured.called, scores.meta.gap, self.floor)
        ends = measured.recipient_N, measured.donor_N
        # Tasks have prompts of their own, so their resamples must not go together.
        seed = [self.seed, *measured.task.encode()]
        try:
            effects = Effects.of(measured.values_CN, *ends, ledger, measured.task, seed)
        except BadInput as error:
            self.without_gap.append(f"{measured.scores}, {measured.where['direction']}: {error.message}")
            return
        places: Places = defaultdict(list)
        for c, trial in enumerate(measured.trials):
            about = [trial.kind or None, trial.side or None, trial.what, trial.branch or None, trial.k, trial.size]
            self.sets.append([*measured.where.values(), *about, trial.draw, *_estimate(effects, c).values()])
            places[trial.what, trial.kind, trial.side, trial.k, trial.branch].append(c)
        for what in CEILINGS:
            (c,) = places[what, "", "", 0, ""]
            self.ceilings.append({**measured.where, "set": what, **_estimate(effects, c)})
        for kind, side, among_Ln in rankings_of(scores):
            count = int(among_Ln.sum())
            for k in [*sizes_of(count), count]:
                self._add_point(scores.meta, measured, effects, places, (str(kind), side, k), count)
            if kind == Kind.NEURON and not measured.removed:
                self.branches += _branch_rows(scores, measured, effects, places, side, among_Ln)

    def _add_point(
        self, meta: ScoreMeta, measured: Measured, effects: Effects, places: Places, at: tuple[str, str, int],
        count: int,
    ) -> None:  # fmt: skip
        """One point of a curve; none where the top set is empty, all having one score."""
        whats = (WHOLE if at[2] == count else TOP, RANDOM, MATCHED, WORST)
        tops, drawn, matched, worst = (places.get((what, *at, ""), []) for what in whats)
        if not tops:
            return
        (top,), (kind, side, k) = tops, at
        trial, effect = measured.trials[top], float(effects.value_C[top])
        own = measured.called == own_metric(meta, side)
        summed = trial.expected if own and not measured.removed and _scores_are_effects(meta, side) else None
        beyond = effects.beyond(top, matched) if matched else None
        self._drawn[len(self.curves)] = effects.drawn_RC[:, top], beyond
        self.curves.append({
            **measured.where, "kind": kind, "side": side, "k": k, "size": trial.size, "components": count, "own": own,
            **_estimate(effects, top), RANDOM: _spread(effects, drawn), MATCHED: _spread(effects, matched),
            WORST: float(effects.value_C[worst[0]]) if worst else None,
            "beyond_matched": None if beyond is None else beyond.interval,
            "sum_of_scores": summed, "additive": effect / summed if summed else None,
        })  # fmt: skip

    def means(self) -> list[Row]:
        """Means over tasks of curves by the rankings' own metrics, with the interval of the mean."""
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        keys = ("scores", "direction", "metric", "kind", "side", "k")
        for number, row in enumerate(self.curves):
            if row["own"]:
                groups[tuple(row[key] for key in keys)].append(number)
        return [{**dict(zip(keys, place, strict=True)), **self._mean(numbers)} for place, numbers in groups.items()]

    def _mean(self, numbers: Sequence[int]) -> Row:
        rows, drawn = [self.curves[n] for n in numbers], [self._drawn[n] for n in numbers]
        beyond = [each for _drawn_R, each in drawn if each is not None]
        low, high = interval_of(np.mean([drawn_R for drawn_R, _each in drawn], axis=0))
        worst = [row[WORST] for row in rows if row[WORST] is not None]
        added = [row["additive"] for row in rows if row["additive"] is not None]
        return {
            "components": rows[0]["components"], "tasks": len(rows),
            "effect": fmean(row["effect"] for row in rows), "low": low, "high": high,
            RANDOM: _mean_spread(rows, RANDOM), MATCHED: _mean_spread(rows, MATCHED),
            WORST: fmean(worst) if worst else None,
            "beyond_matched": Beyond.mean(beyond).interval if beyond else None,
            "tasks_beyond_matched": sum(((row["beyond_matched"] or [None])[0] or 0.0) > 0 for row in rows),
            "additive": fmean(added) if added else None,
        }  # fmt: skip


Places = Mapping[tuple[str, str, str, int, str], list[int]] | defaultdict[Any, list[int]]


def own_metric(meta: ScoreMeta, side: str) -> str:
    """What the rankings of a side are read by."""
    if meta.utility == "projection":
        return "projection"
    return "anchor" if side == UP else KL


def _scores_are_effects(meta: ScoreMeta, side: str) -> bool:
    """Whether a score is what its component restores in the base by the side's own metric."""
    same = meta.utility != "staged-projection" or side == UP
    return same and meta.at is None and meta.method not in ACTIVATION_SIDE


def _estimate(effects: Effects, c: int) -> dict[str, float | None]:
    low, high = interval_of(effects.drawn_RC[:, c])
    return {"effect": float(effects.value_C[c]), "low": low, "high": high}


def _spread(effects: Effects, draws: Sequence[int]) -> list[float] | None:
    """The effect of each draw."""
    return [float(effects.value_C[c]) for c in draws] or None


def _mean_spread(rows: Sequence[Row], what: str) -> list[float] | None:
    """Of each draw, its mean over tasks."""
    known = [row[what] for row in rows if row[what] is not None]
    return np.mean(known, axis=0).tolist() if known else None


def _branch_rows(
    scores: Scores, measured: Measured, effects: Effects, places: Places, side: str, among_Ln: torch.Tensor
) -> Iterator[Row]:
    """Gate, up and down: of the top neurons restored alone, and as what whole neurons are ranked by."""
    table_Ln, parts = table_of(scores, Kind.NEURON, measured.task), scores.tasks[measured.task].parts

    def effect(what: str, k: int, branch: str = "") -> float | None:
        found = places.get((what, str(Kind.NEURON), side, k, branch), [])
        return float(effects.value_C[found[0]]) if found else None

    for k in sizes_of(int(among_Ln.sum()), BRANCH_SHARES):
        full_Ln = top_among(table_Ln, among_Ln, k)
        for branch in BRANCHES:
            by_branch_Ln = by_branch_set(parts, branch, among_Ln, k)
            shared = None if by_branch_Ln is None else Shared.of(full_Ln[among_Ln], by_branch_Ln[among_Ln])
            yield {
                **measured.where, "side": side, "k": k, "branch": branch,
                "own": measured.called == own_metric(scores.meta, side), "whole": effect(TOP, k),
                "alone": effect(BRANCH, k, branch), "ranked_by": effect(BY_BRANCH, k, branch),
                "overlap": shared and shared.share, "by_chance": shared and shared.by_chance,
            }  # fmt: skip
