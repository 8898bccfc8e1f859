"""A set patch as a LoRA: what the set changes in each weight, W' - W, by its R largest singular values (Eckart and
Young), as an adapter that peft loads.

    W' - W = U S V^T,    B = U_R S_R^(1/2),    A = S_R^(1/2) V_R^T,    alpha = R, so that W + B A is what peft computes

The difference is formed in float32 from the stored dtypes, of the set's rows (or columns) alone: outside of them B A is
0. A is [R, in], B [out, R], float32. A bias that the set changes is in the adapter as it is (`bias: lora_only`), which
peft loads and vLLM does not.

What this costs is the relative error |W' - W - B A| / |W' - W| in the Frobenius norm, of every weight and of all
together, computed from the factors as they are written; 0 but for rounding where R is the rank of the difference.

Legend: n slices of the set, R rank, O output and I input width of a weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mergekit_wp.checkpoint.weights import ADAPTER, ADAPTER_CONFIG, SUFFIX
from mergekit_wp.errors import BadInput
from mergekit_wp.files import write_text
from mergekit_wp.foreign import code
from mergekit_wp.geometry import FAMILIES, FUSED, PROJECTIONS, Geometry, TensorSlot, text_name
from mergekit_wp.merge.cut import touched
from mergekit_wp.merge.plan import MergePlan


@dataclass(frozen=True)
class Loss:
    """Squared Frobenius norms of one weight: of what the set changes in it, and of what the adapter leaves of that."""

    changed: float
    left: float

    @property
    def relative(self) -> float:
        """|W' - W - B A| / |W' - W|; 0 where nothing changes."""
        return math.sqrt(self.left / self.changed) if self.changed else 0.0


@dataclass
class LowRank:
    """The factors of every module that the set changes, by the module's name in a plain causal LM, their loss, and the
    biases as they are patched."""

    rank: int
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Loss:
        return Loss(sum(loss.changed for loss in self.losses.values()), sum(loss.left for loss in self.losses.values()))


def low_rank(plan: MergePlan, rank: int) -> LowRank:
    """The adapter of a checked plan of `wp_patch` with a donor; of no higher rank than there is.

    Raises `BadInput` where a difference is not finite, and where nothing differs.
    """
    found = LowRank(0)
    for tensor, slot, places_n, donor in touched(plan):
        name = tensor.source
        own = plan.checkpoints[tensor.base].tensors[name].part(name, ...)
        module, _, what = (text_name(name) or "").rpartition(".")
        before = own.index_select(slot.axis, places_n)
        change = donor.float() - before.float()
        if not bool(torch.isfinite(change).all()):
            raise BadInput(
                f"{name}: holds a NaN or an infinity in {tensor.base} or {tensor.experts[0]}; save it again."
            )
        changed = bool(change.any())
        if what == "bias":
            if changed:
                found.biases[module] = own.index_copy(0, places_n, donor.to(own.dtype))
            continue
        B_nR, A_Rn = _factors(change, rank if changed else 0)
        found.factors[module] = _spread(B_nR, A_Rn, slot, places_n, own.shape)
        found.rank = max(found.rank, len(A_Rn))
        if changed:
            left = change.double() - B_nR.double() @ A_Rn.double()
            found.losses[module] = Loss(float(change.double().square().sum()), float(left.square().sum()))
    if not found.losses and not found.biases:
        raise BadInput("the two models do not differ in any component of the set, so there is nothing to write.")
    return found


def _factors(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A of the best approximation of at most this rank, float32."""
    if not rank:
        return change.new_zeros(change.shape[0], 0), change.new_zeros(0, change.shape[1])
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    root_R = S[:rank].sqrt()
    return U[:, :rank] * root_R, root_R[:, None] * Vh[:rank]


def _spread(
    B_nR: torch.Tensor, A_Rn: torch.Tensor, slot: TensorSlot, places_n: torch.Tensor, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """B [O, R] and A [R, I] of the whole weight: 0 outside of the set's rows (axis 0) or columns (axis 1)."""
    if slot.axis:
        return B_nR, A_Rn.new_zeros(len(A_Rn), shape[1]).index_copy_(1, places_n, A_Rn)
    return B_nR.new_zeros(shape[0], len(A_Rn)).index_copy_(0, places_n, B_nR), A_Rn


def write_adapter(found: LowRank, folder: Path, base: str, geometry: Geometry, about: Iterable[str]) -> None:
    """Write adapter_model.safetensors, adapter_config.json and a README.md into a new folder.

    base: the recipient, as the user called it; about: sentences for the README.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir()
    rank, tensors, targets = max(found.rank, 1), {}, []
    for module, (B_OR, A_RI) in found.factors.items():
        if module not in found.losses and module not in found.biases:
            continue
        targets.append(_in_memory(module, geometry))
        name = f"base_model.model.{targets[-1]}"
        tensors[f"{name}.lora_A.weight"] = _padded(A_RI, (rank, A_RI.shape[1]))
        tensors[f"{name}.lora_B.weight"] = _padded(B_OR, (B_OR.shape[0], rank))
        if module in found.biases:
            tensors[f"{name}.base_layer.bias"] = found.biases[module]
    save_file(tensors, folder / f"{ADAPTER}{SUFFIX}", metadata={"format": "pt"})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        lora_dropout=0.0,
        bias="lora_only" if found.biases else "none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    path = folder / ADAPTER_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    content["target_modules"] = sorted(targets)  # peft writes a set, in whatever order
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
    lines = ["---", "library_name: peft", "---", "# A set patch as a LoRA", "", f"Over {code(base)}.", "", *about]
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def _in_memory(module: str, geometry: Geometry) -> str:
    """What peft finds a module by: where it is in the loaded model (`geometry.text_tower`)."""
    wrapper = FAMILIES[geometry.architecture].wrapper
    return f"model.language_model.{module.removeprefix('model.')}" if wrapper else module


def _padded(factor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """With zeros below or beside it: one rank is of the whole adapter."""
    padded = factor.new_zeros(shape)
    padded[: factor.shape[0], : factor.shape[1]] = factor
    return padded


def loss_table(found: LowRank) -> str:
    """The relative error of every weight, a row a layer, and of all together."""
    rows: dict[int, dict[str, float]] = {}
    for module, loss in found.losses.items():
        layer, _, path = module.removeprefix("model.layers.").partition(".")
        rows.setdefault(int(layer), {})[path] = loss.relative
    columns = [path for path in (*PROJECTIONS.values(), *FUSED) if any(path in row for row in rows.values())]
    lines = ["|W' - W - B A| / |W' - W|", f"{'layer':>6}" + "".join(f"{p.rpartition('.')[2]:>14}" for p in columns)]
    for at, row in sorted(rows.items()):
        lines.append(f"{at:>6}" + "".join(f"{row[p]:>14.4f}" if p in row else " " * 14 for p in columns))
    total = found.total.relative
    lines.append(f"rank {found.rank}: all together {total:.4f} of the change is lost (relative error, Frobenius norm)")
    if found.biases:
        lines.append(f"{len(found.biases)} biases are in it whole (bias: lora_only), which vLLM does not load")
    return "\n".join(lines)
