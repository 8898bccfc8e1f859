"""A set patch as a model that is never written (Eq. 8, 45-47): the base with a set of the expert's heads and neurons,
or the expert with the base's.

It is the merge (`merged`) whose weight of the expert is 1 or 0 for every component, and of all that belongs to none. No
number is computed: each is that of the expert or of the base, as `merge_method: wp_patch` would write it. What a set
does not touch is shared with the models, which stay as they are, so there is nothing to undo.

Legend: L layers, H heads, F neurons, n the length of a tensor along the axis that components cut.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mergekit_wp.checkpoint.vocabulary import align_rows
from mergekit_wp.geometry import Geometry, TensorSlot
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.models.merged import MergedStack, TakenWeights
from mergekit_wp.subset import Subset


@dataclass(frozen=True)
class Exchange:
    """A set of components that one model has from the other.

    subset     the components
    in_expert  whether the expert has those of the base; else the base has those of the expert. What belongs to no
               component (keys, values, norms, embeddings, head) is the recipient's
    parts      keys of `geometry.PROJECTIONS`: the slices that are exchanged; None: all that a component owns
    """

    subset: Subset
    in_expert: bool = False
    parts: Collection[str] | None = None

    @property
    def rest_K(self) -> torch.Tensor:
        """As in `merged.TakenWeights`, of the one expert: 1 or 0."""
        return torch.tensor([float(self.in_expert)])

    def along(self, slot: TensorSlot | None, geometry: Geometry) -> torch.Tensor:
        """As in `merged.TakenWeights`: bool [1, n], whether the expert's number stands there."""
        if slot is None:
            return self.rest_K[:, None].bool()
        own_n = self.subset.owned(slot, geometry)
        if self.parts is not None:
            wanted = [
                torch.full((length,), part in self.parts)
                for part, length in zip(slot.parts, geometry.lengths(slot), strict=True)
            ]
            own_n = own_n & torch.cat(wanted)
        return own_n[None] ^ self.in_expert


class ExchangedStack(MergedStack):
    """Base and expert with an `Exchange`, which `set` replaces; at first the base itself."""

    def __init__(self, base: Stack, expert: Stack, geometry: Geometry):
        nothing = Subset(*(mask & False for mask in Subset.choose(geometry).masks.values()))
        super().__init__(base, [expert], geometry, Exchange(nothing), frozen=True)

    @torch.no_grad()
    def _merge(
        self, weights: TakenWeights, slot: TensorSlot | None, base: torch.Tensor, experts: Sequence[torch.Tensor]
    ) -> nn.Parameter:
        taken_n = weights.along(slot, self.geometry)[0]
        (expert,) = experts
        if bool(taken_n.all()):
            return nn.Parameter(align_rows(expert, base), requires_grad=False)
        if not bool(taken_n.any()):
            return nn.Parameter(base, requires_grad=False)
        assert slot is not None  # of what belongs to no component all is taken, or nothing
        taken_n = taken_n.to(base.device)
        return nn.Parameter(torch.where(_along(taken_n, slot.axis, base.ndim), expert, base), requires_grad=False)


def _along(taken_n: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    """[n] as a mask that broadcasts along the axis of a tensor with `ndim` axes."""
    return taken_n.view([-1 if each == axis else 1 for each in range(ndim)])
