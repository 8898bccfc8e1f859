"""A set patch as a model that is never written (Eq. 8, 45-47): the base with a set of the expert's heads and neurons,
or the expert with the base's.

It is the merge (`merged`) whose weight of the expert is 1 or 0 for every component, and of all that belongs to none. No
number is computed: each is that of the expert or of the base, as `merge_method: wp_patch` would write it. What a set
does not touch is shared with the models, which stay as they are, so there is nothing to undo.

Many sets can be tried in one forward pass (`ExchangedRows`): every row of a batch has an exchange of its own. What all
sets have in common is merged as above. Of the components C in which they differ both models' slices W are run, and a
mask m of each row chooses between their outputs, or hides their inputs from one of them:

    queries, gate, up     y[C] = m W_e[C] x + (1 - m) W_b[C] x
    o, down               y    = W_e[:, C] (m x[C]) + W_b[:, C] ((1 - m) x[C]) + W (x outside of C)

That is 1 + C / n times the products of one model, in as many passes as one model takes.

Legend: B rows of a batch, T tokens, N prompts, M exchanges, L layers, H heads, F neurons, n the length of a tensor
along the axis that components cut, C those along it in which exchanges differ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache

from mergekit_wp.checkpoint.vocabulary import align_rows
from mergekit_wp.geometry import PROJECTIONS, Geometry, TensorSlot, slot_of
from mergekit_wp.scoring.hooks import SCORED, substituted
from mergekit_wp.scoring.models.layerwise import Call, Stack, Start
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

    @cached_property
    def lowest(self) -> int:
        """The lowest layer with one of the components; the number of layers where there is none."""
        touched_L = torch.stack([mask.any(1) for mask in self.subset.masks.values()]).any(0)
        return int(touched_L.float().argmax()) if touched_L.any() else len(touched_L)

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

    def alike_below(self, weights: TakenWeights) -> tuple[Hashable, int]:
        """As `MergedStack.alike_below`: below its lowest component an exchange is its recipient."""
        assert isinstance(weights, Exchange)
        return weights.in_expert, weights.lowest

    @torch.no_grad()
    def _merge(
        self, weights: TakenWeights, slot: TensorSlot | None, base: torch.Tensor, experts: Sequence[torch.Tensor]
    ) -> nn.Parameter:
        taken_n = weights.along(slot, self.geometry)[0]
        (expert,) = experts
        if bool(taken_n.all()):
            merged = align_rows(expert, base)
        elif not bool(taken_n.any()):
            merged = base
        else:
            assert slot is not None  # of what belongs to no component all is taken, or nothing
            merged = torch.where(_along(taken_n.to(base.device), slot.axis, base.ndim), expert, base)
        return nn.Parameter(self._widened(merged), requires_grad=False)

    def _widened(self, stored: torch.Tensor) -> torch.Tensor:
        """Streamed sources are as they are stored, and layers run as they are; elsewhere autocast sees to it."""
        return stored.float() if self.dtype == torch.float32 else stored


@dataclass(frozen=True)
class CommonExchange:
    """What several exchanges of one direction have in common, as weights of a merge."""

    exchanges: Sequence[Exchange]

    @property
    def rest_K(self) -> torch.Tensor:
        return self.exchanges[0].rest_K

    def along(self, slot: TensorSlot | None, geometry: Geometry) -> torch.Tensor:
        """As `Exchange.along`: whether the expert's number stands there in all of them."""
        return self.each(slot, geometry).all(0, keepdim=True)

    def each(self, slot: TensorSlot | None, geometry: Geometry) -> torch.Tensor:
        """The same of every exchange, [M, n]."""
        return torch.cat([exchange.along(slot, geometry) for exchange in self.exchanges])


class ExchangedRows(ExchangedStack):
    """Base and expert with an `Exchange` for every prompt, as `set_each` says; for `Stack.go_on` alone, which is told
    the numbers of the prompts."""

    def set_each(self, exchanges: Sequence[Exchange], of_N: Sequence[int]) -> None:
        """Take other exchanges from here on, which must be of one direction; of_N: each prompt's place in them."""
        self.set(CommonExchange(exchanges))
        self._of_N = torch.tensor(of_N)
        self._of_B: torch.Tensor | None = None
        self._kept: dict[int, dict[str, _Either]] = {}
        self._differs = [self._differences(index) for index in range(self.depth)]

    def _differences(self, index: int) -> dict[str, tuple[Places, torch.Tensor]]:
        """Of the projections of a layer in which exchanges differ: where, and what each exchange has there, [M, C]."""
        assert isinstance(self.weights, CommonExchange)
        found: dict[str, tuple[Places, torch.Tensor]] = {}
        for path in (PROJECTIONS[key] for key in SCORED):
            each_Mn = self.weights.each(_slot(index, path), self.geometry).to(self.device)
            at_C = (each_Mn != each_Mn[0]).any(0).nonzero()[:, 0]
            if 2 * len(at_C) > each_Mn.shape[1]:
                found[path] = slice(None), each_Mn  # picking most of them takes longer than all of them
            elif len(at_C):
                found[path] = at_C, each_Mn[:, at_C]
        return found

    def go_on(self, ids_BT: torch.Tensor, mask_BS: torch.Tensor, cache: Cache, numbers: Sequence[int] = ()) -> Start:
        start = super().go_on(ids_BT, mask_BS, cache)
        of_B = self._of_N[list(numbers)].to(self.device)
        # Batches take turns in a layer, so each call has to say whose rows it is of.
        return Start(start.stream_BTD, [{**call, _ROWS: of_B} for call in start.calls])

    def call(self, layer: nn.Module, stream_BTD: torch.Tensor, call: Call) -> torch.Tensor:
        self._of_B = call[_ROWS]
        return super().call(layer, stream_BTD, {name: value for name, value in call.items() if name != _ROWS})

    def layers(self, order: Sequence[int]) -> Generator[nn.Module, None, None]:
        """As `MergedStack.layers`; while a layer is told of, its projections run both models' slices."""
        with closing(super().layers(order)) as layers:
            for index, layer in zip(order, layers, strict=True):
                found = self._kept.get(index) or self._eithers(index, layer)
                if not self.streamed:  # else they would hold the weights of all layers
                    self._kept[index] = found
                with ExitStack() as mixed:
                    for path, either in found.items():
                        parent, _, name = path.rpartition(".")
                        mixed.enter_context(substituted(layer.get_submodule(parent), **{name: either}))
                    yield layer

    def _eithers(self, index: int, layer: nn.Module) -> dict[str, _Either]:
        _base, (expert,) = self.sources(index)
        found: dict[str, _Either] = {}
        for path, (at_C, each_MC) in self._differs[index].items():
            own, other = layer.get_submodule(path), expert.get_submodule(path)
            if _slot(index, path).axis == 0:
                bias_C = None if other.bias is None else self._widened(other.bias[at_C])
                found[path] = _EitherOutput(own, at_C, each_MC, self._rows, self._widened(other.weight[at_C]), bias_C)
            else:
                found[path] = _EitherInput(own, at_C, each_MC, self._rows, self._widened(other.weight[:, at_C]))
        return found

    def _rows(self) -> torch.Tensor:
        assert self._of_B is not None  # a layer runs by `call`
        return self._of_B


_ROWS = "exchanges_B"
Places = torch.Tensor | slice
"""Indices [C], or all."""


def _slot(index: int, path: str) -> TensorSlot:
    slot = slot_of(f"model.layers.{index}.{path}.weight")
    assert slot is not None  # components are cut from it
    return slot


class _Either(nn.Module):
    """Stands in for a linear layer `own`; at `at_C` the expert's slices stand beside it.

    each_MC: whether each exchange has the expert's; rows: tells the exchange of every row.
    """

    def __init__(
        self, own: nn.Module, at_C: Places, each_MC: torch.Tensor, rows: Callable[[], torch.Tensor],
        experts: torch.Tensor, bias_C: torch.Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        # In a list, or it would be a submodule of what stands in its place.
        self._own, self.at_C, self.each_MC, self.rows = [own], at_C, each_MC, rows
        self.experts, self.bias_C = experts, bias_C

    def own(self, x_BTn: torch.Tensor) -> torch.Tensor:
        y_BTn: torch.Tensor = self._own[0](x_BTn)
        return y_BTn

    def chosen_B1C(self) -> torch.Tensor:
        return self.each_MC[self.rows()][:, None]


class _EitherOutput(_Either):
    """Of queries, gate and up: some outputs by one model or the other."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        y_BTn = self.own(x_BTD)
        expert_BTC = functional.linear(x_BTD, self.experts, self.bias_C)
        y_BTn[..., self.at_C] = torch.where(self.chosen_B1C(), expert_BTC, y_BTn[..., self.at_C])
        return y_BTn


class _EitherInput(_Either):
    """Of o and down: some inputs to one model or the other. Their bias is nobody's, so `own` alone adds it."""

    def forward(self, x_BTn: torch.Tensor) -> torch.Tensor:
        chosen_B1C, x_BTC, kept_BTn = self.chosen_B1C(), x_BTn[..., self.at_C], x_BTn.clone()
        kept_BTn[..., self.at_C] = x_BTC.masked_fill(chosen_B1C, 0)
        return self.own(kept_BTn) + functional.linear(x_BTC.masked_fill(~chosen_B1C, 0), self.experts)


def _along(taken_n: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    """[n] as a mask that broadcasts along the axis of a tensor with `ndim` axes."""
    return taken_n.view([-1 if each == axis else 1 for each in range(ndim)])
