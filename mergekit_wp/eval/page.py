"""A results table as one HTML page, with how every cell was measured; nothing from elsewhere."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from mergekit_wp.eval.table import Table, to_csv, to_markdown, to_text
from mergekit_wp.files import write_text
from mergekit_wp.page import frame, grid, section


def write_tables(table: Table, out: Path, stem: str, title: str) -> tuple[str, list[Path]]:
    """Write OUT/STEM.csv, .md and .html; return the text for a terminal and what was written."""
    contents = {"csv": to_csv(table), "md": to_markdown(table), "html": to_html(table, title)}
    paths = {kind: out / f"{stem}.{kind}" for kind in contents}
    for kind, content in contents.items():
        write_text(paths[kind], content)
    return to_text(table), list(paths.values())


def to_html(table: Table, title: str) -> str:
    """The whole page."""
    warnings = "".join(f'<p class="note"><strong>Warning:</strong> {escape(text)}</p>' for text in table.warnings())
    sections = [
        section("Results", warnings + _results(table)),
        section("How each was measured", grid(_provenance(table))),
    ]
    return frame(title, " ".join(table.notes()), "\n".join(sections))


def _results(table: Table) -> str:
    """A row a model; the best value of each column is bold."""
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    lines = []
    for row in table.rows:
        cells = []
        for column in table.columns:
            text = escape(table.number(row, column))
            if table.has(row, column) and table.value(row, column) == table.best(column):
                text = f"<strong>{text}</strong>"
            if (difference := table.difference(row, column)) is not None:
                kind = "up" if difference > 0 else "down" if difference < 0 else "same"
                text += f'<small class="{kind}">{100 * difference:+.2f}</small>'
            cells.append(f"<td>{text}</td>")
        lines.append(f"<tr><th>{escape(table.label(row))}</th>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>model</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


_SHOWN = (
    "task", "metric", "samples", "limit", "num_fewshot", "backend", "dtype", "device", "chat_template", "versions",
    "date",
)  # fmt: skip


def _provenance(table: Table) -> list[list[str]]:
    """A line for each model and column."""
    lines = [["model", "fingerprint", "column", *(name.replace("_", " ") for name in _SHOWN)]]
    for row in table.rows:
        for column in row.cells:
            about = row.measured.get(column, {})
            lines.append(
                [
                    row.model.name,
                    row.model.fingerprint[:12],
                    column,
                    *(_shown(name, about.get(name)) for name in _SHOWN),
                ]
            )
    return lines


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "\u2013"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)[:12] if name == "chat_template" else str(value)
