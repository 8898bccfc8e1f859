"""Score files as the merge uses them: read once, and turned into each expert's share of each component."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

import torch

from mergekit_wp.components import TensorSlot
from mergekit_wp.errors import BadInput
from mergekit_wp.merge.fusion import component_weights
from mergekit_wp.scorefile import Scores, read_scores

# A path with what tells a rewritten file apart: nanoseconds of modification, bytes.
_Key = tuple[str, int, int]


def load_scores(path: str) -> Scores:
    """The validated score file at `path`; read again only when it has changed.

    Raises `BadInput`, naming the file, as `scorefile.read_scores` does, and when only some components were scored:
    the others' zeros would give them to the other experts.
    """
    scores = _read(_key(path))
    if not scores.complete:
        scored, total = (sum(int(f(mask)) for mask in scores.scored.values()) for f in (torch.sum, torch.numel))
        raise BadInput(
            f"{path}: holds scores of {scored:,} of {total:,} components ({scores.meta.subset}); a merge needs all, so "
            "run wp-score without --components, --layers and --top."
        )
    return scores


def layer_shares(paths: Sequence[str], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_KH and alpha_KF of the K experts whose score files these are, in this order (float32), in one layer.

    Raises `BadInput` when a file is bad or the files are of different geometries.
    """
    files = [load_scores(path) for path in paths]
    for path, scores in zip(paths, files, strict=True):
        if different := scores.meta.geometry.differences(files[0].meta.geometry):
            raise BadInput(f"{path}: made for another shape than {paths[0]} ({'; '.join(different)}).")
    return (
        component_weights([scores.heads[layer] for scores in files]),
        component_weights([scores.neurons[layer] for scores in files]),
    )


def tensor_shares(paths: Sequence[str], slot: TensorSlot) -> torch.Tensor:
    """alpha_Kn along the slot's axis of its tensor: of heads, KV groups (their mean) or neurons."""
    alpha_KH, alpha_KF = layer_shares(paths, slot.layer)
    return load_scores(paths[0]).meta.geometry.expand(slot, alpha_KH, alpha_KF)


def _key(path: str) -> _Key:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise BadInput(
            f"{path}: cannot read this score file ({error.strerror or error}; relative paths start at "
            f"{os.getcwd()}); make it with wp-score or mend the path."
        ) from error
    return path, stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=64)
def _read(key: _Key) -> Scores:
    return read_scores(key[0])
