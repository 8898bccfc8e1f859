"""Which components are scored: all of them, or those of some kinds, of some layers, of a list, or the top of an earlier
score file.

Legend: L layers, H heads, F neurons.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import read_text
from mergekit_wp.geometry import Component, Geometry, Kind
from mergekit_wp.scores import Scores

_MOST_BYTES = 1 << 26  # every neuron of a 405B model fits


@dataclass(frozen=True)
class Ranking:
    """The `count` highest heads and neurons of a score file.

    by   mean: of its mean over tasks; task: of each of its tasks, whose leaders are put together; mean-abs, task-abs:
         by absolute value, so that what works against a capability counts as well
    """

    count: int
    scores: Scores
    by: str = "mean"

    def mask(self, kind: Kind, among: torch.Tensor) -> torch.Tensor:
        """The leaders among the components marked, bool. What the file has no score of leads nothing."""
        among = among & self.scores.seen(kind)
        files = [self.scores] if self.by.startswith("mean") else list(self.scores.tasks.values())
        tables = [getattr(each, kind) for each in files]
        if self.by.endswith("-abs"):
            tables = [table.abs() for table in tables]
        return torch.stack([_top(table, self.count, among) for table in tables]).any(0)


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
        ranking: Ranking | None = None,
    ) -> Subset:
        """The components asked for, in the layers asked for, within the top of a score file.

        components  heads | neurons | all, or a file that `read_components` reads
        layers      as `parse_layers`; None: every layer
        Raises `BadInput` when nothing is left.
        """
        rows_L = torch.zeros(geometry.layers, dtype=torch.bool)
        rows_L[parse_layers(layers, geometry.layers)] = True
        if components in ("all", *Kind):
            listed = {kind: _mask(geometry, kind) | (components in ("all", kind)) for kind in Kind}
        else:
            listed = read_components(components, geometry)
        masks = {kind: mask & rows_L[:, None] for kind, mask in listed.items()}
        if ranking is not None:
            masks = {kind: ranking.mask(kind, mask) for kind, mask in masks.items()}
        if not any(mask.any() for mask in masks.values()):
            of = "" if layers is None else f" of layers {layers}"
            top = "" if ranking is None else " within the top of the ranking"
            raise BadInput(f"components, layers: {shown(components)}{of}{top} leave nothing to score.")
        return cls(masks[Kind.HEAD], masks[Kind.NEURON])

    @property
    def masks(self) -> Mapping[Kind, torch.Tensor]:
        return {Kind.HEAD: self.heads, Kind.NEURON: self.neurons}

    @property
    def whole(self) -> bool:
        return all(bool(mask.all()) for mask in self.masks.values())

    @property
    def count(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def lowest(self) -> int:
        """The lowest layer with a component in it: no gradient is needed below."""
        return self.layers[0]

    @property
    def layers(self) -> list[int]:
        """The layers with a component in them, ascending."""
        return sorted({int(layer) for mask in self.masks.values() for layer in mask.any(1).nonzero()[:, 0]})

    def of(self, kind: Kind, layer: int) -> torch.Tensor:
        """The indices of the components of a kind in a layer, ascending."""
        return self.masks[kind][layer].nonzero()[:, 0]


def _mask(geometry: Geometry, kind: Kind) -> torch.Tensor:
    """Of no component of the kind yet: [L, H] or [L, F]."""
    return torch.zeros(geometry.layers, geometry.count(kind), dtype=torch.bool)


def read_components(path: str, geometry: Geometry) -> dict[Kind, torch.Tensor]:
    """Masks [L, H] and [L, F] of the components that a text file names: L5H3 is head 3 of layer 5, L5N9 a neuron.

    Names are parted by white space or commas, numbers count from 0, and what follows a # is a remark. Raises
    `BadInput`, naming the line, for other words and for components that the model does not have.
    """
    try:
        lines = read_text(path, _MOST_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(
            f"components: found {shown(path)}, expected all, heads, neurons or a file that names components, such as "
            f"L5H3 L5N97 ({getattr(error, 'strerror', None) or error})."
        ) from error
    masks = {kind: _mask(geometry, kind) for kind in Kind}
    for number, line in enumerate(lines, start=1):
        for word in line.partition("#")[0].replace(",", " ").split():
            try:
                named = Component.parse(word)
                named.check(geometry)
            except BadInput as error:
                raise BadInput(f"{path}, line {number}: {error.message}") from error
            masks[named.kind][named.layer, named.index] = True
    if not any(mask.any() for mask in masks.values()):
        raise BadInput(f"{path}: names no component; write some, such as L5H3 or L5N97.")
    return masks


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
