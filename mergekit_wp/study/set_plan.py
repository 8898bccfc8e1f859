"""Which sets of components are exchanged for the curves of one ranking: its best, its worst, and sets drawn at random.

A ranking is of one score file, task, kind and side, by signed scores. Its sizes K are shares of the components that it
ranks, never more than a third (but for all of them, the end of a curve). Of every size there are

    top       the top set of K (`sets.top_set`: where equals lie at its end, none of these is in it)
    worst     the same of the ranking upside down
    random    `DRAWS` sets of as many components, drawn from those that are ranked
    matched   `DRAWS` sets with as many in each layer as the top set has: what only the layers explain

Draws are nested as top sets are: a larger one holds the smaller. The same are tried for every file of the task. Beside
them stand sets of neurons of which one branch alone is exchanged, or whose ranking is by one branch alone (gate, up,
down; Fig. 10), and the ceilings: all heads, all neurons, both, all but these, and everything.

Legend: L layers, n components of a kind in a layer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from mergekit_wp.geometry import Geometry, Kind
from mergekit_wp.ranking import table_of
from mergekit_wp.scores import PART_KIND, Scores
from mergekit_wp.scoring.models.exchanged import Exchange
from mergekit_wp.study.inputs import ALL, DOWN, UP
from mergekit_wp.study.sets import top_among
from mergekit_wp.subset import Subset

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.3)
BRANCH_SHARES = (0.01, 0.05)
DRAWS = 5
TOP, WORST, RANDOM, MATCHED, WHOLE = "top", "worst", "random", "matched", "all"
BRANCHES = {"gate": ("gate",), "up": ("up",), "down": ("down",), "gate+up": ("gate", "up")}
BRANCH, BY_BRANCH = "branch", "by branch"
CEILINGS = ("heads", "neurons", "components", "rest", "everything")


@dataclass(frozen=True)
class Trial:
    """One set: what it is, and the exchange that tries it.

    what      one of the words above, or of `CEILINGS`; of a branch, `BRANCH` (that alone is exchanged) or `BY_BRANCH`
    k, size   how many were asked for, how many it has
    removed   whether it is the expert that has the base's; else the base has the expert's
    expected  the sum of its components' own scores; None where it is no set of a ranking
    """

    what: str
    exchange: Exchange
    kind: str = ""
    side: str = ""
    k: int = 0
    size: int = 0
    draw: int = 0
    branch: str = ""
    expected: float | None = None

    @property
    def removed(self) -> bool:
        return self.exchange.in_expert != (self.what in ("rest", "everything"))


def sides_of(scores: Scores) -> dict[str, torch.Tensor]:
    """Side -> its layers [L], bool: up to the anchor layer and above it where the file reads an anchor, else all."""
    layer_L, anchor = torch.arange(scores.meta.geometry.layers), scores.meta.read_at
    found = {ALL: torch.ones_like(layer_L, dtype=torch.bool)}
    if anchor is not None:
        found = {UP: layer_L <= anchor, DOWN: layer_L > anchor}
    return found


def sizes_of(count: int, shares: tuple[float, ...] = SHARES) -> list[int]:
    """Sizes K among `count` components, ascending, each once; at least 1."""
    return sorted({max(1, math.ceil(share * count - 1e-9)) for share in shares})


def ceilings(shape: Geometry) -> Iterator[Trial]:
    """In both directions."""
    of_kinds = {kind: Subset.choose(shape, kind) for kind in ("heads", "neurons", "all")}
    nothing = masked(shape, {})
    for removed in (False, True):
        for what, subset in zip(CEILINGS, of_kinds.values(), strict=False):
            yield Trial(what, Exchange(subset, removed), size=subset.count)
        # What belongs to no component is the recipient's: so these two are laid into the other model.
        yield Trial("rest", Exchange(of_kinds["all"], not removed))
        yield Trial("everything", Exchange(nothing, not removed))


def rankings_of(scores: Scores) -> Iterator[tuple[Kind, str, torch.Tensor]]:
    """Kind, side, and which components [L, n] it ranks; those that rank any."""
    for kind in Kind:
        for side, layers_L in sides_of(scores).items():
            among_Ln = scores.seen(kind) & layers_L[:, None]
            if among_Ln.any():
                yield kind, side, among_Ln


def ranked(scores: Scores, task: str, seed: int) -> Iterator[Trial]:
    """All sets of the task's rankings."""
    for kind, side, among_Ln in rankings_of(scores):
        yield from _of_ranking(scores, task, kind, side, among_Ln, seed)


def _of_ranking(scores: Scores, task: str, kind: Kind, side: str, among_Ln: torch.Tensor, seed: int) -> Iterator[Trial]:
    table_Ln, count = table_of(scores, kind, task), int(among_Ln.sum())

    def trials(what: str, set_Ln: torch.Tensor, k: int, draw: int = 0) -> Iterator[Trial]:
        expected = float(table_Ln[set_Ln].sum())
        exchange, size = Exchange(masked(scores.meta.geometry, {kind: set_Ln})), int(set_Ln.sum())
        trial = Trial(what, exchange, kind, side, k, size, draw, "", expected)
        if trial.size:
            yield trial
            yield replace(trial, exchange=replace(trial.exchange, in_expert=True))

    random_DLn = drawn_tables(seed, task, kind, table_Ln, DRAWS)
    for k in sizes_of(count):
        set_Ln = top_among(table_Ln, among_Ln, k)
        yield from trials(TOP, set_Ln, k)
        yield from trials(WORST, top_among(-table_Ln, among_Ln, k), k)
        for draw, random_Ln in enumerate(random_DLn):
            for what, drawn_Ln in controls_of(set_Ln, random_Ln, among_Ln).items():
                yield from trials(what, drawn_Ln, k, draw)
    yield from trials(WHOLE, among_Ln, count)
    if kind == Kind.NEURON:
        yield from _of_branches(scores, task, side, table_Ln, among_Ln)


def _of_branches(
    scores: Scores, task: str, side: str, table_Ln: torch.Tensor, among_Ln: torch.Tensor
) -> Iterator[Trial]:
    """Restored alone: one branch of the top neurons; whole neurons by the score of one branch, if the file has that."""
    parts = scores.tasks[task].parts
    for k in sizes_of(int(among_Ln.sum()), BRANCH_SHARES):
        set_Ln = top_among(table_Ln, among_Ln, k)
        subset, size = masked(scores.meta.geometry, {Kind.NEURON: set_Ln}), int(set_Ln.sum())
        for branch, keys in BRANCHES.items():
            if size:
                yield Trial(BRANCH, Exchange(subset, parts=keys), Kind.NEURON, side, k, size, 0, branch)
            by_branch = by_branch_set(parts, branch, among_Ln, k)
            if by_branch is not None and by_branch.any():
                exchange = Exchange(masked(scores.meta.geometry, {Kind.NEURON: by_branch}))
                yield Trial(BY_BRANCH, exchange, Kind.NEURON, side, k, int(by_branch.sum()), 0, branch)


def by_branch_set(
    parts: Mapping[str, torch.Tensor], branch: str, among_Ln: torch.Tensor, k: int
) -> torch.Tensor | None:
    """The top set by what a branch adds to the scores; None where the file does not say."""
    keys = BRANCHES[branch]
    assert all(PART_KIND[key] == Kind.NEURON for key in keys)
    if not all(key in parts for key in keys):
        return None
    return top_among(torch.stack([parts[key].double() for key in keys]).sum(0), among_Ln, k)


def drawn_tables(seed: int, task: str, kind: Kind, like_Ln: torch.Tensor, draws: int) -> list[torch.Tensor]:
    """Random numbers [L, n], by whose size components are drawn: the same for all files and sizes of a task."""
    return [_random(f"{seed}/{task}/{kind}/{draw}", like_Ln) for draw in range(draws)]


def controls_of(set_Ln: torch.Tensor, random_Ln: torch.Tensor, among_Ln: torch.Tensor) -> dict[str, torch.Tensor]:
    """As many drawn anywhere, and drawn in the same layers."""
    anywhere_Ln = top_among(random_Ln, among_Ln, int(set_Ln.sum()))
    return {RANDOM: anywhere_Ln, MATCHED: _like(set_Ln, random_Ln, among_Ln)}


def masked(shape: Geometry, sets: Mapping[Kind, torch.Tensor]) -> Subset:
    """A subset of these sets, and of no component of other kinds."""
    nothing = {kind: torch.zeros(shape.layers, shape.count(kind), dtype=torch.bool) for kind in Kind}
    return Subset(*(nothing | dict(sets)).values())


def _like(set_Ln: torch.Tensor, random_Ln: torch.Tensor, among_Ln: torch.Tensor) -> torch.Tensor:
    """As many in each layer as the set has."""
    rows = [
        top_among(random_Ln[layer], among_Ln[layer], int(count)) if count else torch.zeros_like(set_Ln[layer])
        for layer, count in enumerate(set_Ln.sum(1))
    ]
    return torch.stack(rows)


def _random(name: str, like_Ln: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(random.Random(name).getrandbits(63))
    return torch.rand(like_Ln.shape, generator=generator, dtype=torch.float64)
