"""What is merged and how: the combinations of experts, and each method with its paper's setting and a small grid.

The first point of a grid is the setting of the method's own authors, the one that recipes/table.yaml gives the 13B
merges. Of the grid, the point that does best on validation items is graded on the test items; so is the authors'.
The other points lie between those that did well in a first round on validation items: there TIES was better now with
lambda 1, now with 2, and task arithmetic with 0.7 or 1.0, which DARE was then given as well.
Variants of one's own, for a search, come from a YAML file (`search`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COMBINATIONS: dict[str, tuple[str, ...]] = {
    "code + instruction": ("code", "instruction"),
    "code + maths": ("code", "maths"),
    "instruction + maths": ("instruction", "maths"),
    "all three": ("code", "instruction", "maths"),
}
BASELINE = "average"
"""The variant that differences are taken from."""


@dataclass(frozen=True)
class Point:
    """One setting of a merge method.

    shared  parameters of the merge, as in a recipe's `parameters:`
    expert  parameters of every expert
    base    parameters of the base, which is then listed among the models
    scores  for a method that takes score files: fields of a scoring job, such as {"utility": "kl"}
    """

    method: str
    shared: Mapping[str, Any] = field(default_factory=dict)
    expert: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] | None = None
    scores: Mapping[str, Any] | None = None

    @property
    def values(self) -> dict[str, Any]:
        """All of its parameters and settings by name, but for the base's."""
        return {**self.expert, **self.shared, **(self.scores or {})}

    def text(self) -> str:
        """The setting in a few words, such as `density 0.2, lambda 1`."""
        return _words(self.values)


@dataclass(frozen=True)
class Variant:
    """A row of the table: a name and a grid of settings, the authors' own first; `why` says whose they are."""

    name: str
    points: tuple[Point, ...]
    why: str
    group: str = "methods"

    def text(self, point: Point) -> str:
        """What sets this point apart from the others of the grid, in a few words; all of it where it is alone."""
        others = [other.values for other in self.points]
        apart = {k: v for k, v in point.values.items() if any(other.get(k, ...) != v for other in others)}
        return _words(apart or point.values)


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()) or "defaults"


def _grid(method: str, first: dict[str, Any], *others: dict[str, Any], **fixed: Any) -> tuple[Point, ...]:
    """Points that differ in an expert's `weight` and `density`, or in what all experts share (the rest)."""
    points = []
    for values in (first, *others):
        expert = {k: v for k, v in values.items() if k in ("weight", "density")}
        points.append(Point(method, fixed | {k: v for k, v in values.items() if k not in expert}, expert))
    return tuple(points)


def _wp(name: str, why: str, method: str, utility: str, group: str = "methods") -> Variant:
    return Variant(name, (Point("wp", scores={"method": method, "utility": utility}),), why, group)


_DARE = ({"weight": 1.0, "density": 0.8}, {"weight": 0.7, "density": 0.8},
         {"weight": 1.0, "density": 0.5}, {"weight": 0.7, "density": 0.5})  # fmt: skip

VARIANTS: tuple[Variant, ...] = (
    Variant(
        BASELINE,
        (Point("linear", {"normalize": True}, {"weight": 1.0}, base={"weight": 0.0}),),
        "The plain mean of the experts (arXiv 2203.05482).",
    ),
    Variant(
        "task arithmetic",
        _grid("task_arithmetic", *({"weight": w} for w in (1.0, 0.3, 0.5, 0.7)), normalize=False),
        "Scaling 1.0 as the authors of DARE and WIDEN for 13B experts; 0.3 to 0.5 is Ilharco et al.'s advice for many "
        "tasks (arXiv 2212.04089).",
    ),
    Variant(
        "TIES",
        _grid(
            "ties",
            *({"weight": 1.0, "density": d, "lambda": s} for d, s in ((0.2, 1.0), (0.5, 1.0), (0.8, 1.0), (0.5, 1.5))),
            normalize=True,
        ),
        "Keep the top 20 %, lambda 1: its authors' advice without a validation set (arXiv 2306.01708).",
    ),
    Variant(
        "DARE-TA",
        _grid("dare_linear", *_DARE, normalize=False, rescale=True),
        "Drop rate 0.2, scaling 1.0: how DARE's authors merged 13B experts (arXiv 2311.03099, README of MergeLM).",
    ),
    Variant(
        "DARE-TIES",
        _grid("dare_ties", *_DARE, normalize=False, rescale=True),
        "Drop rate 0.2, scaling 1.0, then the vote on signs (arXiv 2311.03099).",
    ),
    Variant(
        "WIDEN",
        _grid("widen", *({"t": t, "s": s} for t, s in ((1.0, 1.0), (0.5, 1.0), (1.5, 1.0), (1.0, 0.5)))),
        "t = s = 1 as its authors for Llama-2-13B (arXiv 2408.03092).",
    ),
    _wp("WP", "The paper's rule with the paper's scores (attr, anchor).", "attr", "anchor"),
    _wp("WP (ours)", "The paper's rule with wp-score's defaults: writeback, kl.", "writeback", "kl"),
    Variant(
        "WP scaled",
        tuple(
            Point("wp", {"scale": x}, scores={"method": "writeback", "utility": "kl"}) for x in (1.5, 1.25, 1.75, 1.0)
        ),
        "WP (ours), its task vector multiplied: 1.5, chosen on validation items of seeds 0 and 1.",
    ),
    _wp("writeback, anchor", "Up to the anchor layer alone.", "writeback", "anchor", "utilities"),
    _wp("writeback, staged", "The anchor up to its layer, the next token above.", "writeback", "staged", "utilities"),
)  # fmt: skip


def slug(text: str) -> str:
    """Text as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
