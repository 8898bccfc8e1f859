"""Activations files as the merge uses them: read once, checked against the base, turned into what a column keeps.

Legend: C input channels of a module, the columns of its weight.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from mergekit_wp.activations import Activations, read_activations
from mergekit_wp.components import text_name
from mergekit_wp.errors import BadInput
from mergekit_wp.files import Stamp, stamp
from mergekit_wp.merge.plan import MergePlan, PlannedTensor


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
