"""Score files of which all exact scores are known, as `wp-score --sample` would write a part of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from score_example import GEOMETRY, example

from mergekit_wp.missed import draw
from mergekit_wp.scores import Scores, TaskScores
from mergekit_wp.subset import Amount, Ranking, Subset

LAYERS, NEURONS = 8, 100
WIDE = replace(GEOMETRY, layers=LAYERS, neurons=NEURONS)
HEADS = torch.zeros(LAYERS, GEOMETRY.heads)


def file_of(neurons_LF, masks=None, chance=None) -> Scores:
    meta = replace(example(("a",)).meta, geometry=WIDE, utility="kl", anchor_layer=None, split=None)
    return Scores.from_tasks(meta, {"a": TaskScores(HEADS, neurons_LF.float())}, masks, chance)


def audit_of(cheap: Scores, exact: Scores, leaders: int, amount: str, seed: int) -> Scores:
    """What wp-score writes of the leaders of `cheap` and a sample."""
    shape = cheap.meta.geometry
    ranking = Ranking(Amount.parse(f"neurons={leaders}"), cheap)
    among = Subset.choose(shape, "neurons")
    subset, chance = draw(Subset.choose(shape, "neurons", None, ranking), among, ranking, Amount.parse(amount), seed)
    tasks = {name: TaskScores(t.heads * 0, t.neurons * subset.neurons) for name, t in exact.tasks.items()}
    return Scores.from_tasks(exact.meta, tasks, {str(k): m for k, m in subset.masks.items()}, chance)


def populations():
    """Exact scores, and cheap ones that miss some of the highest: near the threshold, or anywhere."""
    random = torch.Generator().manual_seed(5)
    exact_LF = torch.randn(LAYERS, NEURONS, generator=random)
    noisy_LF = exact_LF + 0.3 * torch.randn(exact_LF.shape, generator=random)
    blind_LF = torch.where(torch.rand(exact_LF.shape, generator=random) < 0.3, torch.zeros(()), exact_LF)
    return {"near": (exact_LF, noisy_LF), "anywhere": (exact_LF, blind_LF)}
