"""How large a set of components is, and how much of a ranking fits into a part of a model's weights.

Legend: L layers, n components of a kind in a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from mergekit_wp.console import percent
from mergekit_wp.geometry import Geometry, Kind, slot_of
from mergekit_wp.merge.plan import MergePlan
from mergekit_wp.subset import Amount, Ranking, Subset

_BUDGETS = (1, 2, 5)  # percent of the model's weights


@dataclass(frozen=True)
class Sizes:
    """Of one model: all its numbers, and how many of them one head and one neuron own (in the mean over layers)."""

    total: int
    head: Fraction
    neuron: Fraction

    @classmethod
    def of(cls, plan: MergePlan) -> Sizes:
        """Of the recipient, from the headers of the tensors that the patched model will have."""
        geometry = plan.checkpoints[plan.tensors[0].base].geometry
        total, owned = 0, dict.fromkeys(Kind, 0)
        for tensor in plan.tensors:
            header = plan.header(tensor.base, tensor.source)
            if header is None or not tensor.written:
                continue
            numbers, slot = math.prod(header.shape), slot_of(tensor.source)
            total += numbers
            for share, length in zip(slot.shares, geometry.lengths(slot), strict=True) if slot else ():
                part = numbers * length // header.shape[slot.axis] if slot else 0
                if share != "kv":
                    owned[Kind.HEAD if share == "head" else Kind.NEURON] += part
        each = {kind: Fraction(owned[kind], geometry.layers * geometry.count(kind)) for kind in Kind}
        return cls(total, each[Kind.HEAD], each[Kind.NEURON])

    def share(self, heads: int, neurons: int) -> float:
        """The share of the model's numbers that so many components own."""
        return float((heads * self.head + neurons * self.neuron) / self.total)

    def fitting(self, budget: Fraction, geometry: Geometry) -> Amount:
        """The largest equal shares of all heads and of all neurons that own at most `budget` of the model's numbers."""
        heads, neurons = (geometry.layers * geometry.count(kind) for kind in Kind)
        share = min(Fraction(1), budget * self.total / (heads * self.head + neurons * self.neuron))
        return Amount(int(share * heads), int(share * neurons))


def size_line(subset: Subset, sizes: Sizes, geometry: Geometry) -> str:
    """How many components there are in a set, and what they own."""
    counts = {kind: int(mask.sum()) for kind, mask in subset.masks.items()}
    parts = [f"{counts[kind]:,} of {geometry.layers * geometry.count(kind):,} {kind}" for kind in Kind]
    share = sizes.share(counts[Kind.HEAD], counts[Kind.NEURON])
    return f"{' and '.join(parts)}, {percent(share, 2)} of the model's {sizes.total:,} weights"


def budget_table(ranking: Ranking, sizes: Sizes) -> str:
    """What of a ranking fits into 1, 2 and 5 % of the weights: equal shares of heads and of neurons, and their part of
    the positive score. Scores are of components alone, so this is not what the set restores together."""
    geometry = ranking.scores.meta.geometry
    whole = _positive(ranking, Subset.choose(geometry))
    lines = [f"{'weights':>9}{'heads':>9}{'neurons':>11}   of the positive score"]
    for budget in _BUDGETS:
        amount = sizes.fitting(Fraction(budget, 100), geometry)
        fitting = Subset.choose(geometry, ranking=Ranking(amount, ranking.scores, ranking.by))
        heads, neurons = (int(mask.sum()) for mask in fitting.masks.values())
        held = _positive(ranking, fitting) / whole if whole else 0.0
        lines.append(f"{budget:>7} %{heads:>9,}{neurons:>11,}   {percent(held)}")
    return "\n".join(lines)


def _positive(ranking: Ranking, subset: Subset) -> float:
    """The positive scores of a set's components (mean over the tasks of the ranking) added up."""
    return sum(
        float(getattr(ranking.scores, kind)[mask].double().clamp(min=0).sum()) for kind, mask in subset.masks.items()
    )
