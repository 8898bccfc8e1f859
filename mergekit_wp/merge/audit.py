"""After the merge: is it right? (mergekit issues 214, 437, 671 ask.)

Three independent looks at the written folder:

1. A seeded sample of slices of every kind of tensor is recomputed from the inputs and the score files, in
   float64 and straight from the equation theta_base + sum_k alpha_k (theta_k - theta_base) of METHOD.md 4,
   sharing no code with the kernel, and compared within the rounding of the dtype.
2. Every tensor is read once and holds no NaN and no infinity.
3. transformers loads the folder with no weight missing or left over, and it generates one token.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open

from mergekit_wp.checkpoint import Checkpoint
from mergekit_wp.components import slot_of
from mergekit_wp.merge.plan import MergePlan, PlannedTensor
from mergekit_wp.merge.shares import load_scores

_SLICES_A_KIND = 4
_ROWS = 16
_FLOAT32_STEP = 2.0**-23


class AuditFailed(click.ClickException):
    """The merged folder is not what it should be; exit code 1, one sentence."""

    exit_code = 1


@dataclass(frozen=True)
class _Sample:
    tensor: PlannedTensor
    where: tuple[slice, ...]
    alpha_K: list[float]


def audit(out: Path, plan: MergePlan | None, *, seed: int = 0, say: Callable[[str], None], load: bool = True) -> None:
    """Check the merged folder and `say` what was checked. Raises `AuditFailed` at the first trouble.

    plan: None for a merge by another method, whose slices cannot be recomputed here.
    """
    merged = Checkpoint.open(str(out))
    if plan is not None:
        samples = _samples(plan, random.Random(seed))
        worst = max((_check_sample(plan, merged, sample) for sample in samples), default=0.0)
        kinds = len({_kind(sample.tensor.output) for sample in samples})
        say(
            f"audit: {len(samples)} slices of {kinds} kinds of tensors recomputed from the inputs; the largest "
            f"difference is {worst:.2f} of what rounding allows."
        )
    tensors = check_finite(merged)
    say(f"audit: {tensors} tensors read; no NaN and no infinity.")
    if load:
        say(f"audit: {check_loads(out, merged.nbytes)}.")


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _samples(plan: MergePlan, draw: random.Random) -> list[_Sample]:
    by_kind: dict[str, list[PlannedTensor]] = defaultdict(list)
    for tensor in plan.tensors:
        # Rows that a tokenizer config has moved are not those of the inputs any more.
        if tensor.in_base and not tensor.realigned:
            by_kind[_kind(tensor.output)].append(tensor)
    return [
        _sample(plan, tensor, draw)
        for tensors in by_kind.values()
        for tensor in draw.choices(tensors, k=_SLICES_A_KIND)
    ]


def _sample(plan: MergePlan, tensor: PlannedTensor, draw: random.Random) -> _Sample:
    """One random component of the tensor (or a few rows of a tensor that belongs to no component)."""
    slot = slot_of(tensor.source)
    header = plan.header(tensor.base, tensor.source)
    assert header is not None  # the checks of the plan say so
    K = len(tensor.experts)
    if slot is None:
        start = draw.randrange(header.shape[0])
        return _Sample(tensor, (slice(start, start + _ROWS),), [1 / K] * K)
    files = [load_scores(path) for path in tensor.scores]
    geometry = files[0].meta.geometry
    width = geometry.head_dim
    if slot.kind == "neuron":
        index = draw.randrange(geometry.neurons)
        span = slice(index, index + 1)
        alpha_K = _alpha([float(file.neurons[slot.layer, index]) for file in files])
    else:
        members = 1 if slot.kind == "head" else geometry.heads // geometry.kv_heads
        index = draw.randrange(geometry.heads // members)
        span = slice(index * width, (index + 1) * width)
        per_head = [
            _alpha([float(file.heads[slot.layer, head]) for file in files])
            for head in range(index * members, (index + 1) * members)
        ]
        alpha_K = [sum(column) / members for column in zip(*per_head, strict=True)]
    where = (span,) if slot.axis == 0 else (slice(None), span)
    return _Sample(tensor, where, alpha_K)


def _alpha(scores: list[float]) -> list[float]:
    positive = [max(score, 0.0) for score in scores]
    total = sum(positive)
    return [score / total for score in positive] if total > 0 else [1 / len(scores)] * len(scores)


def _check_sample(plan: MergePlan, merged: Checkpoint, sample: _Sample) -> float:
    """The largest difference as a fraction of the allowed one; raises `AuditFailed` above 1."""
    tensor = sample.tensor
    base = _read(plan.checkpoints[tensor.base], tensor.source, sample.where)
    rows = base.shape[0]
    want, size = base.clone(), torch.zeros_like(base)
    for alpha, expert in zip(sample.alpha_K, tensor.experts, strict=True):
        theta = _read(plan.checkpoints[expert], tensor.sources[expert] or "", sample.where)[:rows]
        want += alpha * (theta - base)
        size += alpha * theta.abs()
    if tensor.output not in merged.tensors:
        raise AuditFailed(f"{merged.name}: the tensor {tensor.output} was not written.")
    got = _read(merged, tensor.output, sample.where)
    dtype = getattr(torch, plan.out_dtype(tensor))
    if got.shape != want.shape:
        raise AuditFailed(
            f"{merged.name}: {tensor.output} has another shape than in the base {tensor.base}; do not use this merge."
        )
    # Half a step of the output dtype, K + 1 steps of the float32 accumulation, and half a step of the dtype
    # that the recipe makes mergekit read the inputs in.
    step = torch.finfo(dtype).eps
    allowed = step / 2 * want.abs() + (len(sample.alpha_K) + 1) * _FLOAT32_STEP * size
    allowed += torch.finfo(dtype).smallest_normal * step
    if tensor.read_dtype:
        allowed += torch.finfo(getattr(torch, tensor.read_dtype.removeprefix("torch."))).eps / 2 * size
    worst = float(((got - want).abs() / allowed).nan_to_num(torch.inf).max())
    if worst > 1:
        raise AuditFailed(
            f"{merged.name}: {tensor.output}{_text(sample.where)} is not what its inputs and scores give (off by "
            f"{float((got - want).abs().nan_to_num(torch.inf).max()):.3g}); do not use this merge."
        )
    return worst


def _read(checkpoint: Checkpoint, name: str, where: tuple[slice, ...]) -> torch.Tensor:
    with safe_open(checkpoint.tensors[name].file, framework="pt") as file:
        view = file.get_slice(name)
        part: torch.Tensor = view[where[0]] if len(where) == 1 else view[where[0], where[1]]
    return part.to(torch.float64)


def _text(where: tuple[slice, ...]) -> str:
    return "[" + ", ".join(":" if s.start is None else f"{s.start}:{s.stop}" for s in where) + "]"


def check_finite(merged: Checkpoint) -> int:
    """Read every tensor once; the number of them. Raises `AuditFailed` naming the first with a NaN or infinity."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, header in merged.tensors.items():
        by_file[header.file].append(name)
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                # The extremes of a tensor are NaN if any element is.
                low, high = torch.aminmax(file.get_tensor(name))
                if not bool(torch.isfinite(low) & torch.isfinite(high)):
                    raise AuditFailed(f"{merged.name}: {name} holds a NaN or an infinity; do not use this merge.")
    return len(merged.tensors)


def check_loads(out: Path, nbytes: int) -> str:
    """Load with transformers and generate one token; says what was done.

    With less free memory than the model takes, only names and shapes are compared. Raises `AuditFailed`.
    """
    import psutil
    import transformers

    device = "cpu" if psutil.virtual_memory().available > 1.2 * nbytes else "meta"
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype="auto", device_map=device, output_loading_info=True
        )
        model, info = loaded
        _check_loading_info(out, info)
        if device == "meta":
            return "transformers finds every weight; too little free memory to load it and generate a token"
        ids = torch.tensor([[model.config.bos_token_id or 0]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1].float()
        if not bool(torch.isfinite(logits).all()):
            raise AuditFailed(f"{out}: the merged model computes NaN; do not use this merge.")
        return f"transformers loads it ({model.dtype}), and it generates a token (id {int(logits.argmax())})"
    except AuditFailed:
        raise
    except Exception as error:  # whatever transformers raises, the folder does not load
        reason = " ".join(str(error).split())[:300]
        raise AuditFailed(f"{out}: transformers cannot load it ({type(error).__name__}: {reason}).") from error


def _check_loading_info(out: Path, info: dict[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise AuditFailed(
                f"{out}: transformers reports {what.replace('_', ' ')}: {sorted(map(str, info[what]))[:3]}."
            )
