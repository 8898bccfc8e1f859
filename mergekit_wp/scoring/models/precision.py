"""In which dtype weights are held, and in which products run.

A score is read off the difference of two fine-tunes of one model, which is small beside the weights: weights are held
in the dtype that they are stored in, and differences are formed in float32 (METHOD.md 2). Rounding float16 weights to
bfloat16 first would lose what an update of half a percent writes. Products may run in fewer bits: autocast rounds
what goes into each of them. That costs a cosine's gradient next to nothing; that of `kl` is itself a difference of two
runs, and bfloat16 blurs it where they hardly differ (experiments/benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import nn
from torch.func import functional_call

from mergekit_wp.checkpoint.weights import TensorHeader
from mergekit_wp.errors import BadInput

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(tensors: Mapping[str, TensorHeader]) -> torch.dtype:
    """The dtype that holds every tensor of a checkpoint without rounding, float32 at most.

    float32 for a checkpoint without tensors of these dtypes (a quantised one).
    """
    found = {STORED[header.dtype] for header in tensors.values() if header.dtype in STORED}
    widest = reduce(torch.promote_types, found) if found else torch.float32
    return torch.float32 if widest == torch.float64 else widest


def held_dtype(tensors: Mapping[str, TensorHeader], products: torch.dtype) -> torch.dtype:
    """In which dtype weights lie in memory: as stored, or in float32 where products run in that."""
    return torch.float32 if products == torch.float32 else stored_dtype(tensors)


def run_in(products: torch.dtype, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`module(x)`, weights that are held in fewer bits widened where products run in float32; elsewhere autocast sees
    to it. The wide copies are gone with the output, or with its graph."""
    named = dict(module.named_parameters()) if products == torch.float32 else {}
    wide = {name: weight.float() for name, weight in named.items() if weight.dtype != torch.float32}
    output: torch.Tensor = functional_call(module, wide, (x,)) if wide else module(x)
    return output


def pick_dtype(name: str, device: torch.device, stored: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of products, asked for by name or `auto`; `stored`: of each model of the job.

    auto on a CPU: float32, exact enough to check by hand. Elsewhere as stored: the 16-bit dtype of those models that
    have one (float32 beside it is a copy in more bytes, mostly), bfloat16 if they have both, which has the range of
    either; float32 if all are. Raises `BadInput` for float16 on a CPU.
    """
    if name == "auto":
        short = set(stored) - {torch.float32}
        if device.type == "cpu" or not short:
            return torch.float32
        return short.pop() if len(short) == 1 else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    if dtype == torch.float16 and device.type == "cpu":
        raise BadInput(
            "dtype: float16 is far slower than bfloat16 on a CPU; use float32, or bfloat16, which is faster and blurs."
        )
    return dtype


def not_finite(what: str, dtype: torch.dtype) -> BadInput:
    """`what` came out as a NaN or an infinity though every weight is finite; `dtype` is what products ran in."""
    if dtype == torch.float16:
        return BadInput(
            f"{what} is not finite: float16 ends at {torch.finfo(dtype).max:.0f}, and most likely this model computes "
            "with more; use --dtype bfloat16 or float32."
        )
    return BadInput(
        f"{what} is not finite, and {str(dtype).removeprefix('torch.')} holds numbers up to 3e38; let base and expert "
        "generate a text by themselves, since one of them is likely broken."
    )


def loss_scale(gradient: torch.Tensor) -> torch.Tensor:
    """A power of two that brings the largest entry of a float32 gradient into [8, 16), float32 [].

    Below 6e-5 float16 loses bits and below 6e-8 everything, and so small are most gradients of a cosine or a KL. What
    is scaled so has 4,000 times as much room upwards, and 100,000 times down to where bits go. In float32 and
    bfloat16 a power of two changes nothing.
    """
    largest = gradient.abs().amax().float().clamp(min=2.0**-100)
    return torch.exp2(3 - torch.floor(torch.log2(largest)))
