"""What a score file says: its strongest components, where their score lies, what it adds up to; and two files compared.

A score is the share of the gap between base and expert that one component restores alone. Such shares do not add: their
sum may pass 1, and is not what all components together restore. Where a share of the score is spoken of, it is of the
positive scores of heads and neurons together, which is what a merge reads.

Legend: L layers, n components of a kind in a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from mergekit_wp.console import percent
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.geometry import Component, Kind

if TYPE_CHECKING:
    import pandas

    from mergekit_wp.scores import Scores

TOP_COUNT = 20


def table_of(scores: Scores, kind: Kind, task: str | None = None) -> torch.Tensor:
    """The scores [L, n] of one task; None: their mean over tasks. float64."""
    source = scores if task is None else scores.tasks[task]
    table: torch.Tensor = getattr(source, kind)
    return table.double()


def tasks_and_mean(scores: Scores) -> list[str | None]:
    """The tasks, and None for their mean where there are several."""
    return [*scores.tasks, *([None] if len(scores.tasks) > 1 else [])]


def strongest(scores: Scores, kind: Kind, count: int, task: str | None = None) -> list[Component]:
    """The highest scores of a kind, highest first, of what was scored; equal ones by layer and index."""
    table_Ln = table_of(scores, kind, task)
    ranked = table_Ln.masked_fill(~scores.seen(kind), -torch.inf).flatten().sort(descending=True, stable=True)
    count, width = min(count, int(scores.seen(kind).sum())), table_Ln.shape[1]
    places = zip(ranked.values[:count].tolist(), ranked.indices[:count].tolist(), strict=True)
    return [Component(kind, place // width, place % width, score) for score, place in places]


def top(scores: Scores, k: int, kind: str | None) -> list[Component]:
    """The `k` strongest of one kind, or (None) of both together: see `Scores.top`."""
    _check_count(k)
    found = [component for each in _kinds(kind) for component in strongest(scores, each, k)]
    return sorted(found, key=lambda component: -component.score)[:k]


def frame(scores: Scores, kind: str | None) -> pandas.DataFrame:
    """A row a component: see `Scores.to_frame`."""
    try:
        import pandas
    except ImportError as error:
        raise BadInput("to_frame needs pandas, which is not installed here; `pip install pandas`.") from error
    parts = []
    for each in _kinds(kind):
        layers, width = getattr(scores, each).shape
        unseen_n = ~scores.seen(each).flatten()
        columns: dict[str, Any] = {
            "kind": str(each),
            "layer": torch.arange(layers).repeat_interleave(width).numpy(),
            "index": torch.arange(width).repeat(layers).numpy(),
        }
        tables = {"score": scores, **{f"tasks/{name}": task for name, task in scores.tasks.items()}}
        for name, source in tables.items():
            columns[name] = getattr(source, each).flatten().masked_fill(unseen_n, math.nan).numpy()
        parts.append(pandas.DataFrame(columns))
    return pandas.concat(parts, ignore_index=True)


def _kinds(kind: str | None) -> tuple[Kind, ...]:
    if kind is not None and kind not in tuple(Kind):
        raise BadInput(f"kind: found {shown(kind)}, expected {' or '.join(Kind)}, or none for both.")
    return tuple(Kind) if kind is None else (Kind(kind),)


def _check_count(k: int) -> None:
    if type(k) is not int or k < 1:
        raise BadInput(f"k: found {shown(k)}, expected a whole number of at least 1.")


def layer_shares_of(scores: Scores, task: str | None = None) -> dict[Kind, torch.Tensor]:
    """Each kind's and layer's share of all positive score, [L]; together 1, or 0 where none is positive. float64."""
    sums = {kind: table_of(scores, kind, task).clamp(min=0).sum(1) for kind in Kind}
    whole = float(sum(sum_L.sum() for sum_L in sums.values()))
    return {kind: sum_L / (whole or 1.0) for kind, sum_L in sums.items()}


@dataclass(frozen=True)
class Totals:
    """Scores summed over all components that were scored: what is positive, and what is negative (0 or below)."""

    positive: float
    negative: float

    @property
    def total(self) -> float:
        return self.positive + self.negative


def totals(scores: Scores, kind: Kind, task: str | None = None) -> Totals:
    table_Ln = table_of(scores, kind, task)
    return Totals(float(table_Ln.clamp(min=0).sum()), float(table_Ln.clamp(max=0).sum()))


@dataclass(frozen=True)
class Agreement:
    """Two score files on one task (None: the mean over the tasks of both; where they have none in common, over each
    one's own) and kind, over the components that both have a score of.

    overlap: {k: share of the k highest of one among those of the other}, for k of 20 and of 1 % (or as asked); only of
        positive scores, so k may be fewer. None where neither has a positive score.
    by_chance: {k: what that is for sets of these sizes drawn at random}: k / `components`, and less where one file has
        fewer positive scores than k.
    spearman: rank correlation; None where one file has the same score everywhere.
    """

    task: str | None
    kind: Kind
    components: int
    overlap: dict[int, float | None]
    by_chance: dict[int, float | None]
    spearman: float | None


def compare(one: Scores, other: Scores, k: int | None = None) -> list[Agreement]:
    """Agreement on every task of both and on the mean over these, for each kind. Both must be of one shape.

    k: of how many leaders the overlap is; None: of 20 and of 1 %.
    """
    if k is not None:
        _check_count(k)
    common = [task for task in one.tasks if task in other.tasks]
    wanted: list[str | None] = [*common, *([None] if len(common) != 1 else [])]
    return [_agreement(one, other, task, common, kind, k) for task in wanted for kind in Kind]


def _agreement(
    one: Scores, other: Scores, task: str | None, common: Sequence[str], kind: Kind, k: int | None
) -> Agreement:
    both = one.seen(kind) & other.seen(kind)
    tasks: list[str | None] = [task] if task is not None else [*common] or [None]
    a_n, b_n = (torch.stack([table_of(x, kind, each)[both] for each in tasks]).mean(0) for x in (one, other))
    count = len(a_n)
    positive = [int((values > 0).sum()) for values in (a_n, b_n)]
    overlap: dict[int, float | None] = {}
    by_chance: dict[int, float | None] = {}
    asked = (TOP_COUNT, math.ceil(count / 100)) if k is None else (k,)
    for wanted in sorted({min(each, count) for each in asked} - {0}):
        size = min(wanted, max(positive))
        overlap[size or wanted] = _overlap(a_n, b_n, size) if size else None
        # Of sets of `size` and of fewer the smaller one's share of all is hit (`sets.Shared`).
        by_chance[size or wanted] = min(size, *positive) / count if size else None
    return Agreement(task, kind, count, overlap, by_chance, spearman(a_n, b_n))


def _overlap(a_n: torch.Tensor, b_n: torch.Tensor, k: int) -> float:
    tops = []
    for values in (a_n, b_n):
        order = values.sort(descending=True, stable=True).indices[:k]
        tops.append(set(order[values[order] > 0].tolist()))
    return len(tops[0] & tops[1]) / k


def spearman(a_n: torch.Tensor, b_n: torch.Tensor) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where it is not defined."""
    from scipy.stats import spearmanr

    if len(a_n) < 2 or bool((a_n == a_n[0]).all()) or bool((b_n == b_n[0]).all()):
        return None
    return float(spearmanr(a_n.numpy(), b_n.numpy()).statistic)


def check_comparable(files: Mapping[str, Scores], any_base: bool) -> None:
    """Raise `BadInput` unless the files' components correspond: one shape, and (unless `any_base`) one base."""
    (first, one), *others = files.items()
    for name, other in others:
        if different := other.meta.geometry.differences(one.meta.geometry):
            raise BadInput(f"{name}: made for another shape than {first} ({'; '.join(different)}); compare others.")
        if not any_base and other.meta.base.tensors != one.meta.base.tensors:
            raise BadInput(
                f"{name}: scores on the base {other.meta.base.name}, {first} on {one.meta.base.name}, which is another "
                "model; a head of one need not be the same head of the other. Say --any-base to compare them all the "
                "same."
            )


def findings(scores: Scores, name: str = "", task: str | None = None) -> list[str]:
    """What stands out, in sentences made from the numbers; `name`: whose score it is, such as instruction."""
    whose = f"{name} score" if name else "score"
    positive = sum(totals(scores, kind, task).positive for kind in Kind)
    if positive == 0:
        return [f"No component has a positive {whose}: none brings the base nearer to the expert by itself."]
    share_L = sum(layer_shares_of(scores, task).values(), torch.zeros(()))
    found = [_where(share_L.tolist(), whose), _who(scores, positive, task)]
    if not scores.complete:
        count = sum(int(scores.seen(kind).sum()) for kind in Kind)
        found.append(f"Only {count:,} components were scored; all shares are of these.")
    return [*found, _sum(scores, task)]


_FEW = ("no", "one", "two", "three", "four", "five")


def _where(share_L: list[float], whose: str) -> str:
    """The fewest layers that hold half of the score, or that it is spread."""
    order = sorted(range(len(share_L)), key=lambda layer: (-share_L[layer], layer))
    sums = list(accumulate(share_L[layer] for layer in order))
    count = 1 + next(place for place, held in enumerate(sums) if held >= 0.5 - 1e-9)
    top, held = order[0], sums[count - 1]
    if count == 1:
        return f"{percent(held)} of the {whose} lies in layer {top}."
    if count <= 3:
        layers = [str(layer) for layer in sorted(order[:count])]
        return f"{percent(held)} of the {whose} lies in layers {', '.join(layers[:-1])} and {layers[-1]}."
    return (
        f"The {whose} is spread: half of it takes {count} of {len(share_L)} layers, and layer {top}, the largest, "
        f"has {percent(share_L[top])}."
    )


def _who(scores: Scores, positive: float, task: str | None) -> str:
    """The best neurons and the best head, and what the kinds have in all."""
    parts = []
    neurons = [c for c in strongest(scores, Kind.NEURON, 5, task) if c.score > 0]
    if neurons:
        carry, those = ("carries", "neuron") if len(neurons) == 1 else ("carry", "neurons")
        share = percent(sum(c.score for c in neurons) / positive)
        parts.append(f"{_FEW[len(neurons)]} {those} {carry} {share} ({', '.join(c.name for c in neurons)})")
    if heads := [c for c in strongest(scores, Kind.HEAD, 1, task) if c.score > 0]:
        parts.append(f"the strongest head, {heads[0].name}, {percent(heads[0].score / positive)}")
    of_heads = totals(scores, Kind.HEAD, task).positive / positive
    text = "; ".join(parts)
    if scores.seen(Kind.HEAD).any() and scores.seen(Kind.NEURON).any():
        text += f". All heads have {percent(of_heads)}, all neurons {percent(1 - of_heads)}"
    return text[0].upper() + text[1:] + "."


def _sum(scores: Scores, task: str | None) -> str:
    """What all scores add up to; apart below and above the anchor where these are shares of two gaps."""
    layers, anchor = scores.meta.geometry.layers, scores.meta.read_at
    if not scores.meta.utility.startswith("staged") or anchor is None or anchor + 1 == layers:
        text = f"the scores come to {_added(scores, task, slice(0, layers))} of the gap"
    else:
        below, above = (_added(scores, task, span) for span in (slice(0, anchor + 1), slice(anchor + 1, layers)))
        text = (
            f"the scores of layers 0 to {anchor} come to {below} of the gap at layer {anchor}, those above to {above}"
        )
        text += " of the gap at the end"
    if any(totals(scores, kind, task).negative for kind in Kind):
        text += ". A merge takes negative scores for 0"
    return f"Added up, {text}. Each was measured alone: all components together may restore more or less than that."


def _added(scores: Scores, task: str | None, span: slice) -> str:
    tables = [table_of(scores, kind, task)[span] for kind in Kind]
    positive = sum(float(table.clamp(min=0).sum()) for table in tables)
    negative = sum(float(table.clamp(max=0).sum()) for table in tables)
    parts = f" ({percent(positive)} for, {percent(-negative)} against)" if negative else ""
    return f"{percent(positive + negative)}{parts}"


def about(scores: Scores) -> dict[str, Any]:
    """What the file says of itself, for people: label -> text."""
    meta = scores.meta
    found: dict[str, Any] = {"expert": meta.expert.called, "base": meta.base.called}
    found |= {"at": meta.at and meta.at.called}
    found |= {"method": meta.method, "utility": meta.utility, "gap": meta.gap}
    found |= {"answers": meta.answer_tokens and f"up to {meta.answer_tokens} tokens"}
    found |= {"object": meta.object, "anchor layer": meta.read_at, "dtype": meta.dtype}
    if not scores.complete:
        found["scored"] = ", ".join(f"{int(scores.seen(kind).sum())} {kind}" for kind in Kind)
    found["date"] = meta.date[:10]
    return {label: str(value) for label, value in found.items() if value is not None}
