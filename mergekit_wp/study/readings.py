"""What is read in words, and beside what: directions, and the components of rankings (see `words`).

Legend: N vectors, K words of one, L layers, n components of a kind, or tokens of the tokenizer, D residual width,
G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu

from mergekit_wp.geometry import Component, Kind
from mergekit_wp.ranking import table_of
from mergekit_wp.scores import Scores
from mergekit_wp.study.at_anchor import Activity, HalvedDirections
from mergekit_wp.study.cells import finite
from mergekit_wp.study.inputs import ALL, DOWN, Inputs
from mergekit_wp.study.readout import Reading, Readout, TokenNames
from mergekit_wp.study.sets import top_among
from mergekit_wp.study.study_spec import Study

MOST = {Kind.HEAD: 10, Kind.NEURON: 50}  # of a ranking
RANDOM, SHUFFLED, OTHERS = 200, 20, 2  # draws: of directions, of a direction's channels, others for each component
SIZED = 20  # words of a ranking that are listed by size
FROM_PROMPTS = "prompts"


@dataclass(frozen=True)
class Readouts:
    """Both models' final norms and heads, and what tokens are called."""

    base: Readout
    expert: Readout
    names: TokenNames
    seed: int

    def words(self, tokens: torch.Tensor) -> list[str]:
        return self.names.names(tokens)

    @property
    def random(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


# Directions


@dataclass(frozen=True)
class Direction:
    """The direction of one task after one layer; `source`: the score file, or prompts."""

    source: str
    task: str
    layer: int
    found: HalvedDirections

    @property
    def v_D(self) -> torch.Tensor:
        return self.found.v_LD[self.layer if self.source == FROM_PROMPTS else 0]


def of_files(inputs: Inputs) -> Iterator[Direction]:
    """Of every score file that has some; one that several files share is read once."""
    seen: list[tuple[str, torch.Tensor]] = []
    for name, scores in inputs.scores.items():
        for task, own in scores.tasks.items():
            if own.anchor is None or scores.meta.anchor_layer is None or not own.anchor.any():
                continue
            if not any(task == other and torch.equal(own.anchor, v_D) for other, v_D in seen):
                seen.append((task, own.anchor))
                yield Direction(name, task, scores.meta.anchor_layer, HalvedDirections(own.anchor[None]))


def read_directions(both: Readouts, directions: Sequence[Direction]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row a direction; and the interval, 95 %, of the peaks of random directions."""
    if not directions:
        return [], {}
    v_ND = torch.stack([each.v_D for each in directions])
    random, width = both.random, v_ND.shape[1]
    expert, base = both.expert.read(v_ND), both.base.read(v_ND)
    drawn = both.expert.read(torch.randn(RANDOM, width, generator=random)).peak_N
    low, high = np.percentile(drawn.numpy(), (2.5, 97.5)).tolist()
    orders = [torch.stack([torch.randperm(width, generator=random) for _ in range(SHUFFLED)]) for _ in directions]
    shuffled_N = both.expert.read(torch.cat([v_D[order] for v_D, order in zip(v_ND, orders, strict=True)])).peak_N
    most_N = shuffled_N.unflatten(0, (len(directions), SHUFFLED)).amax(1)
    halved = _halves(both, directions)
    rows = []
    for i, each in enumerate(directions):
        rows.append({
            "source": each.source, "task": each.task, "layer": each.layer,
            "words": both.words(expert.high_NK[i]), "ids": expert.high_NK[i].tolist(),
            "lowest": both.words(expert.low_NK[i]), "peak": finite(expert.peak_N[i]),
            "shuffled_peak": finite(most_N[i]), "shared_with_base": _shared(expert.high_NK[i], base.high_NK[i]),
            **halved.get(i, dict.fromkeys(HALVES)),
        })  # fmt: skip
    return rows, {"low": low, "high": high, "draws": RANDOM}


HALVES = ("shared_by_halves", "cosine_of_halves", "noise_peak")


def _halves(both: Readouts, directions: Sequence[Direction]) -> dict[int, dict[str, Any]]:
    """For the directions that have halves, by number: how far their words agree, and the peak of their noise."""
    listed = [(i, each.layer, each.found) for i, each in enumerate(directions)]
    with_halves = [
        (i, found.halves[0][at], found.halves[1][at], found.noise_LD[at])
        for i, at, found in listed
        if found.halves is not None and found.noise_LD is not None
    ]
    if not with_halves:
        return {}
    read = both.expert.read(torch.stack([v_D for _i, *three in with_halves for v_D in three]))
    values = {}
    for place, (i, one_D, other_D, _noise_D) in enumerate(with_halves):
        cosine = torch.nn.functional.cosine_similarity(one_D, other_D, dim=0)
        one_K, other_K, _ = read.high_NK[3 * place : 3 * place + 3]
        row = _shared(one_K, other_K), finite(cosine), finite(read.peak_N[3 * place + 2])
        values[i] = dict(zip(HALVES, row, strict=True))
    return values


def _shared(one_K: torch.Tensor, other_K: torch.Tensor) -> float:
    return len(set(one_K.tolist()) & set(other_K.tolist())) / max(1, len(one_K))


# Neurons and heads


@dataclass(frozen=True)
class TopSet:
    """The strongest components of one kind of one task, with their scores, and the others that they are held against.

    signed: the sign of what they write is known, by their activation."""

    file: str
    task: str
    kind: Kind
    side: str
    chosen: Sequence[Component]
    others: Sequence[Component]
    signed: bool


def rankings(study: Study, inputs: Inputs, activity: Mapping[str, Activity]) -> Iterator[TopSet]:
    """Of every file and task: neurons; heads where the prompts have the task."""
    random = torch.Generator().manual_seed(study.seed)
    for name, scores in inputs.scores.items():
        for task in scores:
            for kind in (Kind.NEURON, Kind.HEAD) if task in activity else (Kind.NEURON,):
                side = _side(inputs, scores, kind)
                among_Ln = scores.seen(kind) & inputs.sides[side][:, None]
                table_Ln = table_of(scores, kind, task)
                set_Ln = top_among(table_Ln, among_Ln, min(MOST[kind], study.top[kind])) & (table_Ln > 0)
                if set_Ln.any():
                    places = sorted(set_Ln.nonzero().tolist(), key=lambda at: -float(table_Ln[tuple(at)]))
                    chosen = [Component(kind, at[0], at[1], float(table_Ln[tuple(at)])) for at in places]
                    yield TopSet(name, task, kind, side, chosen, _others(set_Ln, kind, random), task in activity)


def _side(inputs: Inputs, scores: Scores, kind: Kind) -> str:
    down = kind == Kind.NEURON and DOWN in inputs.sides
    return DOWN if down and (scores.seen(kind) & inputs.sides[DOWN][:, None]).any() else ALL


def _others(set_Ln: torch.Tensor, kind: Kind, random: torch.Generator) -> list[Component]:
    """`OTHERS` for each of a set, of its layer and not of the set, as far as the layer has so many; each once, since a
    rank test takes its values for independent ones."""
    found = []
    for layer, set_n in enumerate(set_Ln):
        rest = (~set_n).nonzero()[:, 0]
        if set_n.any() and len(rest):
            drawn = rest[torch.randperm(len(rest), generator=random)[: OTHERS * int(set_n.sum())]]
            found += [Component(kind, layer, index) for index in drawn.tolist()]
    return found


def read_rankings(
    both: Readouts, inputs: Inputs, chosen: Sequence[TopSet], activity: Mapping[str, Activity]
) -> list[dict[str, Any]]:
    """A row a ranking, with its components, how they compare with others, and its words by size."""
    if not chosen:
        return []
    geometry = inputs.geometry
    wanted: list[tuple[Component, torch.Tensor]] = []
    share_GN = torch.zeros(2 * len(chosen), sum(len(r.chosen) + len(r.others) for r in chosen))
    for place, ranking in enumerate(chosen):
        score_N = torch.tensor([component.score for component in ranking.chosen])
        start = len(wanted)
        middle, end = start + len(ranking.chosen), start + len(ranking.chosen) + len(ranking.others)
        share_GN[2 * place, start:middle] = score_N / score_N.sum()
        share_GN[2 * place + 1, middle:end] = 1 / max(1, len(ranking.others))
        for component in (*ranking.chosen, *ranking.others):
            wanted.append((component, _activation(component, ranking, activity, inputs)))
    expert_ND, base_ND = (each.written(geometry, wanted) for each in (both.expert, both.base))
    either_N = torch.tensor([not ranking.signed for ranking in chosen for _ in (*ranking.chosen, *ranking.others)])
    expert = both.expert.read(expert_ND, either=either_N, share_GN=share_GN)
    sign_N1 = expert.sign_N[:, None]
    base = both.base.read(sign_N1 * base_ND, share_GN=share_GN)
    moved = both.expert.read(sign_N1 * (expert_ND - base_ND))
    rows, start = [], 0
    for place, ranking in enumerate(chosen):
        end = start + len(ranking.chosen) + len(ranking.others)
        parts = _part_of(expert, start, end), _part_of(base, start, end), _part_of(moved, start, end)
        sizes = [read.size_Gn[2 * place + other] for read, other in ((expert, 0), (base, 0), (expert, 1))]
        largest = {
            key: both.expert.ids_n[_largest(size_n)].tolist()
            for key, size_n in (("largest", sizes[0]), ("largest_of_others", sizes[2]))
        }
        rows.append(_ranking_row(both, ranking, *parts) | largest | {"sizes": _sizes(both, *sizes)})
        start = end
    return rows


def _activation(
    component: Component, ranking: TopSet, activity: Mapping[str, Activity], inputs: Inputs
) -> torch.Tensor:
    if not ranking.signed:
        return torch.ones(1)
    active = activity[ranking.task].of(component, inputs.geometry)
    return active if component.kind == Kind.HEAD else torch.where(active < 0, -1.0, 1.0)


def _part_of(read: Reading, start: int, end: int) -> Reading:
    own = slice(start, end)
    return Reading(read.high_NK[own], read.low_NK[own], read.peak_N[own], read.sign_N[own], read.size_Gn)


def _ranking_row(both: Readouts, ranking: TopSet, expert: Reading, base: Reading, moved: Reading) -> dict[str, Any]:
    count = len(ranking.chosen)
    shared = [_shared(one_K, other_K) for one_K, other_K in zip(expert.high_NK, base.high_NK, strict=True)]
    return {
        "file": ranking.file, "task": ranking.task, "kind": str(ranking.kind), "side": ranking.side,
        "sign": "of the activation" if ranking.signed else "of the higher peak",
        "peak": _against(expert.peak_N, count), "change_peak": _against(moved.peak_N, count),
        "shared_with_base": fmean(shared[:count]),
        "shared_with_base_others": fmean(shared[count:]) if shared[count:] else None,
        "components": [
            {
                "name": component.name, "score": component.score, "sign": float(expert.sign_N[i]),
                "words": both.words(expert.high_NK[i]), "ids": expert.high_NK[i].tolist(),
                "lowest": both.words(expert.low_NK[i]), "peak": finite(expert.peak_N[i]),
                "base_words": both.words(base.high_NK[i]), "shared_with_base": shared[i],
                "change_words": both.words(moved.high_NK[i]) if moved.peak_N[i].isfinite() else [],
                "change_peak": finite(moved.peak_N[i]),
            }
            for i, component in enumerate(ranking.chosen)
        ],
    }  # fmt: skip


def _against(peak_N: torch.Tensor, count: int) -> dict[str, float | None]:
    """Peaks of the first `count` against the others': medians, how often one is higher, and by how much chance."""
    own, others = (part[part.isfinite()].tolist() for part in (peak_N[:count], peak_N[count:]))
    if not own or not others:
        return {"median": median(own) if own else None, "others": None, "higher": None, "p": None}
    test = mannwhitneyu(own, others, alternative="greater")
    higher = float(test.statistic) / (len(own) * len(others))
    return {"median": median(own), "others": median(others), "higher": higher, "p": float(test.pvalue)}


def _sizes(both: Readouts, expert_n: torch.Tensor, base_n: torch.Tensor, others_n: torch.Tensor) -> list[list[Any]]:
    """[word, id, its size, in the base, of the others] of the largest words; 0 in a base that lacks the token."""
    at_base = dict(zip(both.base.ids_n.tolist(), base_n.tolist(), strict=True))
    largest = _largest(expert_n)
    tokens = both.expert.ids_n[largest].tolist()
    values = zip(tokens, expert_n[largest].tolist(), others_n[largest].tolist(), strict=True)
    return [[both.names.name(token), token, size, at_base.get(token, 0.0), other] for token, size, other in values]


def _largest(size_n: torch.Tensor) -> torch.Tensor:
    return size_n.topk(min(SIZED, len(size_n))).indices
