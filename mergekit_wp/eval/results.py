"""What results.json holds, as far as something reads it again: the fields of `tables.to_json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from mergekit_wp.documents import Count, Date, Number, Positive, Sha256, Text, Versions, strict

AVERAGE = "Average"


@strict
@dataclass(frozen=True)
class StoredCell:
    """`value` and `difference` as fractions; `samples` is not there for the average."""

    value: Number
    stderr: Number | None
    difference: Number | None = None
    samples: Count | None = None


class StoredSeen(TypedDict):
    """Items that are prompts of these files too."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    files: list[Text]
    seen: Positive
    items: Positive


class StoredData(TypedDict):
    """What a task read from a folder in the Hub's place; rows by split, here and as published."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    files: dict[Text, Sha256]
    rows: dict[Text, Count]
    published: dict[Text, Count]


class StoredMeasured(TypedDict, total=False):
    """How a cell came about; files of before lack some, those to come may have more."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]  # no item, as pydantic has it

    task: Text
    metric: Text
    higher_is_better: bool
    share: bool
    subtasks: list[Text]
    limit: Positive | None
    dtype: Text | None
    device: Text | None
    backend: Text
    backend_options: dict[str, Any] | None
    cut_prompts: Count | None
    seen_items: StoredSeen
    data: StoredData
    revisions: dict[Text, Text]
    chat_template: Text | None
    system_instruction: str | None
    versions: Versions | None
    date: Date


@strict
@dataclass(frozen=True)
class StoredRow:
    """One model: its name in the table, its reference and its fingerprint."""

    name: Text
    model: Text
    fingerprint: Text
    cells: dict[Text, StoredCell]
    measured: dict[Text, StoredMeasured]
    suite_hash: Text | None = None
    limit: Positive | None = None


@strict
@dataclass(frozen=True)
class StoredColumn:
    column: Text
    task: Text
    metric: Text


@dataclass(frozen=True)
class StoredSuite:
    """Of the suite nothing but its name is read again."""

    name: Text


@dataclass(frozen=True)
class StoredResults:
    """The whole file; what else there is in it (versions, the command) is for people."""

    columns: list[StoredColumn]
    rows: list[StoredRow]
    suite_content: StoredSuite
    baseline: Text | None
    limit: Positive | None

    def __post_init__(self) -> None:
        columns, names = [column.column for column in self.columns], [row.name for row in self.rows]
        for what, listed in (("columns", columns), ("rows", names)):
            if len(set(listed)) < len(listed):
                raise ValueError(f"two {what} of one name")
        for row in self.rows:
            if foreign := sorted(set(row.cells) - {*columns, AVERAGE}):
                raise ValueError(f"the row {row.name} has the cell {foreign[0]}, which is no column")
