"""Which components are scored: all of them, or those of some kinds, layers, or the top of an earlier score file.

Legend: L layers, H heads, F neurons.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mergekit_wp.components import Geometry, Kind
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.scorefile import Scores


@dataclass(frozen=True)
class Subset:
    """Boolean masks on the CPU: heads [L, H], neurons [L, F]."""

    heads: torch.Tensor
    neurons: torch.Tensor

    @classmethod
    def choose(
        cls,
        geometry: Geometry,
        components: str = "all",
        layers: str | None = None,
        ranked: tuple[int, Scores] | None = None,
    ) -> Subset:
        """The components of the kinds asked for, in the layers asked for, within the top K of a score file.

        components  heads | neurons | all
        layers      as `parse_layers`; None: every layer
        ranked      (K, scores): the K highest heads and the K highest neurons of the file, by its mean over tasks
        Raises `BadInput` when nothing is left.
        """
        rows_L = torch.zeros(geometry.layers, dtype=torch.bool)
        rows_L[parse_layers(layers, geometry.layers)] = True
        masks: dict[Kind, torch.Tensor] = {}
        for kind in Kind:
            wanted = components in ("all", kind)
            mask = rows_L[:, None].expand(-1, geometry.count(kind)) & wanted
            masks[kind] = mask & _top(getattr(ranked[1], kind), ranked[0], mask) if ranked else mask.clone()
        if not any(mask.any() for mask in masks.values()):
            raise BadInput(f"components, layers: {components} of layers {layers} leave nothing to score.")
        return cls(masks[Kind.HEADS], masks[Kind.NEURONS])

    @property
    def masks(self) -> Mapping[Kind, torch.Tensor]:
        return {Kind.HEADS: self.heads, Kind.NEURONS: self.neurons}

    @property
    def whole(self) -> bool:
        return all(bool(mask.all()) for mask in self.masks.values())

    @property
    def count(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def lowest(self) -> int:
        """The lowest layer with a component in it: no gradient is needed below."""
        return min(int(mask.any(1).nonzero()[0]) for mask in self.masks.values() if mask.any())

    def of(self, kind: Kind, layer: int) -> torch.Tensor:
        """The indices of the components of a kind in a layer, ascending."""
        return self.masks[kind][layer].nonzero()[:, 0]


def parse_layers(text: str | None, layers: int) -> list[int]:
    """ "0-5,7" -> [0, 1, 2, 3, 4, 5, 7]; None -> all. Raises `BadInput` for other text and layers out of range."""
    if text is None:
        return list(range(layers))
    chosen: set[int] = set()
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise BadInput(f"layers: found {shown(text)}, expected numbers and ranges such as 0-5,7.")
        low, high = int(match[1]), int(match[2] or match[1])
        if not low <= high < layers:
            raise BadInput(f"layers: {part.strip()} is out of range; this model has layers 0 to {layers - 1}.")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def _top(values: torch.Tensor, count: int, among: torch.Tensor) -> torch.Tensor:
    """The `count` largest entries of `values` among those marked, as a mask."""
    candidates = values.masked_fill(~among, -torch.inf).flatten()
    places = candidates.topk(min(count, int(among.sum()))).indices
    mask = torch.zeros_like(candidates, dtype=torch.bool)
    mask[places] = True
    return mask.view_as(values)
