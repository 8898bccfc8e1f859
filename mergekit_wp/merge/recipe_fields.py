"""What mergekit would take in silence and leave out: fields that it does not have, and parameters in a wrong place.

Its own models of a recipe (pydantic's) say which fields there are; other keys they pass over.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from mergekit_wp.errors import BadInput, shown

# A field of mergekit's that nothing in it reads.
_UNREAD = ("residual_weight",)


def check_fields(path: str, content: Any) -> None:
    """Raise `BadInput` for a key that mergekit would pass over; those of `parameters` are the method's affair."""
    from mergekit.config import MergeConfiguration

    _check(path, content, (MergeConfiguration,), ())


def _check(path: str, value: Any, kinds: tuple[Any, ...], where: tuple[str, ...]) -> None:
    """kinds: the annotations that a value of this place may have."""
    kinds = tuple(_alternatives(kinds))
    if isinstance(value, list):
        inner = tuple(kind for each in kinds if get_origin(each) in (list, tuple) for kind in get_args(each))
        for number, item in enumerate(value, 1):
            _check(path, item, inner, (*where, f"entry {number}"))
    if not isinstance(value, dict):
        return
    if values := tuple(get_args(each)[1] for each in kinds if get_origin(each) is dict):
        for key, item in value.items():
            _check(path, item, values, (*where, str(key)))
    records = [each for each in kinds if inspect.isclass(each) and issubclass(each, BaseModel)]
    if not records:
        return
    record = min(records, key=lambda each: sum(key not in each.model_fields for key in value))
    fields = [name for name in record.model_fields if name not in _UNREAD]
    for key, item in value.items():
        if key not in fields:
            near = get_close_matches(str(key), fields, n=1)
            what = ", ".join([*where, f"unknown field {shown(key)}"])
            instead = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}."
            raise BadInput(f"{path}: {what}; {instead}")
        _check(path, item, (record.model_fields[key].annotation,), (*where, str(key)))


def _alternatives(kinds: tuple[Any, ...]) -> Iterator[Any]:
    """Unions taken apart."""
    for kind in kinds:
        inner = get_args(kind)
        if inner and get_origin(kind) not in (list, tuple, dict):
            yield from _alternatives(inner)
        else:
            yield kind


def check_slices(path: str, node: Any, where: tuple[str, ...] = ()) -> None:
    """Raise `BadInput` for slices of no layer, or of none that a model could have, which mergekit would plan."""
    if isinstance(node, dict):
        if node.get("sources") == []:
            raise BadInput(f"{path}: {', '.join(where)}: `sources` is empty; list the models of the slice.")
        span = node.get("layer_range")
        if isinstance(span, list) and [type(x) for x in span] == [int, int] and not 0 <= span[0] < span[1]:
            raise BadInput(
                f"{path}: {', '.join(where)}, layer_range: found {shown(span)}, expected [first, last + 1] of layers "
                "counted from 0."
            )
    items = node.items() if isinstance(node, dict) else ()
    if isinstance(node, list):
        items = ((f"entry {number}", item) for number, item in enumerate(node, 1))  # type: ignore[assignment]
    for key, item in items:
        check_slices(path, item, (*where, str(key)))


def check_entries(path: str, node: Any, own: tuple[str, ...], base: Any = None) -> None:
    """Raise `BadInput` for an expert's parameter (`own`) on the entry of the base, where no method of ours looks, and
    for a model that is listed twice.

    node: (a part of) the recipe, every model in it as mergekit's mapping. base: what is the base model there.
    """
    if isinstance(node, dict):
        base = node.get("base_model") or base
        for entries in (node.get("models"), node.get("sources")):
            _check_list(path, entries, own, base)
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        check_entries(path, item, own, base)


def _check_list(path: str, entries: Any, own: tuple[str, ...], base: Any) -> None:
    seen: list[Any] = []
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), dict):
            continue
        model, parameters = entry["model"], entry.get("parameters")
        if model in seen:
            instead = " with a `weight` of 2" if "weight" in own else ""
            raise BadInput(f"{path}: {_name(model)} is listed twice; list it once{instead}.")
        seen.append(model)
        if model == base and isinstance(parameters, dict) and (given := sorted(set(parameters) & set(own))):
            raise BadInput(
                f"{path}: `{given[0]}` stands under {_name(model)}, which is the base_model here, and is an expert's; "
                "take it out, or write it under the experts."
            )


def _name(model: dict[str, Any]) -> str:
    parts = [model[key] for key in ("model", "lora") if model.get(key)]
    return "+".join(str(part.get("path")) if isinstance(part, dict) else str(part) for part in parts)
