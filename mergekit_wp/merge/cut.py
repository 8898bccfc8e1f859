"""What a set patch takes from the donor, cut out of its checkpoint: the content of a patch file."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import torch

from mergekit_wp.checkpoint.folder import content_digest
from mergekit_wp.checkpoint.weights import read_header
from mergekit_wp.documents import now
from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import TensorSlot, slot_of, text_name
from mergekit_wp.merge.chosen import chosen, places_of
from mergekit_wp.merge.patch_file import PatchFile, PatchMeta
from mergekit_wp.merge.plan import MergePlan, PlannedTensor, names_file
from mergekit_wp.scores import ModelId


def touched(plan: MergePlan) -> Iterator[tuple[PlannedTensor, TensorSlot, torch.Tensor, torch.Tensor]]:
    """Every tensor that the set owns something of: how it is cut, the places [n] along its axis, and the donor's slices
    there, as they are stored. Reads a tensor at a time."""
    for tensor in plan.tensors:
        places_n, slot = places_of(plan, tensor), slot_of(tensor.source)
        if places_n is None or slot is None:
            continue
        donor = tensor.experts[0]
        name = tensor.sources[donor] or ""
        whole = plan.checkpoints[donor].tensors[name].part(name, ...)
        yield tensor, slot, places_n, whole.index_select(slot.axis, places_n)


def cut(plan: MergePlan, recipient: str, donor: str) -> PatchFile:
    """The patch file of a checked plan of `wp_patch` with a donor; the models by the names that the user gave them.

    Raises `BadInput` where the donor's slices hold a NaN or an infinity.
    """
    first = plan.tensors[0]
    geometry, scores = plan.checkpoints[first.base].geometry, str(first.parameters["scores"])
    asked = {
        name: str(value)
        for name, value in first.parameters.items()
        if value not in ("", False) and not names_file(name, value) and name != "allow_mismatch"
    }
    meta = PatchMeta(
        recipient=ModelId.of(recipient, plan.fingerprint(first.base)),
        donor=ModelId.of(donor, plan.fingerprint(first.experts[0])),
        geometry=geometry,
        chosen=asked,
        scores=content_digest(read_header(Path(scores))) if scores else None,
        versions={name: importlib.metadata.version(name) for name in ("mergekit-wp", "torch", "safetensors")},
        date=now(),
    )
    values = {text_name(tensor.source) or "": slices for tensor, _, _, slices in touched(plan)}
    try:
        return PatchFile(meta, chosen(first.parameters, geometry), values)
    except ValueError as error:
        raise BadInput(f"{donor}: {error}; download or save that checkpoint again.") from error
