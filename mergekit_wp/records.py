"""JSON and YAML that this package wrote, back as dataclasses: every field of the type and the meaning that it says.

A dataclass is the schema: its annotations are checked by pydantic, strictly (`"1"` is no number, `1.5` no count, a
field that nobody knows is one too many). The aliases below are the meanings that occur in more than one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, StrictStr, TypeAdapter, ValidationError

from mergekit_wp.errors import BadInput, shown

T = TypeVar("T")
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}
_MOST_SECONDS = 253_402_300_799  # the last of the year 9999
MOST_TEXT = 4096  # characters; a path has no more

Text = Annotated[StrictStr, Field(min_length=1, max_length=MOST_TEXT)]
Sha256 = Annotated[StrictStr, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def _is_date(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("expected an ISO 8601 date") from None
    return text


def environment_count(name: str, most: int) -> int | None:
    """The whole number in an environment variable, None where it is not set. Raises `BadInput` for another text."""
    text = os.environ.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most):
        raise BadInput(f"the environment variable {name} is {shown(text)}, expected a whole number up to {most:,}.")
    return int(text)


def now() -> str:
    """A `Date`: ISO 8601, UTC. SOURCE_DATE_EPOCH, where set, stands for the clock (reproducible-builds.org)."""
    epoch = environment_count("SOURCE_DATE_EPOCH", _MOST_SECONDS)
    moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(epoch, UTC)
    return moment.isoformat(timespec="seconds")


Date = Annotated[StrictStr, Field(max_length=64), AfterValidator(_is_date)]
Versions = dict[Text, Text]
"""Of programs, by name."""


def strict(kind: type[T]) -> type[T]:
    """For a dataclass that `read_record` reads: no type is converted, no field is ignored."""
    configured: Any = kind
    configured.__pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return kind


def one_of(allowed: Collection[str]) -> AfterValidator:
    """For an annotation: one of these texts."""

    def check(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return value

    return AfterValidator(check)


def read_record(kind: type[T], value: Any) -> T:
    """A dataclass from parsed JSON or YAML. Raises ValueError: the first field that is wrong, found and expected."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)  # costs more than a file
    try:
        found: T = _ADAPTERS[kind].validate_json(json.dumps(value), strict=True)
        return found
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(_sentence(field, first)) from error


def _sentence(field: str, trouble: Any) -> str:
    if trouble["type"] == "missing":
        return f"the field {field} is missing"
    if trouble["type"] == "unexpected_keyword_argument":
        return f"unknown field {field}"
    expected = trouble["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if trouble["type"] == "value_error" and isinstance(trouble["input"], (dict, list)):
        return f"{field or 'the whole'}: {expected}"  # of several of its fields together
    expected = expected if trouble["type"] == "value_error" else f"expected {expected}"
    return f"{field or 'the whole'}: found {shown(trouble['input'])}, {expected}"
