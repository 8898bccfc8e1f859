"""How far an expert's weights are from its base's, added up tile by tile, so that memory does not grow with the model.

For every projection of a layer, its norms, the embeddings, the final norm and the head, and for every head and neuron
(the rows and columns that `geometry` gives it): the sums over its numbers of |delta|, delta^2 and W^2, and how many
numbers there are, where delta is the expert's weight less the base's W. A difference is formed in float32 of the
weights as they are stored (of float64 in float64), sums are float64.

A bias counts with its projection. A fused tensor is cut into its projections. Of the vocabulary, the rows that both
models have count. A LoRA is laid over its base as the loader does it, one tensor at a time, where it is plain; else it
is merged whole, into a folder that is gone afterwards. Tied ends are one tensor, `embeddings`.

Legend: L layers, H heads, F neurons, d_h head width, n lines (rows or columns) of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mergekit_wp.checkpoint.adapters import merge_lora
from mergekit_wp.checkpoint.folder import Checkpoint, local_folder
from mergekit_wp.checkpoint.in_memory import plain_tensors
from mergekit_wp.checkpoint.quantised import check_plain
from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.checkpoint.vocabulary import head_is_tied
from mergekit_wp.console import StartProgress
from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import EMBEDDINGS, FUSED, HEAD, PROJECTIONS, Geometry, Kind, TensorSlot, layer_of, slot_of
from mergekit_wp.outputs import scratch
from mergekit_wp.scoring.models.lora import Adapter
from mergekit_wp.scoring.models.precision import STORED, stored_dtype
from mergekit_wp.scoring.models.streaming import skeleton

NORMS, FINAL_NORM, EMBEDDED, OUT = "norms", "final norm", "embeddings", "head"
LAYER_MODULES = (*PROJECTIONS, NORMS)
END_MODULES = (EMBEDDED, FINAL_NORM, OUT)
_TILE = 1 << 22  # numbers that are read at a time
_BLOCK = 1 << 16  # and computed with, so that they stay in the cache: a seventh of the time
_TABLES = ("inv_freq", "rope.freqs")  # rotary, which old checkpoints store
_PATHS = {path: (key,) for key, path in PROJECTIONS.items()} | FUSED


@dataclass(frozen=True)
class DriftSums:
    """Sums [4, ...]: of |delta|, of delta^2, of W^2, and the count, float64. Of modules [4] by layer (None: outside of
    layers) and name, of heads [4, L, H], of neurons [4, L, F]."""

    modules: Mapping[tuple[int | None, str], torch.Tensor]
    heads: torch.Tensor
    neurons: torch.Tensor

    def of(self, kind: Kind) -> torch.Tensor:
        return self.heads if kind == Kind.HEAD else self.neurons


def mean_size(sums: torch.Tensor) -> torch.Tensor:
    """[4, ...] -> mean |delta|, in the weights' own unit."""
    return sums[0] / sums[3]


def relative(sums: torch.Tensor) -> torch.Tensor:
    """[4, ...] -> ||delta||_F / ||W||_F; not finite where W is 0."""
    return (sums[1] / sums[2]).sqrt()


class StoredModel:
    """A checkpoint's decoder by the names of a plain causal LM (`geometry.text_name`), rows at a time, as stored."""

    def __init__(self, checkpoint: Checkpoint, lora: Adapter | None = None) -> None:
        check_plain(checkpoint)
        self.checkpoint, self._lora = checkpoint, lora
        plain = {p: n for p, n in plain_tensors(checkpoint.tensors).items() if not p.endswith(_TABLES)}
        for end, other in ((EMBEDDINGS, HEAD), (HEAD, EMBEDDINGS)):  # of a tied pair, one may be stored
            if other in plain:
                plain.setdefault(end, plain[other])
        self.names = plain
        self._targets = plain_tensors(dict.fromkeys(lora.targets)) if lora is not None else {}
        self._merged: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def shape(self, plain: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[self.names[plain]].shape

    def rows(self, plain: str, first: int, last: int) -> torch.Tensor:
        """Rows first..last-1, in the dtype stored."""
        name = self.names[plain]
        header = self.checkpoint.tensors[name]
        if self._lora is None or plain not in self._targets:
            return header.part(name, slice(first, last))
        if self._merged[0] != plain:
            weight = header.part(name, slice(None)).to(torch.float32, copy=True)
            self._merged = plain, self._lora.merge(self._targets[plain], weight, STORED[header.dtype])
        return self._merged[1][first:last]


@contextmanager
def opened_expert(name: str) -> Iterator[StoredModel]:
    """The expert that the user calls `name`, perhaps `MODEL+LORA`, inside the block. Raises `BadInput`."""
    reference = read_reference(name)
    reference.check()
    model = Checkpoint.of(reference.model)
    if reference.lora is None:
        yield StoredModel(model)
        return
    if (lora := _plain_lora(name, model, str(local_folder(reference.lora)))) is not None:
        yield StoredModel(model, lora)
        return
    with scratch("wp-lora-") as cache:
        folder: Path = merge_lora(reference, cache, remote_code=False)
        yield StoredModel(Checkpoint(name, folder))


def _plain_lora(name: str, model: Checkpoint, folder: str) -> Adapter | None:
    """The LoRA, if it can be laid over one tensor at a time; whatever is wrong with it, merging it whole will say."""
    check_plain(model)
    try:
        bare = skeleton(name, model, stored_dtype(model.tensors), remote_code=False)
        lora = Adapter(name, folder, bare, torch.device("cpu"))
    except BadInput:
        return None
    ends = {EMBEDDINGS, HEAD} & set(plain_tensors(dict.fromkeys(lora.targets)))
    return None if ends and head_is_tied(model) else lora


def drift_sums(base: StoredModel, expert: StoredModel, geometry: Geometry, progress: StartProgress) -> DriftSums:
    """Read both models once. Raises `BadInput` when one lacks a tensor, has it in another shape, or holds a NaN."""
    names = _common(base, expert)
    modules: dict[tuple[int | None, str], torch.Tensor] = {}
    components = {kind: torch.zeros(4, geometry.layers, geometry.count(kind), dtype=torch.float64) for kind in Kind}
    numbers = {name: math.prod(base.shape(name)) for name in names}
    tick = progress(sum(numbers.values()), "reading both models", "weights")
    for name in names:
        slot, layer = slot_of(name), layer_of(name)
        sums_4n = line_sums(base, expert, name, slot.axis if slot else 0, tick)
        if not torch.isfinite(sums_4n).all():
            raise BadInput(
                f"{expert.checkpoint.name}: the tensor {name} of it or of {base.checkpoint.name} holds a NaN or an "
                "infinity; the checkpoint is damaged."
            )
        parts = torch.split(sums_4n, geometry.lengths(slot), 1) if slot else [sums_4n]
        for module, part in zip(_modules(name), parts, strict=True):
            total = modules.setdefault((layer, module), torch.zeros(4, dtype=torch.float64))
            total += part.sum(1)
        if slot is not None:
            _add_components(components, slot, parts, geometry)
    return DriftSums(modules, components[Kind.HEAD], components[Kind.NEURON])


def _add_components(
    components: Mapping[Kind, torch.Tensor], slot: TensorSlot, parts: Sequence[torch.Tensor], geometry: Geometry
) -> None:
    for share, part in zip(slot.shares, parts, strict=True):
        if share == "head":
            components[Kind.HEAD][:, slot.layer] += geometry.sum_per_head(part)
        elif share == "neuron":
            components[Kind.NEURON][:, slot.layer] += part


def line_sums(
    base: StoredModel, expert: StoredModel, name: str, axis: int, tick: Callable[[float], object]
) -> torch.Tensor:
    """[4, n] (see `DriftSums`): of each row of a tensor, or with axis 1 of each column; rows that both have count."""
    rows = min(base.shape(name)[0], expert.shape(name)[0])
    width = math.prod(base.shape(name)[1:])
    sums_4n = torch.zeros(4, width if axis else rows, dtype=torch.float64)
    tile, block = max(1, _TILE // width), max(1, _BLOCK // width)
    for first in range(0, rows, tile):
        last = min(first + tile, rows)
        read = [model.rows(name, first, last).reshape(last - first, width) for model in (base, expert)]
        for place, (base_RD, expert_RD) in enumerate(zip(*(torch.split(each, block) for each in read), strict=True)):
            start = first + place * block
            where = slice(None) if axis else slice(start, start + len(base_RD))
            sums_4n[:3, where] += _block_sums(base_RD, expert_RD, 1 - axis)
            sums_4n[3, where] += len(base_RD) if axis else width
        tick((last - first) * width)
    return sums_4n


def _block_sums(base_RD: torch.Tensor, expert_RD: torch.Tensor, dim: int) -> torch.Tensor:
    """[3, ...]: of |delta|, delta^2 and W^2 along `dim`."""
    wide = torch.promote_types(torch.promote_types(base_RD.dtype, expert_RD.dtype), torch.float32)
    weight_RD = base_RD.to(wide)
    delta_RD = (expert_RD.to(wide) - weight_RD).double()
    return torch.stack([x.sum(dim) for x in (delta_RD.abs(), delta_RD.square(), weight_RD.double().square())])


def _modules(name: str) -> tuple[str, ...]:
    """The modules that a tensor of a plain causal LM belongs to, in the order of its rows."""
    if layer_of(name) is None:
        return ({EMBEDDINGS: EMBEDDED, HEAD: OUT}.get(name, FINAL_NORM),)
    return _PATHS.get(".".join(name.split(".")[3:-1]), (NORMS,))


def _common(base: StoredModel, expert: StoredModel) -> list[str]:
    """The tensors that are compared; those of the head only where one of the two has its own."""
    tied = head_is_tied(base.checkpoint) and head_is_tied(expert.checkpoint)
    names = [name for name in base.names if not (tied and name == HEAD)]
    for one, other in ((base, expert), (expert, base)):
        if missing := sorted(set(one.names) - set(other.names)):
            raise BadInput(
                f"{other.checkpoint.name}: has no {missing[0]}, which {one.checkpoint.name} has; an expert must be a "
                "fine-tune of the base."
            )
    for name in names:
        one_shape, other_shape = base.shape(name), expert.shape(name)
        if one_shape[1:] != other_shape[1:] or (name not in (EMBEDDINGS, HEAD) and one_shape != other_shape):
            raise BadInput(
                f"{expert.checkpoint.name}: {name} has the shape {list(other_shape)}, in {base.checkpoint.name} "
                f"{list(one_shape)}; an expert must be a fine-tune of the base."
            )
    return names
