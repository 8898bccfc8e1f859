"""Evaluation results for a card: only those in which this very model was measured, and how it was done."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_wp.errors import BadInput
from mergekit_wp.files import read_json_mapping
from mergekit_wp.push.names import Names


@dataclass(frozen=True)
class Results:
    """One results.json: its content as read, the Markdown table, and which row is the model that is published.

    reference: how that row refers to the model; it may have been measured in another folder.
    """

    content: dict[str, Any]
    markdown: str
    row: str
    reference: str


def read_folder(folder: Path, model: Path, fingerprint: Callable[[], str]) -> Results:
    """The results in wp-eval's output folder (or file). fingerprint: of the model, as wp-eval computes it.

    Raises `BadInput` when they are not wp-eval's, and when no row of them was measured on this model.
    """
    from mergekit_wp.eval.table import read_results, to_markdown

    path = folder / "results.json" if folder.is_dir() else folder
    table = read_results(path)
    own = fingerprint()
    row = next((row for row in table.rows if row.model.fingerprint == own), None)
    if row is None:
        names = ", ".join(row.model.name for row in table.rows)
        raise BadInput(
            f"{path}: none of its rows ({names}) was measured on {model} as it is now; evaluate that folder with "
            "wp-eval, or leave these results out."
        )
    content = read_json_mapping(path, "results.json of wp-eval")
    return Results(content, to_markdown(table), row.model.name, row.model.reference)


def model_fingerprint(model: Path) -> str:
    """wp-eval's fingerprint of a model folder (reads all of it)."""
    from mergekit_wp.eval.models import open_model

    return open_model(model.name, str(model), False).fingerprint


def how_measured(content: dict[str, Any]) -> str:
    """Versions, backend, dtype, dates: each with all the values that occur in the cells of the table."""
    measured = [cell for row in content.get("rows", []) for cell in (row.get("measured") or {}).values()]
    measured = [cell for cell in measured if isinstance(cell, dict)]

    def values(key: str) -> list[str]:
        return list(dict.fromkeys(str(cell[key]) for cell in measured if cell.get(key) not in (None, "", {})))

    versions: dict[str, list[str]] = {}
    for cell in measured:
        for name, number in (cell.get("versions") or {}).items():
            if str(number) not in versions.setdefault(name, []):
                versions[name].append(str(number))
    parts = [f"{name} {' and '.join(numbers)}" for name, numbers in versions.items()]
    for key, label in (("backend", "backend"), ("dtype", "dtype"), ("device", "device"), ("limit", "--limit")):
        if found := values(key):
            parts.append(f"{label} {' and '.join(found)}")
    days = sorted({date[:10] for date in values("date")})
    if days:
        parts.append(f"measured {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else ""))
    return "; ".join(parts)


def command(content: dict[str, Any], names: Names) -> str:
    """The command that measures the same again: the one that wp-eval wrote down, else one made of what it did."""
    words = content.get("command")
    if isinstance(words, str) and words:
        words = shlex.split(words)
    if isinstance(words, list) and words:
        return shlex.join([_public(str(word), names) for word in words])
    rows = [f"{row['name']}={names.of(str(row['model']))}" for row in content.get("rows", [])]
    words = ["wp-eval", names.content(str(content.get("suite", "SUITE.yaml"))), *rows]
    if content.get("baseline"):
        words += ["--baseline", str(content["baseline"])]
    if content.get("limit"):
        words += ["--limit", str(content["limit"])]
    return shlex.join([*words, "--out", "runs/eval"])


def _public(word: str, names: Names) -> str:
    name, equals, model = word.partition("=")
    if equals and not word.startswith("-"):
        return f"{name}={names.of(model)}"
    return str(names.content(word))
