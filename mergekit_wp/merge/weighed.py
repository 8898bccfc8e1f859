"""A recipe as weights: its merge is theta_base + sum_k w_k(c) (theta_k - theta_base), which need not be written.

What mergekit would do is read off its own plan, every parameter resolved for every tensor. Then

    wp                a fit's weights, or the shares of score files and `weight`, times `scale`
    task_arithmetic   lambda w_k, over the sum of w with `normalize`
    linear            w_k, over the sum of w with `normalize`, the base's counted; they must sum to 1: then
                      sum_k w_k theta_k is of that form for any base

Whatever else a recipe may ask for (another method, slices, numbers that differ from tensor to tensor, another
vocabulary) has no such weights, and is refused: that merge has to be written. `dtype` and `out_dtype` say how a file
is rounded, and are left aside.

Legend: K experts, L layers, H heads, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergekit_wp.checkpoint.folder import Checkpoint, Fingerprint
from mergekit_wp.checkpoint.vocabulary import head_equals_embeddings, head_is_tied, tokenizer_in
from mergekit_wp.errors import BadInput
from mergekit_wp.fit_file import FusionWeights
from mergekit_wp.merge import register
from mergekit_wp.merge.checks import check_nothing_dropped, check_plan
from mergekit_wp.merge.kernel import prior_shares
from mergekit_wp.merge.plan import WP, MergePlan, PlannedTensor, meaning_of
from mergekit_wp.merge.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from mergekit.common import ModelReference

LINEAR, TASK_ARITHMETIC = "linear", "task_arithmetic"
_METHODS = (WP, TASK_ARITHMETIC, LINEAR)
_SUM_TOLERANCE = 1e-6  # of a linear merge's weights, which people write in decimals
_NO_SUM = 1e-8  # below which mergekit's task arithmetic divides by 1
_SAME_EVERYWHERE = "for some tensors it has other numbers than for others (a list over the layers, or a filter)"


@dataclass(frozen=True)
class WeighedMerge:
    """A merge into a known base: its recipe as written, the experts by the names that the recipe has, and weights."""

    recipe: Recipe
    names: tuple[str, ...]
    experts: tuple[Checkpoint, ...]
    prints: tuple[Fingerprint, ...]
    weights: FusionWeights

    @property
    def whole(self) -> int | None:
        """The number of the expert that the merge is, taken whole with nothing of the others; None where it is none."""
        w = self.weights
        all_Kn = torch.cat([w.heads_KLH.flatten(1), w.neurons_KLF.flatten(1), w.rest_K[:, None]], 1)
        one_K1 = torch.eye(len(all_Kn))[:, :, None]
        return next((k for k, taken_K1 in enumerate(one_K1) if bool((all_Kn == taken_K1).all())), None)


def read_weighed(path: str, base: Checkpoint, remote_code: bool = False) -> WeighedMerge:
    """The merge of a recipe, read against the `base` that it must merge into; reads headers, score and fit files only.

    Raises `BadInput`, naming the recipe, for what wp-merge would refuse, for a merge into another base, and for one
    that is not of this form.
    """
    from mergekit.options import MergeOptions

    recipe = read_recipe(path)
    if recipe.method not in _METHODS:
        raise _not_weights(path, f"merge_method {recipe.method} is no sum of the experts' changes")
    for key in ("slices", "modules"):
        if key in recipe.content:
            raise _not_weights(path, f"it has `{key}`")
    register()
    options = MergeOptions(trust_remote_code=remote_code)
    recipe.prepare(options, merge_loras=False)
    plan = replace(recipe.plan(Path("merged"), options), out=None)
    check_plan(plan)
    if not plan.ours:
        check_nothing_dropped(plan)
    weight_of, tensor = _weights_of_models(path, plan), plan.tensors[0]
    models = _experts(path, recipe, plan, base)
    for expert in models:
        _check_expert(path, plan, expert, base)
    if any(tensor.realigned for tensor in plan.tensors):
        _check_rows(path, recipe, plan, base)
    if weight_of is None:
        weights = _by_files(plan, tensor, base.geometry.layers)
    else:
        weights = FusionWeights.uniform(base.geometry, [weight_of[model] for model in models])
    return WeighedMerge(
        recipe,
        tuple(meaning_of(model).text for model in models),
        tuple(plan.checkpoints[model] for model in models),
        tuple(plan.fingerprint(model) for model in models),
        weights,
    )


def _not_weights(path: str, why: str) -> BadInput:
    return BadInput(
        f"{path}: {why}, so it cannot be read unwritten; write the merge (mergekit-yaml), and give its folder as the "
        "base."
    )


def _weights_of_models(path: str, plan: MergePlan) -> dict[ModelReference, float] | None:
    """What the merge takes of each model's change; None by wp, where components have their own.

    Raises `BadInput` where that is not one number for all tensors, or where the numbers of a linear merge do not sum
    to 1.
    """
    if plan.method == WP:
        same = {(tensor.scores, tensor.weights, tensor.scales, tensor.fit) for tensor in plan.tensors}
        if len(same) > 1:
            raise _not_weights(path, _SAME_EVERYWHERE)
        return None
    by_tensor = [_resolved(tensor) for tensor in plan.tensors]
    if any(found != by_tensor[0] for found in by_tensor):
        raise _not_weights(path, _SAME_EVERYWHERE)
    numbers, normalize, factor = by_tensor[0]
    total = sum(numbers.values())
    if plan.method == LINEAR and normalize and abs(total) < _NO_SUM:
        raise BadInput(f"{path}: its weights sum to 0, by which `normalize` would divide; give other weights.")
    if normalize and abs(total) >= _NO_SUM:
        numbers = {model: number / total for model, number in numbers.items()}
    elif plan.method == LINEAR and abs(total - 1) > _SUM_TOLERANCE:
        raise _not_weights(path, f"without `normalize`, its weights sum to {total:g} and not to 1")
    return {model: factor * number for model, number in numbers.items()}


def _resolved(tensor: PlannedTensor) -> tuple[dict[ModelReference, float], bool, float]:
    """The weights of one tensor's models, whether they are divided by their sum, and what multiplies all of them."""
    counted = tensor.models if tensor.method == LINEAR else tensor.experts
    numbers = {model: float(tensor.inputs[model]["weight"]) for model in counted}
    return numbers, bool(tensor.parameters["normalize"]), float(tensor.parameters.get("lambda", 1.0))


def _experts(path: str, recipe: Recipe, plan: MergePlan, base: Checkpoint) -> tuple[ModelReference, ...]:
    """The models whose changes are taken. Raises `BadInput` for a merge into another base."""
    tensor = plan.tensors[0]
    if recipe.content.get("base_model") is not None:
        if plan.fingerprint(tensor.base) != base.fingerprint:
            raise BadInput(
                f"{path}: merges into {tensor.base}, which is another model than the base {base.name}; give the base "
                "that the recipe has."
            )
        if not tensor.experts:
            raise BadInput(f"{path}: merges nothing into the base {base.name}; give a recipe with experts.")
        return tensor.experts
    # mergekit takes config and vocabulary from the first model. One that is the base has changed nothing.
    first = plan.checkpoints[tensor.base]
    if first.lineage_differences(base) or first.geometry.vocabulary != base.geometry.vocabulary:
        raise BadInput(
            f"{path}: names no base_model, so the merge gets config and vocabulary of {first.name}, which differ from "
            f"those of the base {base.name}; add that as `base_model`, and to the models with weight 0."
        )
    return tensor.models


def _check_expert(path: str, plan: MergePlan, model: ModelReference, base: Checkpoint) -> None:
    expert = plan.checkpoints[model]
    if different := expert.geometry.differences(base.geometry):
        raise BadInput(f"{path}: {model} is not of the shape of the base {base.name}: {'; '.join(different)}.")
    if head_is_tied(base) and not head_equals_embeddings(expert):
        raise BadInput(
            f"{path}: {model} has an output head of its own, while the base {base.name} ties its to the embeddings; "
            "use an expert tuned from this base."
        )


def _check_rows(path: str, recipe: Recipe, plan: MergePlan, base: Checkpoint) -> None:
    """With a `tokenizer:`, rows are brought in line by tokens: the same as by their numbers where every token of the
    base has its own number in every expert, and every row of the base a token."""
    content = recipe.content
    said = content.get("tokenizer", {"source": content.get("tokenizer_source")})
    if said != {"source": "base"} or content.get("base_model") is None:
        raise _not_weights(path, "it makes a vocabulary other than the base's (`tokenizer`)")
    ours, rows = tokenizer_in(base.folder), base.geometry.vocabulary
    ids = {} if ours is None else ours.get_vocab()
    if sorted(ids.values()) != list(range(rows)):
        raise _not_weights(
            path, f"its `tokenizer` keeps the rows of {len(ids)} tokens, and the base {base.name} has {rows} rows"
        )
    for model in plan.tensors[0].experts:
        theirs = tokenizer_in(plan.checkpoints[model].folder)
        if theirs is None:  # mergekit takes the base's for it
            continue
        other, held = theirs.get_vocab(), plan.checkpoints[model].geometry.vocabulary
        # Of a token that an expert does not have, mergekit takes the base's row; so it is here past the expert's rows.
        if moved := [token for token, at in ids.items() if other.get(token, at if at >= held else None) != at]:
            raise _not_weights(path, f"its `tokenizer` moves rows of {model}, which has {moved[0]!r} elsewhere or not")


def _by_files(plan: MergePlan, tensor: PlannedTensor, layers: int) -> FusionWeights:
    """The weights of a merge by wp: shares of score files or those of a fit, times every expert's scale."""
    heads, neurons = zip(*(plan.layer_weights(tensor, layer) for layer in range(layers)), strict=True)
    rest_K = torch.tensor(plan.rest_weights(tensor)) if tensor.fit else prior_shares(tensor.weights)
    scale_K = torch.tensor(tensor.scales)
    return FusionWeights(
        scale_K[:, None, None] * torch.stack(heads, 1),
        scale_K[:, None, None] * torch.stack(neurons, 1),
        scale_K * rest_K,
    )
