"""Prompts as Python has them: names of sets and files, lists of texts, of pairs, of rows, and data sets.

What they may be: `builtin:maths`; a pairs file; `hf://datasets/OWNER/NAME`, a data set on the Hub; a
`datasets.Dataset`; or a list, of texts, of (prompt, contrast), of dicts with the fields of a pairs file, and of several
of the former.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mergekit_wp.errors import BadInput, reason_of, shown
from mergekit_wp.scoring.pairs import FIELDS, Pair, check_contrasts, draw_pairs, load_pairs, parse_pair, read_pairs

DATASET = "hf://datasets/"
DRAWN = 100  # rows of a data set on the Hub, as of a built-in set


def prompts_of(prompts: Any, task: str, column: str | None, samples: int | None, seed: int) -> list[Pair]:
    """All that `prompts` stands for, in order.

    task      of texts, pairs and rows that name none
    column    which column of a data set has the prompts; None: it has the columns of a pairs file
    samples   pairs a task that will be drawn of these; None takes 100 of a built-in set and of a data set on the Hub,
              and everything of others
    Raises `BadInput` for anything else, naming the item.
    """
    pairs = list(_read(prompts, task, column, samples, seed, "prompts"))
    if not pairs:
        raise BadInput("prompts: there are none; give some, or the name of a set such as builtin:maths.")
    check_contrasts(pairs, "prompts")
    return pairs


def _read(
    item: Any, task: str, column: str | None, samples: int | None, seed: int, where: str, listed: bool = False
) -> Iterator[Pair]:
    """`listed`: the item is one of a list, where a text is a prompt unless it names a source."""
    if isinstance(item, str) and item.startswith(DATASET):
        rows = list(_rows(_load(item), task, column, item))
        yield from rows if samples is not None or len(rows) <= DRAWN else draw_pairs(rows, DRAWN, seed, item)
    elif isinstance(item, str) and item.startswith("builtin:"):
        yield from load_pairs(item, samples, seed)
    elif isinstance(item, os.PathLike) or (isinstance(item, str) and (not listed or item.endswith(".jsonl"))):
        yield from read_pairs(os.fspath(item))
    elif isinstance(item, str):
        yield parse_pair({"task": task, "prompt": item}, where)
    elif hasattr(item, "column_names"):  # a split of a data set, or a mapping of several
        yield from _rows(item, task, column, where)
    elif isinstance(item, Mapping):
        yield parse_pair({"task": task, **item}, where)
    elif isinstance(item, tuple) and listed:
        if len(item) != 2:
            raise BadInput(f"{where}: found {shown(item)}, expected (prompt, contrast).")
        yield parse_pair({"task": task, "prompt": item[0], "contrast": item[1]}, where)
    elif isinstance(item, Iterable) and not listed:
        for number, one in enumerate(item):
            yield from _read(one, task, column, samples, seed, f"{where}[{number}]", listed=True)
    else:
        raise BadInput(
            f"{where}: found {shown(type(item).__name__)}, expected a file or set of prompts, texts, (prompt, "
            "contrast) or rows with the field prompt."
        )


def _rows(data: Any, task: str, column: str | None, where: str) -> Iterator[Pair]:
    """The rows of a `datasets.Dataset` as pairs."""
    names = data.column_names
    if isinstance(names, dict):
        raise BadInput(f"{where}: holds the splits {', '.join(map(str, names))}; give one of them.")
    if (column or "prompt") not in names:
        raise BadInput(
            f"{where}: has no column {shown(column or 'prompt')}; name the one with the prompts, column= one of "
            f"{', '.join(names)}."
        )
    kept = {column: "prompt"} if column else {name: name for name in names if name in FIELDS}
    for number, row in enumerate(data):
        fields = {field: row[name] for name, field in kept.items() if row[name] is not None}
        yield parse_pair({"task": task, **fields}, f"{where}, row {number}")


def _load(address: str) -> Any:
    """The split `train`, or the only one, of a data set on the Hub."""
    import datasets

    name, _, revision = address.removeprefix(DATASET).partition("@")
    if name.count("/") != 1:
        raise BadInput(
            f"{address}: expected {DATASET}OWNER/NAME; of a configuration or a split of one, give what "
            "datasets.load_dataset returns."
        )
    try:
        found = datasets.load_dataset(name, revision=revision or None)
    except Exception as error:  # datasets, the Hub's client and the file formats raise many types
        raise BadInput(f"{address}: the data set could not be loaded ({reason_of(error)}).") from error
    if "train" not in found and len(found) > 1:
        raise BadInput(
            f"{address}: has the splits {', '.join(map(str, found))}; give one, as datasets.load_dataset returns it."
        )
    return found["train"] if "train" in found else next(iter(found.values()))
