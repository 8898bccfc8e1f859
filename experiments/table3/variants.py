"""What is merged and how: the combinations of experts, and each method with its paper's setting and a small grid.

The first point of a grid is the setting of the method's own authors, the one that recipes/table.yaml gives the 13B
merges. Of the grid, three points are graded on the test items: the authors', the one that does best on validation
items, and the one with the least loss on unlabelled prompts, which is what a fit makes small.
The other points lie between those that did well in a first round on validation items: there TIES was better now with
lambda 1, now with 2, and task arithmetic with 0.7 or 1.0, which DARE was then given as well.
Variants of one's own, for a search, come from a YAML file (`search`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
SAW_NOTHING, SAW_PROMPTS, SAW_LABELS = "nothing", "unlabelled prompts", "validation labels"
"""What a merge was made by, besides the models: the prompts of the experts' pairs files have no answers."""


@dataclass(frozen=True)
class Point:
    """One setting of a merge method.

    shared  parameters of the merge, as in a recipe's `parameters:`
    expert  parameters of every expert
    base    parameters of the base, which is then listed among the models
    scores  for a method that takes score files: fields of a scoring job, such as {"utility": "kl"}; `at` is a
            combination, at whose plain average is scored
    fit     for a method that takes a fit file: fields of a fit job, such as {"family": "layer"}; it starts from the
            score files of `scores`, where there are any
    """

    method: str
    shared: Mapping[str, Any] = field(default_factory=dict)
    expert: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] | None = None
    scores: Mapping[str, Any] | None = None
    fit: Mapping[str, Any] | None = None

    @property
    def values(self) -> dict[str, Any]:
        """All of its parameters and settings by name, but for the base's."""
        return {**self.expert, **self.shared, **(self.scores or {}), **(self.fit or {})}

    def text(self) -> str:
        """The setting in a few words, such as `density 0.2, lambda 1`."""
        return _words(self.values)


@dataclass(frozen=True)
class Variant:
    """A row of the table: a name and a grid of settings, the authors' own first; `why` says whose they are.

    most  how many experts the method can merge at once, if that is limited
    told  its first setting was chosen by labels, of another world
    """

    name: str
    points: tuple[Point, ...]
    why: str
    group: str = "methods"
    most: int | None = None
    told: bool = False

    def can(self, experts: Sequence[str]) -> bool:
        """Whether the method merges so many."""
        return self.most is None or len(experts) <= self.most

    @property
    def sees(self) -> str:
        """What its first setting has seen besides the models."""
        if self.told:
            return SAW_LABELS
        reads = any(point.scores is not None or point.fit is not None for point in self.points)
        return SAW_PROMPTS if reads else SAW_NOTHING

    def text(self, point: Point) -> str:
        """What sets this point apart from the others of the grid, in a few words; all of it where it is alone."""
        others = [other.values for other in self.points]
        apart = {k: v for k, v in point.values.items() if any(other.get(k, ...) != v for other in others)}
        return _words(apart or point.values)


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()) or "defaults"


def _grid(method: str, first: dict[str, Any], *others: dict[str, Any], **fixed: Any) -> tuple[Point, ...]:
    """Points that differ in what an expert has for itself, such as `weight`, or in what all share (the rest)."""
    points = []
    for values in (first, *others):
        expert = {k: v for k, v in values.items() if k in ("weight", "density", "epsilon", "gamma")}
        points.append(Point(method, fixed | {k: v for k, v in values.items() if k not in expert}, expert))
    return tuple(points)


def _wp(name: str, why: str, method: str, utility: str, group: str = "methods") -> Variant:
    return Variant(name, (Point("wp", scores={"method": method, "utility": utility}),), why, group)


def _fit(name: str, why: str, scores: dict[str, Any] | None = None, **settings: Any) -> Variant:
    return Variant(name, (Point("wp", scores=scores, fit=settings),), why)


_DARE = ({"weight": 1.0, "density": 0.8}, {"weight": 0.7, "density": 0.8},
         {"weight": 1.0, "density": 0.5}, {"weight": 0.7, "density": 0.5})  # fmt: skip
_CRUMBS = ({"weight": 0.2, "density": 0.144, "gamma": 0.006}, {"weight": 1.0, "density": 0.9, "gamma": 0.01},
           {"weight": 0.5, "density": 0.9, "gamma": 0.01})  # fmt: skip
_OURS = {"method": "writeback", "utility": "kl"}

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
    Variant(
        "DELLA",
        _grid("della", {"weight": 1.0, "density": 0.7, "epsilon": 0.07, "lambda": 1.1}),
        "Drop rate 0.3, a window of 0.14 around it, lambda 1.1: its authors' program (arXiv 2406.11617).",
    ),
    Variant(
        "DELLA, linear",
        _grid("della_linear", {"weight": 1.0, "density": 0.7, "epsilon": 0.07, "lambda": 1.1}),
        "The same without a vote on signs.",
    ),
    Variant(
        "Breadcrumbs",
        _grid("breadcrumbs", *_CRUMBS),
        "Where its authors' search starts: of the largest 15 % without the first 0.6 %, 0.2 (arXiv 2312.06795); then "
        "the example of mergekit's documentation.",
    ),
    Variant("Breadcrumbs, TIES", _grid("breadcrumbs_ties", *_CRUMBS), "The same with a vote on signs."),
    Variant(
        "SCE",
        _grid("sce", *({"select_topk": x} for x in (0.1, 1.0))),
        "The tenth of the parameters that differ most, as for FuseChat (arXiv 2408.07990); all is mergekit's default.",
    ),
    Variant("Model Stock", (Point("model_stock"),), "It has no setting (arXiv 2403.19522)."),
    Variant("Karcher mean", (Point("karcher"),), "mergekit's defaults (arXiv 2603.04972)."),
    Variant("RAM", (Point("ram"),), "mergekit's default (arXiv 2601.13572)."),
    Variant("RAM+", (Point("ramplus_tl"),), "mergekit's defaults, tensor by tensor (arXiv 2601.13572)."),
    Variant("Arcee Fusion", (Point("arcee_fusion"),), "It has no setting.", most=1),
    _wp("WP", "The paper's rule with the paper's scores (attr, anchor).", "attr", "anchor"),
    _wp("WP (ours)", "The paper's rule with wp-score's defaults: writeback, kl.", "writeback", "kl"),
    Variant(
        "WP, whole answers",
        (Point("wp", scores=_OURS | {"answer_tokens": 32}),),
        "WP (ours), read over the experts' own answers.",
    ),
    Variant(
        "WP scaled",
        tuple(Point("wp", {"scale": x}, scores=_OURS) for x in (1.5, 1.25, 1.75, 1.0)),
        "WP (ours), its task vector multiplied: 1.5, chosen on validation items of near seeds 0 and 1.",
        told=True,
    ),
    _fit("WP, scale: auto", "WP (ours), its scale by the loss on unlabelled prompts.", _OURS, family="scale",
         start="scores"),
    _fit("fit, scale", "The average, its scale by the loss on unlabelled prompts.", family="scale"),
    _fit("cross", "Weights of heads and neurons in one shot, from what experts do to one another's answers.",
         family="cross"),
    _fit("fit, expert", "A weight for each expert, learnt from the experts' own answers.", family="expert"),
    _fit("fit, layer", "A weight for the heads and one for the neurons of each layer.", family="layer"),
    _fit("fit, component", "A weight for every head and neuron of every expert: wp-fit's default.", family="component"),
    _wp("writeback, anchor", "Up to the anchor layer alone.", "writeback", "anchor", "utilities"),
    _wp("writeback, staged", "The anchor up to its layer, the next token above.", "writeback", "staged", "utilities"),
)  # fmt: skip

_SHORT: dict[str, Any] = {"steps": 25, "prompts_a_step": 8}
FOR_PRETRAINED: tuple[Variant, ...] = (
    _fit("fit, expert, short", "A weight for each expert, in 25 steps of 8 prompts an expert: wp-fit's 50 steps of 32 "
         "take the best part of an hour on a CPU.", family="expert", **_SHORT),
    _fit("fit, layer, short", "A weight for the heads and one for the neurons of each layer, as short.", family="layer",
         **_SHORT),
    _fit("fit, component, short", "A weight for every head and neuron, as short.", family="component", **_SHORT),
    _fit("fit, component, short, next token", "The same by the token after the prompt alone, not by whole answers.",
         family="component", answer_tokens=0, **_SHORT),
)  # fmt: skip
"""What only the tables of a pretrained model have beside those."""


def slug(text: str) -> str:
    """Text as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
