"""The activations file: what `wp-aim` writes and `merge_method: aim` reads.

A safetensors file, float32, with one vector for every weight of a base model but the embeddings, under the weight's
name: the mean of |x_c| over the calibration tokens, x being the input of the weight's module and c its channels. A JSON
document under the metadata key `wp_aim` says where they come from (`Calibration`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch

from mergekit_wp.documents import parse_json
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.records import Count, Date, Positive, Text, Versions, one_of, read_record, strict
from mergekit_wp.scorefile import DTYPES, ModelId, PromptStyle
from mergekit_wp.tensorfile import read_tensors, write_tensors

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
        raw = parse_json(text)
        if not isinstance(raw, dict):
            raise ValueError(f"its metadata is {shown(raw)}")
        if raw.get("format") != FORMAT:
            raise ValueError(f"format version {shown(raw.get('format'))}, this program reads {FORMAT}")
        return read_record(cls, raw)

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
