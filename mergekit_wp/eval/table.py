"""The results table: one row a model, one column a task and their mean, as text, Markdown, CSV and JSON.

results.json keeps lm-eval's fractions; the tables for people show them in percent and differences in points.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_wp.errors import BadInput
from mergekit_wp.eval.alike import differences
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.run import Cell, Row, plain
from mergekit_wp.eval.stored import AVERAGE, StoredResults, StoredRow
from mergekit_wp.eval.suite import Suite, SuiteTask
from mergekit_wp.files import read_json_mapping
from mergekit_wp.foreign import csv_cell, markdown, one_line
from mergekit_wp.records import read_record


@dataclass(frozen=True)
class Table:
    """Rows and the columns of a suite; `baseline` is the name of the row that differences are taken from, or None.

    A row from another suite may lack columns.
    """

    suite: Suite
    rows: Sequence[Row]
    baseline: str | None
    limit: int | None

    @property
    def columns(self) -> list[str]:
        return [*self.suite.columns, AVERAGE]

    def has(self, row: Row, column: str) -> bool:
        """Whether this row has the column; `Average` is there only where all others are."""
        return all(c in row.cells for c in self.suite.columns) if column == AVERAGE else column in row.cells

    def value(self, row: Row, column: str) -> float:
        """A cell as a fraction; `Average` is the plain mean of the columns. Raises `KeyError` where `has` is false."""
        if column == AVERAGE:
            return sum(row.cells[c].value for c in self.suite.columns) / len(self.suite.columns)
        return row.cells[column].value

    def stderr(self, row: Row, column: str) -> float | None:
        """The standard error of a cell; of the mean, from those of its columns, which are independent."""
        if column != AVERAGE:
            return row.cells[column].stderr if column in row.cells else None
        errors = [row.cells[c].stderr if c in row.cells else None for c in self.suite.columns]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) / len(errors) if len(known) == len(errors) else None

    def difference(self, row: Row, column: str) -> float | None:
        """The cell less the baseline's; None on the baseline's own row and where either is missing."""
        base = self._base
        if base is None or row is base or not self.has(row, column) or not self.has(base, column):
            return None
        return self.value(row, column) - self.value(base, column)

    # Looked up once: a table of thousands of rows asks for these in every cell.
    @cached_property
    def _base(self) -> Row | None:
        return next((row for row in self.rows if row.model.name == self.baseline), None)

    @cached_property
    def _best(self) -> dict[str, float]:
        found = {c: [self.value(row, c) for row in self.rows if self.has(row, c)] for c in self.columns}
        return {column: max(values) for column, values in found.items() if values}

    def limit_of(self, row: Row) -> int | None:
        """How many items of each task this row was measured on; None is all of them."""
        limits = [about["limit"] for about in row.measured.values() if about.get("limit")]
        return limits[0] if limits else self.limit

    def label(self, row: Row) -> str:
        """The row's name, marked where only part of each task was measured."""
        return row.model.name + ("*" if self.limit_of(row) else "")

    def notes(self, differences: str = "In brackets") -> list[str]:
        """What the numbers are; sentences. `differences` is how they are set."""
        notes = [f"Suite {self.suite.name}; percent \u00b1 standard error."]
        if self.baseline:
            notes.append(f"{differences}: points of difference to {self.baseline}.")
        if limits := sorted({limit for row in self.rows if (limit := self.limit_of(row))}):
            notes.append(f"* Only the first {', '.join(map(str, limits))} items of each task: not comparable.")
        if any(not self.has(row, AVERAGE) for row in self.rows):
            notes.append("Blank: not in the suite of that row, which therefore has no average.")
        return notes

    def warnings(self) -> list[str]:
        """What a reader must know before comparing rows; sentences, none when all were measured alike."""
        return [*self._unlike, *(text for row in self.rows for text in self._cut(row))]

    def warnings_of(self, row: Row) -> list[str]:
        """Those of the warnings that a reader of this row alone must know."""
        return [*self._unlike, *self._cut(row)]

    @cached_property
    def _unlike(self) -> list[str]:
        return [f"Not measured alike: {text}" for text in differences(self.rows, self.suite.columns)]

    def _cut(self, row: Row) -> list[str]:
        return [
            f"{row.model.name}: {about['cut_prompts']} prompts of {column} were cut on the left to fit the context."
            for column, about in row.measured.items()
            if about.get("cut_prompts")
        ]

    def number(self, row: Row, column: str) -> str:
        """A cell in percent with its standard error, `71.25 \u00b11.10`; empty where the row lacks the column."""
        if not self.has(row, column):
            return ""
        error = self.stderr(row, column)
        return f"{100 * self.value(row, column):.2f}" + ("" if error is None else f" \u00b1{100 * error:.2f}")

    def cell_text(self, row: Row, column: str) -> str:
        """The number and, in brackets, the difference to the baseline."""
        difference = self.difference(row, column)
        return self.number(row, column) + ("" if difference is None else f" ({100 * difference:+.2f})")

    def best(self, column: str) -> float | None:
        """The highest value of a column; None where no row has it."""
        return self._best.get(column)


def to_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    grid = [["model", *map(one_line, table.columns)]]
    grid += [[one_line(table.label(row)), *(table.cell_text(row, c) for c in table.columns)] for row in table.rows]
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))])
        for line in grid
    ]
    rule = "  ".join("-" * width for width in widths)
    warnings = [f"WARNING: {text}" for text in table.warnings()]
    return "\n".join([lines[0], rule, *lines[1:], "", *map(one_line, [*table.notes(), *warnings])]) + "\n"


def to_markdown(table: Table) -> str:
    """A GitHub table; the best value of each column is bold."""
    lines = ["| model | " + " | ".join(map(markdown, table.columns)) + " |", "|---|" + "---:|" * len(table.columns)]
    for row in table.rows:
        cells = []
        for column in table.columns:
            text, space, rest = table.cell_text(row, column).partition(" ")
            best = table.has(row, column) and table.value(row, column) == table.best(column)
            cells.append((f"**{text}**" if best else text) + space + rest)
        lines.append(f"| {markdown(table.label(row))} | " + " | ".join(cells) + " |")
    warnings = [f"\n**Warning:** {markdown(text)}" for text in table.warnings()]
    return "\n".join([*lines, "", markdown(" ".join(table.notes())), *warnings]) + "\n"


def to_csv(table: Table) -> str:
    """Percent, then points of difference to the baseline, then standard errors; empty where unknown."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    differences = [f"{column} - {table.baseline}" for column in table.columns] if table.baseline else []
    errors = [f"{column} stderr" for column in table.columns]
    writer.writerow(map(csv_cell, ["model", *table.columns, *differences, *errors, "limit", "warning"]))
    for row in table.rows:
        values = [table.value(row, column) if table.has(row, column) else None for column in table.columns]
        values += [table.difference(row, column) for column in table.columns] if table.baseline else []
        values += [table.stderr(row, column) for column in table.columns]
        numbers = ["" if value is None else f"{100 * value:.4f}" for value in values]
        writer.writerow(
            [csv_cell(row.model.name), *numbers, table.limit_of(row) or "", csv_cell(" ".join(table.warnings_of(row)))]
        )
    return buffer.getvalue()


def to_json(table: Table, about: dict[str, Any]) -> str:
    """Everything, with provenance: `about` (suite, versions) and how each cell was measured."""
    rows = []
    for row in table.rows:
        cells = {
            column: {
                "value": table.value(row, column),
                "stderr": table.stderr(row, column),
                "difference": table.difference(row, column),
                **({} if column == AVERAGE else {"samples": row.cells[column].samples}),
            }
            for column in table.columns
            if table.has(row, column)
        }
        rows.append(
            {
                "name": row.model.name,
                "model": row.model.reference,
                "fingerprint": row.model.fingerprint,
                "suite_hash": row.suite,
                "limit": table.limit_of(row),
                "cells": cells,
                "measured": row.measured,
            }
        )
    content = {
        **about,
        "unit": "fraction",
        "baseline": table.baseline,
        "limit": table.limit,
        "columns": [{"column": task.column, "task": task.task, "metric": task.metric} for task in table.suite.tasks],
        "rows": rows,
    }
    return json.dumps(plain(content), indent=2) + "\n"


def read_results(path: Path) -> Table:
    """The table in a results.json. Raises `BadInput` when it is missing or not one of ours."""
    content = read_json_mapping(path, "results.json of wp-eval")
    try:
        stored = read_record(StoredResults, content)
        tasks = tuple(SuiteTask(column.task, column.column, column.metric) for column in stored.columns)
        rows = [_read_row(row, tasks) for row in stored.rows]
        return Table(Suite(stored.suite_content.name, tasks), rows, stored.baseline, stored.limit)
    except (ValueError, BadInput) as error:
        raise BadInput(f"{path}: not a results.json of wp-eval ({error}); evaluate again.") from error


def _read_row(row: StoredRow, tasks: Sequence[SuiteTask]) -> Row:
    cells: dict[str, Cell] = {}
    measured: dict[str, dict[str, Any]] = {}
    for task in tasks:
        if (cell := row.cells.get(task.column)) is not None:
            cells[task.column] = Cell(cell.value, cell.stderr, cell.samples)
            measured[task.column] = {"metric": task.metric, **row.measured.get(task.column, {})}
    return Row(EvalModel(row.name, row.model, Path(row.model), row.fingerprint), cells, measured, row.suite_hash)
