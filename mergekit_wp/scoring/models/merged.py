"""A merge as a model that is never written: its layers are made from those of the base and the experts, one at a time.

    theta(c) = theta_base + sum_k w_k(c) (theta_k - theta_base)                         METHOD.md 6

with a weight of every head and neuron of every expert (keys and values: the mean over the query heads of their group),
and one of everything else of an expert (norms, embeddings, output head, biases that nobody owns). Whatever reads a
`Stack` can then read a merge: forward passes, gaps, metrics, gradients.

Sums are formed in float32 and held as the base's weights are held (see `precision`), as a written merge would be, or in
the dtype that is asked for. Of resident models the whole merge is kept until the weights change; of streamed ones a
layer lives while its turn lasts, and the layers that it is made of can be read beside it (`sources`).

Legend: K experts, L layers, H heads, F neurons, n the length of a tensor along the axis that components cut, B prompts,
T tokens, D residual width.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache

from mergekit_wp.checkpoint.vocabulary import align_rows
from mergekit_wp.geometry import Geometry, TensorSlot, slot_of
from mergekit_wp.memory import free_memory
from mergekit_wp.merge.kernel import merge_fitted
from mergekit_wp.scoring.batching import Batch
from mergekit_wp.scoring.hooks import at_reads
from mergekit_wp.scoring.models.layerwise import Stack, Start
from mergekit_wp.scoring.sweep import forward_sweep


class TakenWeights(Protocol):
    """What a merge takes of each expert, such as `fit_file.FusionWeights`."""

    @property
    def rest_K(self) -> torch.Tensor:
        """Of all that belongs to no component [K]."""

    def along(self, slot: TensorSlot | None, geometry: Geometry) -> torch.Tensor:
        """Along the slot's axis of its tensor [K, n]; [K, 1] where there is no component."""


class MergedStack(Stack):
    """The merge of `experts` into `base` by `weights`, which `set` replaces.

    The stacks must be of one geometry, on one device. Streamed if the base is; then a sweep over this stack sweeps over
    all of them. held: the dtype of merged weights; None: the base's. frozen: whether norms and biases, too, are without
    gradients.
    """

    def __init__(
        self, base: Stack, experts: Sequence[Stack], geometry: Geometry, weights: TakenWeights,
        held: torch.dtype | None = None, frozen: bool = False,
    ):  # fmt: skip
        # Modules of its own around the base's parameters, which give way to merged ones.
        shared = {id(parameter): parameter for parameter in base.model.parameters()}
        super().__init__(copy.deepcopy(base.model, shared), base.device, base.dtype)
        self.base, self.experts, self.geometry = base, list(experts), geometry
        self.held, self.frozen = held, frozen
        self.streamed = base.streamed
        self._empty = [dict(layer.named_parameters()) for layer in self.tower.layers]
        self.set(weights)

    def set(self, weights: TakenWeights) -> None:
        """Take other weights from here on."""
        self.weights = weights
        self._merged: set[int] = set()
        self._head_is_merged = False

    def layers(self, order: Sequence[int]) -> Generator[nn.Module, None, None]:
        """As `Stack.layers`; the layers of base and experts are held alongside (`sources`)."""
        if self.streamed:
            with closing(self.branches(order, [self.weights])) as sweep:
                for _index, _branch, layer in sweep:
                    yield layer
            return
        for index in order:
            if index not in self._merged:
                self._merge_layer(index, self.weights)
                self._merged.add(index)
            yield self.tower.layers[index]

    def branches(
        self, order: Sequence[int], candidates: Sequence[TakenWeights]
    ) -> Generator[tuple[int, int, nn.Module], None, None]:
        """(index, number of the candidate, the layer merged by its weights): every candidate's before the next index.

        The layers of base and experts are read once, however many candidates there are.
        """
        with ExitStack() as sweeps:
            stacks = (self.base, *self.experts)
            sources = [sweeps.enter_context(closing(stack.stored_layers(order))) for stack in stacks]
            for index, *_held in zip(order, *sources, strict=True):
                self._merged.discard(index)
                try:
                    for branch, weights in enumerate(candidates):
                        self._merge_layer(index, weights)
                        yield index, branch, self.tower.layers[index]
                finally:
                    for name, parameter in self._empty[index].items():
                        _put(self.tower.layers[index], name, parameter)

    @torch.no_grad()
    def branch_sweep(
        self, candidates: Sequence[TakenWeights], batches: Sequence[Batch]
    ) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        """The merge by every candidate on every batch: (layer, candidate, batch, the stream [B, T, D] above the layer).

        While a candidate is told of, its weights are set: norm and head are its own. Where layers are streamed, all go
        through the layers together; else one after the other. Lowest layers that candidates have in common
        (`alike_below`) are run once. The last layer is right where prompts are read.
        """
        if not self.streamed:
            yield from self._one_after_the_other(candidates, batches)
            return
        starts = [self.starts(batch, candidates) for batch in batches]
        streams = [[start[branch].stream_BTD for start in starts] for branch in range(len(candidates))]
        with closing(self.branches(range(self.depth), candidates)) as sweep_of_all:
            for index, branch, layer in sweep_of_all:
                self.set(candidates[branch])
                same = self._first_alike(candidates, branch, index)
                for i, batch in enumerate(batches):
                    if same < branch:
                        streams[branch][i] = streams[same][i]
                    else:
                        with at_reads(layer, batch.reads_BA if index == self.depth - 1 else None):
                            streams[branch][i] = self.call(layer, streams[branch][i], starts[i][branch].calls[index])
                    yield index, branch, i, streams[branch][i]

    def _one_after_the_other(
        self, candidates: Sequence[TakenWeights], batches: Sequence[Batch]
    ) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        """`branch_sweep` of resident models. Streams that others may begin from are kept, within a quarter of what is
        free."""
        room, kept = free_memory(self.device) // 4, dict[tuple[Hashable, int], list[torch.Tensor]]()
        for branch, weights in enumerate(candidates):
            self.set(weights)
            whose, alike = self.alike_below(weights)
            for i, batch in enumerate(batches):
                known = kept.setdefault((whose, i), [])  # above layers 0, 1, ...
                begin = min(len(known), alike)
                for index in range(begin):
                    yield index, branch, i, known[index]
                start = self.start(batch)
                if begin:
                    start = replace(start, stream_BTD=known[begin - 1])
                sweep = forward_sweep(self, [start], self.depth, at=[batch.reads_BA], below=begin)
                for index, (stream_BTD,) in sweep:
                    if index == len(known) and index < alike and stream_BTD.nbytes <= room:
                        known.append(stream_BTD)
                        room -= stream_BTD.nbytes
                    yield index, branch, i, stream_BTD

    def alike_below(self, weights: TakenWeights) -> tuple[Hashable, int]:
        """A model, and up to which layer the merge by `weights` is that; 0: nothing is known."""
        return None, 0

    def _first_alike(self, candidates: Sequence[TakenWeights], branch: int, index: int) -> int:
        """The number of the first candidate that is the same as this one up to layer `index` at least."""
        whose, alike = self.alike_below(candidates[branch])
        if index >= alike:
            return branch
        others = enumerate(map(self.alike_below, candidates[:branch]))
        return next((other for other, (who, up_to) in others if who == whose and index < up_to), branch)

    def sources(self, index: int) -> tuple[Any, list[Any]]:
        """Layer `index` of the base, and of every expert; of streamed models only while `layers` is at it, and as it is
        stored (`Stack.stored_layers`)."""
        return self.base.tower.layers[index], [expert.tower.layers[index] for expert in self.experts]

    def start(self, batch: Batch) -> Start:
        """As `Stack.start`: what enters layer 0 is linear in the embeddings, so it is merged instead of these."""
        return self.starts(batch, [self.weights])[0]

    @torch.no_grad()
    def go_on(self, ids_BT: torch.Tensor, mask_BS: torch.Tensor, cache: Cache, numbers: Sequence[int] = ()) -> Start:
        """As `Stack.go_on`. An expert of which nothing is taken outside of components need not have all tokens."""
        first = self.base.go_on(ids_BT, mask_BS, cache)
        stream_BTD = first.stream_BTD.clone()
        for expert, weight in zip(self.experts, self.weights.rest_K.tolist(), strict=True):
            if weight:
                stream_BTD.add_(expert.entering(ids_BT) - first.stream_BTD, alpha=weight)
        return Start(stream_BTD, first.calls)

    @torch.no_grad()
    def starts(self, batch: Batch, candidates: Sequence[TakenWeights]) -> list[Start]:
        """The starts of the merges by several weights."""
        first = self.base.start(batch)
        streams = [first.stream_BTD.clone() for _weights in candidates]
        for k, change_BTD in enumerate(self.start_changes(batch, first.stream_BTD)):
            for weights, stream_BTD in zip(candidates, streams, strict=True):
                stream_BTD.add_(change_BTD, alpha=float(weights.rest_K[k]))
        return [Start(stream_BTD, first.calls) for stream_BTD in streams]

    def start_changes(self, batch: Batch, base_BTD: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """What enters layer 0 of each expert beyond what enters the base's (`base_BTD`, if known), [B, T, D]."""
        own_BTD = self.base.entering(batch.ids_BT) if base_BTD is None else base_BTD
        for expert in self.experts:
            yield expert.entering(batch.ids_BT) - own_BTD

    def logits(self, final_BD: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """As `Stack.logits`, by the merged norm and output head, which then stay until the weights change."""
        self.read_head()
        return super().logits(final_BD, vocabulary)

    def read_head(self) -> None:
        """Merge the final norm and the output head, if that is not done yet."""
        if self._head_is_merged:
            return
        for stack in (self.base, *self.experts):
            stack.read_head()
        for own, *others in zip(*(outer_modules(stack) for stack in (self, self.base, *self.experts)), strict=True):
            base, experts = others[0], others[1:]
            for name, parameter in base.named_parameters():
                _put(own, name, self._merge(self.weights, None, parameter, [x.get_parameter(name) for x in experts]))
        self._head_is_merged = True

    def forget_head(self) -> None:
        """Let norm and output head go, here and in what they are merged from, where that is read again."""
        if self.streamed:
            for stack in (self.base, *self.experts):
                stack.forget_head()
            for own, base in zip(outer_modules(self), outer_modules(self.base), strict=True):
                for name, parameter in base.named_parameters():
                    _put(own, name, parameter)
            self._head_is_merged = False

    def _merge_layer(self, index: int, weights: TakenWeights) -> None:
        base, experts = self.sources(index)
        for name, parameter in base.named_parameters():
            slot = slot_of(f"model.layers.{index}.{name}")
            merged = self._merge(weights, slot, parameter, [expert.get_parameter(name) for expert in experts])
            _put(self.tower.layers[index], name, merged)

    @torch.no_grad()
    def _merge(
        self,
        weights: TakenWeights,
        slot: TensorSlot | None,
        base: torch.Tensor,
        experts: Sequence[torch.Tensor],
    ) -> nn.Parameter:
        """One tensor. Norms and biases, which are small, may have a gradient from autograd, unless all is frozen."""
        experts = [align_rows(tensor, base) for tensor in experts]
        axis = 0 if slot is None else slot.axis
        weight_Kn = weights.along(slot, self.geometry)
        held = self.held or (torch.float32 if self.dtype == torch.float32 else base.dtype)
        merged = merge_fitted(base, experts, weight_Kn, axis, [1.0] * len(experts), held)
        return nn.Parameter(merged, requires_grad=base.ndim == 1 and not self.frozen)


def outer_modules(stack: Stack) -> tuple[nn.Module, nn.Module]:
    """The final norm and the output head."""
    return stack.tower.norm, stack.model.lm_head


def _put(module: Any, name: str, parameter: nn.Parameter) -> None:
    """Replace a parameter of `module` by its dotted name."""
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = parameter
