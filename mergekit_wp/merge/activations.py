"""The activations file: what `wp-aim` writes and `merge_method: aim` reads.

A safetensors file, float32, with one vector for every weight of a base model but the embeddings, under the weight's
name: the mean of |x_c| over the calibration tokens, x being the input of the weight's module and c its channels. A JSON
document under the metadata key `wp_aim` says where they come from (`Calibration`).

A merge reads it once, checks it against the base, and turns it into what a column keeps (`kept_share`).

Legend: C input channels of a module, the columns of its weight.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch

from mergekit_wp.documents import Count, Date, Positive, Text, Versions, one_of, read_document, strict
from mergekit_wp.errors import BadInput
from mergekit_wp.files import Stamp, read_tensors, stamp, write_tensors
from mergekit_wp.geometry import text_name
from mergekit_wp.merge.plan import MergePlan, PlannedTensor
from mergekit_wp.scores import DTYPES, ModelId, PromptStyle

FORMAT = 1
METADATA_KEY = "wp_aim"


@strict
@dataclass(frozen=True)
class Calibration:
    """Where activations come from: documents, put end to end and cut into `blocks` of `tokens` each; `date` is UTC.

    prompts: how documents were put, where not as they are; otherwise left out of the file, as before it was kept.
    """

    base: ModelId
    texts: Text
    documents: Positive
    blocks: Positive
    tokens: Positive
    dtype: Annotated[str, one_of(DTYPES)]
    device: Text
    versions: Versions
    date: Date
    format: Count = FORMAT
    prompts: PromptStyle | None = None

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Parse and check; raises ValueError (`read_activations` makes it a BadInput)."""
        return read_document(cls, text, range(FORMAT, FORMAT + 1))

    def to_json(self) -> str:
        """What `from_json` reads."""
        content = asdict(self)
        if self.prompts is None:
            del content["prompts"]
        return json.dumps(content, sort_keys=True)


@dataclass(frozen=True)
class Activations:
    """Means by name of weight, float32 [channels]; checks itself (raises ValueError)."""

    meta: Calibration
    means: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        if not self.means:
            raise ValueError("there are no activations in it")
        for name, mean_C in self.means.items():
            if mean_C.dtype != torch.float32 or mean_C.ndim != 1 or not len(mean_C):
                raise ValueError(f"{name} is {mean_C.dtype} of shape {list(mean_C.shape)}, expected a float32 vector")
            if not bool(torch.isfinite(mean_C).all() & (mean_C >= 0).all()):
                raise ValueError(f"{name} holds a negative number, a NaN or an infinity")


def write_activations(activations: Activations, path: str | Path) -> None:
    """Write the file atomically. Raises `BadInput` when the folder cannot be written."""
    write_tensors(path, activations.means, METADATA_KEY, activations.meta.to_json())


def read_activations(path: str | Path) -> Activations:
    """Read and validate a file. Raises `BadInput`, naming it, for anything that `write_activations` does not write."""
    text, means = read_tensors(path, METADATA_KEY, "activations", "wp-aim")
    try:
        return Activations(Calibration.from_json(text), means)
    except ValueError as error:
        raise BadInput(f"{path}: not a valid activations file: {error}; make it again with wp-aim.") from error


def load_activations(path: str) -> Activations:
    """The validated file at `path`; read again only when it has changed. Raises `BadInput`, naming the file."""
    return _read(stamp(path, "activations file", "make it with wp-aim or mend the path"))


def kept_share(path: str, name: str, omega: float) -> torch.Tensor | None:
    """1 - (1 - omega) a_C, float32 [C]: what each column of the weight `name` keeps of its change; None for all of it.

    a_C are the activations over the module's largest. The file has names of a plain causal LM (`text_name`).
    """
    mean_C = load_activations(path).means.get(text_name(name) or "")
    if mean_C is None or omega == 1 or not mean_C.any():
        return None
    return (1 - (1 - omega) * mean_C.double() / mean_C.max().double()).float()


def check_activations(plan: MergePlan, tensor: PlannedTensor) -> None:
    """The file is there, and was made with this very base. Raises `BadInput`."""
    path = str(tensor.parameters.get("activations") or "")
    if not path:
        raise BadInput(
            f"merge_method {tensor.method}: no activations are given; write `parameters: {{activations: FILE}}` in the "
            "recipe, with the FILE that wp-aim made for the base."
        )
    activations, base = load_activations(path), plan.checkpoints[tensor.base]
    found, made = plan.fingerprint(tensor.base), activations.meta.base
    if not found.has_config(made.config) or found.tensors != made.tensors:
        raise BadInput(
            f"{path}: these activations are of the base {made.name}, which is not {tensor.base}; run wp-aim with the "
            "base of this recipe."
        )
    headers = {text_name(name): header for name, header in base.tensors.items()}
    for name, mean_C in activations.means.items():
        header = headers.get(name)
        if header is None or header.shape[-1:] != (len(mean_C),):
            raise BadInput(f"{path}: {name} is not of the base's shape; make the file again with wp-aim.")


@lru_cache(maxsize=8)
def _read(key: Stamp) -> Activations:
    return read_activations(key[0])
