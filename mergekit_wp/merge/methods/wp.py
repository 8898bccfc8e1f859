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

`weight` and `scale` are ours and 1 by default; what they do is written at the top of `kernel`.

Of mergekit it may import `merge_methods.base` alone, at the top (see `base`).
"""

from __future__ import annotations

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
from mergekit_wp.merge.kernel import NotFiniteError, merge_tensor
from mergekit_wp.merge.methods.base import CheckedMethod, not_finite, number, register_method
from mergekit_wp.merge.plan import WP
from mergekit_wp.merge.shares import load_scores, tensor_shares

_REFERENCE = "https://arxiv.org/abs/2604.13694"


def _checked_scores(value: Any) -> str:
    """The validating type of `scores`: a bad score file is refused while the recipe is planned."""
    if not isinstance(value, str):
        raise BadInput(f"scores: found {shown(value)}, expected the path of a score file; make one with wp-score.")
    if value:  # empty is the default and means "not given": the check of the plan names the expert
        load_scores(value)
    return value


class WeightPatchingMerge(CheckedMethod):
    """theta_fuse(c) = theta_base + sum_k alpha_k(c) (theta_k - theta_base), METHOD.md 4.

    `scores` (of each expert): the path of its score file; a relative path starts at the working directory. Left out,
    it is the file `wp/scores.safetensors` in the expert's own folder (a LoRA's: in the LoRA's).
    `weight` (of each expert, or of all; default 1): a number of at least 0, not 0 for all.
    `scale` (of each expert, or of all; default 1): any finite number; below 0 an expert is taken away.
    `allow_mismatch` (shared, default false): accept scores whose fingerprints are not those of the models.

    As with every number of a mergekit recipe, a list is a gradient over the layers and a filter chooses tensors.
    """

    spec = MergeMethodSpec(
        name=WP,
        pretty_name="Weight Patching",
        reference_url=_REFERENCE,
        parameters=(
            ParameterSpec(
                "scores",
                Annotated[str, BeforeValidator(_checked_scores)],
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
                "allow_mismatch",
                bool,
                ParameterScope.SHARED,
                default=False,
                description="Accept score files made for other models than those of the recipe.",
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
        allow_mismatch: bool = False,
        source_name: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """One output tensor of the experts' shape.

        `source_name` is the tensor's name in the inputs, whose layer decides the shares (under `slices:` the
        output's name has another layer); it falls back to the group's name. `out_dtype` falls back to the
        base's dtype. The base's values are read only if a `scale` is not 1. Raises `ValueError` when the tensor
        does not have the shape that the score files were made for or no `weight` is above 0, `BadInput` when an input
        holds a NaN or an infinity.
        """
        base = group.base
        assert base is not None  # the contract says so
        experts = group.non_base
        prior, scales = weight.values_for(experts), scale.values_for(experts)
        slot = slot_of(source_name or group.metadata.name or "")
        alpha_Kn = None if slot is None else tensor_shares(scores.values_for(experts), slot, prior)
        axis = 0 if slot is None else slot.axis
        dtype = out_dtype or base.tensor.dtype
        try:
            return merge_tensor(base.tensor, [each.tensor for each in experts], alpha_Kn, axis, prior, scales, dtype)
        except NotFiniteError:
            raise not_finite(group, source_name) from None


def register() -> None:
    """Add the method to mergekit's registry; idempotent. Raises `ValueError` if another `wp` is there."""
    register_method(WeightPatchingMerge)


# When this module's own import is what made mergekit load, `autoload` left it out.
register()
