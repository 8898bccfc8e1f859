"""The table as text for a terminal, as Markdown and as CSV; and the words about it, the same everywhere."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from experiments.table3.table import COLUMNS, MEAN, MERGED, RivalRow, RivalTable, Spread, best, item_error, less, ranked
from experiments.table3.variants import BASELINE
from mergekit_wp.page import aligned, markdown_grid

GROUPS = {
    "methods": "Each method (of a grid, the setting that is best on validation items)",
    "authors": "The same methods with their authors' own settings",
    "utilities": "WP by the utility of its scores",
}
HEADS = {MEAN: "mean of all", MERGED: "mean of merged"}
SUMMARIES = {
    MEAN: "Mean over all three capabilities, as in the paper",
    MERGED: "Mean over the merged capabilities alone",
}
MODELS = "The models before merging"


def number(spread: Spread) -> str:
    """`71.2 ± 0.9`, the standard error over seeds; without it for one seed."""
    return f"{spread.mean:.1f}" + (f" ± {spread.error:.1f}" if spread.error is not None else "")


def difference(spread: Spread | None) -> str:
    """`+4.1 ± 0.8*`; the star where it stands by itself. Empty on the baseline's row."""
    if spread is None:
        return ""
    return f"{spread.mean:+.1f}" + (f" ± {spread.error:.1f}" if spread.error is not None else "") + (
        "*" if spread.stands else ""
    )  # fmt: skip


def caption(table: RivalTable) -> list[str]:
    """What the numbers are, and what they cannot say; sentences."""
    n, items = len(table.seeds), table.items
    seeds = ", ".join(map(str, table.seeds))
    lines = [
        f"Percent of {table.split} items answered right, {items} a capability; mean over {n} "
        f"{'seeds' if n > 1 else 'seed'} of the miniature world ({seeds})"
        + (", ± the standard error over seeds." if n > 1 else "; one seed says nothing about the spread."),
        f"Differences are to {BASELINE}, seed by seed, so what a seed does to all methods alike cancels.",
        f"By the draw of items alone a cell of one seed has a standard error of up to {item_error(items):.1f} points, "
        f"a mean of three cells of up to {item_error(items, 3):.1f}.",
    ]
    if n > 1:
        lines.append(
            f"* marks a difference whose own 95 % interval (Student's t, {n - 1} degrees of freedom) excludes 0; with "
            "this many comparisons and no correction, some marks are luck, and a difference without a mark is not "
            "shown to be nothing."
        )
    return lines


def verdict(table: RivalTable) -> list[str]:
    """Which method is first in each combination, where WP stands, and what lies between; said whoever wins."""
    return [
        f"{combination}: "
        + "; ".join(_said(table.of(combination, "methods"), column) for column in (MEAN, MERGED))
        + "."
        for combination in table.combinations
    ]


def _said(rows: Sequence[RivalRow], column: str) -> str:
    ranked_rows = sorted(rows, key=lambda row: -row.cells[column].mean)
    ours = [row for row in ranked_rows if row.name.startswith("WP")]
    others = [row for row in ranked_rows if row not in ours]
    places = ", ".join(f"{row.name} is {ranked_rows.index(row) + 1} of {len(rows)}" for row in ours)
    text = f"by the {HEADS[column]} {ranked_rows[0].name} is first ({number(ranked_rows[0].cells[column])})"
    if not ours or not others:
        return text
    paired = less(ours[0].cells[column], others[0].cells[column])
    return f"{text}, {places}, and {ours[0].name} less {others[0].name}, the best other, is {difference(paired)}"


def grid_of(table: RivalTable, combination: str, group: str) -> list[list[str]]:
    """Header and rows of one block; the difference of the mean in a column of its own."""
    columns = [c for c in COLUMNS if any(c in row.cells for row in table.of(combination, group))]
    main = MEAN if MEAN in columns else MERGED
    lines = [["", *(HEADS.get(c, c) for c in columns), f"{HEADS[main]} − {BASELINE}"]]
    for row in table.of(combination, group):
        cells = [number(row.cells[c]) for c in columns]
        lines.append([row.name, *cells, difference((row.differences or {}).get(main))])
    return lines


def summary(table: RivalTable, column: str = MEAN) -> list[list[str]]:
    """The paper's layout, turned: a row a method, a column a combination."""
    lines = [["", *table.combinations]]
    names = list(dict.fromkeys(row.name for row in table.rows if row.group == "methods"))
    for name in names:
        line = [name]
        for combination in table.combinations:
            row = next((r for r in table.of(combination, "methods") if r.name == name), None)
            line.append(_with_difference(row, column) if row else "")
        lines.append(line)
    return lines


def _with_difference(row: RivalRow, column: str) -> str:
    text = number(row.cells[column])
    return f"{text} ({difference(row.differences[column])})" if row.differences else text


def models(table: RivalTable) -> list[list[str]]:
    """Header and rows of the base and the experts themselves; the header alone where they were not graded."""
    rows = table.of("", "models")
    columns = [c for c in COLUMNS if any(c in row.cells for row in rows)]
    return [
        ["", *(HEADS.get(c, c) for c in columns)],
        *([r.name, *(number(r.cells[c]) for c in columns)] for r in rows),
    ]


def to_text(table: RivalTable, notes: Sequence[str] = ()) -> str:
    """Aligned columns: the summaries, then block by block."""
    parts = []
    for column, title in SUMMARIES.items():
        parts += [f"{title} (and the difference to the {BASELINE})", aligned(summary(table, column))]
    parts += [MODELS, aligned(models(table))]
    for combination in table.combinations:
        for group, title in GROUPS.items():
            if table.of(combination, group):
                parts += [f"{combination}. {title}", aligned(grid_of(table, combination, group))]
    return "\n\n".join([*parts, "\n".join([*caption(table), *verdict(table), *notes])]) + "\n"


def to_markdown(table: RivalTable, notes: Sequence[str] = ()) -> str:
    """GitHub tables: the summaries, then a section a combination; the best method of each column is bold."""
    parts = ["# Merges on the miniature world"]
    for column, title in SUMMARIES.items():
        parts += [f"{title}:", _markdown(summary(table, column))]
    parts.append(_star(" ".join([*caption(table), *notes])))
    parts.append("\n".join(f"- {_star(line)}" for line in verdict(table)))
    parts += [f"## {MODELS}", _markdown(models(table))]
    for combination in table.combinations:
        parts.append(f"## {combination}")
        for group, title in GROUPS.items():
            if table.of(combination, group):
                parts += [title + ":", _markdown(_bold(table, combination, group))]
    return "\n\n".join(parts) + "\n"


def _bold(table: RivalTable, combination: str, group: str) -> list[list[str]]:
    grid, rows = grid_of(table, combination, group), table.of(combination, group)
    columns = [c for c in COLUMNS if any(c in row.cells for row in rows)]
    for at, column in enumerate(columns, start=1):
        top = best(rows, column)
        for line, row in zip(grid[1:], rows, strict=True):
            line[at] = f"**{line[at]}**" if row is top else line[at]
    return grid


def to_csv(table: RivalTable) -> str:
    """Long: one line a cell, with the value of every seed."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    seeds = [f"seed {seed}" for seed in table.seeds]
    writer.writerow(["combination", "group", "row", "column", "mean", "standard error", f"minus {BASELINE}",
                     "its standard error", *seeds, "settings"])  # fmt: skip
    for row in table.rows:
        for column, spread in row.cells.items():
            paired = (row.differences or {}).get(column)
            shown = [spread.mean, spread.error, paired and paired.mean, paired and paired.error, *spread.values]
            settings = "; ".join(dict.fromkeys(row.settings))
            texts = ["" if value is None else f"{value:.4f}" for value in shown]
            writer.writerow([row.combination, row.group, row.name, column, *texts, settings])
    return buffer.getvalue()


def search_text(table: RivalTable) -> str:
    """Variants and settings by their mean on validation items, best first."""
    lines = [["variant", *table.combinations, "mean"]]
    for name, _setting, cells, mean in ranked(table):
        lines.append([name, *(number(cells[c]) if c in cells else "" for c in table.combinations), f"{mean:.1f}"])
    note = (
        f"Mean over the merged capabilities, percent of {table.items} validation items each; seeds "
        f"{', '.join(map(str, table.seeds))}."
    )
    return f"{aligned(lines)}\n\n{note}\n"


def _markdown(grid: list[list[str]]) -> str:
    lines = [[_star(cell.replace("|", "\\|")) for cell in line] for line in grid]
    return markdown_grid(lines)


def _star(text: str) -> str:
    """A single star is a mark, not emphasis."""
    return re.sub(r"(?<!\*)\*(?!\*)", r"\\*", text)
