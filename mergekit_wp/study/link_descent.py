"""Links: how much of what a component does upstream reaches F through one target, by one descent of the base
(Eqs. 13-16, 76-80 of arXiv 2604.13694).

The need of a target is the gradient of F at the stream that it reads, as far as it reaches that stream through the
target alone (the paper's Eq. 13, read at the shared stream, is the same for all heads of a layer, and so tells nothing
about any of them):

    head (l, h)     of dF/d(input of o_proj) in layer l the columns of h, taken back through attention and norm to the
                    stream below layer l
    neuron (l, j)   of dF/d(input of down_proj) the entry j, taken back through the MLP and its norm to the stream
                    between attention and MLP of layer l

    link(target, c) = mean over prompts of [sum over p in c of dtheta_p d<stream, need>/dtheta_p] / gap

with the need held fixed, for every component c below: heads' suppliers are in layers below l, neurons' also the heads
of layer l. Both are linear in the need, so several components of one layer and kind are one target, and below layer l

    sum over h of link((l, h), c) + link(what passes by the attention of layer l, c) = attr(c)

The descent carries 1 + n gradients: the total one, whose table is `attr` itself, and one for every target that was met.
A layer is recomputed once with its graph, which serves all of them, and its weights are read once. A control is a
target whose need is replaced by noise: at every position a random direction with the need's own length.

Legend: n targets, B prompts, T tokens, D residual width, L layers run, H heads, F neurons, W either of H*d_h and F.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergekit_wp.geometry import Component, Geometry, Kind
from mergekit_wp.scoring.first_order import Moves, Parts, attr_heads, attr_neurons
from mergekit_wp.scoring.hooks import LayerRecord
from mergekit_wp.scoring.passes import Passes
from mergekit_wp.scoring.patching import KEY

TOTAL = 0
"""The row of the total gradient, before those of the targets."""
_ATTR: dict[Kind, Callable[..., Parts]] = {Kind.HEAD: attr_heads, Kind.NEURON: attr_neurons}


@dataclass(frozen=True)
class Target:
    """Components of one kind and layer that are one target. noise: of heads, the seed of what stands in for the need;
    None: the need itself."""

    kind: Kind
    layer: int
    indices: tuple[int, ...]
    noise: str | None = None

    @classmethod
    def of(cls, component: Component, noise: str | None = None) -> Target:
        return cls(component.kind, component.layer, (component.index,), noise)

    @property
    def component(self) -> Component:
        """The only one."""
        (index,) = self.indices
        return Component(self.kind, self.layer, index)

    def columns(self, geometry: Geometry, device: torch.device) -> torch.Tensor:
        """Which columns of o_proj or down_proj are the target's, bool [W]."""
        own = geometry.columns(self.kind, torch.tensor(self.indices)).flatten()
        marked = torch.zeros(geometry.count(self.kind) * geometry.width(self.kind), dtype=torch.bool)
        return marked.index_fill(0, own, True).to(device)


@dataclass
class LinkSums:
    """Of one task: its targets, and sums over prompts, float64 on the device: heads [1 + n, L, H], neurons
    [1 + n, L, F]. Row `TOTAL` is attr."""

    targets: Sequence[Target]
    layers: int
    geometry: Geometry
    device: torch.device
    tables: dict[Kind, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        rows = 1 + len(self.targets)
        self.tables = {
            kind: torch.zeros(rows, self.layers, self.geometry.count(kind), dtype=torch.float64, device=self.device)
            for kind in Kind
        }

    def add(self, kind: Kind, row: int, layer: int, parts: Parts) -> None:
        self.tables[kind][row, layer] += sum(parts.values(), start=torch.zeros((), device=self.device))

    def finish(self, gap: float) -> LinkTables:
        """gap: what sums are divided by (`GapLedger.normalizer`)."""
        return LinkTables(self.targets, {kind: (table / gap).cpu() for kind, table in self.tables.items()})


@dataclass(frozen=True)
class LinkTables:
    """Links of one task, float64 on the CPU: heads [1 + n, L, H], neurons [1 + n, L, F], as shares of the gap."""

    targets: Sequence[Target]
    tables: Mapping[Kind, torch.Tensor]

    def attr(self, kind: Kind) -> torch.Tensor:
        """[L, H] or [L, F]"""
        return self.tables[kind][TOTAL]

    def link(self, kind: Kind, target: Target) -> torch.Tensor:
        """Of one target [L, H] or [L, F]; 0 where it reads nothing."""
        return self.tables[kind][1 + self.targets.index(target)]


def descend(passes: Passes, sums: Mapping[str, LinkSums]) -> None:
    """Sweep down the base from the layer of the metric and add to the sums of every item's task.

    passes: of the method attr; their metric is read above the topmost layer run.
    """
    cache, order = passes.base_cache, range(passes.depth - 1, -1, -1)
    gradients: list[dict[int, torch.Tensor]] = [{} for _ in passes.items]
    base, expert = passes.pair.base, passes.pair.expert
    for index, layer, expert_layer in zip(order, base.layers(order), expert.layers(order), strict=True):
        for i, item in enumerate(passes.items):
            above_BTD, record = cache.recorded(base, layer, index, i, gradient=True)
            step = _Step(passes, sums[item.run.task], index, i, above_BTD, record, (layer, expert_layer))
            gradients[i] = step.through(gradients[i])
            del above_BTD, record, step  # before the next batch's are made
            passes.tick(len(item.batch.last_B) / (2 * passes.depth))
        cache.forget(index)


class _Step:
    """One layer on one batch: its graph, which all gradients go through."""

    def __init__(
        self, passes: Passes, sums: LinkSums, index: int, place: int, above_BTD: torch.Tensor, record: LayerRecord,
        layers: tuple[Any, Any],
    ):  # fmt: skip
        self.passes, self.sums, self.index, self.place = passes, sums, index, place
        self.above_BTD, self.record, self.layers = above_BTD, record, layers
        self.moves = Moves(*layers, record)
        self.device = passes.pair.device

    def through(self, from_above: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Rows and their gradients above the layer -> those below it, with the targets that were met here."""
        below, total = {}, self.record
        for row in (TOTAL, *(row for row in from_above if row != TOTAL)):
            gradient_BTD = from_above[row].to(self.device) if row in from_above else None
            if row == TOTAL:
                gradient_BTD = self.passes.inject(self.index, self.place, gradient_BTD)
            assert gradient_BTD is not None
            below_BTD, record = self.record.another(self.above_BTD, gradient_BTD)
            self._add(row, record)
            below[row] = self._kept(below_BTD)
            total = record if row == TOTAL else total
        for row, target in enumerate(self.sums.targets, start=1):
            if target.layer == self.index:
                below[row] = self._kept(self._need(row, target, total))
        return below

    def _need(self, row: int, target: Target, total: LayerRecord) -> torch.Tensor:
        """The target's need, taken to the stream below the layer."""
        need_BTD, record = total.branch(KEY[target.kind], target.columns(self.sums.geometry, self.device))
        if target.kind == Kind.NEURON:
            self._add(row, record, (Kind.HEAD,))
        return need_BTD if target.noise is None else self._noise(target.noise, need_BTD)

    def _noise(self, seed: str, like_BTD: torch.Tensor) -> torch.Tensor:
        """At every position a random direction of the same length; the same however batches are grouped."""
        prompts = self.passes.items[self.place].batch.ids_BT.tolist()
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/{prompts}").getrandbits(63))
        drawn_BTD = torch.randn(like_BTD.shape, generator=generator).to(like_BTD)
        return torch.nn.functional.normalize(drawn_BTD, dim=-1) * like_BTD.norm(dim=-1, keepdim=True)

    def _add(self, row: int, record: LayerRecord, kinds: Sequence[Kind] = tuple(Kind)) -> None:
        with torch.no_grad(), self.passes.pair.base.autocast():
            for kind in kinds:
                parts = _ATTR[kind](*self.layers, record, self.sums.geometry, self.moves)
                self.sums.add(kind, row, self.index, parts)

    def _kept(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Gradients wait for the next layer where the activations do."""
        return x_BTD.cpu() if self.passes.base_cache.offload else x_BTD
