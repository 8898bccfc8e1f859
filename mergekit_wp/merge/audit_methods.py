"""The audit's own AIM and WIDEN: straight from the formulas of `methods`, in float64, on some rows and columns.

The kernel of WIDEN works in float32, so two columns whose changes are nearly equal may come in another order there. One
place more or less moves a softmax by at most 1 / (4C), for which there is slack; across the average it moves the
weight to s, so columns whose rank may lie on either side are left out of the sample.

Legend: K experts, C columns as taken apart, n sampled columns, O elements of a column.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.geometry import text_name
from mergekit_wp.merge.activations import read_activations
from mergekit_wp.merge.audit_slices import (
    FLOAT32_STEP,
    TokenRows,
    by_kind,
    compare,
    pick_rows,
    read_aligned,
    read_inputs,
    read_slice,
)
from mergekit_wp.merge.methods.widen import by_token
from mergekit_wp.merge.plan import MergePlan, PlannedTensor

_TENSORS_A_KIND = 4


def check_aim(plan: MergePlan, merged: Checkpoint, draw: random.Random, rows: TokenRows | None = None) -> list[float]:
    """Some rows of some tensors of every kind: the difference of each, as a fraction of what rounding allows.

    rows: as for wp.
    """
    differences = []
    for tensors in by_kind(plan, realigned=rows is not None):
        for tensor in draw.choices(tensors, k=_TENSORS_A_KIND):
            means = read_activations(tensor.parameters["activations"]).means
            header = plan.header(tensor.base, tensor.source)
            assert header is not None  # the checks of the plan say so
            where, own = pick_rows(tensor, header.shape[0], draw, rows)
            base, tuned = read_inputs(plan, tensor, where, own)
            share = torch.ones(())
            if (mean_C := means.get(text_name(tensor.source) or "")) is not None:
                a_C = mean_C.double() / mean_C.max().clamp(min=1e-45)
                share = 1 - (1 - float(tensor.parameters["omega"])) * (a_C[where[0]] if len(header.shape) == 1 else a_C)
            want = base + (tuned - base) * share
            slack = 3 * FLOAT32_STEP * (base.abs() + tuned.abs())
            differences.append(compare(plan, merged, tensor, where, want, slack))
    return differences


_COLUMNS = 16
_BLOCK_ELEMENTS = 2**22
# How far the kernel's float32 sums may be off: relative to a difference, and relative to the whole change.
_RELATIVE, _ABSOLUTE = 1e-5, 1e-6


@dataclass(frozen=True)
class _Columns:
    """The base's tensor and the experts' as matrices whose columns are those that WIDEN takes apart."""

    plan: MergePlan
    tensor: PlannedTensor

    @property
    def by_row(self) -> bool:
        return by_token(self.tensor.source)

    @property
    def shape(self) -> tuple[int, ...]:
        header = self.plan.header(self.tensor.base, self.tensor.source)
        assert header is not None  # the checks of the plan say so
        return header.shape

    @property
    def count(self) -> int:
        return self.shape[0 if self.by_row or len(self.shape) == 1 else 1]

    def where(self, start: int, stop: int) -> tuple[slice, ...]:
        columns = slice(start, stop)
        return (columns,) if self.by_row or len(self.shape) == 1 else (slice(0, self.shape[0]), columns)

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """base_OC and experts_KOC (a vector has O = 1)."""
        where, tensor, opened = self.where(start, stop), self.tensor, self.plan.checkpoints
        base = read_slice(opened[tensor.base], tensor.source, where, tensor.read_dtype)
        parts = [base] + [
            read_aligned(opened[model], tensor.sources[model] or "", where, base, tensor.read_dtype)
            for model in tensor.experts
        ]
        parts = [part[None] if part.ndim == 1 else part.T if self.by_row else part for part in parts]
        return parts[0], torch.stack(parts[1:])


def check_widen(plan: MergePlan, merged: Checkpoint, draw: random.Random) -> list[float]:
    """Some columns of one tensor of every kind: the difference of each, as a fraction of what rounding allows."""
    differences = []
    for tensors in by_kind(plan, realigned=False):
        columns = _Columns(plan, draw.choice(tensors))
        weights_KC, slack_C, certain_C = _weights(columns)
        certain = certain_C.nonzero().flatten().tolist()
        for j in draw.sample(certain, min(_COLUMNS, len(certain))):
            base_O1, experts_KO1 = columns.read(j, j + 1)
            change_KO1 = experts_KO1 - base_O1
            want = base_O1 + (weights_KC[:, j, None, None] * change_KO1).sum(0)
            size = base_O1.abs() + (weights_KC[:, j, None, None] * (experts_KO1.abs() + base_O1.abs())).sum(0)
            slack = slack_C[j] * change_KO1.abs().sum(0) + (len(experts_KO1) + 2) * FLOAT32_STEP * size
            if columns.by_row or len(columns.shape) == 1:
                want, slack = want.T, slack.T
            if len(columns.shape) == 1:
                want, slack = want[0], slack[0]
            differences.append(compare(plan, merged, columns.tensor, columns.where(j, j + 1), want, slack))
    return differences


def _weights(columns: _Columns) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weights_KC; by how much the kernel's may differ from them, slack_C; and for which columns that is sure."""
    t, s = (float(columns.tensor.parameters[name]) for name in ("t", "s"))
    C = columns.count
    if len(columns.shape) == 1:
        base_1C, experts_K1C = columns.read(0, C)
        change_KC = (experts_K1C - base_1C).abs()[:, 0]
        limit_K1 = t * change_KC.mean(1, keepdim=True)
        weights_KC = torch.where(change_KC > limit_K1, s, change_KC.softmax(0))
        return weights_KC, torch.zeros(C), ((change_KC - limit_K1).abs() > 1e-12 * limit_K1).all(0)
    measures = _differences(columns)
    weights, slack_C, certain_C = [], torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.bool)
    for difference_KC, tolerance_KC in measures:
        place_KC = difference_KC.argsort(dim=1, stable=True).argsort(dim=1).double()
        limit = t * (C - 1) / 2
        weights.append(torch.where(place_KC > limit, s, (place_KC / C).softmax(0)))
        ordered_KC = difference_KC.sort(1).values
        low_KC = torch.searchsorted(ordered_KC, difference_KC - tolerance_KC).double()
        high_KC = torch.searchsorted(ordered_KC, difference_KC + tolerance_KC, right=True).double() - 1
        # What has not changed at all is 0 in the kernel as well, in the same order.
        low_KC, high_KC = (torch.where(tolerance_KC == 0, place_KC, edge) for edge in (low_KC, high_KC))
        certain_C &= ((low_KC > limit) | (high_KC <= limit)).all(0)
        slack_C += ((high_KC - low_KC) / (4 * C)).sum(0)
    return (weights[0] + weights[1]) / 2, slack_C, certain_C


def _differences(columns: _Columns) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(dm_KC, its tolerance), (dd_KC, its tolerance)."""
    C, height = columns.count, columns.shape[1 if columns.by_row else 0]
    step = max(1, _BLOCK_ELEMENTS // height)
    blocks = []
    for start in range(0, C, step):
        base_OC, experts_KOC = columns.read(start, min(C, start + step))
        m0_C, m_KC = base_OC.norm(dim=0), experts_KOC.norm(dim=1)
        unit_OC, units_KOC = base_OC / m0_C, experts_KOC / m_KC[:, None]
        # 1 - cos of two unit vectors is half their squared distance; a column of length 0 has no direction.
        direction_KC = ((units_KOC - unit_OC).square().sum(1) / 2).nan_to_num(nan=1.0)
        change_KC = (experts_KOC - base_OC).norm(dim=1)
        # Norms of equal columns may differ in their last bit.
        length_KC = (m_KC - m0_C).abs()
        length_KC[change_KC == 0] = 0
        direction_KC[change_KC == 0] = 0
        relative_KC = (change_KC.square() / (m0_C * m_KC)).nan_to_num(nan=0.0, posinf=0.0)
        blocks.append(torch.stack([length_KC, change_KC, direction_KC, relative_KC]))
    length_KC, change_KC, direction_KC, relative_KC = torch.cat(blocks, 2)
    return [
        (length_KC, _RELATIVE * length_KC + _ABSOLUTE * change_KC),
        (direction_KC, _RELATIVE * direction_KC + _ABSOLUTE * relative_KC),
    ]
