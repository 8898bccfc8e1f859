"""The patch file: what a set patch takes from the donor, small, to be laid over the recipient elsewhere.

A safetensors file:

    heads [n, 2], neurons [n, 2]    int32: layer and index of every component of the set, ascending
    slices/<tensor> [n, C]          rows of a tensor that the set owns (of a bias [n]), ascending
    slices/<tensor> [R, n]          columns, of o_proj and down_proj

in the donor's own dtypes, bit for bit, under the names that tensors have in a plain causal LM (`geometry.text_name`),
with a JSON document under the metadata key `wp_patch` (`PatchMeta`). `wp-patch --sparse` writes it, `wp-patch --apply`
and `merge_method: wp_patch` with `patch: FILE` lay it over the recipient that it names, and over no other model.

Legend: n slices or components, R rows, C columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from mergekit_wp.documents import Count, Date, Sha256, Text, Versions, read_document, strict
from mergekit_wp.errors import BadInput
from mergekit_wp.files import Stamp, read_tensors, stamp, write_tensors
from mergekit_wp.geometry import Component, Geometry, Kind, slot_of
from mergekit_wp.scores import ModelId
from mergekit_wp.subset import Subset

FORMAT = 1
METADATA_KEY = "wp_patch"
_PREFIX = "slices/"
_MOST_COMPONENTS = 1 << 28  # of a kind; the neurons of a 405B model are a fortieth of it
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@strict
@dataclass(frozen=True)
class PatchMeta:
    """Whose slices these are, and how they were chosen; `date` is ISO 8601 UTC.

    recipient, donor   the model that they are laid over, the model that they come from
    geometry           of both
    chosen             the parameters of `merge_method: wp_patch` that were given, without paths
    scores             content of the score file that ranked (`content_digest`); None without one
    """

    recipient: ModelId
    donor: ModelId
    geometry: Geometry
    chosen: dict[Text, Text]
    scores: Sha256 | None
    versions: Versions
    date: Date
    format: Count = FORMAT

    @classmethod
    def from_json(cls, text: str) -> PatchMeta:
        """Parse and check; raises ValueError (`read_patch` makes it a BadInput)."""
        return read_document(cls, text, range(FORMAT, FORMAT + 1))

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class PatchFile:
    """A whole patch file; checks itself (raises ValueError). `values` by tensor, as a plain causal LM names it."""

    meta: PatchMeta
    subset: Subset
    values: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        for name, values in self.values.items():
            slot, axis_length = slot_of(name), 0
            if slot is not None and slot.layer < self.meta.geometry.layers:
                axis_length = int(self.subset.owned(slot, self.meta.geometry).sum())
            if slot is None or not axis_length:
                raise ValueError(f"slices of {name}, of which no component of the set owns any")
            if values.dtype not in _DTYPES:
                raise ValueError(f"{name} has dtype {values.dtype}")
            if values.ndim not in (1, 2) or slot.axis >= values.ndim or values.shape[slot.axis] != axis_length:
                raise ValueError(f"{name} has shape {list(values.shape)}, and the set owns {axis_length} of its slices")
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} holds a NaN or an infinity")


def write_patch(patch: PatchFile, path: str | Path) -> None:
    """Write the file atomically. Raises `BadInput` when the folder cannot be written."""
    tensors = {f"{_PREFIX}{name}": values for name, values in patch.values.items()}
    tensors |= {str(kind): mask.nonzero().to(torch.int32) for kind, mask in patch.subset.masks.items()}
    write_tensors(path, tensors, METADATA_KEY, patch.meta.to_json())


def read_patch(path: str | Path) -> PatchFile:
    """Read and validate a file. Raises `BadInput`, naming it, for anything that `write_patch` does not write."""
    text, tensors = read_tensors(path, METADATA_KEY, "patch", "wp-patch --sparse")
    try:
        meta = PatchMeta.from_json(text)
        masks = [_mask(tensors.pop(str(kind)), kind, meta.geometry) for kind in Kind]
        if odd := [name for name in tensors if not name.startswith(_PREFIX)]:
            raise ValueError(f"unexpected tensors {sorted(odd)}")
        return PatchFile(meta, Subset(*masks), {name.removeprefix(_PREFIX): t for name, t in tensors.items()})
    except KeyError as error:
        raise BadInput(f"{path}: this patch file has no {error.args[0]}; make it again with wp-patch.") from error
    except (ValueError, BadInput) as error:
        reason = error.message.rstrip(".") if isinstance(error, BadInput) else str(error)
        raise BadInput(f"{path}: not a valid patch file: {reason}; make it again with wp-patch.") from error


def load_patch(path: str) -> PatchFile:
    """The validated file at `path`; read again only when it has changed. Raises `BadInput`, naming the file."""
    return _read(stamp(path, "patch file", "make it with wp-patch --sparse or mend the path"))


def _mask(places_n2: torch.Tensor, kind: Kind, geometry: Geometry) -> torch.Tensor:
    """The set's components of a kind, bool [L, n]. Raises ValueError for a list that no set writes."""
    if places_n2.dtype != torch.int32 or places_n2.ndim != 2 or places_n2.shape[1] != 2:
        raise ValueError(f"{kind} is {places_n2.dtype} of shape {list(places_n2.shape)}, expected int32 [n, 2]")
    if geometry.layers * geometry.count(kind) > _MOST_COMPONENTS:
        raise ValueError(f"a model of {geometry.layers} layers and {geometry.count(kind)} {kind} in each")
    mask = torch.zeros(geometry.layers, geometry.count(kind), dtype=torch.bool)
    if len(places_n2):
        low, high = places_n2.amin(0), places_n2.amax(0)
        if bool((low < 0).any()):
            raise ValueError(f"{kind} holds a number below 0")
        Component(kind, int(high[0]), int(high[1])).check(geometry)
        mask[places_n2[:, 0].long(), places_n2[:, 1].long()] = True
    if not torch.equal(mask.nonzero().to(torch.int32), places_n2):
        raise ValueError(f"{kind} are not in order, or one stands there twice")
    return mask


@lru_cache(maxsize=2)
def _read(key: Stamp) -> PatchFile:
    return read_patch(key[0])
