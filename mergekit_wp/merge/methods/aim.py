"""`merge_method: aim`: Activation-Informed Merging (Nobari et al., arXiv 2502.02421), one tensor at a time.

A step after any merge: where the base's inputs are large, the merged model goes part of the way back to the base.

    merge_method: aim
    base_model: BASE
    models:
      - model: MERGED
    parameters: {activations: activations.safetensors, omega: 0.4}    # 0.4 is the authors' choice

    W = W0 + (W_merged - W0) (1 - (1 - omega) a_c)      for every column c

a_c, from 0 to 1, is the mean of |x_c| at the input of W's module in the base, over the largest of the module; `wp-aim`
makes the file. As in the authors' program (github.com/ahnobari/ActivationInformedMerging), W is every weight that is
not an embedding: projections, norms and the output head. Embeddings, a head tied to them, and biases stay as merged.
omega 1 changes nothing; omega 0 takes the column of the largest input from the base.

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
    TensorGroup,
)
from pydantic import BeforeValidator

from mergekit_wp.errors import BadInput, shown
from mergekit_wp.merge.activations import kept_share, load_activations
from mergekit_wp.merge.kernel import NotFiniteError, fuse
from mergekit_wp.merge.methods.base import CheckedMethod, not_finite, number, register_method
from mergekit_wp.merge.plan import AIM


def _checked_file(value: Any) -> str:
    """The validating type of `activations`: a bad file is refused while the recipe is planned."""
    if not isinstance(value, str):
        raise BadInput(f"activations: found {shown(value)}, expected the path of a file; make one with wp-aim.")
    if value:  # empty is the default and means "not given": the check of the plan says so
        load_activations(value)
    return value


class AimMerge(CheckedMethod):
    """W0 + (W - W0) (1 - (1 - omega) a_c), column by column.

    `activations` (shared): the path of the file that wp-aim made for the base. `omega` (shared, default 0.4): a number
    from 0 to 1. As with every number of a mergekit recipe, a list is a gradient over the layers.
    """

    spec = MergeMethodSpec(
        name=AIM,
        pretty_name="Activation-Informed Merging",
        reference_url="https://arxiv.org/abs/2502.02421",
        parameters=(
            ParameterSpec(
                "activations",
                Annotated[str, BeforeValidator(_checked_file)],
                ParameterScope.SHARED,
                default="",
                description="Activations of the base, as wp-aim writes them.",
            ),
            ParameterSpec(
                "omega",
                number("omega", "the authors use 0.4", least=0, most=1),
                ParameterScope.SHARED,
                default=0.4,
                description="What the column of the largest input keeps of its change.",
            ),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1, max_non_base=1),
    )

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        activations: str = "",
        omega: float = 0.4,
        source_name: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """One output tensor of the base's shape; `out_dtype` falls back to the base's dtype.

        Raises `BadInput` when an input holds a NaN or an infinity.
        """
        assert group.base is not None  # the contract says so
        base, merged = group.base.tensor, group.non_base[0].tensor
        keep_C = kept_share(activations, source_name or group.metadata.name or "", omega)
        dtype = out_dtype or base.dtype
        try:
            if keep_C is None:
                return fuse([merged], None, 0, dtype)
            # A mean of the two is exact at both ends, where a difference would be rounded.
            return fuse([merged, base], torch.stack([keep_C, 1 - keep_C]), base.ndim - 1, dtype)
        except NotFiniteError:
            raise not_finite(group, source_name) from None


def register() -> None:
    """Add the method to mergekit's registry; idempotent. Raises `ValueError` if another `aim` is there."""
    register_method(AimMerge)


# When this module's own import is what made mergekit load, `autoload` left it out.
register()
