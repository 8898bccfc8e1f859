"""`merge_method: wp`, the way mergekit sees it: a name, its parameters, and one tensor at a time.

Recipe:

    merge_method: wp
    base_model: BASE
    models:
      - model: EXPERT_A
        parameters: {scores: a.safetensors}
      - model: EXPERT_B
        parameters: {scores: b.safetensors}

Of mergekit it may import `merge_methods.base` alone, at the top (see `checked`).
"""

from __future__ import annotations

import math
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

from mergekit_wp.components import slot_of
from mergekit_wp.errors import BadInput
from mergekit_wp.merge.checked import CheckedMethod, not_finite, register_method
from mergekit_wp.merge.fusion import NotFiniteError, fuse
from mergekit_wp.merge.plan import WP
from mergekit_wp.merge.shares import load_scores, tensor_shares

_REFERENCE = "https://arxiv.org/abs/2604.13694"


def _checked_scores(value: Any) -> str:
    """The validating type of `scores`: a bad score file is refused while the recipe is planned."""
    if not isinstance(value, str):
        raise BadInput(f"scores: found {value!r}, expected the path of a score file; make one with wp-score.")
    if value:  # empty is the default and means "not given": the check of the plan names the expert
        load_scores(value)
    return value


def _checked_scale(value: Any) -> float:
    """The validating type of `scale`: a number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise BadInput(f"scale: found {value!r}, expected a number above 0; 1 is the paper's rule.")
    return float(value)


class WeightPatchingMerge(CheckedMethod):
    """theta_fuse(c) = theta_base + sum_k alpha_k(c) (theta_k - theta_base), METHOD.md 4.

    `scores` (under each expert): the path of its score file; a relative path starts at the working directory.
    `allow_mismatch` (shared, default false): accept scores whose fingerprints are not those of the models.
    `scale` (shared, default 1, the paper's rule): multiplies what the merge adds to the base.
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
                "allow_mismatch",
                bool,
                ParameterScope.SHARED,
                default=False,
                description="Accept score files made for other models than those of the recipe.",
            ),
            ParameterSpec(
                "scale",
                Annotated[float, BeforeValidator(_checked_scale)],
                ParameterScope.SHARED,
                default=1.0,
                description="Multiplies what the merge adds to the base.",
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
        allow_mismatch: bool = False,
        scale: float = 1.0,
        source_name: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """One output tensor of the experts' shape.

        `source_name` is the tensor's name in the inputs, whose layer decides the shares (under `slices:` the
        output's name has another layer); it falls back to the group's name. `out_dtype` falls back to the
        base's dtype. The base's values are read only if `scale` is not 1. Raises `ValueError` when the tensor
        does not have the shape that the score files were made for, `BadInput` when an input holds a NaN or an
        infinity.
        """
        base = group.base
        assert base is not None  # the contract says so
        experts = group.non_base
        slot = slot_of(source_name or group.metadata.name or "")
        alpha_Kn = None if slot is None else tensor_shares(scores.values_for(experts), slot)
        if scale != 1.0:
            uniform = torch.full((len(experts), base.tensor.shape[0]), 1 / len(experts))
            alpha_Kn = scale * (uniform if alpha_Kn is None else alpha_Kn)
        try:
            return fuse(
                [expert.tensor for expert in experts],
                alpha_Kn,
                0 if slot is None else slot.axis,
                out_dtype or base.tensor.dtype,
                None if scale == 1.0 else base.tensor,
            )
        except NotFiniteError:
            raise not_finite(group, source_name) from None


def register() -> None:
    """Add the method to mergekit's registry; idempotent. Raises `ValueError` if another `wp` is there."""
    register_method(WeightPatchingMerge)


# When this module's own import is what made mergekit load, `autoload` left it out.
register()
