"""Evaluation results for a card: only those in which this very model was measured, and how it was done."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.files import read_json_mapping
from mergekit_wp.foreign import one_line
from mergekit_wp.push.names import Names

if TYPE_CHECKING:
    from mergekit_wp.eval.rows import Row
    from mergekit_wp.eval.suite import Suite
    from mergekit_wp.eval.tables import Table

# Of wp-eval's flags, those that say where things lie on one machine, and those that decide no number.
_NOT_REPEATED = ("--out", "--include-path", "--data", "--prompts", "--log-samples", "--quiet", "--json")


@dataclass(frozen=True)
class Results:
    """One results.json: its content as read, its table and suite, and the row of the model that is published.

    That row's reference may be another folder than the one which is published.
    """

    content: dict[str, Any]
    table: Table
    suite: Suite
    row: Row


def read_folder(folder: Path, model: Path, fingerprint: Callable[[], str]) -> Results:
    """The results in wp-eval's output folder (or file). fingerprint: of the model, as wp-eval computes it.

    Raises `BadInput` when they are not wp-eval's, and when no row of them was measured on this model.
    """
    from mergekit_wp.eval.suite import parse_suite
    from mergekit_wp.eval.tables import read_results

    path = folder / "results.json" if os.path.isdir(folder) else folder
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
    try:
        suite = parse_suite(content.get("suite_content") or {}, Path())
    except BadInput as error:
        raise BadInput(f"{path}: its `suite_content` is no suite: {error.message}") from error
    return Results(content, table, suite, row)


def model_fingerprint(model: Path) -> str:
    """wp-eval's fingerprint of a model folder: all of it is read, and nothing loaded, since it may bring code."""
    from mergekit_wp.eval.models import answers_digest

    checkpoint = Checkpoint.open(str(model))
    return answers_digest(checkpoint.tensors, checkpoint.folder)


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


def include_path(content: dict[str, Any], suite: Suite) -> Path | None:
    """The folder of tasks that was used: the command's, else the suite's."""
    words = _command(content)
    if "--include-path" in words[:-1]:
        return Path(words[words.index("--include-path") + 1])
    return suite.include_path


def command(content: dict[str, Any], names: Names, suite: str) -> list[str]:
    """The words of the command that measures the same again in a copy of the repository; `suite` is its path there.

    Rows are those of the table, under their published names; other flags are those that wp-eval wrote down.
    """
    rows = [f"{row['name']}={names.of(str(row['model']))}" for row in content.get("rows", [])]
    words = ["wp-eval", suite, *rows, *_flags(content), "--out", "runs/eval"]
    return [one_line(word) for word in words]


def _flags(content: dict[str, Any]) -> list[str]:
    """The flags of the command that was run, as they were given, but those of `_NOT_REPEATED`."""
    from mergekit_wp.eval.cli import main

    words = _command(content)
    if not words:  # written by a wp-eval that did not write it down
        flags = ["--baseline", str(content["baseline"])] if content.get("baseline") else []
        return flags + (["--limit", str(content["limit"])] if content.get("limit") else [])
    known = {name: option for option in main.params for name in option.opts if name.startswith("--")}
    flags, rest = [], iter(words)
    for word in rest:
        if word in known:
            value = [] if getattr(known[word], "is_flag", False) else [next(rest, "")]
            flags += [] if word in _NOT_REPEATED else [word, *value]
    return flags


def _command(content: dict[str, Any]) -> list[str]:
    words = content.get("command")
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else []


@dataclass(frozen=True)
class Figure:
    """One value of a row for a card's `model-index`: a fraction, as lm-eval gives it."""

    column: str
    task: str
    metric: str
    value: float
    shots: int | None


def figures(table: Table, row: Row) -> list[Figure]:
    """The values of one row; none where only part of the items was asked, since a `model-index` cannot say so."""
    if table.limit_of(row):
        return []
    found = []
    for task in table.suite.tasks:
        if task.column in row.cells:
            shots = row.measured.get(task.column, {}).get("num_fewshot")
            shots = shots if isinstance(shots, int) else None
            found.append(Figure(task.column, task.task, task.metric, row.cells[task.column].value, shots))
    return found
