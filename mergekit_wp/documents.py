"""YAML and JSON as everything of this package reads them: strictly, within bounds, and into plain values.

The libraries take more than a person can have meant. Of two equal keys the last wins in silence; a few lines of
aliases stand for billions of values; `2001-01-01` becomes a date, `.nan` a number, `\ud800` half a character that
cannot be printed; what cannot be converted, or nests too deeply, ends in whatever exception Python has for it. Here
each of these is a `ValueError` whose text is a clause for the person who wrote the file; `files` says which file.

What comes out is text, numbers that are finite, true, false, null, lists, and mappings of at most `MOST_LEVELS`
levels, so that what works on it later may recurse, hash, compare and print.

What this package wrote comes back as dataclasses (`read_record`), every field of the type and the meaning that it says.
A dataclass is the schema: its annotations are checked by pydantic, strictly (`"1"` is no number, `1.5` no count, a
field that nobody knows is one too many). The aliases below are the meanings that occur in more than one file.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, ConfigDict, Field, StrictStr, TypeAdapter, ValidationError

from mergekit_wp import __version__
from mergekit_wp.errors import BadInput, shown

MOST_YAML_BYTES = 1 << 18
"""A recipe that lists every layer of a 70B model takes some twenty thousand; PyYAML needs seconds for a megabyte."""
MOST_JSON_BYTES = 1 << 25
"""The shard index of a model of 90,000 tensors has nine million."""
MOST_LEVELS = 64
MOST_VALUES = 20_000  # of a YAML, with its aliases written out
MOST_KEY = 500  # characters
_MOST_SAID = 200  # characters of what PyYAML says, which may quote the file
_MOST_YAML_INT = 2**63
_MOST_JSON_INT = 10**300  # transformers writes 10**30 for "no limit"; what no float can hold ends in an OverflowError

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def parse_yaml(text: str) -> Any:
    """The value of a YAML document. Raises ValueError with a clause that says what is wrong, and in which line."""
    return _parsed(text, lambda loader: [loader.get_single_data()])[0]


def parse_yaml_documents(text: str) -> list[Any]:
    """As `parse_yaml`, of a text of several documents, which `---` parts."""

    def read(loader: _Strict) -> list[Any]:
        found = []
        while loader.check_data():
            found.append(loader.get_data())
        return found

    return _parsed(text, read)


def _parsed(text: str, read: Callable[[_Strict], list[Any]]) -> list[Any]:
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"it is larger than {MOST_YAML_BYTES:,} characters")
    loader = None
    try:
        loader = _Strict(text)
        values = read(loader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_where(error)) from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        if loader is not None:
            loader.dispose()
    for value in values:
        _check(value, _CONTROL, _MOST_YAML_INT)
    return values


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document. Raises ValueError with a clause that says what is wrong with it."""
    if len(text) > MOST_JSON_BYTES:
        raise ValueError(f"it is larger than {MOST_JSON_BYTES:,} bytes")
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text  # json would guess at UTF-16
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError(f"it nests more than {MOST_LEVELS} levels deep") from error
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's limit, with advice about Python
            raise ValueError("it holds a whole number of thousands of digits") from error
        raise
    _check(value, _HALF_CHARACTER, _MOST_JSON_INT)
    return value


class _Strict(yaml.SafeLoader):
    """Safe YAML without equal keys, with as much of aliases and nesting as a person writes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._levels = self._values = 0
        self._size_of: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self._values
        self._levels += 1
        if self._levels > MOST_LEVELS:
            raise _trouble(f"it nests more than {MOST_LEVELS} levels deep", event)
        node = super().compose_node(parent, index)
        self._levels -= 1
        if node is None:
            return node
        if isinstance(event, yaml.AliasEvent):
            if node not in self._size_of:
                raise _trouble(f"the alias *{event.anchor} stands within what it refers to", event)
            self._values += self._size_of[node]
        else:
            self._values += 1
            self._size_of[node] = self._values - before
        if self._values > MOST_VALUES:
            raise _trouble(f"it has more than {MOST_VALUES:,} values, its aliases written out", event)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key_node, _ in node.value:  # now, since merge keys (<<) are about to be written into it
            if not isinstance(key_node, yaml.ScalarNode):
                raise _trouble("a list or a mapping cannot be a key", key_node)
            merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = key_node.value if merge else self.construct_object(key_node, deep=True)
            if not isinstance(key, str):  # `no:` and `1:`; nothing of ours has such keys
                raise _trouble(f"the key {shown(key_node.value)} is read as {shown(key)}; put it in quotes", key_node)
            line = key_node.start_mark.line + 1
            if key in lines:
                raise _trouble(f"the key {_key(key)} stands twice, first in line {lines[key]}; keep one", key_node)
            lines[key] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            kind = str(node.tag).rpartition(":")[2]
            raise _trouble(f"{shown(node.value)} cannot be read as {kind}; put it in quotes", node) from error


def _trouble(text: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, text, place.start_mark)


def _where(error: yaml.MarkedYAMLError) -> str:
    """The library's error as one clause with its line, without the excerpt of the file."""
    said = ", ".join(part for part in (error.context, error.problem) if part)[:_MOST_SAID]
    mark = error.problem_mark or error.context_mark
    return said if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {said}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"the key {_key(twice)} stands twice in one object; keep one")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _check(value: Any, forbidden: re.Pattern[str], most: int) -> None:
    """Types, depth, keys, text and numbers, whatever was shared by aliases. Raises ValueError."""
    rest: list[tuple[Any, int]] = [(value, 1)]
    while rest:
        found, level = rest.pop()
        if isinstance(found, (dict, list)) and level > MOST_LEVELS:
            raise ValueError(f"it nests more than {MOST_LEVELS} levels deep")
        if isinstance(found, dict):
            for key in found:
                if len(key) > MOST_KEY or _CONTROL.search(key):
                    raise ValueError(f"{shown(key)} cannot be a key: printable text of at most {MOST_KEY} characters")
            rest += [(item, level + 1) for item in found.values()]
        elif isinstance(found, list):
            rest += [(item, level + 1) for item in found]
        elif isinstance(found, str):
            if odd := forbidden.search(found):
                raise ValueError(f"a text holds the character {odd[0]!r}, which cannot be printed: {shown(found)}")
        elif isinstance(found, float):
            if not math.isfinite(found):
                raise ValueError(f"{found} is no number that can be used")
        elif isinstance(found, int):
            if not -most < found < most:
                raise ValueError(f"{shown(found)} is too large a number")
        elif found is not None:
            raise ValueError(f"{shown(str(found))} is read as a {type(found).__name__}; put it in quotes")


def _key(key: str) -> str:
    return f"`{key}`" if key.isprintable() and len(key) < 80 else shown(key)


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


def versions() -> Versions:
    """Of this package and those that its numbers depend on."""
    packages = ("torch", "transformers", "safetensors")
    return {"mergekit-wp": __version__} | {name: importlib.metadata.version(name) for name in packages}


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


def read_document(kind: type[T], text: str, formats: range) -> T:
    """The JSON document of one of our files of tensors, of a format that this program reads. Raises ValueError."""
    raw = parse_json(text)
    if not isinstance(raw, dict):
        raise ValueError(f"its metadata is {shown(raw)}")
    if raw.get("format") not in formats:
        read = f"{formats[0]} to {formats[-1]}" if len(formats) > 1 else f"{formats[0]}"
        raise ValueError(f"format version {shown(raw.get('format'))}, this program reads {read}")
    return read_record(kind, raw)


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
