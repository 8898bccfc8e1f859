"""`merge_method: wp_patch`: one model with a set of heads and neurons of another (Eq. 8, 45-47), one tensor at a time.

Recipes:

    merge_method: wp_patch                            # restore: the base with the expert's best components
    base_model: BASE
    models: [{model: EXPERT}]
    parameters: {scores: scores.safetensors, top: 5%}

    merge_method: wp_patch                            # remove: the expert with the base's
    base_model: EXPERT
    models: [{model: BASE}]
    parameters: {scores: scores.safetensors, top: 5%, remove: true}

    merge_method: wp_patch                            # slices that wp-patch --sparse cut
    base_model: BASE
    models: [{model: BASE}]
    parameters: {patch: maths.safetensors}

base_model is the recipient: the result is that model, with its config, tokenizer and vocabulary, but for the rows and
columns that the set's components own (`geometry`), which are the donor's. Nothing is computed: where dtypes agree,
every number is one of the two models', bit for bit. Keys, values, norms, embeddings and the output head belong to no
component and stay the recipient's, whatever is in the set.

Of mergekit it may import `merge_methods.base` alone, at the top (see `base`).
"""

from __future__ import annotations

from collections.abc import Callable
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

from mergekit_wp.choices import COMPONENTS, RANKS
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.geometry import slot_of, text_name
from mergekit_wp.merge.kernel import NotFiniteError, transplant
from mergekit_wp.merge.methods.base import CheckedMethod, not_finite, register_method
from mergekit_wp.merge.patch_file import load_patch
from mergekit_wp.merge.plan import PATCH
from mergekit_wp.merge.shares import load_any_scores
from mergekit_wp.subset import Amount


def _text(name: str, expected: str, check: Callable[[str], Any] = lambda text: None, numbers: bool = False) -> Any:
    """A validating type for a text, or a whole number where `numbers` are meant; empty is the default and means "not
    given": the check of the plan says what is missing."""

    def checked(value: Any) -> str:
        if type(value) is not str and not (numbers and type(value) is int):
            raise BadInput(f"{name}: found {shown(value)}, expected {expected}.")
        if value != "":
            check(str(value))
        return str(value)

    return Annotated[str, BeforeValidator(checked)]


def _rank(text: str) -> None:
    if text not in RANKS:
        raise BadInput(f"rank: found {shown(text)}, expected one of {', '.join(RANKS)}.")


_PARAMETERS = {
    "scores": (
        _text("scores", "the path of a score file; make one with wp-score", load_any_scores),
        "Score file of the expert, as wp-score writes it.",
    ),
    "top": (
        _text("top", "a number or a percentage, such as 20, 5% or heads=20,neurons=1000", Amount.parse, numbers=True),
        "How many of the highest heads and neurons.",
    ),
    "rank": (_text("rank", f"one of {', '.join(RANKS)}", _rank), "By what they rank."),
    "task": (_text("task", "the name of one of the score file's tasks"), "Whose ranking."),
    "layers": (_text("layers", "numbers and ranges such as 0-5,7", numbers=True), "Of these layers alone."),
    "components": (
        _text("components", f"{', '.join(COMPONENTS)} or the path of a file that names some"),
        "Of this kind or list alone.",
    ),
    "patch": (
        _text("patch", "the path of a patch file; make one with wp-patch --sparse", load_patch),
        "Patch file, as wp-patch --sparse writes it, in the place of a donor.",
    ),
}


class SetPatchMerge(CheckedMethod):
    """The recipient (`base_model`) with the set's rows and columns from the donor, the one model that is listed.

    All parameters are of the whole patch, and one value each. `scores` and `top`: the highest components of a score
    file; `task`, `rank`: of which task, by which key; `components`, `layers`: of these alone. `remove`: the recipient
    is the score file's expert, and the donor its base. `patch`: a patch file, in the place of all of these.
    `allow_mismatch`: accept files whose fingerprints are not those of the models.
    """

    alone = True
    spec = MergeMethodSpec(
        name=PATCH,
        pretty_name="Weight Patching of a set of components",
        reference_url="https://arxiv.org/abs/2604.13694",
        parameters=(
            *(
                ParameterSpec(name, kind, ParameterScope.SHARED, default="", description=about)
                for name, (kind, about) in _PARAMETERS.items()
            ),
            ParameterSpec(
                "remove",
                bool,
                ParameterScope.SHARED,
                default=False,
                description="base_model is the expert of the scores, and takes the base's components.",
            ),
            ParameterSpec(
                "allow_mismatch",
                bool,
                ParameterScope.SHARED,
                default=False,
                description="Accept score and patch files made for other models than those of the recipe.",
            ),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=0, max_non_base=1),
    )

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        places_n: torch.Tensor | None,
        patch: str = "",
        source_name: str | None = None,
        out_dtype: torch.dtype | None = None,
        **_chosen: Any,
    ) -> torch.Tensor:
        """One output tensor of the recipient's shape.

        `places_n`: which rows (or columns) come from the donor, None for none; what the other parameters mean is
        decided by the plan (`merge.chosen`). Raises `BadInput` when a number of the result is a NaN or an infinity.
        """
        assert group.base is not None  # the contract says so
        recipient = group.base.tensor
        name = source_name or group.metadata.name or ""
        slot = slot_of(name)
        dtype = out_dtype or recipient.dtype
        try:
            if places_n is None or slot is None:
                return transplant(recipient, None, None, 0, dtype)
            if patch:
                values = load_patch(patch).values[text_name(name) or ""]
            else:
                donor = group.non_base[0].tensor
                values = donor.index_select(slot.axis, places_n.to(donor.device))
            return transplant(recipient, values, places_n, slot.axis, dtype)
        except NotFiniteError:
            raise not_finite(group, source_name) from None


def register() -> None:
    """Add the method to mergekit's registry; idempotent. Raises `ValueError` if another `wp_patch` is there."""
    register_method(SetPatchMerge)


# When this module's own import is what made mergekit load, `autoload` left it out.
register()
