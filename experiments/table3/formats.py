"""The table as text for a terminal, as Markdown and as CSV; and the words about it, the same everywhere."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence

from experiments.table3.jobs import LABELS, UNLABELLED
from experiments.table3.table import (
    COLUMNS,
    MEAN,
    MERGED,
    OWN,
    RIVALS,
    WITHOUT,
    RivalRow,
    RivalTable,
    Spread,
    best,
    best_of,
    item_error,
    less,
    ranked,
)
from experiments.table3.variants import BASELINE, Variant
from mergekit_wp.page import aligned, markdown_grid

GROUPS = {
    OWN: "Each method with its authors' own setting",
    UNLABELLED: "The setting of a grid that has the least loss on the experts' prompts, without labels",
    LABELS: "The setting of a grid that is best on validation items, by their labels",
    "utilities": "WP by the utility of its scores",
}
HEADS = {MEAN: "mean of all", WITHOUT: "mean of maths, code", MERGED: "mean of merged"}
SUMMARIES = {
    MEAN: "Mean over all three capabilities, as in the paper",
    WITHOUT: "Mean over maths and code, without the instruction column",
    MERGED: "Mean over the merged capabilities alone",
}
FLAGSHIP = "fit, component"
NONE = "—"
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
        f"{'seeds' if n > 1 else 'seed'} of {table.world} ({seeds})"
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
    """Which row is first in each combination, where ours stand, and what lies between; said whoever wins.

    Then the means over the combinations, in which the goals are stated.
    """
    said = [
        f"{combination}: "
        + "; ".join(_said(table.of(combination, *RIVALS), column) for column in (MEAN, WITHOUT, MERGED))
        + "."
        for combination in table.combinations
    ]
    whole = table.over_combinations
    if len(said) < 2 or not whole:
        return said
    return [*said, f"mean over the combinations: {'; '.join(_said(whole, column) for column in SUMMARIES)}."]


def _said(rows: Sequence[RivalRow], column: str) -> str:
    ranked_rows = sorted(rows, key=lambda row: -row.cells[column].mean)
    text = f"by the {HEADS[column]} {ranked_rows[0].title} is first ({number(ranked_rows[0].cells[column])})"
    ours = next((row for row in ranked_rows if row.name == FLAGSHIP), None)
    ours = ours or next((row for row in ranked_rows if row.ours), None)
    others = [row for row in ranked_rows if not row.ours]
    if ours is None or not others:
        return text
    text += f", {ours.title} is {ranked_rows.index(ours) + 1} of {len(rows)}"
    for labels, which in ((False, "the best other without labels"), (True, "the best other with them")):
        if (other := best_of(others, column, labels)) is not None:
            paired = less(ours.cells[column], other.cells[column])
            text += f", less {other.title}, {which}, {difference(paired)}"
    return text


def remarks(variants: Sequence[Variant], combinations: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence on every method that has no place in some combination, or whose own setting saw labels."""
    found = []
    for variant in variants:
        if unable := [name for name, experts in combinations.items() if not variant.can(experts)]:
            count = "one expert" if variant.most == 1 else f"at most {variant.most} experts"
            found.append(f"{variant.name} takes {count}: {NONE} in {', '.join(unable)}.")
        if variant.told:
            found.append(f"{variant.name}: {variant.why}")
    return found


def grid_of(table: RivalTable, combination: str, group: str) -> list[list[str]]:
    """Header and rows of one block; the difference of the mean in a column of its own."""
    columns = [c for c in COLUMNS if any(c in row.cells for row in table.of(combination, group))]
    main = MEAN if MEAN in columns else MERGED
    lines = [["", *(HEADS.get(c, c) for c in columns), f"{HEADS[main]} − {BASELINE}", "saw"]]
    for row in table.of(combination, group):
        cells = [number(row.cells[c]) for c in columns]
        lines.append([row.name, *cells, difference((row.differences or {}).get(main)), row.saw])
    return lines


def summary(table: RivalTable, column: str = MEAN) -> list[list[str]]:
    """The paper's layout, turned: a row a method (and a way of choosing its setting), a column a combination."""
    lines = [["", "saw", *table.combinations, "mean"]]
    whole = {row.title: row for row in table.over_combinations}
    for title, by in table.lines.items():
        rows = [*(by.get(combination) for combination in table.combinations), whole.get(title)]
        lines.append([title, next(iter(by.values())).saw, *(_with_difference(row, column) for row in rows)])
    return lines


def _with_difference(row: RivalRow | None, column: str) -> str:
    if row is None:
        return NONE
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
    parts = [f"# Merges on {table.world}"]
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
    writer.writerow(["combination", "group", "row", "saw", "column", "mean", "standard error", f"minus {BASELINE}",
                     "its standard error", *seeds, "settings"])  # fmt: skip
    for row in table.rows:
        for column, spread in row.cells.items():
            paired = (row.differences or {}).get(column)
            shown = [spread.mean, spread.error, paired and paired.mean, paired and paired.error, *spread.values]
            settings = "; ".join(dict.fromkeys(row.settings))
            texts = ["" if value is None else f"{value:.4f}" for value in shown]
            writer.writerow([row.combination, row.group, row.name, row.saw, column, *texts, settings])
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
