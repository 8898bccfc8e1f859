"""Which models answer for the part `answers`, and to which task's prompts.

Of every task that a chosen score file ranks: base and expert; the base with the top of a ranking (*restored*), the
expert without it (*removed*); random sets of as many, drawn anywhere and in the same layers; all that the file ranks. A
set is of heads, of neurons or of both, a share of each; a file that ranks two sides, up to the anchor layer and above
it, gives the share of either, since their scores are not on one scale. Of two files their tops are restored together,
too (Fig. 12).

Across tasks (Fig. 14) the prompts of one task are put to the models with the top neurons of each other's ranking, of
the largest share.

A score file is of the weight side or of the activation side; unless the study says otherwise the first of either is
taken, as every answer costs a pass of the model a token.

Legend: L layers, n components of a kind in a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from mergekit_wp.choices import ACTIVATION_SIDE
from mergekit_wp.geometry import Geometry, Kind
from mergekit_wp.ranking import table_of
from mergekit_wp.scores import Scores
from mergekit_wp.scoring.models.exchanged import Exchange
from mergekit_wp.study.set_effects import key_of
from mergekit_wp.study.set_plan import (
    MATCHED,
    RANDOM,
    TOP,
    WHOLE,
    controls_of,
    drawn_tables,
    masked,
    rankings_of,
    sizes_of,
)
from mergekit_wp.study.sets import top_among
from mergekit_wp.study.study_spec import Answering
from mergekit_wp.subset import Subset

BASE, EXPERT = "base", "expert"
BOTH = "both"
KINDS: Mapping[str, tuple[Kind, ...]] = {"heads": (Kind.HEAD,), "neurons": (Kind.NEURON,), BOTH: tuple(Kind)}
KIND_WORDS = {"heads": "heads", "neurons": "neurons", BOTH: "heads and neurons"}
ACROSS = "neurons"
"""What is exchanged across tasks."""


@dataclass(frozen=True)
class Model:
    """A model that answers: base or expert, with a set of the other's components.

    what     BASE, EXPERT, or a word of `set_plan`: TOP, RANDOM, MATCHED, WHOLE
    subset   what it has of the other model
    removed  whether it is the expert that has components of the base; else the base has the expert's
    scores   the file that ranks; of two, both names with a plus
    of       the task whose ranking it is
    kinds    one of `KINDS`
    share    of what is ranked; 1 for all of it
    """

    what: str
    subset: Subset
    removed: bool
    scores: str = ""
    of: str = ""
    kinds: str = ""
    share: float = 0.0
    draw: int = 0

    @property
    def called(self) -> str:
        """In words, such as `base with top 5 % of neurons (kl, maths)`."""
        if self.what in (BASE, EXPERT):
            return self.what
        size = self.what if self.what == WHOLE else f"{self.what} {100 * self.share:g} % of"
        draw = f", draw {self.draw}" if self.what in (RANDOM, MATCHED) else ""
        whole = "expert without" if self.removed else "base with"
        return f"{whole} {size} {KIND_WORDS[self.kinds]} ({self.scores}, {self.of}{draw})"

    @cached_property
    def key(self) -> str:
        """What tells one model from another: those that are equal answer once."""
        return key_of(Exchange(self.subset, self.removed))


def chosen_files(scores: Mapping[str, Scores], how: Answering) -> dict[str, Scores]:
    """The files whose rankings are tried, by name."""
    first: dict[bool, str] = {}
    for name, found in scores.items():
        first.setdefault(found.meta.method in ACTIVATION_SIDE, name)
    return {name: scores[name] for name in how.scores or first.values()}


def ends(shape: Geometry) -> list[Model]:
    """Base and expert as they are."""
    return [Model(BASE, masked(shape, {}), False), Model(EXPERT, masked(shape, {}), True)]


def models_of(files: Mapping[str, Scores], task: str, tasks: Sequence[str], how: Answering, seed: int) -> list[Model]:
    """All that answer the prompts of `task`; `tasks`: those across which sets are tried. A top set without a component,
    since all have one score, is left out, and its controls."""
    ranking = {name: scores for name, scores in files.items() if task in scores.tasks}
    shape, share = next(iter(files.values())).meta.geometry, how.shares[-1]
    found = ends(shape)
    for name, scores in ranking.items():
        found += _of_file(name, scores, task, how, seed)
    if len(ranking) > 1:
        for each in how.shares:
            tops = [top for scores in ranking.values() for top in _tops(scores, task, BOTH, each)]
            found += _both_ways(TOP, shape, tops, " + ".join(ranking), task, BOTH, each)[:1]
    for name, scores in files.items():
        for other in (each for each in tasks if each != task and each in scores.tasks):
            found += _both_ways(TOP, shape, _tops(scores, other, ACROSS, share), name, other, ACROSS, share)
    return [model for model in found if model.subset.count or model.what in (BASE, EXPERT)]


def top_models(name: str, scores: Scores, task: str, kinds: str, share: float) -> list[Model]:
    """The base with the top of a file's rankings, and the expert without it."""
    return _both_ways(TOP, scores.meta.geometry, _tops(scores, task, kinds, share), name, task, kinds, share)


_Pieces = list[tuple[Kind, torch.Tensor]]
"""Components [L, n] of a kind."""


def _tops(scores: Scores, task: str, kinds: str, share: float) -> _Pieces:
    """The share of each kind, and of each side that the file ranks."""
    found = []
    for kind, among_Ln in _ranked(scores, kinds):
        (k,) = sizes_of(int(among_Ln.sum()), (share,))
        found.append((kind, top_among(table_of(scores, kind, task), among_Ln, k)))
    return found


def _ranked(scores: Scores, kinds: str) -> _Pieces:
    return [(kind, among_Ln) for kind, _side, among_Ln in rankings_of(scores) if kind in KINDS[kinds]]


def _of_file(name: str, scores: Scores, task: str, how: Answering, seed: int) -> Iterator[Model]:
    shape = scores.meta.geometry
    random = {kind: drawn_tables(seed, task, kind, scores.seen(kind), how.draws) for kind in Kind}
    for kinds in KINDS:
        ranked = _ranked(scores, kinds)
        for share in how.shares:
            tops = _tops(scores, task, kinds, share)
            yield from _both_ways(TOP, shape, tops, name, task, kinds, share)
            for draw in range(how.draws):
                drawn = [
                    (kind, controls_of(top_Ln, random[kind][draw], among_Ln))
                    for (kind, among_Ln), (_kind, top_Ln) in zip(ranked, tops, strict=True)
                ]
                for what in (RANDOM, MATCHED):
                    sets = [(kind, controls[what]) for kind, controls in drawn]
                    yield from _both_ways(what, shape, sets, name, task, kinds, share, draw)
        yield from _both_ways(WHOLE, shape, ranked, name, task, kinds, 1.0)


def _both_ways(
    what: str, shape: Geometry, pieces: _Pieces, scores: str, of: str, kinds: str, share: float, draw: int = 0
) -> list[Model]:
    """Put into the base, and taken out of the expert."""
    joined: dict[Kind, torch.Tensor] = {}
    for kind, set_Ln in pieces:
        joined[kind] = joined.get(kind, set_Ln) | set_Ln
    found = Model(what, masked(shape, joined), False, scores, of, kinds, share, draw)
    return [found, replace(found, removed=True)]
