"""The passes of some batches of prompts through both models: what every method does with them.

    Passes        1. expert forward: what each metric reads there    2. base forward: F of the base, the gap, and from
                  it each prompt's weight and the gradient that its metric starts the backward pass with
    first_order   3. base backward, layer by layer, the expert's layer alongside: attr, writeback, atp
    patch_layer   3. base forward again from one layer, with its components patched one by one: exact, ap

Of a resident pair one batch goes through at a time, and the base's graphs are kept; of a streamed pair as many as
memory holds, so that each layer is read once forward and once backward, and the backward pass recomputes.

Legend: C components, B prompts, T tokens, A positions read of each, D residual width, L layers, H heads, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergekit_wp.choices import ACTIVATION_SIDE
from mergekit_wp.geometry import Kind
from mergekit_wp.scoring.accumulator import TaskAccumulator
from mergekit_wp.scoring.batching import Batch, rows_of
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.first_order import Parts, attr_heads, attr_neurons
from mergekit_wp.scoring.hooks import LayerRecord
from mergekit_wp.scoring.metrics import metric_of
from mergekit_wp.scoring.models.load import ModelPair
from mergekit_wp.scoring.patching import (
    KEY,
    MixedPatch,
    Patch,
    PatchedForward,
    chunks,
    patch_head_activations,
    patch_heads,
    patch_neuron_activations,
    patch_neurons,
)
from mergekit_wp.scoring.shuffled import ShuffledLayer
from mergekit_wp.scoring.sweep import ActivationCache, backward_sweep, forward_sweep
from mergekit_wp.subset import Subset

PATCHING = ("exact", "ap")
_PATCHES: dict[Kind, Callable[..., Patch | MixedPatch]] = {Kind.HEAD: patch_heads, Kind.NEURON: patch_neurons}
_ACTIVATIONS: dict[Kind, Callable[..., Patch]] = {
    Kind.HEAD: patch_head_activations,
    Kind.NEURON: patch_neuron_activations,
}
_ATTR: dict[Kind, Callable[..., Parts]] = {Kind.HEAD: attr_heads, Kind.NEURON: attr_neurons}


@dataclass
class BatchState:
    """One batch of a task, the numbers of its prompts (where these are kept), and what the forward passes leave: by
    metric name, F of the base [B], what the metric compares with, the prompts' weights [B], and the weighted gradient
    of F where it is read [B, A, D]."""

    run: TaskAccumulator
    batch: Batch
    numbers: Sequence[int] = ()
    expert: dict[str, torch.Tensor] = field(default_factory=dict)
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    base: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    metric_gradients: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Passes:
    """The items and the forward passes of both models; `depth` layers are run.

    `write`: ap and atp put in the place of what a component writes what the expert's writes; else its activation alone
    (`ScoringJob.object`).
    `tick` hears of the prompts that are done, layer by layer: a quarter of each for either forward pass, a half for
    the backward pass.
    """

    pair: ModelPair
    method: str
    items: Sequence[BatchState]
    keep_graphs: bool
    tick: Callable[[float], object] = lambda _done: None
    write: bool = True
    base_cache: ActivationCache = field(init=False)
    expert_cache: ActivationCache | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.depth = max(metric.layer for metric in self.items[0].run.metrics) + 1
        self._forward_expert()
        self._forward_base()

    def _cache(self, stack: Any, keep_graphs: bool = False) -> ActivationCache:
        starts, reads = [stack.start(item.batch) for item in self.items], [item.batch.reads_BA for item in self.items]
        offload = not keep_graphs and stack.streamed and stack.device.type != "cpu"
        return ActivationCache(starts, reads, self.depth, keep_graphs, offload)

    def _forward_expert(self) -> None:
        cache = self._cache(self.pair.expert)
        if self.method in ACTIVATION_SIDE:
            self.expert_cache, sweep = cache, cache.forward(self.pair.expert)
        else:
            sweep = forward_sweep(self.pair.expert, cache.starts, self.depth, at=cache.reads)
        for layer, streams in sweep:
            for item, stream_BTD in zip(self.items, streams, strict=True):
                for metric in item.run.metrics_at(layer):
                    with torch.no_grad():
                        z_BAD = item.batch.at_reads(stream_BTD)
                        value_B, target = metric.expert(self.pair.expert, z_BAD, item.batch.weights_BA)
                    item.expert[metric.name], item.targets[metric.name] = value_B, target
            self.tick(self.prompts / (4 * self.depth))

    def _forward_base(self) -> None:
        self.base_cache = self._cache(self.pair.base, self.keep_graphs)
        for layer, streams in self.base_cache.forward(self.pair.base):
            for item, stream_BTD in zip(self.items, streams, strict=True):
                for metric in item.run.metrics_at(layer):
                    name, gradient_BAD = metric.name, None
                    read = self.pair.base, item.batch.at_reads(stream_BTD), item.targets[name], item.batch.weights_BA
                    if self.method in PATCHING:
                        with torch.no_grad():
                            item.base[name] = metric.read(*read)
                    else:
                        item.base[name], gradient_BAD = metric.read_with_gradient(*read)
                    item.weights[name] = item.run.ledgers[name].weights(
                        item.base[name], item.expert[name], item.numbers
                    )
                    if gradient_BAD is not None:
                        item.metric_gradients[name] = (item.weights[name][:, None, None] * gradient_BAD).float()
            self.tick(self.prompts / (4 * self.depth))

    def inject(self, layer: int, i: int, from_above_BTD: torch.Tensor | None) -> torch.Tensor:
        """The gradient at the base's stream above `layer` of one item: what its metric there starts with, else what
        comes from above."""
        item = self.items[i]
        metrics = item.run.metrics_at(layer)
        if not metrics:
            assert from_above_BTD is not None  # the topmost layer run has a metric
            return from_above_BTD
        # A metric scores the layers up to its own, so the gradient of a metric above ends here.
        gradient_BAD = item.metric_gradients[metrics[0].name]
        gradient_BTD = gradient_BAD.new_zeros(*item.batch.ids_BT.shape, self.pair.geometry.d_model)
        reads_BA = item.batch.reads_BA
        gradient_BTD[rows_of(gradient_BTD, reads_BA), reads_BA] = gradient_BAD
        return gradient_BTD

    @property
    def prompts(self) -> int:
        return sum(len(item.batch.last_B) for item in self.items)

    def expert_record(self, expert_layer: Any, index: int, batch: int) -> LayerRecord:
        """The expert's own run of a layer, recomputed."""
        assert self.expert_cache is not None
        return self.expert_cache.recorded(self.pair.expert, expert_layer, index, batch, gradient=False)[1]


def first_order(passes: Passes, subset: Subset) -> None:
    """Sweep down and add the scores of every layer to the items' runs."""
    pair = passes.pair
    held: dict[int, list[ShuffledLayer]] = {}  # of the layer whose turn it is

    def shuffled(index: int, base: Any, expert: Any, seeds: Sequence[str]) -> list[ShuffledLayer]:
        if index not in held:
            held.clear()
            held[index] = [ShuffledLayer(base, expert, f"{seed}/{index}") for seed in seeds]
        return held[index]

    def consume(index: int, i: int, base: Any, expert: Any, record: LayerRecord) -> None:
        expert_record, item = None, passes.items[i]
        record.by_prompt = item.run.prompts > 0
        if passes.method == "atp" and any(len(subset.of(kind, index)) for kind in Kind):
            expert_record = passes.expert_record(expert, index, i)
        for kind in Kind:
            if len(subset.of(kind, index)):
                # All of a layer are scored together; what nobody asked for is left out of the sums.
                rest = ~subset.masks[kind][index].to(pair.device)
                parts = _parts(passes, kind, base, expert, record, expert_record)
                item.run.add(kind, index, _without(rest, parts), item.numbers)
                for number, null in enumerate(shuffled(index, base, expert, item.run.shuffles)):
                    parts = _parts(passes, kind, base, null, record, None)
                    item.run.add_shuffled(kind, index, number, _without(rest, parts))
        passes.tick(len(item.batch.last_B) / (2 * (passes.depth - subset.lowest)))

    backward_sweep(pair.base, pair.expert, passes.base_cache, passes.inject, consume, lowest=subset.lowest)


def _without(rest: torch.Tensor, parts: Parts) -> Parts:
    return {part: x.masked_fill(rest, 0.0) for part, x in parts.items()}


def _parts(passes: Passes, kind: Kind, base: Any, expert: Any, record: LayerRecord, other: LayerRecord | None) -> Parts:
    shape = passes.pair.geometry
    if passes.method == "attr":
        return _ATTR[kind](base, expert, record, shape)
    parts = _patch(passes, kind, base, expert, record, other).scores(KEY[kind], record, shape.width(kind))
    if passes.method in ACTIVATION_SIDE:
        return {"whole": sum(parts.values(), start=torch.zeros((), device=passes.pair.device))}
    return parts


def _patch(
    passes: Passes, kind: Kind, base: Any, expert: Any, record: LayerRecord, other: LayerRecord | None
) -> Patch | MixedPatch:
    if passes.method in ACTIVATION_SIDE:
        return _ACTIVATIONS[kind](base, expert, record, other, passes.write)
    return _PATCHES[kind](passes.pair.base, base, expert, record, passes.pair.geometry)


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
    processes: ProcessGroup
    tick: Callable[[float], object]
    fraction: float = 1.0

    def width(self, pair: ModelPair, batch: Batch) -> int:
        """Components to stack on this batch: as many as the room and the most useful tokens allow, at least one."""
        shape, (rows, tokens) = pair.geometry, batch.ids_BT.shape
        attention = 4 * shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim
        if pair.base.tower.config._attn_implementation == "eager":
            attention += 3 * shape.heads * tokens
        # Float32 numbers that live at once: of a token in a layer, of a prompt at the output head.
        floats = rows * tokens * (8 * shape.d_model + max(attention, 3 * shape.neurons))
        floats += 4 * len(batch.last_B) * shape.vocabulary
        return max(1, min(self.most_tokens // (rows * tokens), self.room // (4 * floats)))


@torch.no_grad()
def patch_layer(passes: Passes, plan: PatchPlan, index: int, base: Any, expert: Any) -> None:
    """Patch every chosen component of layer `index` in every item; the items' runs get this process's share."""
    pair = passes.pair
    for i, item in enumerate(passes.items):
        metric = metric_of(item.run.metrics, index)
        if metric is None:
            continue
        _above, record = passes.base_cache.recorded(pair.base, base, index, i, gradient=False)
        other = passes.expert_record(expert, index, i) if passes.method == "ap" else None
        restart = PatchedForward(
            pair.base, pair.geometry, item.batch, passes.base_cache.starts[i].calls, index, base, record, metric,
            item.targets[metric.name],
        )  # fmt: skip
        width = plan.width(pair, item.batch)
        for kind in Kind:
            components = plan.processes.share(list(chunks(plan.subset.of(kind, index), width)))
            if not components:
                continue
            with pair.base.autocast():
                patch = _patch(passes, kind, base, expert, record, other)
            for components_C in components:
                gained_CB = restart.utilities(kind, patch, components_C, plan.fraction) - item.base[metric.name]
                values_CB = gained_CB * item.weights[metric.name]
                item.run.add_some(kind, index, components_C, values_CB, item.numbers)
                plan.tick(len(components_C) * len(item.batch.last_B))
