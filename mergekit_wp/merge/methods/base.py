"""What the merge methods of this package share, the way mergekit sees them.

Imported while `mergekit.merge_methods` is half initialised (see `autoload`), so of mergekit this module and those of
the methods may import `merge_methods.base` alone, at the top. Importing this makes all of them known to mergekit.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Annotated, Any

import torch
from mergekit.merge_methods.base import BatchOptions, GroupMergeMethod, TensorGroup
from pydantic import BeforeValidator

from mergekit_wp.autoload import register_methods
from mergekit_wp.errors import BadInput, NotFinite, shown


class CheckedMethod(GroupMergeMethod):
    """A method with a base, whose recipe and models are checked before the first tensor is read (`mergekit_patch`).

    A subclass gives `spec`, with a base required, and `merge_group`, which takes `source_name`, the tensor's name
    in the inputs (under `slices:` the output's name has another layer), and `out_dtype` beside its parameters.
    """

    alone = False
    """Whether the base may be the only model."""

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Refuse a recipe without a base or without experts.

        mergekit calls this before it plans anything, so here the method also takes its seat in the task graph.
        """
        from mergekit_wp.merge.mergekit_patch import install

        install()
        name, where = self.spec.name, f" for {group_name}" if group_name else ""
        if base_id is None or base_id not in input_ids:
            raise BadInput(
                f"merge_method {name} needs base_model{where}: name the model that the experts were tuned from."
            )
        if len(input_ids) < 2 and not self.alone:
            raise BadInput(f"merge_method {name} found no expert beside {base_id}{where}; list one or more models.")
        try:
            super().validate_inputs(input_ids, base_id, group_name=group_name)
        except ValueError as error:
            raise BadInput(f"merge_method {name}: {error}.") from error

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """As mergekit's, without its promotion of whole tensors to a common dtype: the kernels convert tiles."""
        return tuple(
            self.merge_group(group, out_dtype=out_dtype, **bound)
            for group, bound in zip(groups, parameters, strict=True)
        )


def number(name: str, hint: str, *, least: float = -math.inf, most: float = math.inf) -> Any:
    """A validating type for a parameter of this `name`: a finite number, refused while the recipe is planned."""
    limits = f" of at least {least:g}" if least > -math.inf else ""
    limits = f" from {least:g} to {most:g}" if most < math.inf else limits

    def checked(value: Any) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not least <= value <= most:
            of_run = " (`auto` is a word of a pipeline, for wp-run)" if value == "auto" else ""
            raise BadInput(f"{name}: found {shown(value)}, expected a number{limits}{of_run}; {hint}.")
        return float(value)

    return Annotated[float, BeforeValidator(checked)]


def not_finite(group: TensorGroup, source_name: str | None) -> NotFinite:
    """The error for a tensor that came out with a NaN or an infinity: it names the models that have one."""
    bad = [str(entry.id) for entry in group.entries if not bool(torch.isfinite(entry.tensor).all())]
    return NotFinite(
        f"{' and '.join(bad) or 'the experts'}: {source_name or group.metadata.name} holds a NaN or an "
        "infinity; download or save that checkpoint again."
    )


def register_method(method: type[CheckedMethod]) -> None:
    """Add a method to mergekit's registry; idempotent. Raises `ValueError` if another of its name is there."""
    from mergekit.merge_methods import registry

    held = registry._METHODS.get(method.spec.name)
    if type(held).__qualname__ != method.__qualname__:
        registry.register(method())


# When this module is what made mergekit load, the hook in `autoload` came while it was half imported.
register_methods()
