"""What a task's prompts leave at the anchor position, their last token: directions after every layer, from two random
halves of the prompts, and the mean activation of every head and neuron.

    direction   v(l) as `anchor.directions` has it (Eq. 3); of each half by itself, so that one sees what is stable
    noise       the difference of the two halves' means on the same model: a direction that no instruction made

Legend: L layers, D residual width, Q = H*d_h, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mergekit_wp.console import Tick
from mergekit_wp.geometry import Component, Geometry, Kind
from mergekit_wp.scoring.anchor.directions import mean_residuals
from mergekit_wp.scoring.batching import TaskTokens, Tokens, batches
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.models.load import ModelPair
from mergekit_wp.scoring.pairs import shuffled
from mergekit_wp.scoring.sweep import batch_groups, recorded_sweep

_READ = {Kind.HEAD: "o", Kind.NEURON: "down"}


@dataclass(frozen=True)
class HalvedDirections:
    """Of one task, float32 [L, D]: of all pairs, and (None of a single pair) of two random halves and their noise."""

    v_LD: torch.Tensor
    halves: tuple[torch.Tensor, torch.Tensor] | None = None
    noise_LD: torch.Tensor | None = None


def halved_directions(
    pair: ModelPair, tasks: Sequence[TaskTokens], batch_size: int, seed: int, tick: Tick
) -> list[HalvedDirections]:
    """Of every task, from `extraction` and its contrasts: one sweep of the expert, and of the base where none are."""
    halves = [_halves(len(task.extraction), seed, task.task) for task in tasks]
    of_expert: list[Tokens] = []
    of_base: list[Tokens] = []
    for task, both in zip(tasks, halves, strict=True):
        for half in both:
            of_expert += [
                [task.extraction[i] for i in half],
                [task.contrasts[i] for i in half] if task.contrasts else [],
            ]
            of_base.append([] if task.contrasts else [task.extraction[i] for i in half])
    depth = pair.expert.depth
    expert = [mean_LD.cpu() for mean_LD in mean_residuals(pair.expert, of_expert, depth, batch_size, tick)]
    base = [mean_LD.cpu() for mean_LD in mean_residuals(pair.base, of_base, depth, batch_size, tick)]
    found = []
    for place, (task, both) in enumerate(zip(tasks, halves, strict=True)):
        with_, contrast = expert[4 * place : 4 * place + 4 : 2], expert[4 * place + 1 : 4 * place + 4 : 2]
        without = contrast if task.contrasts else base[2 * place : 2 * place + 2]
        one_LD, other_LD = (x - y for x, y in zip(with_, without, strict=True))
        share = len(both[0]) / len(task.extraction)
        v_LD = share * one_LD + (1 - share) * other_LD
        if both[0]:
            noise_LD = with_[0] - with_[1]
            found.append(HalvedDirections(v_LD.float(), (one_LD.float(), other_LD.float()), noise_LD.float()))
        else:
            found.append(HalvedDirections(v_LD.float()))
    return found


def _halves(count: int, seed: int, task: str) -> tuple[list[int], list[int]]:
    order = shuffled(range(count), seed, task)
    return order[: count // 2], order[count // 2 :]


@dataclass(frozen=True)
class Activity:
    """Mean activations of one task at the anchor: heads [L, Q], neurons [L, F], float32."""

    tables: Mapping[Kind, torch.Tensor]

    def of(self, component: Component, geometry: Geometry) -> torch.Tensor:
        """Of one component: d_h numbers of a head, one of a neuron."""
        columns = geometry.columns(component.kind, torch.tensor([component.index]))[0]
        return self.tables[component.kind][component.layer, columns]


def anchor_activity(stack: Stack, tasks: Sequence[TaskTokens], batch_size: int, tick: Tick) -> list[Activity]:
    """Of every task, over its scoring prompts: one sweep."""
    items = [(i, batch) for i, task in enumerate(tasks) for batch in batches(task.scoring, batch_size, stack)]
    totals: list[dict[Kind, list[torch.Tensor]]] = [{kind: [] for kind in Kind} for _ in tasks]
    sums: dict[tuple[int, Kind, int], torch.Tensor] = {}
    for group in batch_groups(stack, items, lambda item: item[1].ids_BT.numel()):
        starts = [stack.start(batch) for _i, batch in group]
        for layer, place, _module, record in recorded_sweep(stack, starts, stack.depth):
            i, batch = group[place]
            for kind, key in _READ.items():
                own = batch.at_anchor(record.inputs[key]).double().sum(0).cpu()
                sums[i, kind, layer] = sums.get((i, kind, layer), torch.zeros(())) + own
            tick(len(batch.last_B) / stack.depth)
    for (i, kind, _layer), total in sorted(sums.items()):
        totals[i][kind].append(total / len(tasks[i].scoring))
    return [Activity({kind: torch.stack(rows).float() for kind, rows in found.items()}) for found in totals]
