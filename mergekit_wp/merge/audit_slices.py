"""What the audits of the methods share: picking tensors, reading slices, comparing with what was written."""

from __future__ import annotations

import re
from collections import defaultdict

import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.vocabulary import align_rows
from mergekit_wp.errors import OneSentence
from mergekit_wp.merge.plan import MergePlan, PlannedTensor

FLOAT32_STEP = 2.0**-23


class AuditFailed(OneSentence):
    """The merged folder is not what it should be; exit code 1, one sentence."""


def kind_of(name: str) -> str:
    """A tensor's name without its layer."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def by_kind(plan: MergePlan) -> list[list[PlannedTensor]]:
    """The written tensors that can be recomputed from the inputs, those of one kind together."""
    kinds: dict[str, list[PlannedTensor]] = defaultdict(list)
    for tensor in plan.tensors:
        # Rows that a tokenizer config has moved are not those of the inputs any more.
        if tensor.written and not tensor.realigned:
            kinds[kind_of(tensor.output)].append(tensor)
    return list(kinds.values())


def read_slice(checkpoint: Checkpoint, name: str, where: tuple[slice, ...], dtype: str | None = None) -> torch.Tensor:
    """A part of one tensor in float64; `dtype`: converted to that first, as mergekit reads under a recipe's dtype."""
    part = checkpoint.tensors[name].part(name, where)
    return (part if dtype is None else part.to(getattr(torch, dtype.removeprefix("torch.")))).to(torch.float64)


def read_aligned(
    checkpoint: Checkpoint, name: str, where: tuple[slice, ...], base: torch.Tensor, dtype: str | None = None
) -> torch.Tensor:
    """The part of an expert's tensor that matches `base`, the same part of the base's.

    Embeddings and head have the base's rows: an expert's others are left out, and those it lacks are the base's.
    """
    have, start = checkpoint.tensors[name].shape[0], where[0].start or 0
    rows = slice(min(start, have), min(start + len(base), have))
    if rows.start == rows.stop:
        return base
    return align_rows(read_slice(checkpoint, name, (rows, *where[1:]), dtype), base)


def compare(
    plan: MergePlan,
    merged: Checkpoint,
    tensor: PlannedTensor,
    where: tuple[slice, ...],
    want: torch.Tensor,
    slack: torch.Tensor,
) -> float:
    """The largest difference as a fraction of the allowed one: half a step of the output dtype and `slack`.

    Raises `AuditFailed` above 1, and when the tensor is missing or has another shape than in the base.
    """
    if tensor.output not in merged.tensors:
        raise AuditFailed(f"{merged.name}: the tensor {tensor.output} was not written.")
    header = plan.header(tensor.base, tensor.source)
    if header and merged.tensors[tensor.output].shape != header.shape:
        raise AuditFailed(
            f"{merged.name}: {tensor.output} has another shape than in the base {tensor.base}; do not use this merge."
        )
    got = read_slice(merged, tensor.output, where)
    dtype = torch.finfo(getattr(torch, plan.out_dtype(tensor)))
    allowed = dtype.eps / 2 * want.abs() + slack + dtype.smallest_normal * dtype.eps
    off = (got - want).abs()
    worst = float((off / allowed).nan_to_num(torch.inf).max())
    if worst > 1:
        raise AuditFailed(
            f"{merged.name}: {tensor.output}{_text(where)} is not what its inputs and {plan.method} give (off by "
            f"{float(off.nan_to_num(torch.inf).max()):.3g}); do not use this merge."
        )
    return worst


def _text(where: tuple[slice, ...]) -> str:
    return "[" + ", ".join(":" if s.start is None else f"{s.start}:{s.stop}" for s in where) + "]"
