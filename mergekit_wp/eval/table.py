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
from pathlib import Path
from typing import Any

from mergekit_wp.errors import BadInput
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.run import Cell, Row, plain
from mergekit_wp.eval.suite import Suite, SuiteTask

AVERAGE = "Average"


@dataclass(frozen=True)
class Table:
    """Rows of one suite; `baseline` is the name of the row that differences are taken from, or None."""

    suite: Suite
    rows: Sequence[Row]
    baseline: str | None
    limit: int | None

    @property
    def columns(self) -> list[str]:
        return [*self.suite.columns, AVERAGE]

    def value(self, row: Row, column: str) -> float:
        """A cell as a fraction; `Average` is the plain mean of the columns."""
        if column == AVERAGE:
            return sum(cell.value for cell in row.cells.values()) / len(row.cells)
        return row.cells[column].value

    def stderr(self, row: Row, column: str) -> float | None:
        """The standard error of a cell; of the mean, from those of its columns, which are independent."""
        if column != AVERAGE:
            return row.cells[column].stderr
        errors = [cell.stderr for cell in row.cells.values()]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) / len(errors) if len(known) == len(errors) else None

    def difference(self, row: Row, column: str) -> float | None:
        """The cell less the baseline's; None on the baseline's own row and where there is no baseline."""
        base = next((other for other in self.rows if other.model.name == self.baseline), None)
        if base is None or row is base:
            return None
        return self.value(row, column) - self.value(base, column)

    def label(self, row: Row) -> str:
        """The row's name, marked where only part of each task was measured."""
        return row.model.name + ("*" if self.limit else "")

    def notes(self) -> list[str]:
        notes = [f"Suite {self.suite.name}; percent."]
        if self.baseline:
            notes.append(f"In brackets: points of difference to {self.baseline}.")
        if self.limit:
            notes.append(f"* Only the first {self.limit} items of each task (--limit): not comparable.")
        return notes

    def cell_text(self, row: Row, column: str) -> str:
        difference = self.difference(row, column)
        text = f"{100 * self.value(row, column):.2f}"
        return text if difference is None else f"{text} ({100 * difference:+.2f})"


def to_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    grid = [["model", *table.columns]]
    grid += [[table.label(row), *(table.cell_text(row, c) for c in table.columns)] for row in table.rows]
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))])
        for line in grid
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:], "", *table.notes()]) + "\n"


def to_markdown(table: Table) -> str:
    """A GitHub table; the best value of each column is bold."""
    lines = ["| model | " + " | ".join(table.columns) + " |", "|---|" + "---:|" * len(table.columns)]
    best = {column: max(table.value(row, column) for row in table.rows) for column in table.columns}
    for row in table.rows:
        cells = []
        for column in table.columns:
            text, space, rest = table.cell_text(row, column).partition(" ")
            cells.append((f"**{text}**" if table.value(row, column) == best[column] else text) + space + rest)
        name = table.label(row).replace("|", "\\|").replace("*", "\\*")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = " ".join(table.notes()).replace("*", "\\*")
    return "\n".join([*lines, "", notes]) + "\n"


def to_csv(table: Table) -> str:
    """Percent, then points of difference to the baseline, then standard errors; empty where unknown."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    differences = [f"{column} - {table.baseline}" for column in table.columns] if table.baseline else []
    errors = [f"{column} stderr" for column in table.columns]
    writer.writerow(["model", *table.columns, *differences, *errors, "limit"])
    for row in table.rows:
        values: list[float | None] = [table.value(row, column) for column in table.columns]
        values += [table.difference(row, column) for column in table.columns] if table.baseline else []
        values += [table.stderr(row, column) for column in table.columns]
        shown = ["" if value is None else f"{100 * value:.4f}" for value in values]
        writer.writerow([row.model.name, *shown, table.limit or ""])
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
        }
        rows.append(
            {
                "name": row.model.name,
                "model": row.model.reference,
                "fingerprint": row.model.fingerprint,
                "limit": table.limit,
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tasks = tuple(SuiteTask(**column) for column in content["columns"])
        rows = [
            Row(
                EvalModel(row["name"], row["model"], Path(row["model"]), row["fingerprint"]),
                {
                    task.column: Cell(**{k: row["cells"][task.column][k] for k in ("value", "stderr", "samples")})
                    for task in tasks
                },
                row["measured"],
            )
            for row in content["rows"]
        ]
        suite = Suite(content["suite_content"]["name"], tasks)
        return Table(suite, rows, content["baseline"], content["limit"])
    except OSError as error:
        raise BadInput(f"{path}: cannot read these results ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError, BadInput) as error:
        raise BadInput(f"{path}: not a results.json of wp-eval ({error}); evaluate again.") from error
