"""Fit files as the merge uses them: read once, their experts found among those of the merge, their weights by tensor.

`order` is, for each expert of the merge, its place in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache

import torch

from mergekit_wp.checkpoint.folder import Fingerprint
from mergekit_wp.errors import BadInput
from mergekit_wp.files import Stamp, stamp
from mergekit_wp.fit_file import Fit, read_fit
from mergekit_wp.foreign import logger
from mergekit_wp.geometry import TensorSlot
from mergekit_wp.scores import ModelId

LOG = logger(__name__)


def load_fit(path: str) -> Fit:
    """The validated fit file at `path`; read again only when it has changed. Raises `BadInput`, naming the file."""
    return _read(stamp(path, "fit file", "make it with wp-fit or mend the path"))


def order_of(
    fit: Fit,
    experts: Mapping[str, Sequence[Fingerprint]],
    where: str,
    allow: bool,
    content: Callable[[str], Collection[str]],
) -> tuple[int, ...]:
    """The places in the file of a merge's experts: each is known again by one of its fingerprints, and where that is
    another model's too by its content, which the file then has.

    where: the fit's name in sentences. allow: an expert that is none of the file's takes the place of one that is left,
    in order (a warning). content: what `content_digest` gives of an expert, read where it is needed. Raises `BadInput`
    unless these are all of the file's experts and no other.
    """
    fitted, contents = fit.meta.experts, fit.meta.contents or (None,) * len(fit.meta.experts)
    left, places = list(range(len(fitted))), dict.fromkeys(experts, -1)
    for name, prints in experts.items():
        alike = [k for k in range(len(fitted)) if any(_same(mark, fitted[k]) for mark in prints)]
        if any(contents[k] for k in alike):
            found_content = content(name)
            alike = [k for k in alike if contents[k] is None or contents[k] in found_content]
        elif len(alike) > 1 and not allow:
            raise BadInput(
                f"{where}: {_listed([fitted[k].name for k in alike])} have one fingerprint, which samples weights, so "
                f"that {name} cannot be told apart from the others; fit these models anew with wp-fit, or set "
                "`allow_mismatch: true` to take them in order."
            )
        found = next((k for k in alike if k in left), None)
        if found is not None:
            places[name] = found
            left.remove(found)
    strange = [name for name, place in places.items() if place < 0]
    missing = [fitted[k].name for k in left]
    if strange or missing:
        text = f"{where}: these weights were fitted for the experts {_listed([expert.name for expert in fitted])}"
        if missing:
            text += f", and {_listed(missing)} cannot be found among those of the merge"
        if strange:
            text += f", and {_listed(strange)} cannot be found among these"
        if len(experts) != len(fitted):
            raise BadInput(f"{text}; merge all of the fitted experts and no other, or fit these models with wp-fit.")
        if not allow:
            raise BadInput(
                f"{text}; fit these models with wp-fit, or set `allow_mismatch: true` to take them in order."
            )
        LOG.warning("%s; taking them in order, as allow_mismatch says.", text)
        places |= dict(zip(strange, left, strict=True))
    return tuple(places.values())


def layer_weights(fit: Fit, order: Sequence[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w_KH and w_KF of the merge's experts in one layer, float32."""
    return fit.heads[list(order), layer], fit.neurons[list(order), layer]


def fitted_weights(fit: Fit, order: Sequence[int], slot: TensorSlot | None) -> torch.Tensor:
    """w_Kn of the merge's experts, as `FusionWeights.along`."""
    return fit.weights(order).along(slot, fit.meta.geometry)


def _same(found: Fingerprint, fitted: ModelId) -> bool:
    """Of tensors alone a fingerprint has no config, which then is not compared."""
    return found.tensors == fitted.tensors and (not found.config or found.has_config(fitted.config))


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@lru_cache(maxsize=8)
def _read(key: Stamp) -> Fit:
    return read_fit(key[0])
