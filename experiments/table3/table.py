"""The arithmetic of the table: mean and standard error over seeds, and paired differences to the average.

Values are percent, differences points. Every seed is one draw of everything at once: the world and its training, the
items, DARE's random numbers, and (for a grid) the choice on validation items. Two rows of one seed share all of that
but the method, so their difference is taken seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from scipy.stats import t as student_t

from experiments.miniature.items import CAPABILITIES
from experiments.table3.grade import Grade
from experiments.table3.jobs import LABELS, UNLABELLED, Entry
from experiments.table3.variants import BASELINE, COMBINATIONS, SAW_LABELS

MEAN, WITHOUT, MERGED = "mean", "without", "merged"
"""The last three columns: the mean over all capabilities, as in the paper, over all but instructions (the paper's lead
is in these alone), and over those that were merged."""
COLUMNS = (*CAPABILITIES, MEAN, WITHOUT, MERGED)
_OTHERS = tuple(name for name in CAPABILITIES if name != "instruction")
OWN = "methods"
"""The group of rows at the authors' settings. What was chosen of a grid has a group by how (`UNLABELLED`, `LABELS`)."""
RIVALS = (OWN, UNLABELLED, LABELS)
"""The groups that are compared, one row a method and a way of choosing its setting."""


@dataclass(frozen=True)
class Spread:
    """Values of several seeds, in their order."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def error(self) -> float | None:
        """Standard error of the mean over seeds (n - 1 in the variance); None for a single seed."""
        n = len(self.values)
        if n < 2:
            return None
        return math.sqrt(sum((v - self.mean) ** 2 for v in self.values) / (n - 1) / n)

    @property
    def stands(self) -> bool:
        """Whether 0 lies outside the mean's 95 % interval by Student's t, taken for itself alone."""
        if self.error is None:
            return False
        return abs(self.mean) > float(student_t.ppf(0.975, len(self.values) - 1)) * self.error


@dataclass(frozen=True)
class RivalRow:
    """One method in one combination, over seeds; `settings` are those that were graded, by seed; `saw`: see `Entry`."""

    combination: str
    name: str
    group: str
    settings: tuple[str, ...]
    cells: dict[str, Spread]
    differences: dict[str, Spread] | None
    saw: str

    @property
    def ours(self) -> bool:
        """By Weight Patching, or by a fit, which has grown out of it."""
        return self.name.startswith(("WP", "fit", "cross"))

    @property
    def title(self) -> str:
        """The method, and how its setting was chosen, if it was."""
        how = {UNLABELLED: ", setting by loss", LABELS: ", setting by labels"}
        return self.name + how.get(self.group, "")


@dataclass(frozen=True)
class RivalTable:
    """The rows of `entries`, in their order; only those that every seed has. `world`: what the models are."""

    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    split: str
    world: str = "the miniature world"

    @cached_property
    def rows(self) -> list[RivalRow]:
        groups: dict[tuple[str, str, str], dict[int, Entry]] = {}
        for entry in self.entries:
            name, group = _place(entry)
            groups.setdefault((entry.combination, group, name), {})[entry.seed] = entry
        base = {c: found for (c, group, name), found in groups.items() if (group, name) == (OWN, BASELINE)}
        rows = []
        for (combination, group, name), found in groups.items():
            if set(found) == set(self.seeds):
                rows.append(self._row(combination, group, name, found, base.get(combination)))
        return rows

    def of(self, combination: str, *groups: str) -> list[RivalRow]:
        return [row for row in self.rows if row.combination == combination and row.group in groups]

    @cached_property
    def lines(self) -> dict[str, dict[str, RivalRow]]:
        """The rows that are compared, by title and combination: in the order of variants, then of groups."""
        rows = [row for row in self.rows if row.combination and row.group in RIVALS]
        names = list(dict.fromkeys(row.name for row in rows))
        found: dict[str, dict[str, RivalRow]] = {}
        for row in sorted(rows, key=lambda row: (names.index(row.name), RIVALS.index(row.group))):
            found.setdefault(row.title, {})[row.combination] = row
        return found

    @cached_property
    def over_combinations(self) -> list[RivalRow]:
        """Of each line that every combination has, the mean over them, seed by seed."""
        return [_mean_row(list(by.values())) for by in self.lines.values() if set(by) == set(self.combinations)]

    @property
    def combinations(self) -> list[str]:
        found = {row.combination for row in self.rows}
        return [name for name in COMBINATIONS if name in found]

    @property
    def columns(self) -> tuple[str, ...]:
        """On validation items only what was merged is graded."""
        return COLUMNS if self.split == "test" else (MERGED,)

    @property
    def items(self) -> int:
        """Of a capability; the fewest of any."""
        return min((n for entry in self.entries for n in entry.grade.items.values()), default=0)

    def _row(
        self, combination: str, group: str, name: str, found: dict[int, Entry], base: dict[int, Entry] | None
    ) -> RivalRow:
        mine = {seed: values(found[seed]) for seed in self.seeds}
        cells = {
            c: Spread(tuple(mine[seed][c] for seed in self.seeds)) for c in self.columns if c in mine[self.seeds[0]]
        }
        differences = None
        if base is not None and (group, name) != (OWN, BASELINE) and set(base) == set(self.seeds):
            theirs = {seed: values(base[seed]) for seed in self.seeds}
            differences = {c: less(cells[c], Spread(tuple(theirs[s][c] for s in self.seeds))) for c in cells}
        settings, saw = tuple(found[seed].setting for seed in self.seeds), found[self.seeds[0]].saw
        return RivalRow(combination, name, group, settings, cells, differences, saw)


def _mean_row(rows: Sequence[RivalRow]) -> RivalRow:
    def mean(spreads: Sequence[Spread]) -> Spread:
        return Spread(tuple(sum(values) / len(values) for values in zip(*(x.values for x in spreads), strict=True)))

    first, between = rows[0], [row.differences for row in rows if row.differences is not None]
    return replace(
        first,
        combination="",
        settings=(),
        cells={c: mean([row.cells[c] for row in rows]) for c in (MEAN, WITHOUT, MERGED)},
        differences={c: mean([x[c] for x in between]) for c in (MEAN, WITHOUT, MERGED)} if between else None,
    )


def values(entry: Entry) -> dict[str, float]:
    """Percent right: of each capability graded, their mean where all were, and the mean of those merged."""
    grade: Grade = entry.grade
    found = {name: 100 * value for name, value in grade.right.items()}
    if set(CAPABILITIES) <= set(grade.right):
        found |= {MEAN: 100 * grade.mean(CAPABILITIES), WITHOUT: 100 * grade.mean(_OTHERS)}
    if entry.combination:
        found[MERGED] = 100 * grade.mean(COMBINATIONS[entry.combination])
    return found


def less(one: Spread, other: Spread) -> Spread:
    """The difference seed by seed."""
    return Spread(tuple(a - b for a, b in zip(one.values, other.values, strict=True)))


def item_error(items: int, columns: int = 1) -> float:
    """The largest standard error that drawing `items` items can give a cell, or a mean of so many cells (points)."""
    return 100 * math.sqrt(0.25 / max(items, 1) / columns)


def best(rows: Iterable[RivalRow], column: str) -> RivalRow | None:
    """The row with the highest mean in a column."""
    return max((row for row in rows if column in row.cells), key=lambda row: row.cells[column].mean, default=None)


def ranked(table: RivalTable, column: str = MERGED) -> list[tuple[str, str, dict[str, Spread], float]]:
    """For a search: (name, setting, spread by combination, mean over combinations), best first."""
    found: dict[tuple[str, str], dict[str, Spread]] = {}
    for row in table.rows:
        if row.combination:
            found.setdefault((row.name, row.settings[0]), {})[row.combination] = row.cells[column]
    scored = [(n, s, by, sum(x.mean for x in by.values()) / len(by)) for (n, s), by in found.items()]
    return sorted(scored, key=lambda item: -item[3])


def best_of(rows: Iterable[RivalRow], column: str, labels: bool) -> RivalRow | None:
    """The best of the rows that saw labels, or of those that saw none."""
    return best((row for row in rows if (row.saw == SAW_LABELS) == labels), column)


def _place(entry: Entry) -> tuple[str, str]:
    """Name and group of an entry's row."""
    return entry.variant, entry.role if entry.role in (UNLABELLED, LABELS) else entry.group


def by_setting(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Validation entries with a row for every setting, not one for every variant."""
    return tuple(
        Entry(e.seed, e.combination, f"{e.variant} | {e.setting}" if e.variant != BASELINE else e.variant,
              e.group, e.setting, e.role, e.grade) for e in entries
    )  # fmt: skip
