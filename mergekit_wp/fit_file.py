"""The fit file: weights of a merge that were learnt from the experts' own answers (METHOD.md 6).

A safetensors file, all tensors float32, every weight from 0 to `MOST`:

    heads [K, L, H]      alpha_k(c) of every head: how much of what expert k changed there the merge takes
    neurons [K, L, F]    alpha_k(c) of every neuron
    rest [K]             rho_k, of everything that belongs to no component: embeddings, norms, output head, biases of
                         o_proj and down_proj

with a JSON document under the metadata key `wp_fit` (`FitMeta`), whose `experts` are the K experts in order. The merge
is theta_base + sum_k w_k (theta_k - theta_base), w_k being alpha_k of the component, rho_k elsewhere, and for the keys
and values of a group the mean of alpha_k over its query heads. The weights of a component need not sum to 1.

R is the share of an expert's gap to the base that a model does not recover: the mean over the tokens of the expert's
answers of KL(p_expert || p_model), over the same for the base. 1 is the base, 0 the expert. The loss is its mean over
the experts, and over the base's own (`Kept`) where the base was a teacher too.

Legend: K experts, L layers, H query heads, F neurons a layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch

from mergekit_wp.choices import FIT_FAMILIES
from mergekit_wp.documents import Count, Date, Number, Positive, Sha256, Text, Versions, one_of, read_document, strict
from mergekit_wp.errors import BadInput
from mergekit_wp.files import open_file, read_tensors, write_tensors
from mergekit_wp.geometry import Geometry, TensorSlot
from mergekit_wp.scores import DTYPES, ModelId, PromptStyle, check_table

FORMAT = 1
METADATA_KEY = "wp_fit"
MOST = 2.0
"""The largest weight."""


@dataclass(frozen=True)
class FusionWeights:
    """What a merge takes of each expert: heads_KLH, neurons_KLF, and rest_K of all that belongs to no component."""

    heads_KLH: torch.Tensor
    neurons_KLF: torch.Tensor
    rest_K: torch.Tensor

    @classmethod
    def uniform(cls, geometry: Geometry, values: Sequence[float]) -> FusionWeights:
        """One number an expert for all that it has, float32."""
        value_K = torch.tensor(values, dtype=torch.float32)
        heads, neurons = (
            value_K[:, None, None].repeat(1, geometry.layers, count) for count in (geometry.heads, geometry.neurons)
        )
        return cls(heads, neurons, value_K)

    def scaled(self, factor: float) -> FusionWeights:
        """All of them times one number."""
        return FusionWeights(factor * self.heads_KLH, factor * self.neurons_KLF, factor * self.rest_K)

    @property
    def digest(self) -> str:
        """SHA-256 of all numbers, hex."""
        parts = (self.heads_KLH, self.neurons_KLF, self.rest_K)
        return hashlib.sha256(b"".join(x.float().contiguous().cpu().numpy().tobytes() for x in parts)).hexdigest()

    def along(self, slot: TensorSlot | None, geometry: Geometry) -> torch.Tensor:
        """[K, n] along the slot's axis of its tensor: of heads, KV groups (their mean) or neurons; [K, 1] where there
        is no component."""
        if slot is None:
            return self.rest_K[:, None]
        return geometry.expand(slot, self.heads_KLH[:, slot.layer], self.neurons_KLF[:, slot.layer])


@strict
@dataclass(frozen=True)
class FittedPrompts:
    """Of one expert: how many prompts weights were fitted to, how many were held out, and how prompts were put, where
    not as they are."""

    fitted: Positive
    held_out: Count
    style: PromptStyle | None = None


@strict
@dataclass(frozen=True)
class LossAt:
    """The loss after a step, mean over the teachers; held_out: on prompts that nothing was fitted to, None without."""

    step: Count
    fitted: Number
    held_out: Number | None


@strict
@dataclass(frozen=True)
class Unrecovered:
    """The share R of one expert's gap that is not recovered, on its held-out prompts (on the fitted, where none is held
    out): by the base (1), by the merge that the fit started from, by the one that is in the file."""

    base: Number
    start: Number
    end: Number


@strict
@dataclass(frozen=True)
class Kept:
    """What the base taught on prompts of its own.

    pairs        the name of their file or built-in set
    start, end   how far from the base the merge that the fit started from, and the one in the file, are on those held
                 out (on the fitted, where none is held out), over the mean of the experts' distances: 0 is the base, 1
                 as far as an expert
    """

    pairs: Text
    prompts: FittedPrompts
    start: Number
    end: Number


@strict
@dataclass(frozen=True)
class FitMeta:
    """Everything about a fit file that is not a tensor; `date` is ISO 8601 UTC.

    geometry        the base's
    family          what had a weight of its own: the whole (`scale`), each expert, each layer's heads and neurons, each
                    component; or `cross`, from cross effects, without steps
    start           the merge that the fit started from, in words
    answer_tokens   how many tokens of an expert's answers were read, at most; 0: the one that follows the prompt
    prompts, unrecovered    of each expert, in order
    curve           the loss by step
    best_step       whose weights these are
    keep            of the base as one more teacher, so that what no expert teaches is not lost; or None
    contents        of each expert whose fingerprint is another model's too (it only samples weights) the SHA-256 of all
                    its weights, else None; () where every model has its own
    """

    base: ModelId
    experts: tuple[ModelId, ...]
    geometry: Geometry
    family: Annotated[str, one_of(FIT_FAMILIES)]
    start: Text
    answer_tokens: Count
    seed: Count
    prompts: tuple[FittedPrompts, ...]
    curve: tuple[LossAt, ...]
    unrecovered: tuple[Unrecovered, ...]
    best_step: Count
    dtype: Annotated[str, one_of(DTYPES)]
    device: Text
    versions: Versions
    date: Date
    keep: Kept | None = None
    contents: tuple[Sha256 | None, ...] = ()
    format: Count = FORMAT

    def __post_init__(self) -> None:
        if not self.experts:
            raise ValueError("experts: there are none")
        for name, rows in (("prompts", self.prompts), ("unrecovered", self.unrecovered)):
            if len(rows) != len(self.experts):
                raise ValueError(f"{name}: found {len(rows)} entries for {len(self.experts)} experts")
        if self.contents and len(self.contents) != len(self.experts):
            raise ValueError(f"contents: found {len(self.contents)} entries for {len(self.experts)} experts")
        steps = [point.step for point in self.curve]
        if steps != sorted(set(steps)):
            raise ValueError("curve: its steps do not ascend")
        if self.best_step not in steps:
            raise ValueError(f"best_step: found {self.best_step}, which is no step of the curve")

    @classmethod
    def from_json(cls, text: str) -> FitMeta:
        """Parse and check; raises ValueError (`read_fit` makes it a BadInput)."""
        return read_document(cls, text, range(FORMAT, FORMAT + 1))

    def to_json(self) -> str:
        """What `from_json` reads."""
        content = asdict(self)
        if not self.contents:  # so that earlier releases read what they can
            del content["contents"]
        return json.dumps(content, sort_keys=True)


@dataclass(frozen=True, repr=False)
class Fit:
    """A whole fit file; checks itself, so a `Fit` that exists is valid (raises ValueError)."""

    meta: FitMeta
    heads: torch.Tensor
    neurons: torch.Tensor
    rest: torch.Tensor

    def __post_init__(self) -> None:
        K, shape = len(self.meta.experts), self.meta.geometry
        sizes = {"heads": (K, shape.layers, shape.heads), "neurons": (K, shape.layers, shape.neurons), "rest": (K,)}
        for name, tensor in self.tensors().items():
            check_table(name, tensor, sizes[name])
            if not bool(((tensor >= 0) & (tensor <= MOST)).all()):
                found = f"{float(tensor.min()):g} to {float(tensor.max()):g}"
                raise ValueError(f"{name} holds weights from {found}, expected 0 to {MOST:g}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors under the names that they have in the file."""
        return {"heads": self.heads, "neurons": self.neurons, "rest": self.rest}

    def weights(self, order: Sequence[int] | None = None) -> FusionWeights:
        """Of the experts at these places in the file; in its own order they are not copied."""
        chosen = list(range(len(self.rest)) if order is None else order)
        if chosen == list(range(len(self.rest))):
            return FusionWeights(self.heads, self.neurons, self.rest)
        return FusionWeights(self.heads[chosen], self.neurons[chosen], self.rest[chosen])

    def save(self, path: str | Path) -> None:
        """Write the fit file, as wp-fit does (`write_fit`)."""
        write_fit(self, path)

    def __repr__(self) -> str:
        about, shape, K = self.meta, self.meta.geometry, len(self.meta.experts)
        names = ", ".join(expert.name for expert in about.experts)
        return (
            f"Fit({names} against {about.base.name}, {about.family}; heads [{K}, {shape.layers}, {shape.heads}], "
            f"neurons [{K}, {shape.layers}, {shape.neurons}])"
        )


def is_fit(path: str | Path) -> bool:
    """Whether a safetensors file with the metadata of a fit is there; what else may be is left to whoever reads it."""
    from safetensors import SafetensorError, safe_open

    try:
        open_file(path).close()
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def write_fit(fit: Fit, path: str | Path) -> None:
    """Write the file atomically. Raises `BadInput` when the folder cannot be written."""
    write_tensors(path, fit.tensors(), METADATA_KEY, fit.meta.to_json())


def read_fit(path: str | Path) -> Fit:
    """Read and validate a whole fit file.

    Raises `BadInput`, naming the file, when it is missing, is not safetensors, has no `wp_fit` metadata, has an unknown
    format version, misses a tensor or has one too many, or holds a wrong shape, a wrong dtype, a NaN, or a weight
    outside of 0 to `MOST`.
    """
    text, tensors = read_tensors(path, METADATA_KEY, "fit", "wp-fit")
    try:
        fit = Fit(FitMeta.from_json(text), *(tensors.pop(name) for name in ("heads", "neurons", "rest")))
        if tensors:
            raise ValueError(f"unexpected tensors {sorted(tensors)}")
        return fit
    except KeyError as error:
        raise BadInput(f"{path}: this fit file has no {error.args[0]}; make it again with wp-fit.") from error
    except (ValueError, BadInput) as error:
        reason = error.message if isinstance(error, BadInput) else str(error)
        raise BadInput(f"{path}: not a valid fit file: {reason}; make it again with wp-fit.") from error
