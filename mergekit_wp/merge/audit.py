"""After the merge: is it right? (mergekit issues 214, 437, 671 ask.)

Three independent looks at the written folder:

1. A seeded sample of slices of every kind of tensor is recomputed from the inputs in float64, sharing no code with
   the kernel, and compared within the rounding of the dtype: for wp here, from the score files or the fit file and
   straight from theta_base + sum_k scale_k alpha_k (theta_k - theta_base) of METHOD.md 4 and 6; for widen and aim in
   `audit_methods`. A set patch is compared whole, bit for bit, in `audit_patch`.
2. Every tensor is read once and holds no NaN and no infinity.
3. transformers loads the folder with no weight missing or left over, and it generates one token.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.vocabulary import head_against_config
from mergekit_wp.errors import BadInput, out_of_memory, reason_of
from mergekit_wp.geometry import auto_class, slot_of
from mergekit_wp.merge.audit_methods import check_aim, check_widen
from mergekit_wp.merge.audit_patch import check_patched
from mergekit_wp.merge.audit_slices import (
    FLOAT32_STEP,
    AuditFailed,
    TokenRows,
    by_kind,
    compare,
    pick_rows,
    read_inputs,
)
from mergekit_wp.merge.fitted import load_fit
from mergekit_wp.merge.plan import AIM, PATCH, WIDEN, WP, MergePlan, PlannedTensor
from mergekit_wp.merge.shares import load_scores

if TYPE_CHECKING:
    from mergekit.common import ModelReference

_SLICES_A_KIND = 4


@dataclass(frozen=True)
class _Sample:
    tensor: PlannedTensor
    where: tuple[slice, ...]
    alpha_K: list[float]
    rows: Mapping[ModelReference, int] | None = None
    """Of a vocabulary that a `tokenizer:` has made: where the row lies in each model."""


def audit(out: Path, plan: MergePlan | None, *, seed: int = 0, say: Callable[[str], None], load: bool = True) -> None:
    """Check the merged folder and `say` what was checked. Raises `AuditFailed` at the first trouble.

    plan: the slices of a merge by another method than ours, or without a plan, cannot be recomputed here.
    """
    merged = Checkpoint.open(str(out))
    if plan is not None and plan.method == PATCH:
        say(f"audit: {check_patched(plan, merged)}.")
    elif plan is not None and plan.ours:
        # WIDEN ranks rows of a vocabulary among all others, so that none can be recomputed alone.
        rows = None if plan.method == WIDEN else TokenRows.of(plan, merged, plan.tensors[0].models)
        draw, kinds = random.Random(seed), by_kind(plan, realigned=rows is not None)
        if plan.method == WIDEN:
            differences = check_widen(plan, merged, draw)
        else:
            differences = {WP: check_wp, AIM: check_aim}[plan.method](plan, merged, draw, rows)
        left = [] if rows else [tensor.output for tensor in plan.tensors if tensor.written and tensor.realigned]
        unseen = f"; {' and '.join(left)}, whose rows `tokenizer:` has moved, were not" if left else ""
        say(
            f"audit: {len(differences)} slices of {len(kinds)} kinds of tensors recomputed from the inputs; "
            f"the largest difference is {max(differences, default=0.0):.2f} of what rounding allows"
            f"{rows.said if rows else unseen}."
        )
    tensors = check_finite(merged)
    say(f"audit: {tensors} tensors read; no NaN and no infinity.")
    if load:
        say(f"audit: {check_loads(out, merged.nbytes)}.")
    if trouble := head_against_config(merged):
        raise AuditFailed(f"{trouble} Do not use this merge.")


def check_wp(plan: MergePlan, merged: Checkpoint, draw: random.Random, rows: TokenRows | None = None) -> list[float]:
    """Some slices of every kind: the difference of each, as a fraction of what rounding allows.

    rows: of a vocabulary that a `tokenizer:` has made; without them its tensors are left out.
    """
    samples = [
        _sample(plan, tensor, draw, rows)
        for tensors in by_kind(plan, realigned=rows is not None)
        for tensor in draw.choices(tensors, k=_SLICES_A_KIND)
    ]
    return [_check_sample(plan, merged, sample) for sample in samples]


def _sample(plan: MergePlan, tensor: PlannedTensor, draw: random.Random, rows: TokenRows | None) -> _Sample:
    """One random component of the tensor (or a few rows of a tensor that belongs to no component)."""
    slot = slot_of(tensor.source)
    header = plan.header(tensor.base, tensor.source)
    assert header is not None  # the checks of the plan say so
    if slot is None:
        where, own = pick_rows(tensor, header.shape[0], draw, rows)
        return _Sample(tensor, where, _scaled(tensor, _weights(plan, tensor, "")), own)
    geometry = plan.checkpoints[tensor.base].geometry
    width, part = geometry.head_dim, draw.randrange(len(slot.shares))
    share, begin = slot.shares[part], sum(geometry.lengths(slot)[:part])
    if share == "neuron":
        index = draw.randrange(geometry.neurons)
        span = slice(begin + index, begin + index + 1)
        alpha_K = _weights(plan, tensor, "neurons", slot.layer, index)
    else:
        members = 1 if share == "head" else geometry.heads // geometry.kv_heads
        index = draw.randrange(geometry.heads // members)
        span = slice(begin + index * width, begin + (index + 1) * width)
        heads = range(index * members, (index + 1) * members)
        per_head = [_weights(plan, tensor, "heads", slot.layer, head) for head in heads]
        alpha_K = [sum(column) / members for column in zip(*per_head, strict=True)]
    where = (span,) if slot.axis == 0 else (slice(None), span)
    return _Sample(tensor, where, _scaled(tensor, alpha_K))


def _weights(plan: MergePlan, tensor: PlannedTensor, kind: str, *where: int) -> list[float]:
    """Each expert's weight in the component of that kind at (layer, index), or, without a kind, outside of all."""
    if tensor.fit:
        fit = load_fit(tensor.fit)
        table = getattr(fit, kind or "rest")
        return [float(table[k, *where]) for k in plan.order(tensor)]
    scores = [float(getattr(load_scores(path), kind)[where]) if kind else 0.0 for path in tensor.scores]
    positive = [weight * max(score, 0.0) for weight, score in zip(tensor.weights, scores, strict=True)]
    total = sum(positive)
    return [score / total for score in positive] if total > 0 else [w / sum(tensor.weights) for w in tensor.weights]


def _scaled(tensor: PlannedTensor, alpha_K: list[float]) -> list[float]:
    return [scale * alpha for scale, alpha in zip(tensor.scales, alpha_K, strict=True)]


def _check_sample(plan: MergePlan, merged: Checkpoint, sample: _Sample) -> float:
    tensor = sample.tensor
    base, *tuned = read_inputs(plan, tensor, sample.where, sample.rows)
    whole = not tensor.fit and set(tensor.scales) == {1.0}  # the weights sum to 1, and the base cancels
    want, size = base.clone(), torch.zeros_like(base) if whole else base.abs()
    for alpha, theta in zip(sample.alpha_K, tuned, strict=True):
        want += alpha * (theta - base)
        size += abs(alpha) * (theta.abs() + base.abs())
    # K + 1 steps of the float32 accumulation.
    slack = (len(sample.alpha_K) + 1) * FLOAT32_STEP * size
    return compare(plan, merged, tensor, sample.where, want, slack)


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
                    what = (
                        ""
                        if merged.tensors[name].dtype != "F16"
                        else (" (float16 ends at 65504: larger values want `dtype: bfloat16` in the recipe)")
                    )
                    raise AuditFailed(f"{merged.name}: {name} holds a NaN or an infinity{what}; do not use this merge.")
    return len(merged.tensors)


def check_loads(out: Path, nbytes: int) -> str:
    """Load with transformers and generate one token; says what was done.

    With less free memory than the model takes, only names and shapes are compared. Raises `AuditFailed`.
    """
    import psutil

    device = "cpu" if psutil.virtual_memory().available > 1.2 * nbytes else "meta"
    try:
        loaded: Any = auto_class(Checkpoint.open(str(out)).config).from_pretrained(
            out, dtype="auto", device_map=device, output_loading_info=True
        )
        model, info = loaded
        _check_loading_info(out, info)
        if device == "meta":
            return "transformers finds every weight; too little free memory to load it and generate a token"
        ids = torch.tensor([[_first_token(model)]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1].float()
        if not bool(torch.isfinite(logits).all()):
            raise AuditFailed(f"{out}: the merged model computes NaN; do not use this merge.")
        return f"transformers loads it ({model.dtype}), and it generates a token (id {int(logits.argmax())})"
    except (AuditFailed, BadInput):
        raise
    except Exception as error:  # whatever transformers raises, the folder does not load
        if out_of_memory(error):
            raise AuditFailed(f"{out}: too little memory to load it; free some, and audit it again.") from error
        raise AuditFailed(f"{out}: transformers cannot load it ({reason_of(error, 300)}).") from error


def _first_token(model: Any) -> int:
    """The beginning of a text, if the vocabulary has such a token; else the first of the vocabulary."""
    token = getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)
    return token if type(token) is int and 0 <= token < model.get_input_embeddings().weight.shape[0] else 0


def _check_loading_info(out: Path, info: dict[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise AuditFailed(
                f"{out}: transformers reports {what.replace('_', ' ')}: {sorted(map(str, info[what]))[:3]}."
            )
