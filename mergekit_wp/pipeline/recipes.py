"""mergekit recipes written by program: by a pipeline, and by the table of `make table3`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_wp.autoload import METHODS


def build_recipe(
    method: str,
    base: str,
    experts: Mapping[str, Mapping[str, Any]],
    *,
    shared: Mapping[str, Any],
    base_parameters: Mapping[str, Any] | None = None,
    out_dtype: str | None,
) -> dict[str, Any]:
    """A mergekit recipe of `experts` (model -> its own parameters) on `base`.

    `shared` are the recipe's parameters; `base_parameters` puts the base among the merged models (linear averages
    what it is given, and takes config and tokenizer from the base only if it is there). Without `out_dtype` the methods
    of this package write the base's dtype, others float32.
    """
    listed = [{"model": m} | ({"parameters": dict(own)} if own else {}) for m, own in experts.items()]
    if base_parameters is not None:
        listed.append({"model": base, "parameters": dict(base_parameters)})
    content: dict[str, Any] = {"merge_method": method, "base_model": base, "models": listed}
    if shared:
        content["parameters"] = dict(shared)
    if method not in METHODS:
        # An expert may have rows for added tokens; and without a dtype differences would be rounded to 16 bits.
        # The methods of this package see to both themselves.
        content |= {"tokenizer": {"source": "base"}, "dtype": "float32"}
    return content | ({"out_dtype": out_dtype} if out_dtype else {})


def scores_of(recipe: Any) -> Iterator[str]:
    """Every score file that a recipe names."""
    yield from _values(recipe, ("scores",))


def _values(node: Any, keys: tuple[str, ...]) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _values(item, keys)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in keys and isinstance(value, str):
                yield value
            else:
                yield from _values(value, keys)
