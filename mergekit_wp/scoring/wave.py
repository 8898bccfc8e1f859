"""A wave: some batches of scoring prompts taken through both models together.

    measure       expert up, base up: gaps, and each prompt's weight and pull (the gradient that starts the way down)
    first_order   base down with gradients: attr, writeback, atp
    patch_all     base restarted in every layer with patched components: exact, ap

A resident pair takes one batch a wave and keeps the base's graphs; a streamed pair takes all prompts in one wave, so
that each layer is read once on the way up and once on the way down, and recomputes.

Legend: C components, B prompts, T tokens, D residual width, L layers, H heads, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergekit_wp.components import Kind
from mergekit_wp.scoring.batches import Batch
from mergekit_wp.scoring.capture import LayerRecord
from mergekit_wp.scoring.firstorder import Parts, attr_heads, attr_neurons
from mergekit_wp.scoring.gauges import gauge_of
from mergekit_wp.scoring.job import ACTIVATION_SIDE
from mergekit_wp.scoring.models import ModelPair
from mergekit_wp.scoring.patches import (
    MixedPatch,
    Patch,
    patch_head_activations,
    patch_heads,
    patch_neuron_activations,
    patch_neurons,
)
from mergekit_wp.scoring.restart import KEY, Restart, chunks
from mergekit_wp.scoring.subset import Subset
from mergekit_wp.scoring.sweep import Trail, ascend, descend
from mergekit_wp.scoring.tally import TaskRun
from mergekit_wp.scoring.team import Team

PATCHING = ("exact", "ap")
_PATCHES: dict[Kind, Callable[..., Patch | MixedPatch]] = {Kind.HEADS: patch_heads, Kind.NEURONS: patch_neurons}
_ACTIVATIONS: dict[Kind, Callable[..., Patch]] = {
    Kind.HEADS: patch_head_activations,
    Kind.NEURONS: patch_neuron_activations,
}
_ATTR: dict[Kind, Callable[..., Parts]] = {Kind.HEADS: attr_heads, Kind.NEURONS: attr_neurons}


@dataclass
class Item:
    """One batch of a task, with what the sweeps up leave: by gauge name, F of the base [B], what the gauge compares
    with, the prompts' weights [B], and the weighted gradient of F at the anchors [B, D]."""

    run: TaskRun
    batch: Batch
    expert: dict[str, torch.Tensor] = field(default_factory=dict)
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    base: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    pulls: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Wave:
    """The items and the sweeps up of both models; `depth` layers are run.

    `write`: ap and atp put in the place of what a component writes what the expert's writes; else its activation alone
    (`ScoringJob.object`).
    `tick` hears of the prompts that are done, layer by layer: a quarter of each for either way up, a half for the way
    down.
    """

    pair: ModelPair
    method: str
    items: Sequence[Item]
    keep_graphs: bool
    tick: Callable[[float], object] = lambda _done: None
    write: bool = True
    base_trail: Trail = field(init=False)
    expert_trail: Trail | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.depth = max(gauge.layer for gauge in self.items[0].run.gauges) + 1
        self._climb_expert()
        self._climb_base()

    def _trail(self, stack: Any, keep_graphs: bool = False) -> Trail:
        starts, anchors = [stack.start(item.batch) for item in self.items], [item.batch.last_B for item in self.items]
        offload = not keep_graphs and stack.streamed and stack.device.type != "cpu"
        return Trail(starts, anchors, self.depth, keep_graphs, offload)

    def _climb_expert(self) -> None:
        trail = self._trail(self.pair.expert)
        if self.method in ACTIVATION_SIDE:
            self.expert_trail, sweep = trail, trail.climb(self.pair.expert)
        else:
            sweep = ascend(self.pair.expert, trail.starts, self.depth, at=trail.anchors)
        for layer, streams in sweep:
            for item, stream_BTD in zip(self.items, streams, strict=True):
                for gauge in item.run.gauges_at(layer):
                    with torch.no_grad():
                        value_B, target = gauge.expert(self.pair.expert, item.batch.at_anchor(stream_BTD))
                    item.expert[gauge.name], item.targets[gauge.name] = value_B, target
            self.tick(self.prompts / (4 * self.depth))

    def _climb_base(self) -> None:
        self.base_trail = self._trail(self.pair.base, self.keep_graphs)
        for layer, streams in self.base_trail.climb(self.pair.base):
            for item, stream_BTD in zip(self.items, streams, strict=True):
                for gauge in item.run.gauges_at(layer):
                    z_BD, name = item.batch.at_anchor(stream_BTD), gauge.name
                    pull_BD = None
                    if self.method in PATCHING:
                        with torch.no_grad():
                            item.base[name] = gauge.read(self.pair.base, z_BD, item.targets[name])
                    else:
                        item.base[name], pull_BD = gauge.read_with_pull(self.pair.base, z_BD, item.targets[name])
                    item.weights[name] = item.run.ledgers[name].weights(item.base[name], item.expert[name])
                    if pull_BD is not None:
                        item.pulls[name] = (item.weights[name][:, None] * pull_BD).float()
            self.tick(self.prompts / (4 * self.depth))

    @property
    def prompts(self) -> int:
        return sum(len(item.batch.last_B) for item in self.items)

    def expert_record(self, expert_layer: Any, index: int, batch: int) -> LayerRecord:
        """The expert's own run of a layer, recomputed."""
        assert self.expert_trail is not None
        return self.expert_trail.recorded(self.pair.expert, expert_layer, index, batch, gradient=False)[1]


def first_order(wave: Wave, subset: Subset) -> None:
    """Sweep down and add the scores of every layer to the items' runs."""
    pair, shape = wave.pair, wave.pair.geometry

    def inject(layer: int, i: int, from_above_BTD: torch.Tensor | None) -> torch.Tensor:
        item = wave.items[i]
        gauges = item.run.gauges_at(layer)
        if not gauges:
            assert from_above_BTD is not None  # the topmost layer run has a gauge
            return from_above_BTD
        # A gauge scores the layers up to its own, so the gradient of a gauge above ends here.
        pull_BD = item.pulls[gauges[0].name]
        gradient_BTD = pull_BD.new_zeros(*item.batch.ids_BT.shape, shape.d_model)
        gradient_BTD[torch.arange(len(pull_BD), device=pull_BD.device), item.batch.last_B] = pull_BD
        return gradient_BTD

    def consume(index: int, i: int, base: Any, expert: Any, record: LayerRecord) -> None:
        expert_record = None
        if wave.method == "atp" and any(len(subset.of(kind, index)) for kind in Kind):
            expert_record = wave.expert_record(expert, index, i)
        for kind in Kind:
            if len(subset.of(kind, index)):
                parts = _parts(wave, kind, base, expert, record, expert_record)
                # All of a layer are scored together; what nobody asked for is left out of the sums.
                rest = ~subset.masks[kind][index].to(pair.device)
                wave.items[i].run.add(kind, index, {part: x.masked_fill(rest, 0.0) for part, x in parts.items()})
        wave.tick(len(wave.items[i].batch.last_B) / (2 * (wave.depth - subset.lowest)))

    descend(pair.base, pair.expert, wave.base_trail, inject, consume, lowest=subset.lowest)


def _parts(wave: Wave, kind: Kind, base: Any, expert: Any, record: LayerRecord, other: LayerRecord | None) -> Parts:
    shape = wave.pair.geometry
    if wave.method == "attr":
        return _ATTR[kind](base, expert, record, shape)
    parts = _patch(wave, kind, base, expert, record, other).scores(KEY[kind], record, shape.width(kind))
    if wave.method in ACTIVATION_SIDE:
        return {"whole": sum(parts.values(), start=torch.zeros((), device=wave.pair.device))}
    return parts


def _patch(
    wave: Wave, kind: Kind, base: Any, expert: Any, record: LayerRecord, other: LayerRecord | None
) -> Patch | MixedPatch:
    if wave.method in ACTIVATION_SIDE:
        return _ACTIVATIONS[kind](base, expert, record, other, wave.write)
    return _PATCHES[kind](wave.pair.base, base, expert, record, wave.pair.geometry)


@dataclass(frozen=True)
class PatchPlan:
    """How components are patched one by one: which, how many at a time, shared by whom, and who is told.

    room         bytes that the stacked activations may take
    most_tokens  of patched prompts in a step; products do not get faster with more
    fraction     of each component's change that is put in: 1 patches; less shows how curved the way to there is
    """

    subset: Subset
    room: int
    most_tokens: int
    team: Team
    tick: Callable[[float], object]
    fraction: float = 1.0

    def width(self, pair: ModelPair, batch: Batch) -> int:
        """Components to stack on this batch: as many as the room and the most useful tokens allow, at least one."""
        shape, (prompts, tokens) = pair.geometry, batch.ids_BT.shape
        attention = 4 * shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim
        if pair.base.tower.config._attn_implementation == "eager":
            attention += 3 * shape.heads * tokens
        # Float32 numbers that live at once: of a token in a layer, of a prompt at the output head.
        floats = tokens * (8 * shape.d_model + max(attention, 3 * shape.neurons)) + 4 * shape.vocabulary
        return max(1, min(self.most_tokens // (prompts * tokens), self.room // (4 * prompts * floats)))


@torch.no_grad()
def patch_layer(wave: Wave, plan: PatchPlan, index: int, base: Any, expert: Any) -> None:
    """Patch every chosen component of layer `index` in every item; the items' runs get this process's share."""
    pair = wave.pair
    for i, item in enumerate(wave.items):
        gauge = gauge_of(item.run.gauges, index)
        if gauge is None:
            continue
        _above, record = wave.base_trail.recorded(pair.base, base, index, i, gradient=False)
        other = wave.expert_record(expert, index, i) if wave.method == "ap" else None
        restart = Restart(
            pair.base, pair.geometry, item.batch, wave.base_trail.starts[i].calls, index, base, record, gauge,
            item.targets[gauge.name],
        )  # fmt: skip
        width = plan.width(pair, item.batch)
        for kind in Kind:
            components = plan.team.share(list(chunks(plan.subset.of(kind, index), width)))
            if not components:
                continue
            with pair.base.autocast():
                patch = _patch(wave, kind, base, expert, record, other)
            for components_C in components:
                gained_CB = restart.utilities(kind, patch, components_C, plan.fraction) - item.base[gauge.name]
                values_C = (gained_CB * item.weights[gauge.name]).sum(1)
                item.run.add_some(kind, index, components_C, values_C)
                plan.tick(len(components_C) * len(item.batch.last_B))
