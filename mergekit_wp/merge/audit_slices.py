"""What the audits of the methods share: picking tensors, reading slices, comparing with what was written."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.vocabulary import align_rows, tokenizer_in
from mergekit_wp.errors import BadInput, OneSentence
from mergekit_wp.merge.plan import MergePlan, PlannedTensor

if TYPE_CHECKING:
    from mergekit.common import ModelReference

FLOAT32_STEP = 2.0**-23
_ROWS = 16


class AuditFailed(OneSentence):
    """The merged folder is not what it should be; exit code 1, one sentence."""


def kind_of(name: str) -> str:
    """A tensor's name without its layer."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def by_kind(plan: MergePlan, *, realigned: bool) -> list[list[PlannedTensor]]:
    """The written tensors, those of one kind together; realigned: also those whose rows a `tokenizer:` has moved."""
    kinds: dict[str, list[PlannedTensor]] = defaultdict(list)
    for tensor in plan.tensors:
        if tensor.written and (realigned or not tensor.realigned):
            kinds[kind_of(tensor.output)].append(tensor)
    return list(kinds.values())


@dataclass(frozen=True)
class TokenRows:
    """Where rows of a vocabulary that a `tokenizer:` has made come from: of some tokens the row in the result and that
    in every model. `others`: how many tokens of the result are not among them, since a model lacks them or the recipe
    says itself what they are."""

    rows: Sequence[tuple[int, Mapping[ModelReference, int]]]
    others: int

    @classmethod
    def of(cls, plan: MergePlan, merged: Checkpoint, models: Sequence[ModelReference]) -> TokenRows | None:
        """The rows of these models; None where no `tokenizer:` has moved any, or a tokenizer cannot be read."""
        moved = [tensor for tensor in plan.tensors if tensor.written and tensor.realigned]
        try:
            whole = tokenizer_in(merged.folder) if moved else None
            found = {model: tokenizer_in(plan.tokenizer_folder(model)) for model in models} if whole else {}
        except BadInput:
            return None
        # Of a model without one, mergekit takes the base's.
        own = found.get(moved[0].base) if moved else None
        if whole is None or own is None:
            return None
        ids = {model: (tokenizer or own).get_vocab() for model, tokenizer in found.items()}
        sizes = {model: plan.checkpoints[model].geometry.vocabulary for model in models}
        rows = []
        vocabulary = whole.get_vocab()
        for token, row in vocabulary.items():
            places = {model: ids[model].get(token, sizes[model]) for model in models}
            if token not in moved[0].tokens and all(places[model] < sizes[model] for model in models):
                rows.append((row, places))
        return cls(rows, len(vocabulary) - len(rows)) if rows else None

    @property
    def said(self) -> str:
        """What was not looked at, as the end of a sentence."""
        return f"; rows of {self.others} tokens that not every model has were not" if self.others else ""


def pick_rows(
    tensor: PlannedTensor, count: int, draw: random.Random, rows: TokenRows | None
) -> tuple[tuple[slice, ...], Mapping[ModelReference, int] | None]:
    """Some of a tensor's `count` rows: their place in the result and, of one that `tokenizer:` has moved, in each
    model."""
    if not tensor.realigned or rows is None:
        start = draw.randrange(count)
        return (slice(start, start + _ROWS),), None
    row, places = draw.choice(rows.rows)
    return (slice(row, row + 1),), places


def read_inputs(
    plan: MergePlan, tensor: PlannedTensor, where: tuple[slice, ...], rows: Mapping[ModelReference, int] | None = None
) -> list[torch.Tensor]:
    """What a part of the result is made of, of the base and of every expert in float64, as mergekit reads it.

    rows: of a vocabulary that a `tokenizer:` has made, the row in each model.
    """
    base = read_slice(plan.checkpoints[tensor.base], tensor.source, _at(tensor.base, where, rows), tensor.read_dtype)
    found = [base]
    for expert in tensor.experts:
        name, there = tensor.sources[expert] or "", _at(expert, where, rows)
        found.append(read_aligned(plan.checkpoints[expert], name, there, base, tensor.read_dtype))
    return found


def _at(
    model: ModelReference, where: tuple[slice, ...], rows: Mapping[ModelReference, int] | None
) -> tuple[slice, ...]:
    return where if rows is None else (slice(rows[model], rows[model] + 1), *where[1:])


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
    rows = 1 if tensor.realigned else 0  # how many a `tokenizer:` has decided
    if header and merged.tensors[tensor.output].shape[rows:] != header.shape[rows:]:
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
