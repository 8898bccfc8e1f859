"""Anchor directions of a task at every layer, from one sweep over its extraction pairs.

    v(l) = mean over pairs of z_l(x+ | expert) - z_l(x- | expert)                Eq. 3
    v(l) = mean over prompts of z_l(x | expert) - z_l(x | base)                  without contrasts (METHOD.md 2)

z_l(x | M) is the residual stream after layer l at the anchor position, the prompt's last token.

Legend: L layers swept, D residual width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_wp.console import Tick
from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.batching import TaskTokens, Tokens, batches
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.models.precision import not_finite
from mergekit_wp.scoring.sweep import batch_groups, forward_sweep


@dataclass(frozen=True)
class Directions:
    """Of one task, float32: v_LD the direction after each layer; mean_LD the mean of z_l(x+ | expert)."""

    v_LD: torch.Tensor
    mean_LD: torch.Tensor

    @property
    def alpha_L(self) -> torch.Tensor:
        """The expert's mean projection on the unit direction of each layer (Eq. 35): steering's target."""
        unit_LD = torch.nn.functional.normalize(self.v_LD, dim=-1)
        return (self.mean_LD * unit_LD).sum(-1)  # the mean of projections is the projection of the mean


def extract_all(
    base: Stack,
    expert: Stack,
    tasks: Sequence[TaskTokens],
    depth: int,
    batch_size: int,
    tick: Tick = lambda _n: None,
    processes: ProcessGroup | None = None,
) -> list[Directions]:
    """Directions of every task after layers 0 to depth-1, each model swept once.

    Raises `BadInput` when one is not finite. Whether one vanishes matters at the layers used: see `check_present`.
    """
    wanted = [task.extraction for task in tasks]
    without = [task.contrasts or [] for task in tasks]
    of_base = [[] if task.contrasts else task.extraction for task in tasks]
    with_LD = mean_residuals(expert, wanted + without, depth, batch_size, tick, processes)
    bare_LD = mean_residuals(base, of_base, depth, batch_size, tick, processes)
    found = []
    for i, task in enumerate(tasks):
        without_LD = with_LD[len(tasks) + i] if task.contrasts else bare_LD[i]
        v_LD = with_LD[i] - without_LD
        if not torch.isfinite(v_LD).all():
            raise not_finite(f"task {task.task}: its anchor direction", expert.dtype)
        found.append(Directions(v_LD.float(), with_LD[i].float()))
    return found


def check_present(tasks: Sequence[TaskTokens], directions: Sequence[Directions], layers: Sequence[int]) -> None:
    """Raises `BadInput` when a task's direction after one of `layers` is zero."""
    for task, found in zip(tasks, directions, strict=True):
        for layer in layers:
            if not found.v_LD[layer].any():
                raise BadInput(
                    f"task {task.task}: prompts and contrasts leave the same residual at layer {layer}, so there is no "
                    "anchor direction; check the pairs and the expert, or score with --utility kl, which needs none."
                )


def mean_residuals(
    stack: Stack,
    sets: Sequence[Tokens],
    depth: int,
    batch_size: int,
    tick: Tick = lambda _n: None,
    processes: ProcessGroup | None = None,
) -> list[torch.Tensor]:
    """Of every set of prompts, the mean of z_l(x) after every layer: float64 [depth, D] on the stack's device.

    All sets share one sweep; that of an empty set is zero. Several processes share the batches.
    """
    processes = processes or ProcessGroup()
    every = [(i, batch) for i, prompts in enumerate(sets) for batch in batches(prompts, batch_size, stack)]
    totals = [torch.zeros(depth, stack.width, dtype=torch.float64, device=stack.device) for _ in sets]
    for parts in batch_groups(stack, processes.share(every), lambda part: part[1].ids_BT.numel()):
        starts = [stack.start(batch) for _i, batch in parts]
        for layer, streams in forward_sweep(stack, starts, depth, at=[batch.reads_BA for _i, batch in parts]):
            for (i, batch), stream_BTD in zip(parts, streams, strict=True):
                totals[i][layer] += batch.at_anchor(stream_BTD).double().sum(0)
            tick(processes.size * sum(len(batch.last_B) for _i, batch in parts) / depth)
    return [processes.add_up(total) / max(len(prompts), 1) for total, prompts in zip(totals, sets, strict=True)]
