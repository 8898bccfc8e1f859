"""Prompts with the answers of base, expert and merge, out of the logs of `wp-eval --log-samples`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mergekit_wp.documents import parse_json
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.rows import Row
from mergekit_wp.eval.tables import Table
from mergekit_wp.files import inside, open_file
from mergekit_wp.pipeline.spec import BASE

_MOST_ITEMS = 2000
_MOST_CHARACTERS = 4000


@dataclass(frozen=True)
class Example:
    """One item of a task: what was asked, and (model, answer, whether it is right) of each."""

    column: str
    prompt: str
    answers: Sequence[tuple[str, str, bool]]


@dataclass(frozen=True)
class _Answer:
    prompt: str
    text: str
    right: bool


def examples_of(table: Table, results: Path, experts: Sequence[str], merges: Sequence[str]) -> list[Example]:
    """Of each task with written answers, the first item that the base gets wrong and the task's best expert right.

    Base, that expert and every merge answer it. Empty where answers were not logged, or there is no such item.
    """
    rows = {row.model.name: row for row in table.rows}
    found = []
    for column in table.suite.columns:
        able = [rows[name] for name in experts if name in rows and column in rows[name].cells]
        if BASE not in rows or not able:
            continue
        best = table.best_of(able)[column]
        expert = next(row for row in able if table.value(row, column) == best)
        shown = [rows[BASE], expert, *(rows[name] for name in merges if name in rows)]
        logs = [_log(row, column, results) for row in shown]
        item = next((key for key, a in logs[0].items() if not a.right and key in logs[1] and logs[1][key].right), None)
        if item is not None:
            answers = [
                (row.model.name, log[item].text, log[item].right)
                for row, log in zip(shown, logs, strict=True)
                if item in log
            ]
            found.append(Example(column, logs[0][item].prompt, answers))
    return found


def _log(row: Row, column: str, results: Path) -> dict[tuple[str, str], _Answer]:
    """The answers of a row to a task's items by (task, item); empty where there is no log, or it is not ours."""
    about = row.measured.get(column, {})
    name = about.get("samples_file")
    if not isinstance(name, str):
        return {}
    metric, _, filters = str(about.get("metric")).partition(",")
    found = {}
    try:
        with open_file(inside(results, results / name)) as stream:
            for line in map(_parsed, islice(stream, _MOST_ITEMS)):
                answer = _answer(line, metric)
                if answer is not None and line.get("filter", "none") == (filters or "none"):
                    found[str(line.get("task")), str(line.get("doc_id"))] = answer
    except (BadInput, OSError):
        return {}
    return found


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        content = parse_json(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _answer(line: dict[str, Any], metric: str) -> _Answer | None:
    """None for what was not written (a choice among given answers) or not graded right or wrong."""
    try:
        (prompt, *_), *_ = line["arguments"]
        (text, *_), *_ = line["resps"]
    except (KeyError, TypeError, ValueError):
        return None
    grade = line.get(metric)
    if not isinstance(prompt, str) or not isinstance(text, str) or grade not in (0, 1):
        return None
    return _Answer(_shortened(prompt), _shortened(text), grade == 1)


def _shortened(text: str) -> str:
    """The end of a long text: that of a prompt is what is asked."""
    return text if len(text) <= _MOST_CHARACTERS else f"[...] {text[-_MOST_CHARACTERS:]}"
