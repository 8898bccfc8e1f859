"""A results table as one HTML page, with how every cell was measured; nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_wp.eval.table import Table, to_csv, to_markdown, to_text
from mergekit_wp.files import write_text
from mergekit_wp.foreign import html
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
    warnings = "".join(f"<p><strong>Warning:</strong> {html(text)}</p>" for text in table.warnings())
    alike, lines = _provenance(table)
    common = f"<p>All cells: {html('; '.join(alike))}.</p>" if alike else ""
    sections = [section("Results", warnings + _results(table)), section("How each was measured", common + grid(lines))]
    return frame(title, " ".join(table.notes("Small")), "\n".join(sections))


def _results(table: Table) -> str:
    """A row a model; the best value of each column is bold."""
    head = "".join(f"<th>{html(column)}</th>" for column in table.columns)
    lines = []
    for row in table.rows:
        cells = []
        for column in table.columns:
            text = html(table.number(row, column))
            if table.has(row, column) and table.value(row, column) == table.best(column):
                text = f"<strong>{text}</strong>"
            if (difference := table.difference(row, column)) is not None:
                kind = "up" if difference > 0 else "down" if difference < 0 else "same"
                text += f'<small class="{kind}">{100 * difference:+.2f}</small>'
            elif table.baseline:
                text += "<small></small>"  # keeps the figures of a column under one another
            cells.append(f"<td>{text}</td>")
        lines.append(f"<tr><th>{html(table.label(row))}</th>{''.join(cells)}</tr>")
    differences = ' class="differences"' if table.baseline else ""
    return (
        f'<div class="scroll"><table{differences}><thead><tr><th>model</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


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
