"""Sets of components: all of them, or those of some kinds, of some layers, of a list, or the top of a score file. What
is scored, and what a set patch takes from the donor, is chosen here.

Legend: L layers, H heads, F neurons.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from mergekit_wp.choices import COMPONENTS
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import read_text
from mergekit_wp.geometry import Component, Geometry, Kind, TensorSlot
from mergekit_wp.scores import Scores

_MOST_BYTES = 1 << 26  # every neuron of a 405B model fits
_QUANTITY = re.compile(r"(?:(heads|neurons)\s*=\s*)?(\d{1,9}|\d{1,3}(?:\.\d{1,9})?\s*%)")


@dataclass(frozen=True)
class Amount:
    """How many components of each kind: a whole number, or a share of all that the model has (a `Fraction`).

    >>> Amount.parse("5%") == Amount.parse("heads=5%, neurons=5%")
    True
    >>> Amount.parse("heads=20").neurons
    0
    """

    heads: int | Fraction
    neurons: int | Fraction

    @classmethod
    def parse(cls, value: Any, field: str = "top") -> Amount:
        """Of `20` (20 heads and 20 neurons), `5%`, or `heads=20,neurons=5%`; a kind that is left out has none.

        Raises `BadInput` for anything else, naming the field.
        """
        parts = [_QUANTITY.fullmatch(part.strip()) for part in str(value).split(",")]
        matches = [match for match in parts if match is not None]
        kinds = [match[1] for match in matches]
        good = type(value) in (str, int) and len(matches) == len(parts) and len(set(kinds)) == len(kinds)
        if not good or (None in kinds and len(kinds) > 1) or any(_quantity(m[2]) > 1 for m in matches if "%" in m[2]):
            raise BadInput(
                f"{field}: found {shown(value)}, expected a number or a percentage (20, 5%), or those of each kind "
                "(heads=20,neurons=1000)."
            )
        found = {kind: _quantity(match[2]) for kind, match in zip(kinds, matches, strict=True)}
        return cls(*(found.get(None, found.get(str(kind), 0)) for kind in Kind))

    def of(self, kind: Kind, geometry: Geometry) -> int:
        """How many of a kind; shares, of all in all layers, are rounded up."""
        return self.among(kind, geometry.layers * geometry.count(kind))

    def among(self, kind: Kind, count: int) -> int:
        """The same of so many components."""
        amount: int | Fraction = getattr(self, kind)
        return math.ceil(amount * count) if isinstance(amount, Fraction) else amount


def _quantity(text: str) -> int | Fraction:
    return Fraction(text.removesuffix("%").strip()) / 100 if "%" in text else int(text)


@dataclass(frozen=True)
class Ranking:
    """The highest heads and neurons of a score file, so many of each.

    by   mean: of its mean over tasks; task: of each of its tasks, whose leaders are put together; mean-abs, task-abs:
         by absolute value, so that what works against a capability counts as well
    """

    amount: Amount
    scores: Scores
    by: str = "mean"

    @classmethod
    def of_task(cls, amount: Amount, scores: Scores, task: str | None, by: str | None) -> Ranking:
        """The ranking of one task, which may go unnamed where there is no other; of several only by a `by`.

        Raises `BadInput`: components that lead in one task need not in another, so which is meant must be said.
        """
        if task is not None:
            scores = scores[task]
        if by is None and len(scores.tasks) > 1:
            raise BadInput(
                f"there are scores of several tasks, {', '.join(scores.tasks)}; say which by `task`, or by `rank` how "
                "they are put together (mean, or task: the leaders of each)."
            )
        return cls(amount, scores, by or "mean")

    def mask(self, kind: Kind, among: torch.Tensor) -> torch.Tensor:
        """The leaders among the components marked, bool. What the file has no score of leads nothing."""
        among = among & self.scores.seen(kind)
        count = self.amount.of(kind, self.scores.meta.geometry)
        return torch.stack([highest(table, count, among) for table in self._tables(kind)]).any(0)

    def values(self, kind: Kind) -> torch.Tensor:
        """By what a component ranks, [L, n]; where each task has its leaders, in the task where it is highest."""
        return torch.stack(self._tables(kind)).amax(0)

    def _tables(self, kind: Kind) -> list[torch.Tensor]:
        files = [self.scores] if self.by.startswith("mean") else list(self.scores.tasks.values())
        tables = [getattr(each, kind) for each in files]
        return [table.abs() for table in tables] if self.by.endswith("-abs") else tables


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
        Nothing may be left: see `nonempty`. Raises `BadInput` for what the model does not have.
        """
        rows_L = torch.zeros(geometry.layers, dtype=torch.bool)
        rows_L[parse_layers(layers, geometry.layers)] = True
        if components in COMPONENTS:
            listed = {kind: _mask(geometry, kind) | (components in ("all", kind)) for kind in Kind}
        else:
            listed = read_components(components, geometry)
        masks = {kind: mask & rows_L[:, None] for kind, mask in listed.items()}
        if ranking is not None:
            masks = {kind: ranking.mask(kind, mask) for kind, mask in masks.items()}
        return cls(masks[Kind.HEAD], masks[Kind.NEURON])

    def nonempty(self, asked: str) -> Subset:
        """Itself. Raises `BadInput` where there is nothing in it; `asked` says what was."""
        if not self.count:
            raise BadInput(f"components, layers: {asked} leave nothing to score.")
        return self

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

    def owned(self, slot: TensorSlot, geometry: Geometry) -> torch.Tensor:
        """Which rows (or columns) of the slot's tensor these components own, bool along its axis."""
        return geometry.owned(slot, self.heads[slot.layer], self.neurons[slot.layer])

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


def highest(values: torch.Tensor, count: int, among: torch.Tensor) -> torch.Tensor:
    """The `count` largest entries of `values` among those marked, as a mask; of equal ones the first, so that a larger
    count only adds."""
    order = values.masked_fill(~among, -torch.inf).flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order[: min(count, int(among.sum()))]] = True
    return mask.view_as(values)
