"""Numbers that may be missing, as tables and sections show them."""

from __future__ import annotations

from mergekit_wp.page import bullets
from mergekit_wp.study.cells import cell, draws, estimate, flat, lines_of


def test_what_is_known_is_shown() -> None:
    assert [cell(None), cell(0.126), cell(0.5, ".0%")] == ["-", "0.13", "50 %"]
    assert estimate(0.5, None, None) == "0.50"
    assert estimate(None, None, None) == "-"
    assert estimate(0.5, -0.25, 1, "+.1f") == "+0.5 (-0.2 to +1.0)"
    assert [draws(None), draws([0.5, 0.25])] == ["-", "0.38 (0.25 to 0.50)"]


def test_draws_and_intervals_are_columns_of_a_table() -> None:
    rows = [
        {"task": "a", "random": [0.5, 0.25], "beyond": (0.1, 0.2)},
        {"task": "b", "random": None, "beyond": None},
    ]
    assert lines_of([flat(row, ("random",), ("beyond",)) for row in rows]) == [
        ["task", "random_mean", "random_low", "random_high", "beyond_low", "beyond_high"],
        ["a", 0.375, 0.25, 0.5, 0.1, 0.2],
        ["b", None, None, None, None, None],
    ]
    assert lines_of([]) == []


def test_a_list_of_nothing_is_nothing() -> None:
    assert bullets([], "Left out:") == ""
    assert bullets(["<a>"], "Left out:") == "<p>Left out:</p>\n<ul>\n<li>&lt;a&gt;</li>\n</ul>"
