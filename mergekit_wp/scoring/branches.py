"""The next token of the base steered at many layers, in one sweep.

Above each candidate layer a steered copy of the base's stream branches off, and all branches go up together. So
every layer is read once, and it works with weights that stream.

Legend: B prompts, T tokens, D residual width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mergekit_wp.scoring.batches import Batch, Tokens, batches
from mergekit_wp.scoring.capture import at_anchors
from mergekit_wp.scoring.directions import Directions
from mergekit_wp.scoring.stack import Stack
from mergekit_wp.scoring.steering import Steering
from mergekit_wp.scoring.sweep import ascend
from mergekit_wp.scoring.utilities import kl_utility

Tick = Callable[[float], object]
Part = tuple[int, Batch]  # a batch, and the number of the set that it is from


@torch.no_grad()
def kl_levels(
    base: Stack,
    expert: Stack,
    sets: Sequence[Tokens],
    directions: Sequence[Directions],
    layers: Sequence[int],
    positions: str,
    batch_size: int,
    tick: Tick = lambda _n: None,
) -> list[tuple[float, tuple[float, ...]]]:
    """For every set of prompts, the mean F = -KL(expert || model) of the base, and of it steered at each layer.

    In nats. Each set has its own `directions`; `layers` ascend. Memory: (len(layers) + 1) float32 streams [B, T, D]
    of every prompt, on the device, or in host memory where weights stream.
    """
    if not sets:
        return []
    parts = [(i, batch) for i, prompts in enumerate(sets) for batch in batches(prompts, batch_size, base, expert)]
    vocabulary = min(base.vocabulary, expert.vocabulary)
    targets = _expert_logits(expert, parts, vocabulary)
    totals = torch.zeros(len(sets), len(layers) + 1, dtype=torch.float64, device=base.device)
    branched = _branches(base, parts, directions, layers, positions)
    for (i, batch), branches, target_BV in zip(parts, branched, targets, strict=True):
        for column, stream_BTD in enumerate(branches):
            logits_BV = base.logits(batch.at_anchor(stream_BTD.to(base.device)), vocabulary)
            totals[i, column] += kl_utility(logits_BV, target_BV).double().sum()
        tick(len(batch.last_B))
    means = [(total / len(prompts)).tolist() for total, prompts in zip(totals, sets, strict=True)]
    return [(mean[0], tuple(mean[1:])) for mean in means]


def _expert_logits(expert: Stack, parts: Sequence[Part], vocabulary: int) -> list[torch.Tensor]:
    """Of every batch [B, V]; rows past `vocabulary` are cut."""
    starts = [expert.start(batch) for _i, batch in parts]
    tops = [start.stream_BTD for start in starts]
    for _layer, tops in ascend(expert, starts, expert.depth, at=[batch.last_B for _i, batch in parts]):  # noqa: B007
        pass
    return [expert.logits(batch.at_anchor(top), vocabulary) for (_i, batch), top in zip(parts, tops, strict=True)]


def _branches(
    base: Stack, parts: Sequence[Part], directions: Sequence[Directions], layers: Sequence[int], positions: str
) -> list[list[torch.Tensor]]:
    """Of every batch the final stream [B, T, D] of the base, then of the base steered at each of `layers`."""
    # Weights stream where the device is small: then it holds one branch of one batch at a time.
    home, device = torch.device("cpu") if base.streamed else base.device, base.device
    starts = [base.start(batch) for _i, batch in parts]
    branches = [[start.stream_BTD.to(home)] for start in starts]
    alphas = [along.alpha_L for along in directions]
    order = range(base.depth)
    for index, layer in zip(order, base.layers(order), strict=True):
        for k, (i, batch) in enumerate(parts):
            with at_anchors(layer, batch.last_B if index == base.depth - 1 else None):
                called = [base.call(layer, x_BTD.to(device), starts[k].calls[index]).to(home) for x_BTD in branches[k]]
            if index in layers:
                way = Steering(index, directions[i].v_LD[index], float(alphas[i][index]), positions)
                called.append(way.at(called[0], batch.last_B.to(home)))
            branches[k] = called
    return branches
