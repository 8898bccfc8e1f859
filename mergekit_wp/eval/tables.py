"""The results table: one row a model, one column a task and their mean, as text, Markdown, CSV, JSON and HTML.

results.json keeps lm-eval's fractions; the tables for people show them in percent and differences in points. The page
also says how every cell was measured, and holds nothing from elsewhere.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mergekit_wp.documents import read_record
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.comparability import differences
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.official_data import odd_counts
from mergekit_wp.eval.results import AVERAGE, StoredResults, StoredRow
from mergekit_wp.eval.rows import Cell, Row, plain
from mergekit_wp.eval.suite import Suite, SuiteTask
from mergekit_wp.files import read_json_mapping, write_text
from mergekit_wp.foreign import csv_cell, markdown, one_line
from mergekit_wp.page import aligned, frame, grid, markdown_grid, render, render_text, section

# lm-eval's own metrics of this kind, for results that were written before `higher_is_better` was.
_LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ter", "brier_score")


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
        return [*self.suite.columns, *([AVERAGE] if self.averaged else [])]

    @cached_property
    def averaged(self) -> list[str]:
        """The columns that `Average` is of: shares of which more is better."""
        return [c for c in self.suite.columns if self.is_share(c) and self.more_is_better(c)]

    def is_share(self, column: str) -> bool:
        """Whether a column's values are shares, to be shown in percent."""
        return column not in self._other_scales

    def more_is_better(self, column: str) -> bool:
        return column not in self._lower_is_better

    @cached_property
    def _other_scales(self) -> set[str]:
        about = self._recorded("share")
        beyond = {column for row in self.rows for column, cell in row.cells.items() if abs(cell.value) > 1}
        return {column for column in self.suite.columns if column in beyond or about[column] is False}

    @cached_property
    def _lower_is_better(self) -> set[str]:
        about = self._recorded("higher_is_better")
        for task in self.suite.tasks:  # files of before do not say so
            if about[task.column] is None and task.metric.partition(",")[0] in _LOWER_IS_BETTER:
                about[task.column] = False
        return {column for column, higher in about.items() if higher is False}

    def _recorded(self, name: str) -> dict[str, bool | None]:
        """What the rows say of each column's metric, False if one does; None if none does."""
        said = {c: [a[name] for row in self.rows if name in (a := row.measured.get(c, {}))] for c in self.suite.columns}
        return {column: all(found) if found else None for column, found in said.items()}

    def has(self, row: Row, column: str) -> bool:
        """Whether this row has the column; `Average` is there only where all that it is of are."""
        if column == AVERAGE:
            return bool(self.averaged) and all(c in row.cells for c in self.averaged)
        return column in row.cells

    def value(self, row: Row, column: str) -> float:
        """A cell as lm-eval has it; `Average` is the plain mean of `averaged`. Raises `KeyError` where `has` is not."""
        if column == AVERAGE and self.averaged:
            return sum(row.cells[c].value for c in self.averaged) / len(self.averaged)
        return row.cells[column].value

    def stderr(self, row: Row, column: str) -> float | None:
        """The standard error of a cell; of the mean, from those of its columns.

        Columns with the same items rise and fall together: their errors are added, which is the most that it can be.
        Others are independent.
        """
        if column != AVERAGE:
            return row.cells[column].stderr if column in row.cells else None
        sums = []
        for family in self._families:
            errors = [row.cells[c].stderr if c in row.cells else None for c in family]
            known = [error for error in errors if error is not None]
            if len(known) < len(errors):
                return None
            sums.append(sum(known))
        return math.hypot(*sums) / len(self.averaged) if sums else None

    @cached_property
    def _families(self) -> list[list[str]]:
        """The columns of the average, those together that are of one task, or of a group and a task of it."""
        found: list[tuple[set[str], list[str]]] = []
        for task in self.suite.tasks:
            if task.column in self.averaged:
                below = (row.measured.get(task.column, {}).get("subtasks", ()) for row in self.rows)
                tasks, columns, apart = {task.task}.union(*below), [task.column], []
                for family in found:
                    if tasks & family[0]:
                        tasks, columns = tasks | family[0], family[1] + columns
                    else:
                        apart.append(family)
                found = [*apart, (tasks, columns)]
        return [columns for _, columns in found]

    def difference(self, row: Row, column: str) -> float | None:
        """The cell less the baseline's; None on the baseline's own row and where either is missing."""
        base = self.base_row
        if base is None or row is base or not self.has(row, column) or not self.has(base, column):
            return None
        return self.value(row, column) - self.value(base, column)

    # Looked up once: a table of thousands of rows asks for these in every cell.
    @cached_property
    def base_row(self) -> Row | None:
        return next((row for row in self.rows if row.model.name == self.baseline), None)

    @cached_property
    def _best(self) -> dict[str, float]:
        return self.best_of(self.rows)

    def limit_of(self, row: Row) -> int | None:
        """How many items of each task this row was measured on; None is all of them."""
        limits = [about["limit"] for about in row.measured.values() if about.get("limit")]
        return limits[0] if limits else self.limit

    def label(self, row: Row) -> str:
        """The row's name, marked where only part of each task was measured."""
        return row.model.name + ("*" if self.limit_of(row) else "")

    def notes(self, differences: str = "In brackets") -> list[str]:
        """What the numbers are; sentences. `differences` is how they are set."""
        unit = "percent" if any(map(self.is_share, self.suite.columns)) else "value"
        notes = [f"Suite {self.suite.name}; {unit} \u00b1 standard error."]
        if self.baseline:
            notes.append(f"{differences}: points of difference to {self.baseline}.")
        notes += [self._odd(column) for column in self.suite.columns if column not in self.averaged]
        if limits := sorted({limit for row in self.rows if (limit := self.limit_of(row))}):
            notes.append(f"* Only the first {', '.join(map(str, limits))} items of each task: not comparable.")
        if self.averaged and any(not self.has(row, AVERAGE) for row in self.rows):
            notes.append("Blank: not in the suite of that row, which therefore has no average.")
        elif any(column not in row.cells for row in self.rows for column in self.suite.columns):
            notes.append("Blank: not in the suite of that row.")
        return notes

    def _odd(self, column: str) -> str:
        """How a column differs from a share of items that are right; a sentence."""
        how = [] if self.is_share(column) else ["not in percent"]
        how += [] if self.more_is_better(column) else ["lower is better"]
        how += [f"not in {AVERAGE}"] if self.averaged else []
        return f"{column}: {', '.join(how)}."

    def warnings(self) -> list[str]:
        """What a reader must know before comparing rows; sentences, none when all were measured alike."""
        items = dict.fromkeys(text for row in self.rows for text in self._items(row))
        return [*self._unlike, *items, *(text for row in self.rows for text in self._cut(row))]

    def warnings_of(self, row: Row) -> list[str]:
        """Those of the warnings that a reader of this row alone must know."""
        return [*self._unlike, *self._items(row), *self._cut(row)]

    @cached_property
    def _unlike(self) -> list[str]:
        return [f"Not measured alike: {text}" for text in differences(self.rows, self.suite.columns)]

    @staticmethod
    def _items(row: Row) -> list[str]:
        """Of what items are: not all that were published, or not new."""
        odd = [
            f"{column}: its data has {', '.join(found)}."
            for column, about in row.measured.items()
            if (found := odd_counts(about.get("data") or {}))
        ]
        return odd + [
            f"{seen['seen']} of {seen['items']} items of {column} are prompts of {', '.join(seen['files'])} too: "
            "models that were made with these are not measured on new items there."
            for column, about in row.measured.items()
            if (seen := about.get("seen_items"))
        ]

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
        text = self._figure(row, column, self.value(row, column))
        return text + ("" if error is None else f" \u00b1{self._figure(row, column, error)}")

    def _figure(self, row: Row, column: str, number: float, sign: str = "") -> str:
        """A value, error or difference of a cell: in percent of a share, else with 4 places up to a value of 10."""
        if self.is_share(column):
            return f"{100 * number:{sign}.2f}"
        return f"{number:{sign}.{4 if abs(self.value(row, column)) < 10 else 2}f}"

    def cell_text(self, row: Row, column: str) -> str:
        """The number and, in brackets, the difference to the baseline."""
        difference = self.difference_text(row, column)
        return self.number(row, column) + (f" ({difference})" if difference else "")

    def difference_text(self, row: Row, column: str) -> str:
        """The difference to the baseline with its sign; empty where there is none."""
        difference = self.difference(row, column)
        return "" if difference is None else self._figure(row, column, difference, "+")

    def best(self, column: str) -> float | None:
        """The best value of a column; None where no row has it."""
        return self._best.get(column)

    def best_of(self, rows: Sequence[Row]) -> dict[str, float]:
        """The best value of each column among some rows: the lowest where lower is better."""
        found = {c: [self.value(row, c) for row in rows if self.has(row, c)] for c in self.columns}
        return {c: max(values) if self.more_is_better(c) else min(values) for c, values in found.items() if values}


def to_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    lines = [["model", *table.columns]]
    lines += [[table.label(row), *(table.cell_text(row, c) for c in table.columns)] for row in table.rows]
    warnings = [f"WARNING: {text}" for text in table.warnings()]
    return "\n".join([aligned(lines), "", *map(one_line, [*table.notes(), *warnings])]) + "\n"


def to_markdown(table: Table) -> str:
    """A GitHub table; the best value of each column is bold."""
    lines = [["model", *map(markdown, table.columns)]]
    for row in table.rows:
        cells = []
        for column in table.columns:
            text, space, rest = table.cell_text(row, column).partition(" ")
            best = table.has(row, column) and table.value(row, column) == table.best(column)
            cells.append((f"**{text}**" if best else text) + space + rest)
        lines.append([markdown(table.label(row)), *cells])
    warnings = [f"\n**Warning:** {markdown(text)}" for text in table.warnings()]
    return "\n".join([markdown_grid(lines), "", markdown(" ".join(table.notes())), *warnings]) + "\n"


def to_csv(table: Table) -> str:
    """Percent, then points of difference to the baseline, then standard errors; empty where unknown.

    Columns that are no shares are as lm-eval has them.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    differences = [f"{column} - {table.baseline}" for column in table.columns] if table.baseline else []
    errors = [f"{column} stderr" for column in table.columns]
    writer.writerow(map(csv_cell, ["model", *table.columns, *differences, *errors, "limit", "warning"]))
    for row in table.rows:
        values = [table.value(row, column) if table.has(row, column) else None for column in table.columns]
        values += [table.difference(row, column) for column in table.columns] if table.baseline else []
        values += [table.stderr(row, column) for column in table.columns]
        units = [100 if table.is_share(column) else 1 for column in table.columns]
        numbers = ["" if v is None else f"{unit * v:.4f}" for v, unit in zip(values, cycle(units), strict=False)]
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


_MEAN_TOLERANCE = 1e-9


def read_results(path: Path) -> Table:
    """The table in a results.json. Raises `BadInput` when it is missing or not one of ours."""
    content = read_json_mapping(path, "results.json of wp-eval")
    try:
        stored = read_record(StoredResults, content)
        tasks = tuple(SuiteTask(column.task, column.column, column.metric) for column in stored.columns)
        rows = [_read_row(row, tasks) for row in stored.rows]
        table = Table(Suite(stored.suite_content.name, tasks), rows, stored.baseline, stored.limit)
        _check_averages(table, stored)
        return table
    except (ValueError, BadInput) as error:
        raise BadInput(f"{path}: not a results.json of wp-eval ({error}); evaluate again.") from error


def _check_averages(table: Table, stored: StoredResults) -> None:
    """Raises `ValueError` where `Average` is not what it is of: of all columns in files before 2026-11-27."""
    for row, kept in zip(table.rows, stored.rows, strict=True):
        if AVERAGE in kept.cells and all(column in row.cells for column in table.suite.columns):
            means = [sum(cell.value for cell in row.cells.values()) / len(row.cells)]
            means += [table.value(row, AVERAGE)] if table.averaged else []
            found = kept.cells[AVERAGE].value
            if not any(math.isclose(found, mean, rel_tol=_MEAN_TOLERANCE, abs_tol=_MEAN_TOLERANCE) for mean in means):
                raise ValueError(f"the average of the row {row.model.name} is not the mean of its columns")


def _read_row(row: StoredRow, tasks: Sequence[SuiteTask]) -> Row:
    cells: dict[str, Cell] = {}
    measured: dict[str, dict[str, Any]] = {}
    for task in tasks:
        if (cell := row.cells.get(task.column)) is not None:
            cells[task.column] = Cell(cell.value, cell.stderr, cell.samples)
            measured[task.column] = {"metric": task.metric, **row.measured.get(task.column, {})}
    return Row(EvalModel(row.name, row.model, Path(row.model), row.fingerprint), cells, measured, row.suite_hash)


def write_tables(table: Table, out: Path, stem: str, title: str) -> tuple[str, list[Path]]:
    """Write OUT/STEM.csv, .md and .html; return the text for a terminal and what was written."""
    contents = {"csv": to_csv(table), "md": to_markdown(table), "html": to_html(table, title)}
    paths = {kind: out / f"{stem}.{kind}" for kind in contents}
    for kind, content in contents.items():
        write_text(paths[kind], content)
    return to_text(table), list(paths.values())


def to_html(table: Table, title: str) -> str:
    """The whole page."""
    results = render_text(
        "{% for text in warnings %}<p><strong>Warning:</strong> {{ text }}</p>{% endfor %}{{ table }}",
        warnings=table.warnings(), table=results_html(table),
    )  # fmt: skip
    alike, lines = _provenance(table)
    measured = render_text(
        "{% if alike %}<p>All cells: {{ alike }}.</p>{% endif %}{{ rest }}", alike="; ".join(alike), rest=grid(lines)
    )
    sections = section("Results", results) + section("How each was measured", measured)
    return frame(title, " ".join([*table.notes("Small"), *colour_note(table)]), sections)


_STANDS = 1.96  # standard errors: the two-sided 95 % interval of a normal distribution


def stands(table: Table, row: Row, other: Row, column: str) -> bool:
    """Whether two rows differ by more than the standard errors of both explain.

    Their items are taken for independent draws. They are the same items, so the true error is mostly smaller.
    """
    if not table.has(row, column) or not table.has(other, column):
        return False
    errors = table.stderr(row, column), table.stderr(other, column)
    if errors[0] is None or errors[1] is None:
        return False
    return abs(table.value(row, column) - table.value(other, column)) > _STANDS * math.hypot(errors[0], errors[1])


def colour_note(table: Table) -> list[str]:
    """What the colours of `results_html` are; a sentence, or none."""
    return (
        ["Green (better) and red (worse): a difference beyond 1.96 standard errors of the two values."]
        if table.baseline
        else []
    )


def results_html(table: Table, marked: Sequence[str] = ()) -> Markup:
    """A row a model; the best value of each column is bold, of the rows `marked` alone if there are some.

    A difference has a colour only where it `stands`.
    """
    among = [row for row in table.rows if row.model.name in marked] or table.rows
    best = table.best_of(among)
    rows = []
    for row in table.rows:
        cells = []
        for column in table.columns:
            difference = table.difference(row, column)
            coloured = table.base_row is not None and stands(table, row, table.base_row, column)
            better = ((difference or 0) > 0) == table.more_is_better(column)
            cells.append({
                "number": table.number(row, column),
                "best": row in among and table.has(row, column) and table.value(row, column) == best[column],
                "difference": table.difference_text(row, column),
                "colour": ("up" if better else "down") if coloured else "",
            })  # fmt: skip
        rows.append({"label": table.label(row), "marked": row.model.name in marked, "cells": cells})
    return render("results.html", columns=table.columns, rows=rows, baseline=table.baseline)


_SHOWN = {
    "task": "task", "metric": "metric", "samples": "items", "limit": "limit", "num_fewshot": "shots",
    "backend": "backend", "backend_options": "options", "dtype": "dtype", "device": "device",
    "chat_template": "chat template", "versions": "versions", "date": "date",
}  # fmt: skip


def _provenance(table: Table) -> tuple[list[str], list[list[str]]]:
    """What is the same for all cells; and of the rest a head, and a line for each model and column."""
    cells = [(row, column, row.measured.get(column, {})) for row in table.rows for column in row.cells]
    texts = {name: [_shown(name, about) for _, _, about in cells] for name in _SHOWN}
    same = [name for name, found in texts.items() if len(set(found)) == 1]
    other = [name for name in _SHOWN if name not in same]
    lines = [["model", "fingerprint", "column", *(_SHOWN[name] for name in other)]]
    for place, (row, column, _) in enumerate(cells):
        values = [texts[name][place] for name in other]
        lines.append([row.model.name, row.model.fingerprint[:12], column, *values])
    return [f"{_SHOWN[name]} {texts[name][0]}" for name in same], lines


def _shown(name: str, about: dict[str, Any]) -> str:
    value = about.get(name)
    if not value and not isinstance(value, int):
        return "none" if name in about else "not recorded"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)[:12] if name == "chat_template" else str(value)
