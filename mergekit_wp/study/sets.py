"""Top sets of components, how far they overlap, and rank correlations with their control.

A top set of K is {c : at most K components have a value of at least c's}: the K highest, but where the K-th has equals
beyond it, none of these, since nothing orders them. (An expert that moved ten neurons has zeros everywhere else; the
first of 200,000 equal zeros are no finding, and two files would share them all.) With K = all it is everything.
Overlap is the share of two top sets that is in both, |A and B| / max(|A|, |B|); sets drawn at random would have
min(|A|, |B|) / N of N components, which is K / N for full sets, or K^2 / N components.

These are the paper's plain sets, whatever the sign of what is in them; `ranking.compare`, of which a merge is made,
counts positive scores alone.

Legend: n components, L layers, T tasks, S rows of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata

SIGNED, ABSOLUTE = "signed", "absolute"
KEYS = (SIGNED, ABSOLUTE)
"""By what components are ranked: their scores, or the size of these."""

PERMUTATIONS = 200
INTERVAL = (2.5, 97.5)
"""Percentiles of the control, %."""


def keyed(table: torch.Tensor, key: str) -> torch.Tensor:
    return table.abs() if key == ABSOLUTE else table


def top_set(value_n: torch.Tensor, k: int) -> torch.Tensor:
    """The top set of K, bool [n]."""
    if k >= len(value_n):
        return torch.ones_like(value_n, dtype=torch.bool)
    return value_n > value_n.topk(k + 1).values[-1]


def top_among(value_Ln: torch.Tensor, among_Ln: torch.Tensor, k: int) -> torch.Tensor:
    """The top set among some components, bool [L, n]."""
    set_Ln = torch.zeros_like(among_Ln)
    set_Ln[among_Ln] = top_set(value_Ln[among_Ln], k)
    return set_Ln


@dataclass(frozen=True)
class Shared:
    """Two top sets among `components`. share: of the larger set that is in both; None where both are empty."""

    one: int
    other: int
    both: int
    components: int

    @classmethod
    def of(cls, one_n: torch.Tensor, other_n: torch.Tensor) -> Shared:
        return cls(int(one_n.sum()), int(other_n.sum()), int((one_n & other_n).sum()), len(one_n))

    @property
    def share(self) -> float | None:
        larger = max(self.one, self.other)
        return self.both / larger if larger else None

    @property
    def by_chance(self) -> float:
        """What `share` is on average for sets of these sizes drawn at random."""
        return min(self.one, self.other) / self.components if self.components else 0.0

    @property
    def both_by_chance(self) -> float:
        return self.one * self.other / self.components if self.components else 0.0


def in_exactly(set_Tn: torch.Tensor) -> list[int]:
    """How many components are in exactly 0, 1, ..., T of the sets."""
    return torch.bincount(set_Tn.sum(0), minlength=len(set_Tn) + 1).tolist()


def in_exactly_by_chance(sizes: Sequence[int], components: int) -> list[float]:
    """The same on average for sets of these sizes drawn at random, each by itself."""
    chance = np.ones(1)
    for size in sizes:
        share = size / components if components else 0.0
        chance = np.convolve(chance, [1 - share, share])
    return (components * chance).tolist()


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation, None where one side has equal values only; low, high: the interval of its control,
    in which one side is permuted within layers."""

    spearman: float | None
    low: float | None
    high: float | None


def with_control(value_n: np.ndarray, score_Sn: np.ndarray, layer_n: np.ndarray, seed: int) -> list[Correlation]:
    """Rank correlation of a value with each row of scores, and the interval of 200 permutations of it within layers.

    What a permutation within layers leaves is what the layer alone explains. Spearman is Pearson of mean ranks, so
    ranks are taken once. layer_n: ascending.
    """
    value_ranks = _ranks(value_n)
    score_ranks = [_ranks(score_n) for score_n in score_Sn]
    known = [row for row in score_ranks if row is not None]
    if value_ranks is None or not known:
        return [Correlation(None, None, None)] * len(score_Sn)
    stacked_Sn = np.stack(known)
    random = np.random.default_rng(seed)
    starts = np.flatnonzero(np.diff(layer_n)) + 1
    drawn_PS = np.empty((PERMUTATIONS, len(known)))
    for place in range(PERMUTATIONS):
        shuffled = np.concatenate([random.permutation(part) for part in np.split(value_ranks, starts)])
        drawn_PS[place] = stacked_Sn @ shuffled
    bounds = zip(stacked_Sn @ value_ranks, *np.percentile(drawn_PS, INTERVAL, axis=0), strict=True)
    found = iter([Correlation(float(rho), float(low), float(high)) for rho, low, high in bounds])
    return [Correlation(None, None, None) if row is None else next(found) for row in score_ranks]


def _ranks(value_n: np.ndarray) -> np.ndarray | None:
    """Mean ranks, centred and of length 1; None where all values are equal."""
    if len(value_n) < 2 or (value_n == value_n[0]).all():
        return None
    rank_n: np.ndarray = rankdata(value_n)
    rank_n -= rank_n.mean()
    return rank_n / np.linalg.norm(rank_n)
