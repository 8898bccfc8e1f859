"""Whether models stay on the device or are streamed: what they take against what is free."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.console import percent
from mergekit_wp.memory import free_memory
from mergekit_wp.scoring.models.precision import held_dtype

# Of the free memory, what `auto` leaves to activations, gradients and whoever else runs here. A share, not a number
# of bytes, since prompts and batches that are sensible on a device grow with it.
RESERVE = 0.25


def pick_offload(
    asked: str, models: Sequence[Checkpoint], dtype: torch.dtype, device: torch.device, what: str = "both models",
    more: int = 0,
) -> tuple[str, str]:  # fmt: skip
    """(`none` or `stream`, one line that says why) for an --offload of `none`, `stream` or `auto`.

    `auto` is `none` if the parameters of all models, as they are held for products in `dtype`, fit into the device's
    free memory less RESERVE. `what` they are, in words; `more`: bytes beside them. Reads headers only.
    """
    need = more + sum(parameter_bytes(model, held_dtype(model.tensors, dtype)) for model in models)
    free = free_memory(device)
    sizes = f"{_size(need)} of parameters against {_size(free)} of free memory on {device}"
    if asked != "auto":
        how = "layers are streamed" if asked == "stream" else f"{what} stay on the device"
        return asked, f"{how}, as asked ({sizes})."
    share = f"{percent(1 - RESERVE)} of the {_size(free)} of free memory on {device}"
    if need <= (1 - RESERVE) * free:
        return "none", f"{what}, {_size(need)}, fit into {share}: they stay there."
    return "stream", f"{what}, {_size(need)}, do not fit into {share}: streaming layers."


def parameter_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """What the model's parameters take in `dtype`, from the headers of its tensors."""
    return sum(torch.Size(header.shape).numel() for header in checkpoint.tensors.values()) * dtype.itemsize


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
