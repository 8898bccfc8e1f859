"""Numbers that may be missing, and lists of them, as tables and sections show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def finite(value: Any) -> float | None:
    """A number, or a tensor or array of one; None for what JSON has no name for."""
    number = float(value)
    return number if math.isfinite(number) else None


def cell(value: float | None, form: str = ".2f") -> str:
    """A number in this form, a dash for none."""
    return "-" if value is None else format(value, form)


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """Rows that all have the same fields, below a head of these; nothing for none."""
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
