"""Whether rows of a table were measured alike: what differs that can change an answer, and for which rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mergekit_wp.eval.options import OPTIONS
from mergekit_wp.eval.rows import Row
from mergekit_wp.hashing import digest_of

_LISTED = 12
_NOT_RECORDED = "not recorded"


def differences(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """A sentence for everything in which rows differ, such as `dtype is float32 for a, b; bfloat16 for c (in Gen).`

    Compared are what was asked (the suite), the data of the Hub or the files that stood in for it, the backend with
    its version and the options that change answers, dtype, chat template, limit, shots and package versions; not the
    device, the batch size or the number of GPUs, which move an answer now and then by rounding.
    """
    found: dict[tuple[str, str], list[str]] = {}  # (what, who has which) -> columns
    for column in columns:
        having = [row for row in rows if column in row.cells]
        described = {row.model.name: dict(_described(row, column)) for row in having}
        for what in dict.fromkeys(name for one in described.values() for name in one):
            groups: dict[str, list[str]] = {}
            for row, one in described.items():
                if what.startswith(("version of", "revision of")) and what not in one:
                    continue  # its backend does not use that package; the data came from elsewhere
                absent = "not set" if what in OPTIONS else _NOT_RECORDED
                groups.setdefault(one.get(what, absent), []).append(row)
            if len(groups) > 1:
                said = _first((f"{value} for {_first(names, ', ')}" for value, names in groups.items()), "; ")
                found.setdefault((what, said), []).append(column)
    sentences = []
    for (what, said), where in found.items():
        everywhere = all(column in where for column in columns)
        sentences.append(f"{what} is {said}" + ("." if everywhere else f" (in {', '.join(where)})."))
    return sentences


def _first(texts: Iterable[str], between: str) -> str:
    """The texts, and of many the first and how many more: a sentence is read, and repeated with every row of a CSV."""
    listed = list(texts)
    more = [f"and {len(listed) - _LISTED:,} more"] if len(listed) > _LISTED + 1 else []
    return between.join([*listed[: _LISTED if more else None], *more])


def _described(row: Row, column: str) -> Iterator[tuple[str, str]]:
    """What was done for one cell: name and value, both for people."""
    measured = row.measured.get(column, {})
    yield "suite", (row.suite or _NOT_RECORDED)[:12]
    for name in ("task", "metric", "limit", "num_fewshot", "dtype", "backend"):
        yield name, _text(measured, name)
    cell = row.cells[column]
    yield "items", _NOT_RECORDED if cell.samples is None else str(cell.samples)
    yield "data", _files(measured.get("data") or {})
    for dataset, commit in sorted((measured.get("revisions") or {}).items()):
        yield f"revision of {dataset}", commit[:12]
    options = measured.get("backend_options") or {}
    for name in sorted(options):
        if OPTIONS[name].answers if name in OPTIONS else True:
            yield name, str(options[name])
    yield "chat template", _text(measured, "chat_template")[:12]
    yield "system instruction", _text(measured, "system_instruction")
    for package, number in sorted((measured.get("versions") or {}).items()):
        yield f"version of {package}", str(number)


def _files(data: dict[str, Any]) -> str:
    """By content: a file may have another name on another machine."""
    files = data.get("files") or {}
    if not files:
        return "as its task names it"
    return f"files of content {digest_of(sorted(files.values()))[:12]}"


def _text(measured: dict[str, Any], name: str) -> str:
    if name not in measured:
        return _NOT_RECORDED
    value = measured[name]
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
