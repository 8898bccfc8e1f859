"""The audit's own AIM: straight from the formula at the top of `aim`, in float64, on a few rows of some tensors."""

from __future__ import annotations

import random

import torch

from mergekit_wp.activations import read_activations
from mergekit_wp.checkpoint import Checkpoint
from mergekit_wp.components import text_name
from mergekit_wp.merge.audit_slices import FLOAT32_STEP, by_kind, compare, read_aligned, read_slice
from mergekit_wp.merge.plan import MergePlan

_TENSORS_A_KIND, _ROWS = 4, 16


def check_aim(plan: MergePlan, merged: Checkpoint, draw: random.Random) -> list[float]:
    """Some rows of some tensors of every kind: the difference of each, as a fraction of what rounding allows."""
    differences = []
    for tensors in by_kind(plan):
        for tensor in draw.choices(tensors, k=_TENSORS_A_KIND):
            means = read_activations(tensor.parameters["activations"]).means
            header = plan.header(tensor.base, tensor.source)
            assert header is not None  # the checks of the plan say so
            start = draw.randrange(header.shape[0])
            rows = slice(start, min(header.shape[0], start + _ROWS))
            model = tensor.experts[0]
            base = read_slice(plan.checkpoints[tensor.base], tensor.source, (rows,), tensor.read_dtype)
            tuned = read_aligned(plan.checkpoints[model], tensor.sources[model] or "", (rows,), base, tensor.read_dtype)
            share = torch.ones(())
            if (mean_C := means.get(text_name(tensor.source) or "")) is not None:
                a_C = mean_C.double() / mean_C.max().clamp(min=1e-45)
                share = 1 - (1 - float(tensor.parameters["omega"])) * (a_C[rows] if len(header.shape) == 1 else a_C)
            want = base + (tuned - base) * share
            slack = 3 * FLOAT32_STEP * (base.abs() + tuned.abs())
            differences.append(compare(plan, merged, tensor, (rows,), want, slack))
    return differences
