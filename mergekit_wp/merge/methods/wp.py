"""`merge_method: wp`, the way mergekit sees it: a name, its parameters, and one tensor at a time.

Recipe:

    merge_method: wp
    base_model: BASE
    models:
      - model: EXPERT_A
        parameters: {scores: a.safetensors}
      - model: EXPERT_B
        parameters: {scores: b.safetensors, weight: 0.5}
    parameters: {scale: 1.5}

or, with weights that were learnt (METHOD.md 6) in the place of scores:

    merge_method: wp
    base_model: BASE
    models: [{model: EXPERT_A}, {model: EXPERT_B}]
    parameters: {fit: fit.safetensors}

`weight` and `scale` are ours and 1 by default; what they do is written at the top of `kernel`.

Of mergekit it may import `merge_methods.base` alone, at the top (see `base`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    PerInputValues,
    TensorGroup,
)
from pydantic import BeforeValidator

from mergekit_wp.errors import BadInput, shown
from mergekit_wp.geometry import slot_of
from mergekit_wp.merge.fitted import fitted_weights, load_fit
from mergekit_wp.merge.kernel import NotFiniteError, merge_fitted, merge_tensor
from mergekit_wp.merge.methods.base import CheckedMethod, not_finite, number, register_method
from mergekit_wp.merge.plan import WP
from mergekit_wp.merge.shares import load_scores, tensor_shares

_REFERENCE = "https://arxiv.org/abs/2604.13694"


def _file(name: str, what: str, maker: str, load: Callable[[str], Any]) -> Any:
    """A validating type for the path of a file: a bad one is refused while the recipe is planned."""

    def checked(value: Any) -> str:
        if not isinstance(value, str):
            raise BadInput(f"{name}: found {shown(value)}, expected the path of a {what} file; make one with {maker}.")
        if value:  # empty is the default and means "not given": the check of the plan says what is missing
            load(value)
        return value

    return Annotated[str, BeforeValidator(checked)]


class WeightPatchingMerge(CheckedMethod):
    """theta_fuse(c) = theta_base + sum_k alpha_k(c) (theta_k - theta_base), METHOD.md 4; alpha learnt, 6.

    `scores` (of each expert): the path of its score file; a relative path starts at the working directory. Left out,
    it is the file `wp/scores.safetensors` in the expert's own folder (a LoRA's: in the LoRA's).
    `weight` (of each expert, or of all; default 1): a number of at least 0, not 0 for all.
    `scale` (of each expert, or of all; default 1): any finite number; below 0 an expert is taken away.
    `fit` (shared): the path of a fit file, whose weights stand in the place of what `scores` and `weight` give; its
    experts are found among those of the merge by their fingerprints, in any order.
    `allow_mismatch` (shared, default false): accept a score or fit file whose fingerprints are not those of the models.

    As with every number of a mergekit recipe, a list is a gradient over the layers and a filter chooses tensors.
    """

    spec = MergeMethodSpec(
        name=WP,
        pretty_name="Weight Patching",
        reference_url=_REFERENCE,
        parameters=(
            ParameterSpec(
                "scores",
                _file("scores", "score", "wp-score", load_scores),
                ParameterScope.NON_BASE,
                default="",
                description="Score file of this expert, as wp-score writes it.",
            ),
            ParameterSpec(
                "weight",
                number("weight", "equal weights are the paper's rule", least=0),
                ParameterScope.NON_BASE,
                default=1.0,
                description="How much this expert counts against the others.",
            ),
            ParameterSpec(
                "scale",
                number("scale", "1 is the paper's rule"),
                ParameterScope.NON_BASE,
                default=1.0,
                description="Multiplies what this expert adds to the base.",
            ),
            ParameterSpec(
                "fit",
                _file("fit", "fit", "wp-fit", load_fit),
                ParameterScope.SHARED,
                default="",
                description="Fit file of the merge, as wp-fit writes it, in the place of score files.",
            ),
            ParameterSpec(
                "allow_mismatch",
                bool,
                ParameterScope.SHARED,
                default=False,
                description="Accept score and fit files made for other models than those of the recipe.",
            ),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    )

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        scores: PerInputValues[str],
        weight: PerInputValues[float],
        scale: PerInputValues[float],
        fit: str = "",
        allow_mismatch: bool = False,
        source_name: str | None = None,
        order: Sequence[int] | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """One output tensor of the experts' shape.

        `source_name` is the tensor's name in the inputs, whose layer decides the shares (under `slices:` the
        output's name has another layer); it falls back to the group's name. `order`: the experts' places in the fit
        file; it falls back to the file's own. `out_dtype` falls back to the base's dtype. The base's values are read
        only with a fit, or if a `scale` is not 1. Raises `ValueError` when the tensor does not have the shape that the
        files were made for or no `weight` is above 0, `BadInput` when an input holds a NaN or an infinity.
        """
        base = group.base
        assert base is not None  # the contract says so
        experts, tensors = group.non_base, [each.tensor for each in group.non_base]
        prior, scales = weight.values_for(experts), scale.values_for(experts)
        slot = slot_of(source_name or group.metadata.name or "")
        axis = 0 if slot is None else slot.axis
        dtype = out_dtype or base.tensor.dtype
        try:
            if fit:
                weight_Kn = fitted_weights(load_fit(fit), range(len(tensors)) if order is None else order, slot)
                return merge_fitted(base.tensor, tensors, weight_Kn, axis, scales, dtype)
            alpha_Kn = None if slot is None else tensor_shares(scores.values_for(experts), slot, prior)
            return merge_tensor(base.tensor, tensors, alpha_Kn, axis, prior, scales, dtype)
        except NotFiniteError:
            raise not_finite(group, source_name) from None


def register() -> None:
    """Add the method to mergekit's registry; idempotent. Raises `ValueError` if another `wp` is there."""
    register_method(WeightPatchingMerge)


# When this module's own import is what made mergekit load, `autoload` left it out.
register()
