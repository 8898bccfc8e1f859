"""Numbers that may be missing, and lists of them, as tables and sections show them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any


def finite(value: Any) -> float | None:
    """A number, or a tensor or array of one; None for what JSON has no name for."""
    number = float(value)
    return number if math.isfinite(number) else None


def cell(value: float | None, form: str = ".2f") -> str:
    """A number in this form, a dash for none. Before a percent sign stands a space, as in every text here."""
    return "-" if value is None else format(value, form).replace("%", " %")


def estimate(value: float | None, low: float | None, high: float | None, form: str = ".2f") -> str:
    """A number and its interval, where there is one."""
    return cell(value, form) if low is None else f"{cell(value, form)} ({cell(low, form)} to {cell(high, form)})"


def draws(values: Sequence[float] | None) -> str:
    """Of random draws the mean and the range; a dash where none was drawn."""
    return "-" if values is None else f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def flat(row: Mapping[str, Any], drawn: Collection[str], ends: Collection[str] = ()) -> dict[str, Any]:
    """A row as a line of a table has it: of columns of draws their mean and range, of intervals their ends."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name in drawn:
            bounds = (None, None, None) if value is None else (fmean(value), min(value), max(value))
            found |= dict(zip((f"{name}_mean", f"{name}_low", f"{name}_high"), bounds, strict=True))
        elif name in ends:
            found |= dict(zip((f"{name}_low", f"{name}_high"), value or (None, None), strict=True))
        else:
            found[name] = value
    return found


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """Rows that all have the same fields, below a head of these; nothing for none."""
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
