"""`merge_method: widen`: merging by weight disentanglement (Yu et al., arXiv 2408.03092), one tensor at a time.

Recipe:

    merge_method: widen
    base_model: BASE
    models:
      - model: EXPERT_A
      - model: EXPERT_B
    parameters: {t: 1.0, s: 1.0}    # the defaults, and the authors' choice for Llama-2-13B

The arithmetic is in `widen_math`. Its authors' program holds all models in float32 at once; here a tensor is read
twice, and beyond the inputs there is the output and a few tiles.

Of mergekit it may import `merge_methods.base` alone, at the top (see `checked`).
"""

from __future__ import annotations

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from mergekit_wp.components import EMBEDDINGS, text_name
from mergekit_wp.merge.checked import CheckedMethod, not_finite, number, register_method
from mergekit_wp.merge.fusion import NotFiniteError, fuse
from mergekit_wp.merge.plan import WIDEN
from mergekit_wp.merge.widen_math import column_weights


def by_token(name: str) -> bool:
    """The one matrix that is taken apart by row: its rows are tokens, and tokens are what its columns shall be."""
    return text_name(name) == EMBEDDINGS


class WidenMerge(CheckedMethod):
    """W* = W0 + sum_n 1/2 (S_m + S_d)_n (Wn - W0), column by column (`widen_math`).

    `t` (shared, default 1): a column whose rank is above t times the average is taken as important. `s` (shared,
    default 1): the weight of an important column. As with every number of a mergekit recipe, a list is a gradient
    over the layers.
    """

    spec = MergeMethodSpec(
        name=WIDEN,
        pretty_name="WIDEN",
        reference_url="https://arxiv.org/abs/2408.03092",
        parameters=(
            ParameterSpec(
                "t",
                number("t", "the authors use 1.0", least=0),
                ParameterScope.SHARED,
                default=1.0,
                description="A rank above t times the average makes a column important.",
            ),
            ParameterSpec(
                "s",
                number("s", "the authors use 1.0", least=0),
                ParameterScope.SHARED,
                default=1.0,
                description="The weight of an important column.",
            ),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    )

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        t: float = 1.0,
        s: float = 1.0,
        source_name: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """One output tensor of the base's shape; `out_dtype` falls back to the base's dtype.

        Raises `BadInput` when an input holds a NaN or an infinity, `ValueError` for a tensor of more than two axes.
        """
        assert group.base is not None  # the contract says so
        base, experts = group.base.tensor, [entry.tensor for entry in group.non_base]
        by_row = by_token(source_name or group.metadata.name or "")
        weights_Kn = column_weights(base, experts, by_row=by_row, t=t, s=s)
        try:
            return fuse(experts, weights_Kn, 0 if by_row or base.ndim == 1 else 1, out_dtype or base.dtype, base)
        except NotFiniteError:
            raise not_finite(group, source_name) from None


def register() -> None:
    """Add the method to mergekit's registry; idempotent. Raises `ValueError` if another `widen` is there."""
    register_method(WidenMerge)


# When this module's own import is what made mergekit load, `autoload` left it out.
register()
