"""A field of a file that a person writes is stated once: its check, its default, what it means, its flag, its schema.

    @dataclass(frozen=True)
    class ScoringJob:
        batch_size: int = described(whole(1), "Prompts a forward pass.", 16, group="Performance")

Out of that come `first_wrong` (the check), `options` (flags of a command), and `schema_option` (`--schema`: the fields
as text, or as JSON Schema, draft 2020-12, for editors). Text is Markdown: names and values stand in backticks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

import click

from mergekit_wp.foreign import echo_lines


@dataclass(frozen=True)
class ValueKind:
    """What a value must be: `expected` in the words of an error, `schema` in those of JSON Schema, `flag` in click's.

    flag is a type of click, bool for a flag without a value, None for what no flag can say.
    """

    expected: str
    fits: Callable[[Any], bool]
    schema: Mapping[str, Any]
    flag: Any = str


def text(expected: str = "text", holds: str = "") -> ValueKind:
    """A text that is not blank and has `holds` in it."""
    return ValueKind(
        expected,
        lambda value: isinstance(value, str) and bool(value.strip()) and holds in value,
        {"type": "string", "pattern": re.escape(holds) or r"\S"},
    )


def any_text(expected: str = "a string") -> ValueKind:
    return ValueKind(expected, lambda value: isinstance(value, str), {"type": "string"})


def one_of(*names: str) -> ValueKind:
    return ValueKind(
        f"one of {', '.join(names)}",
        lambda value: isinstance(value, str) and value in names,
        {"enum": list(names)},
        click.Choice(names),
    )


def whole(least: int, expected: str = "", word: str = "") -> ValueKind:
    """A whole number from `least` up, or the `word`."""
    expected = expected or f"a whole number of at least {least}" + (f", or {word}" if word else "")
    number = {"type": "integer", "minimum": least}
    return ValueKind(
        expected,
        lambda value: (bool(word) and value == word) or (type(value) is int and value >= least),
        {"anyOf": [number, {"const": word}]} if word else number,
        WholeOr(word, least) if word else int,
    )


def number(least: float, most: float = math.inf, expected: str = "", above: bool = False) -> ValueKind:
    """A finite number within bounds, `least` itself left out where it is to be `above`."""
    schema = {"type": "number", "exclusiveMinimum" if above else "minimum": least}
    return ValueKind(
        expected or f"a number of at least {least:g}",
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (least < value if above else least <= value)
            and value <= most
            and value < math.inf
        ),
        schema | ({"maximum": most} if most < math.inf else {}),
        float,
    )


def switch() -> ValueKind:
    return ValueKind("true or false", lambda value: isinstance(value, bool), {"type": "boolean"}, bool)


def mapping(expected: str = "a mapping", of: Mapping[str, Any] | None = None) -> ValueKind:
    """`of` is the schema of the values."""
    schema = {"type": "object"} | ({"additionalProperties": of} if of else {})
    return ValueKind(expected, lambda value: isinstance(value, dict), schema, None)


def texts(expected: str) -> ValueKind:
    schema = {"type": "array", "items": {"type": "string"}}
    return ValueKind(expected, lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v), schema, None)


class WholeOr(click.ParamType):
    """A whole number from `least` up, or a word such as auto."""

    def __init__(self, word: str, least: int) -> None:
        self.word, self.least, self.name = word, least, f"N|{word}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == self.word or isinstance(value, int):
            return value
        if str(value).isascii() and str(value).isdecimal() and int(value) >= self.least:
            return int(value)
        self.fail(f"{value!r} is neither a whole number from {self.least} up nor {self.word}.", param, ctx)


@dataclass(frozen=True)
class Description:
    """What `described` keeps with a field. `unset`: what holds without it, in words; `shown`: its value in help."""

    kind: ValueKind
    meaning: str
    unset: str
    group: str
    metavar: str | None


def described(
    kind: ValueKind,
    meaning: str,
    default: Any = MISSING,
    *,
    unset: str = "",
    group: str = "",
    metavar: str | None = None,
) -> Any:
    """A field of a dataclass, with what there is to say about it. Without a default it is needed.

    unset: what holds without it, in words. group: its heading in help. metavar: its value there.
    """
    about = {"about": Description(kind, meaning, unset, group, metavar)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


def same(kind: type, name: str) -> Any:
    """A field that another dataclass has already, with all that is said of it there."""
    item = next(item for item in fields(kind) if item.name == name)
    return field(default=item.default, metadata=item.metadata)


def about(item: Field[Any]) -> Description:
    found: Description = item.metadata["about"]
    return found


def default_of(item: Field[Any]) -> Any:
    """Of a field; MISSING where it is needed."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def first_wrong(kind: type, values: Mapping[str, Any]) -> tuple[str, ValueKind] | None:
    """The first of these fields whose value is not of its kind. None goes where it is the default."""
    for item in fields(kind):
        if "about" not in item.metadata or item.name not in values:
            continue
        value = values[item.name]
        if not (value is None and default_of(item) is None) and not about(item).kind.fits(value):
            return item.name, about(item).kind
    return None


def default_words(item: Field[Any]) -> str:
    """What holds where the field is left out, in Markdown: empty where it is needed, or simply off."""
    default = default_of(item)
    if unset := about(item).unset:
        return unset
    if default is MISSING or default is None or default is False or default in ({}, ()):
        return ""
    return f"`{default}`" if isinstance(default, str) else str(default)


def plain(markdown: str) -> str:
    """Markdown for a terminal."""
    return markdown.replace("`", "")


def options(kind: type, names: Collection[str] | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: a flag for every field (of these `names`) that a flag can say, named as it is; None if not given."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for item in reversed(fields(kind)):
            said, words = about(item), default_words(item)
            if said.kind.flag is None or (names is not None and item.name not in names):
                continue
            help_text = plain(said.meaning.rstrip(".") + (f" (default: {words})." if words else "."))
            flag: dict[str, Any] = {"is_flag": True} if said.kind.flag is bool else {"type": said.kind.flag}
            name = "--" + item.name.replace("_", "-")
            command = click.option(name, default=None, metavar=said.metavar, help=help_text, **flag)(command)
        return command

    return decorate


def groups(kind: type, names: Collection[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Heading -> fields (of these `names`), for `GroupedCommand`."""
    found: dict[str, tuple[str, ...]] = {}
    for item in (item for item in fields(kind) if names is None or item.name in names):
        found[about(item).group] = (*found.get(about(item).group, ()), item.name)
    return found


def json_schema(kind: type, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON Schema of a mapping of these fields, and `more` that something else reads."""
    properties: dict[str, Any] = {}
    for item in fields(kind):
        if "about" not in item.metadata:
            continue
        said, default = about(item), default_of(item)
        schema = dict(said.kind.schema)
        if default is None:
            schema = {"anyOf": [schema, {"type": "null"}]}
        words = f" Default: {said.unset}." if said.unset else ""
        properties[item.name] = {"description": plain(said.meaning + words), **schema}
        if not said.unset and default not in (MISSING, None, {}, ()):
            properties[item.name]["default"] = default
    required = [item.name for item in fields(kind) if "about" in item.metadata and default_of(item) is MISSING]
    found: dict[str, Any] = {
        "type": "object",
        "properties": properties | dict(more or {}),
        "additionalProperties": False,
    }
    return found | ({"required": required} if required else {})


@dataclass(frozen=True)
class Form:
    """A kind of file for `--schema`: its name, its JSON Schema, and its parts, each a heading and its fields."""

    name: str
    purpose: str
    schema: Callable[[], dict[str, Any]]
    parts: Mapping[str, Mapping[str, tuple[str, str]]]
    """Heading -> field -> (what it must be, what it means), plain text."""

    def as_json(self) -> str:
        head = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": f"{self.name} of mergekit-wp",
            "description": self.purpose,
        }
        return json.dumps(head | self.schema(), indent=2)

    def as_text(self) -> str:
        out = click.HelpFormatter(width=100)
        out.write_text(f"{self.name[0].upper()}{self.name[1:]}, a YAML mapping. {self.purpose}")
        for heading, fields_of_it in self.parts.items():
            with out.section(heading):
                for name, (expected, meaning) in fields_of_it.items():
                    out.write_text(f"{name}: {meaning}")
                    with out.indentation():
                        out.write_text(f"{expected}.")
        return out.getvalue().rstrip()


def rows(kind: type, names: Sequence[str] | None = None) -> dict[str, tuple[str, str]]:
    """Of a `Form`: the fields of a dataclass, or some of them."""
    found = {}
    for item in fields(kind):
        if "about" not in item.metadata or (names is not None and item.name not in names):
            continue
        said, words = about(item), default_words(item)
        words = words or ("false" if default_of(item) is False else "")
        tail = "needed" if default_of(item) is MISSING else f"default: {words}" if words else "optional"
        found[item.name] = (plain(f"{said.kind.expected}; {tail}"), plain(said.meaning))
    return found


def schema_option(form: Form) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `--schema`, which prints the fields of the command's file and ends."""

    def show(context: click.Context, _option: click.Parameter, value: str | None) -> None:
        if value is not None and not context.resilient_parsing:
            echo_lines(form.as_json() if value == "json" else form.as_text())
            context.exit()

    return click.option(
        "--schema",
        type=click.Choice(["text", "json"]),
        is_flag=False,
        flag_value="text",
        metavar="[text|json]",
        is_eager=True,
        expose_value=False,
        callback=show,
        help=f"Print the fields of a {form.name}, or its JSON Schema, and exit.",
    )
