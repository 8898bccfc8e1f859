"""Score files as the merge uses them: found, read once, and turned into each expert's share of each component."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from mergekit_wp.checkpoint.hub import BESIDE
from mergekit_wp.errors import BadInput
from mergekit_wp.files import Stamp, stamp
from mergekit_wp.geometry import TensorSlot
from mergekit_wp.merge.kernel import component_weights
from mergekit_wp.scores import Scores, read_scores


def load_scores(path: str) -> Scores:
    """The validated score file at `path`; read again only when it has changed.

    Raises `BadInput`, naming the file, as `scores.read_scores` does, and when only some components were scored:
    the others' zeros would give them to the other experts.
    """
    scores = load_any_scores(path)
    check_complete(scores, path)
    return scores


def load_any_scores(path: str) -> Scores:
    """As `load_scores`, also where only some components were scored."""
    return _read(stamp(path, "score file", "make it with wp-score or mend the path"))


def check_complete(scores: Scores, where: str) -> None:
    """Raise `BadInput` when only some components were scored; `where` names the scores."""
    if not scores.complete:
        scored, total = (sum(int(f(mask)) for mask in scores.scored.values()) for f in (torch.sum, torch.numel))
        raise BadInput(
            f"{where}: holds scores of {scored:,} of {total:,} components ({scores.meta.subset}); a merge needs all, "
            "so run wp-score without --components, --layers and --top."
        )


def scores_beside(folder: Path) -> str:
    """The score file that an expert (a LoRA) has in its own folder; empty where there is none."""
    path = folder / BESIDE
    return str(path) if os.path.isfile(path) else ""


def layer_shares(
    paths: Sequence[str], layer: int, prior: Sequence[float] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_KH and alpha_KF of the K experts whose score files these are, in this order (float32), in one layer.

    prior: the experts' weights; None for equal ones. Raises `BadInput` when a file is bad or the files are of
    different geometries.
    """
    files = [load_scores(path) for path in paths]
    for path, scores in zip(paths, files, strict=True):
        if different := scores.meta.geometry.differences(files[0].meta.geometry):
            raise BadInput(f"{path}: made for another shape than {paths[0]} ({'; '.join(different)}).")
    return _layer_shares(files, layer, prior)


def tensor_shares(paths: Sequence[str], slot: TensorSlot, prior: Sequence[float] | None = None) -> torch.Tensor:
    """alpha_Kn along the slot's axis of its tensor: of heads, KV groups (their mean) or neurons."""
    alpha_KH, alpha_KF = layer_shares(paths, slot.layer, prior)
    return load_scores(paths[0]).meta.geometry.expand(slot, alpha_KH, alpha_KF)


def held_shares(files: Sequence[Scores], slot: TensorSlot, prior: Sequence[float] | None = None) -> torch.Tensor:
    """As `tensor_shares`, of scores in memory, which are known to be of one geometry."""
    return files[0].meta.geometry.expand(slot, *_layer_shares(files, slot.layer, prior))


def _layer_shares(
    files: Sequence[Scores], layer: int, prior: Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        component_weights([scores.heads[layer] for scores in files], prior),
        component_weights([scores.neurons[layer] for scores in files], prior),
    )


@lru_cache(maxsize=64)
def _read(key: Stamp) -> Scores:
    return read_scores(key[0])
