"""What the page says of sets at its top."""

from __future__ import annotations

import json
from types import SimpleNamespace

from mergekit_wp.study.parts import Answer, _in_short
from mergekit_wp.study.set_page import _upstream


def rows(layers, anchor):
    """Every layer restores the same."""
    sides = {"up": anchor + 1, "down": layers - anchor - 1}
    return [
        {
            "direction": "restored", "metric": "kl", "scores": "s", "kind": kind, "side": side, "k": 12 * count,
            "components": 12 * count, "effect": 0.4 * count / layers,
        }
        for kind in ("heads", "neurons") for side, count in sides.items()
    ]  # fmt: skip


def test_what_sides_of_the_anchor_restore_is_no_verdict_on_where_it_is_needed() -> None:
    name, text = _upstream(rows(40, 27))
    assert name == "s"
    assert text == (
        "Put into the base by themselves, of the gap at the output the layers up to the anchor restore 28 % by their "
        "336 neurons and 28 % by their 336 heads, those above it 12 % by their 144 neurons and 12 % by their 144 heads."
    )
    assert _upstream([row for row in rows(40, 27) if row["side"] == "up"]) is None


def test_a_fallback_answers_only_where_nothing_else_does(tmp_path) -> None:
    links, sets = (SimpleNamespace(name=name, title=name) for name in ("links", "sets"))
    said = {"links": Answer("heads pass it on"), "sets": Answer("sides restore it", fallback=True)}
    for name, answer in said.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "stamp.json").write_text(json.dumps({"answers": {"path": answer}, "headline": ""}))
    assert "heads pass it on" in (both := _in_short([links, sets], tmp_path))
    assert "sides restore it" not in both
    assert "sides restore it" in _in_short([sets], tmp_path)
