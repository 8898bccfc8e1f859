"""Which components a set patch takes from the donor (`merge_method: wp_patch`), and what must be right about that.

The parameters of a recipe say it: either a ranking (`scores`, `top`, and `task` or `rank` where there are several
tasks), a list or a kind (`components`), some `layers`, or of these together what all of them allow; or a patch file,
which has a set of its own. One set is of the whole patch. `remove` says that it is the recipient that the score file
calls the expert: its components are taken back to the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from mergekit_wp.checkpoint.weights import TensorHeader
from mergekit_wp.choices import COMPONENTS
from mergekit_wp.errors import BadInput
from mergekit_wp.files import Stamp, stamp
from mergekit_wp.foreign import logger
from mergekit_wp.geometry import Geometry, TensorSlot, slot_of, text_name
from mergekit_wp.merge.made_for import OR_ALLOW, check_fingerprint
from mergekit_wp.merge.patch_file import load_patch
from mergekit_wp.merge.plan import PATCH, TORCH_DTYPE, MergePlan, PlannedTensor
from mergekit_wp.merge.shares import load_any_scores
from mergekit_wp.subset import Amount, Ranking, Subset

LOG = logger(__name__)

_OF_A_PATCH = ("slices", f"apply slices to the model that they were cut for, {OR_ALLOW}")
"""The last words of `check_fingerprint`."""
_CHOOSING = ("scores", "top", "task", "rank", "layers", "components")


def chosen(parameters: Mapping[str, Any], geometry: Geometry) -> Subset:
    """The set that a recipe's parameters mean, in a model of this geometry. Raises `BadInput`."""
    if path := parameters["patch"]:
        return load_patch(path).subset
    words = tuple(str(parameters[name]) for name in _CHOOSING)
    listed = parameters["components"] not in ("", *COMPONENTS)
    files = [(parameters["scores"], "score file", "mend the path")] if parameters["scores"] else []
    if listed:
        remedy = "components are all, heads, neurons or a file that names some, such as L5H3 L5N97"
        files.append((parameters["components"], "file of components", remedy))
    return _chosen(words, geometry, tuple(stamp(*file) for file in files))


@lru_cache(maxsize=8)
def _chosen(words: tuple[str, ...], geometry: Geometry, _files: tuple[Stamp, ...]) -> Subset:
    """The stamps tell when a file was written anew."""
    parameters = dict(zip(_CHOOSING, words, strict=True))
    components, layers = parameters["components"] or "all", parameters["layers"] or None
    return Subset.choose(geometry, components, layers, ranking_of(parameters))


def ranking_of(parameters: Mapping[str, Any]) -> Ranking | None:
    """The ranking that a recipe's parameters name; None without. Raises `BadInput`."""
    path, task, by = (parameters[name] or None for name in ("scores", "task", "rank"))
    if path is None:
        return None
    try:
        return Ranking.of_task(Amount.parse(parameters["top"]), load_any_scores(path), task, by)
    except BadInput as error:
        raise BadInput(error.message if error.message.startswith("top:") else f"{path}: {error.message}") from error


def places_of(plan: MergePlan, tensor: PlannedTensor) -> torch.Tensor | None:
    """Which rows (or columns) of a tensor come from the donor, int64, ascending; None where none do."""
    slot = slot_of(tensor.source)
    if slot is None:
        return None
    geometry = plan.checkpoints[tensor.base].geometry
    places_n = chosen(tensor.parameters, geometry).owned(slot, geometry).nonzero()[:, 0]
    return places_n if len(places_n) else None


def check_patch(plan: MergePlan, tensor: PlannedTensor, awaited: bool) -> None:
    """The parameters of a set patch go together, and its files are of these models. Raises `BadInput`.

    awaited: the score file is still to come.
    """
    given = {name: value for name, value in tensor.parameters.items() if value not in ("", False)}
    asked = sorted(set(given) - {"allow_mismatch", "patch"})
    if "patch" in given:
        if tensor.experts:
            raise BadInput(
                f"patch: {given['patch']} has the slices of a donor, and {tensor.experts[0]} is given as one too; "
                "keep one of the two."
            )
        if asked:
            raise BadInput(f"{asked[0]}: a patch file has a set of its own; leave `{asked[0]}` or `patch` out.")
        _check_file(plan, tensor, given["patch"])
        return
    if not tensor.experts:
        raise BadInput(
            f"merge_method {PATCH} found no model beside {tensor.base} to take slices from; list one, or give `patch`."
        )
    if awaited and "scores" not in given:
        return
    _check_together(given)
    chosen(tensor.parameters, plan.checkpoints[tensor.base].geometry)
    if "scores" in given:
        _check_scores(plan, tensor, given["scores"])
    _warn_of_rounding(plan, tensor)


def check_one_set(plan: MergePlan) -> None:
    """A component's slices lie in several tensors, so a filter or a gradient would cut it up. Raises `BadInput`."""
    first = plan.tensors[0]
    for tensor in plan.tensors:
        for name, value in tensor.parameters.items():
            if value != first.parameters[name]:
                raise BadInput(
                    f"{name}: found {first.parameters[name]!r} for some tensors and {value!r} for others; a set is one "
                    "for the whole patch, so write a single value, and neither a list nor a filter."
                )
        if tensor.experts != first.experts or tensor.base != first.base:
            raise BadInput(f"merge_method {PATCH}: slices of other models are listed together; list the same in all.")


def _check_together(given: Mapping[str, Any]) -> None:
    if ("top" in given) != ("scores" in given):
        if "top" in given:
            raise BadInput("top: goes with `scores`, the score file whose highest components are taken; give both.")
        raise BadInput(
            "scores: goes with `top`, how many of its highest components are taken, such as 5% or heads=20; give both."
        )
    for name in ("rank", "task"):
        if name in given and "top" not in given:
            raise BadInput(f"{name}: says how `top` ranks, and there is no top; give one, or leave `{name}` out.")
    if not {"top", "components", "layers"} & given.keys():
        raise BadInput(
            f"merge_method {PATCH}: which components are to be taken is not said; give `scores` and `top`, such as 5%, "
            "or `components` (all, heads, neurons or a file that names some), or `layers`."
        )


def _check_scores(plan: MergePlan, tensor: PlannedTensor, path: str) -> None:
    """The ranking is of these two models, and `remove` says rightly which of them it calls the expert."""
    meta, removes = load_any_scores(path).meta, bool(tensor.parameters["remove"])
    recipient, donor = tensor.base, tensor.experts[0]
    if different := meta.geometry.differences(plan.checkpoints[recipient].geometry):
        raise BadInput(
            f"{path}: these scores were made for another shape than {recipient}: {'; '.join(different)}; score these "
            "models with wp-score."
        )
    base, expert = (donor, recipient) if removes else (recipient, donor)
    found = {model: plan.fingerprint(model) for model in (base, expert)}
    # Where both have one fingerprint, which samples weights, nothing tells one from the other.
    told_apart = meta.base.tensors != meta.expert.tensors
    if told_apart and found[base].tensors == meta.expert.tensors and found[expert].tensors == meta.base.tensors:
        what = "leave `remove` out" if removes else "set `remove: true` to take its components back to the base's"
        raise BadInput(
            f"{path}: the expert of these scores is {meta.expert.name}, which is {base} here, the "
            f"{'donor' if removes else 'base_model'}; {what}, or exchange the two."
        )
    for role, model, scored in (("base", base, meta.base), ("expert", expert, meta.expert)):
        check_fingerprint(found[model], role, str(model), scored, path, tensor.allow_mismatch)


def _check_file(plan: MergePlan, tensor: PlannedTensor, path: str) -> None:
    """The slices were cut for this recipient, and fit every tensor that their components own something of."""
    patch, recipient = load_patch(path), plan.checkpoints[tensor.base]
    if different := patch.meta.geometry.differences(recipient.geometry):
        raise BadInput(
            f"{path}: these slices are of another shape than {tensor.base}: {'; '.join(different)}; apply them to "
            f"{patch.meta.recipient.called}."
        )
    found = plan.fingerprint(tensor.base)
    check_fingerprint(
        found, "recipient", str(tensor.base), patch.meta.recipient, path, tensor.allow_mismatch, *_OF_A_PATCH
    )
    left = dict(patch.values)
    for each in plan.tensors:
        slot, header = slot_of(each.source), plan.header(each.base, each.source)
        count = 0 if slot is None else int(patch.subset.owned(slot, patch.meta.geometry).sum())
        if slot is None or header is None or not count:
            continue
        values = left.pop(text_name(each.source) or "", None)
        want = _shape(header, slot, count)
        if values is None or tuple(values.shape) != want:
            has = "none" if values is None else f"of shape {list(values.shape)}"
            raise BadInput(
                f"{path}: slices of {each.source} {list(want)} are wanted, and there are {has}; cut them anew."
            )
    known = {text_name(name) for name in recipient.tensors}
    if odd := sorted(left.keys() - known):
        raise BadInput(f"{path}: has slices of {odd[0]}, which {tensor.base} does not have; cut them anew.")


def _shape(header: TensorHeader, slot: TensorSlot, count: int) -> tuple[int, ...]:
    shape = list(header.shape)
    shape[slot.axis] = count
    return tuple(shape)


def _warn_of_rounding(plan: MergePlan, tensor: PlannedTensor) -> None:
    """Where the output's dtype does not hold the donor's numbers, patched slices are not the donor's to the bit."""
    for each in plan.tensors:
        if places_of(plan, each) is None:
            continue
        header = plan.header(each.experts[0], each.sources[each.experts[0]])
        stored, kept = TORCH_DTYPE.get(header.dtype if header else ""), plan.out_dtype(each)
        if stored is None or _holds(kept, stored):
            continue
        LOG.warning(
            "%s: is stored in %s, and its slices are rounded to %s, the dtype of %s; write `dtype: %s` in a recipe to "
            "keep them as they are.",
            *(tensor.experts[0], stored, kept, tensor.base, "float32" if stored != "float64" else stored),
        )
        return


def _holds(wide: str, narrow: str) -> bool:
    """Whether every number of a dtype is one of the other's too."""
    return torch.promote_types(getattr(torch, wide), getattr(torch, narrow)) == getattr(torch, wide)
