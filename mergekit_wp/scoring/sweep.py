"""Sweeps over the layers of a stack: forward without gradients, and backward with them, a layer at a time.

Layers are the outer loop and batches the inner one, so a streamed layer is read once however many batches there
are. The backward sweep recomputes each layer from its stored input, unless its graph was kept on the forward one (which
saves a forward pass and costs memory). Two layers of weights are needed at a time (METHOD.md 3).

Legend: B prompts, T tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, TypeVar

import torch
from torch import nn

from mergekit_wp.memory import free_memory
from mergekit_wp.scoring.hooks import SCORED, LayerRecord, at_reads, run_layer
from mergekit_wp.scoring.models.layerwise import Stack, Start

Streams = list[torch.Tensor]
T = TypeVar("T")


def batch_groups(stack: Stack, items: Sequence[T], tokens_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut batches into what goes through the layers together.

    One at a time where the model is resident; where layers are streamed, as many as memory holds: the streams on the
    device (a quarter of what is free there), the activation cache of all layers in host memory (half of it).
    """
    if not stack.streamed:
        yield from ([item] for item in items)
        return
    stream_bytes = 4 * stack.width  # of one token
    room = free_memory(torch.device("cpu")) // (2 * stream_bytes * (stack.depth + 3))
    if stack.device.type != "cpu":
        room = min(room, free_memory(stack.device) // (4 * 3 * stream_bytes))
    yield from portions(items, tokens_of, room)


def portions(items: Sequence[T], size_of: Callable[[T], int], room: int) -> Iterator[list[T]]:
    """Cut the list into pieces whose sizes add up to at most `room`, or of one item."""
    group: list[T] = []
    for item in items:
        if group and sum(map(size_of, group)) + size_of(item) > room:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


@torch.no_grad()
def forward_sweep(
    stack: Stack, starts: Sequence[Start], depth: int, *, at: Sequence[torch.Tensor] | None = None, below: int = 0
) -> Iterator[tuple[int, Streams]]:
    """Sweep up through layers `below` to depth-1 without gradients; after each, (layer, residual streams [B, T, D]).

    `start.stream_BTD` is the stream under layer `below`. With `at` (`reads_BA` of every batch) the last layer
    computes those positions alone. The list is the same one at every step; its entries are replaced.
    """
    streams = [start.stream_BTD for start in starts]
    order = range(below, depth)
    for index, layer in zip(order, stack.layers(order), strict=True):
        for i, start in enumerate(starts):
            with at_reads(layer, at[i] if at is not None and index == depth - 1 else None):
                streams[i] = stack.call(layer, streams[i], start.calls[index])
        yield index, streams


@torch.no_grad()
def recorded_sweep(
    stack: Stack, starts: Sequence[Start], depth: int
) -> Iterator[tuple[int, int, nn.Module, LayerRecord]]:
    """Sweep up through layers 0 to depth-1 without gradients; (layer, batch, module, record) of each on each batch."""
    streams = [start.stream_BTD for start in starts]
    order = range(depth)
    for index, layer in zip(order, stack.layers(order), strict=True):
        for i, start in enumerate(starts):
            streams[i], record = run_layer(stack, layer, streams[i], start.calls[index], gradient=False)
            yield index, i, layer, record


@dataclass
class ActivationCache:
    """What a forward sweep leaves for the backward one: the input of every layer for every batch, or its graph.

    `inputs[layer][batch]` [B, T, D] lies in host memory if `offload`, else where it was computed. `graphs` holds
    (stream above, record) instead where they were kept.
    """

    starts: Sequence[Start]
    reads: Sequence[torch.Tensor]
    depth: int
    keep_graphs: bool = False
    offload: bool = False
    projections: Sequence[str] = SCORED
    inputs: list[Streams] = field(default_factory=list)
    graphs: list[list[tuple[torch.Tensor, LayerRecord]]] = field(default_factory=list)

    def at(self, layer: int, batch: int) -> torch.Tensor | None:
        """Where layer `layer` is to be computed: where it is read for the topmost, None (everywhere) below."""
        return self.reads[batch] if layer == self.depth - 1 else None

    def forward(self, stack: Stack) -> Iterator[tuple[int, Streams]]:
        """As `forward_sweep`, and remember."""
        streams = [start.stream_BTD for start in self.starts]
        order = range(self.depth)
        for index, layer in zip(order, stack.layers(order), strict=True):
            if self.keep_graphs:
                self.graphs.append([self._run(stack, layer, index, i, x) for i, x in enumerate(streams)])
                streams = [above.detach() for above, _record in self.graphs[-1]]
            else:
                self.inputs.append([x.cpu() if self.offload else x for x in streams])
                with torch.no_grad():
                    for i, (x_BTD, start) in enumerate(zip(streams, self.starts, strict=True)):
                        with at_reads(layer, self.at(index, i)):
                            streams[i] = stack.call(layer, x_BTD, start.calls[index])
                streams = list(streams)
            yield index, streams

    def recorded(
        self, stack: Stack, layer: nn.Module, index: int, batch: int, *, gradient: bool
    ) -> tuple[torch.Tensor, LayerRecord]:
        """The stream above `layer` and its record for one batch, kept or recomputed."""
        if self.keep_graphs:
            return self.graphs[index][batch]
        return self._run(stack, layer, index, batch, self.inputs[index][batch].to(stack.device), gradient)

    def forget(self, index: int) -> None:
        """Free what was kept of layer `index`; the layers below it stay."""
        for kept in (self.graphs, self.inputs):
            if kept:
                kept[index] = []

    def _run(
        self, stack: Stack, layer: nn.Module, index: int, batch: int, stream_BTD: torch.Tensor, gradient: bool = True
    ) -> tuple[torch.Tensor, LayerRecord]:
        call = self.starts[batch].calls[index]
        return run_layer(
            stack,
            layer,
            stream_BTD,
            call,
            gradient=gradient,
            reads_BA=self.at(index, batch),
            projections=self.projections,
        )


Inject = Callable[[int, int, torch.Tensor | None], torch.Tensor]
Consume = Callable[[int, int, nn.Module, Any, LayerRecord], None]


def backward_sweep(
    base: Stack, expert: Stack | None, cache: ActivationCache, inject: Inject, consume: Consume, *, lowest: int = 0,
    through: bool = False,
) -> list[torch.Tensor]:  # fmt: skip
    """Sweep down the base to layer `lowest` with gradients, the expert's layers (if there is one) alongside.

    inject(layer, batch, g)   the gradient [B, T, D] at the stream above `layer`, given that from above it (None at
                              the top)
    consume(layer, batch, base layer, expert layer, record)   takes every record with its gradients, also those of the
                              layer's own parameters that have any
    Returns, if it goes `through` the lowest layer too, the gradients at the stream below it.
    """
    gradients: list[torch.Tensor | None] = [None] * len(cache.starts)
    order = range(cache.depth - 1, lowest - 1, -1)
    alongside = repeat(None, len(order)) if expert is None else expert.layers(order)
    for index, layer, expert_layer in zip(order, base.layers(order), alongside, strict=True):
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        for i in range(len(cache.starts)):
            gradient_BTD = inject(index, i, gradients[i])
            above_BTD, record = cache.recorded(base, layer, index, i, gradient=True)
            below = through or index > lowest
            gradients[i] = record.backward(above_BTD, gradient_BTD, below=below, parameters=trained)
            with torch.no_grad(), base.autocast():
                consume(index, i, layer, expert_layer, record)
            del above_BTD, record  # before the next batch's are made
        cache.forget(index)
    return [gradient for gradient in gradients if gradient is not None]
