"""What a cheap ranking can have missed: from exact scores of its leaders and of a random sample of all others.

`wp-score --method exact --top 400 FILE --sample 10%` scores the 400 leaders of FILE one by one, and of the rest of each
kind a sample: the rest is put in order of its scores in FILE and cut into bands, and of each band the same share is
drawn (rounded up), at random, each member of a band as likely as the others. How likely is kept in the score file.

How many are missed, of one task, kind and k. Let t be the k-th highest exact score among the leaders: it hangs on FILE
and on exact scores, and not on the draw. M of the rest lie above t, x of them were drawn; nobody knows M. Each of the M
was drawn with a chance of at least f. How many of a band are drawn is hypergeometric, and so a sum of independent
trials, as many as the band has of the M at most (Vatutin and Mikhailov 1982, Theory Probab. Appl. 27, 734); bands are
independent, so x is one of M trials that succeed f M times or more on average. Such a sum is no likelier to be small
than the binomial (Hoeffding 1956, Ann. Math. Statist. 27, 713, theorem 4):

    P(X <= x) <= P(Bin(M, f) <= x)    for x <= f M - 1, and always for x = 0

The largest M of which the right side is above 5 %, or not known to bound, is the upper end at 95 % (as Clopper and
Pearson's, but f is known and M is not). It holds however the M lie over the bands, so these are not bounded apart and
added. What of the k highest of all is not among the k highest of the file lies above t and was not drawn: at most the
upper end less x.

With x = 0 the end is log(0.05) / log(1 - f), about 3 / f, whatever the model's size: a sample of 1 % says at best that
298 are missed at most, one of 10 % that 28 are. That is enough for a top set of thousands, and of hundreds; no draw of
so many can say more, since what it would have to find may lie anywhere.

The bound is of the exact scores on the file's prompts; how these hang on the prompts is asked in `intervals`. It is one
at 95 % for each k, task and kind, and void if the seed was chosen after looking at what it gives.

Legend: L layers, n components of a kind in a layer, N components of a kind.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mergekit_wp.geometry import Kind
from mergekit_wp.intervals import LEVEL
from mergekit_wp.ranking import TOP_COUNT, table_of, tasks_and_mean
from mergekit_wp.subset import highest

if TYPE_CHECKING:
    from mergekit_wp.scores import Scores
    from mergekit_wp.subset import Amount, Ranking, Subset

_BANDS, _LEAST = 10, 20  # so many bands, each of as many components at least


def draw(
    leaders: Subset, among: Subset, ranking: Ranking, amount: Amount, seed: int
) -> tuple[Subset, dict[Kind, torch.Tensor]]:
    """The leaders with a sample of the rest of those `among` which they lead; and, for each kind that is sampled, with
    which chance each component came in, float32 [L, n]: 1 for leaders, 0 outside of `among`."""
    masks, chances = dict(leaders.masks), {}
    for kind in Kind:
        rest_Ln = among.masks[kind] & ~leaders.masks[kind]
        count = int(rest_Ln.sum())
        wanted = min(amount.among(kind, count), count)
        if count and not wanted:
            continue
        picked_N, chance_N = _of_bands(ranking.values(kind)[rest_Ln], wanted, f"{seed}/sample/{kind}")
        chance_Ln, mask_Ln = leaders.masks[kind].float(), leaders.masks[kind].clone()
        chance_Ln[rest_Ln], mask_Ln[rest_Ln] = chance_N, picked_N
        masks[kind], chances[kind] = mask_Ln, chance_Ln
    return type(leaders)(*masks.values()), chances


def plan(subset: Subset, chances: Mapping[Kind, torch.Tensor]) -> Iterator[str]:
    """What a sample can say at best, before it is scored: a sentence a kind."""
    for kind, chance_Ln in chances.items():
        rest_Ln = (chance_Ln > 0) & (chance_Ln < 1)
        if rest_Ln.any():
            leaders, rest = int((chance_Ln == 1).sum()), int(rest_Ln.sum())
            drawn, best = int((subset.masks[kind] & rest_Ln).sum()), upper_end(0, float(chance_Ln[rest_Ln].min()), rest)
            yield (
                f"{leaders:,} {kind} that lead, and {drawn:,} of {rest:,} others: at best this will say that at most "
                f"{best:,} of the highest are missed (95 %)."
            )


def _of_bands(value_N: torch.Tensor, wanted: int, seed: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Which are drawn, bool, and each one's chance, float32 [N]."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    count = len(value_N)
    picked_N, chance_N = torch.zeros(count, dtype=torch.bool), torch.zeros(count)
    order_N = value_N.sort(descending=True, stable=True).indices
    for band in order_N.tensor_split(max(1, min(_BANDS, count // _LEAST))) if count else ():
        size = -(-wanted * len(band) // count)
        picked_N[band[torch.randperm(len(band), generator=generator)[:size]]] = True
        chance_N[band] = size / len(band)
    return picked_N, chance_N


def upper_end(found: int, share: float, rest: int, level: float = LEVEL) -> int:
    """M: how many of the `rest` lie above a threshold at most, if `found` of them were drawn, each with a chance of at
    least `share`."""
    from scipy.special import bdtr  # of the binomial: how likely so many successes are at most

    def refuted(count: int) -> bool:
        bounded = found == 0 or found <= share * count - 1
        return bounded and float(bdtr(found, count, share)) <= 1 - level

    return bisect_left(range(rest + 1), True, key=refuted) - 1


@dataclass(frozen=True)
class Missed:
    """What a file of leaders and a sample says of the k highest exact scores of one task (None: the mean) and kind.

    leaders    components that were scored for sure
    drawn      of so many others (`rest`); `share`: the least chance of any of them
    found      of those drawn, above the k-th leader, whose score is `threshold`; `highest`: of all that were drawn
    at_most    upper end (95 %): of the k highest of all, not among the k highest of the file
    estimate   how many of these that there are, by what was found
    """

    task: str | None
    kind: Kind
    k: int
    leaders: int
    drawn: int
    rest: int
    share: float
    found: int
    threshold: float
    highest: float | None
    at_most: int
    estimate: float

    @property
    def sentence(self) -> str:
        """For people."""
        whose = f"the {self.k} highest {self.kind} of {'all tasks' if self.task is None else self.task}"
        drawn = f"above leader {self.k}: {self.found} of {self.drawn:,} drawn"
        if self.at_most == self.k:
            return f"The sample is too small to say how many of {whose} are missed ({drawn})."
        return f"Of {whose}, at most {self.at_most} are missed (95 %; {drawn})."


@dataclass(frozen=True)
class TopKept:
    """Of the k highest of another file, the share that is among the k highest by exact: from `low` (95 %) to `high`."""

    missed: Missed
    low: float
    high: float


def missed(scores: Scores, task: str | None, kind: Kind, k: int) -> Missed | None:
    """Of a score file with a sample; None without one of this kind, or without a leader of positive score.

    k is cut to the number of leaders with a positive score: others lead nothing.
    """
    if kind not in scores.chance:
        return None
    table_Ln, chance_Ln = table_of(scores, kind, task), scores.chance[kind]
    sure_Ln = scores.seen(kind) & (chance_Ln == 1)
    k = min(k, int((table_Ln[sure_Ln] > 0).sum()))
    rest_Ln = scores.population(kind) & (chance_Ln < 1)
    drawn_Ln, rest = scores.seen(kind) & rest_Ln, int(rest_Ln.sum())
    if not k:
        return None
    threshold = float(table_Ln[sure_Ln].topk(k).values[-1])
    found_Ln = drawn_Ln & (table_Ln > threshold)
    found, drawn = int(found_Ln.sum()), int(drawn_Ln.sum())
    share = float(chance_Ln[rest_Ln].min()) if rest else 1.0
    highest = float(table_Ln[drawn_Ln].max()) if drawn else None
    return Missed(
        task, kind, k, int(sure_Ln.sum()), drawn, rest, share, found, threshold, highest,
        min(k, rest - drawn, upper_end(found, share, rest) - found), float((1 / chance_Ln[found_Ln] - 1).sum()),
    )  # fmt: skip


def every(scores: Scores) -> Iterator[Missed]:
    """Of every task and their mean, each kind, and k of 20, of 1 % of the kind and of half the leaders."""
    for task in tasks_and_mean(scores):
        for kind in Kind:
            seen: dict[int, Missed] = {}
            for k in _sizes(scores, kind):
                found = missed(scores, task, kind, k)
                seen |= {} if found is None else {found.k: found}
            yield from seen.values()


def _sizes(scores: Scores, kind: Kind) -> list[int]:
    if kind not in scores.chance:
        return []
    leaders = int((scores.chance[kind] == 1).sum())
    asked = {TOP_COUNT, math.ceil(int(scores.population(kind).sum()) / 100), math.ceil(leaders / 2)}
    return sorted(k for k in asked if k <= leaders)


def kept(other: Scores, audit: Scores, found: Missed) -> TopKept:
    """How much of the other file's top k, among the components that the audit is of, is of the top k by exact."""
    kind, k = found.kind, found.k
    among_Ln = audit.population(kind) & other.seen(kind)
    set_Ln = _highest(table_of(other, kind, found.task), among_Ln, k)
    both = int((set_Ln & _highest(table_of(audit, kind, found.task), audit.seen(kind), k)).sum())
    open_ = int((set_Ln & ~audit.seen(kind)).sum())
    return TopKept(found, max(0, both - found.at_most) / k, (both + min(open_, found.at_most)) / k)


def audits(files: Mapping[str, Scores]) -> Iterator[tuple[str, str, TopKept]]:
    """(file, audit, what is kept) of every file without a sample and every audit of its tasks."""
    for name, audit in files.items():
        for found in every(audit):
            for other, scores in files.items():
                if not scores.chance and (found.task in scores.tasks or (found.task is None and _same(scores, audit))):
                    yield other, name, kept(scores, audit, found)


def _same(one: Scores, other: Scores) -> bool:
    return set(one.tasks) == set(other.tasks)


def _highest(table_Ln: torch.Tensor, among_Ln: torch.Tensor, k: int) -> torch.Tensor:
    """The k highest positive scores of those marked, bool."""
    return highest(table_Ln, k, among_Ln & (table_Ln > 0))


def cost(scores: Scores) -> float:
    """What the file cost, as a share of scoring everything that it is a sample of: in layers run, of a component from
    its own up to where it is read."""
    depth_L = torch.tensor([float(scores.meta.layers_run(layer)) for layer in range(scores.meta.geometry.layers)])
    kinds = [kind for kind in Kind if kind in scores.chance]
    paid, whole = (
        sum(float(m(kind).sum(1).float() @ depth_L) for kind in kinds) for m in (scores.seen, scores.population)
    )
    return paid / whole if whole else 1.0
