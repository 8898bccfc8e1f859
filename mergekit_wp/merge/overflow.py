"""Why a merged tensor came out with a NaN or an infinity: a damaged input, or a value that the dtype does not hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from mergekit_wp.errors import BadInput
from mergekit_wp.merge.audit_slices import read_slice
from mergekit_wp.merge.plan import MergePlan, PlannedTensor

if TYPE_CHECKING:
    from mergekit.common import ModelReference

_ROWS = 1024


def why_not_finite(plan: MergePlan, tensor: PlannedTensor) -> BadInput:
    """One sentence, after reading the inputs of this tensor once more as they are stored."""
    largest = {model: _largest(plan, tensor, model) for model in tensor.models}
    if damaged := [str(model) for model, size in largest.items() if not math.isfinite(size)]:
        return BadInput(
            f"{' and '.join(damaged)}: {tensor.source} holds a NaN or an infinity; download or save that checkpoint "
            "again."
        )
    names = {str(name).removeprefix("torch.") for name in (tensor.read_dtype, plan.out_dtype(tensor)) if name}
    narrow = min(names, key=lambda name: torch.finfo(getattr(torch, name)).max)
    limit = torch.finfo(getattr(torch, narrow)).max
    model, size = max(largest.items(), key=lambda item: item[1])
    what = f"{model}: {tensor.source} holds {size:.6g}" if size > limit else f"the merged {tensor.output} holds more"
    return BadInput(
        f"{what}, and {narrow} ends at {limit:.6g}; write `dtype: bfloat16` or `dtype: float32` in the recipe."
    )


def _largest(plan: MergePlan, tensor: PlannedTensor, model: ModelReference) -> float:
    """The largest magnitude, NaN if there is one."""
    checkpoint, name = plan.checkpoints[model], tensor.sources[model] or ""
    rows = checkpoint.tensors[name].shape[0]
    parts = [read_slice(checkpoint, name, (slice(r, r + _ROWS),)).abs().max() for r in range(0, rows, _ROWS)]
    return float(torch.stack(parts).max())
