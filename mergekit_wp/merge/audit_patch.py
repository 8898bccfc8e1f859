"""The audit of a set patch: every number of the result is the recipient's or the donor's, bit for bit, where it should.

Which slices are the donor's is found component by component from `Geometry.owned_slices`, where the merge goes by
`Geometry.owned`, tensor by tensor; the set itself is the one that the merge had.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.geometry import Component, Kind, slot_of, text_name
from mergekit_wp.merge.audit_slices import AuditFailed, TokenRows
from mergekit_wp.merge.chosen import chosen
from mergekit_wp.merge.patch_file import load_patch
from mergekit_wp.merge.plan import MergePlan, PlannedTensor

_BLOCK = 1 << 24  # numbers compared at a time


def check_patched(plan: MergePlan, merged: Checkpoint) -> str:
    """Compare the whole result; says what was found. Raises `AuditFailed` at the first number that is another."""
    slices = _owned(plan)
    rows = TokenRows.of(plan, merged, [plan.tensors[0].base])
    written = [tensor for tensor in plan.tensors if tensor.written]
    tensors = [tensor for tensor in written if rows is not None or not tensor.realigned]
    for tensor in tensors:
        if tensor.realigned and rows is not None:
            _compare_rows(plan, merged, tensor, rows)
        else:
            _compare(plan, merged, tensor, slices.get(text_name(tensor.source) or "", []))
    left = [tensor.output for tensor in written if tensor not in tensors]
    unseen = f"; {' and '.join(left)}, whose rows `tokenizer:` has moved, were not" if left else ""
    taken = sum(len(slices.get(text_name(tensor.source) or "", [])) for tensor in tensors)
    return (
        f"{len(tensors)} tensors compared with the inputs: {taken:,} slices are the donor's and everything else is the "
        f"recipient's, bit for bit{rows.said if rows else unseen}"
    )


def _owned(plan: MergePlan) -> dict[str, list[Any]]:
    """Of each tensor the indices of the slices that components of the set own, by its name in a plain causal LM."""
    first = plan.tensors[0]
    recipient = plan.checkpoints[first.base]
    stored = {text_name(name) for name in recipient.tensors}
    found: dict[str, list[Any]] = defaultdict(list)
    for kind, mask_Ln in chosen(first.parameters, recipient.geometry).masks.items():
        for layer, index in mask_Ln.nonzero().tolist():
            component = Component(Kind(kind), layer, index)
            for name, where in recipient.geometry.owned_slices(component.kind, component.layer, component.index):
                if name in stored:
                    found[name].append(where)
    return found


def _compare(plan: MergePlan, merged: Checkpoint, tensor: PlannedTensor, slices: list[Any]) -> None:
    recipient = plan.header(tensor.base, tensor.source)
    assert recipient is not None  # the checks of the plan say so
    got = merged.tensors.get(tensor.output)
    if got is None or got.shape != recipient.shape:
        raise AuditFailed(f"{merged.name}: {tensor.output} is not there in the shape of {tensor.base}; do not use it.")
    from_donor = torch.zeros(recipient.shape, dtype=torch.bool) if slices else None
    for where in slices:
        assert from_donor is not None
        from_donor[where] = True
    donor = _donor(plan, tensor) if slices else None
    step = max(1, _BLOCK * recipient.shape[0] // max(1, torch.Size(recipient.shape).numel()))
    for start in range(0, recipient.shape[0], step):
        rows = slice(start, start + step)
        want = _converted(plan, tensor, recipient.part(tensor.source, rows))
        if donor is not None and from_donor is not None:
            want = torch.where(from_donor[rows], _converted(plan, tensor, donor[rows]), want)
        found = got.part(tensor.output, rows)
        if found.dtype != want.dtype or not torch.equal(_bits(found), _bits(want)):
            raise AuditFailed(
                f"{merged.name}: {tensor.output}[{start}:{start + len(want)}] is not what {tensor.base} and the donor "
                "hold there; do not use it."
            )


def _compare_rows(plan: MergePlan, merged: Checkpoint, tensor: PlannedTensor, rows: TokenRows) -> None:
    """Of a vocabulary that a `tokenizer:` has made: every token that the recipient has is its row."""
    recipient, got = plan.header(tensor.base, tensor.source), merged.tensors.get(tensor.output)
    assert recipient is not None  # the checks of the plan say so
    if got is None or got.shape[1:] != recipient.shape[1:]:
        raise AuditFailed(f"{merged.name}: {tensor.output} is not there in the shape of {tensor.base}; do not use it.")
    there, here = (
        torch.tensor(numbers) for numbers in zip(*((row, own[tensor.base]) for row, own in rows.rows), strict=True)
    )
    want = _converted(plan, tensor, recipient.part(tensor.source, ...)[here])
    found = got.part(tensor.output, ...)[there]
    if found.dtype != want.dtype or not torch.equal(_bits(found), _bits(want)):
        raise AuditFailed(
            f"{merged.name}: {tensor.output} is not what {tensor.base} holds for the same tokens; do not use it."
        )


def _donor(plan: MergePlan, tensor: PlannedTensor) -> torch.Tensor:
    """The donor's tensor; of a patch file, its slices where they belong and 0 elsewhere."""
    if tensor.experts:
        donor = tensor.experts[0]
        name = tensor.sources[donor] or ""
        return plan.checkpoints[donor].tensors[name].part(name, ...)
    patch = load_patch(tensor.parameters["patch"])
    values, slot = patch.values[text_name(tensor.source) or ""], slot_of(tensor.source)
    header = plan.header(tensor.base, tensor.source)
    assert slot is not None and header is not None  # noqa: PT018  (it has slices)
    whole = torch.zeros(header.shape, dtype=values.dtype)
    mask = patch.subset.owned(slot, patch.meta.geometry)
    whole[(slice(None), mask) if slot.axis else mask] = values
    return whole


def _converted(plan: MergePlan, tensor: PlannedTensor, part: torch.Tensor) -> torch.Tensor:
    """To the dtype that the recipe makes mergekit read in, then to that of the output; each as it rounds."""
    read = part if tensor.read_dtype is None else part.to(getattr(torch, tensor.read_dtype.removeprefix("torch.")))
    return read.to(getattr(torch, plan.out_dtype(tensor)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes: -0 is not 0 here, and a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)
