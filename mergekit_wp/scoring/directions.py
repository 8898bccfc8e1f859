"""Anchor directions of a task at every layer, from one sweep over its extraction pairs.

    v(l) = mean over pairs of z_l(x+ | expert) - z_l(x- | expert)                Eq. 3
    v(l) = mean over prompts of z_l(x | expert) - z_l(x | base)                  without contrasts (METHOD.md 2)

z_l(x | M) is the residual stream after layer l at the anchor position, the prompt's last token.

Legend: L layers swept, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.batches import TaskTokens, Tokens, batches
from mergekit_wp.scoring.stack import Stack, Start

Tick = Callable[[int], object]


@dataclass(frozen=True)
class Directions:
    """Of one task, float32: v_LD the direction after each layer; mean_LD the mean of z_l(x+ | expert)."""

    v_LD: torch.Tensor
    mean_LD: torch.Tensor

    @property
    def alpha_L(self) -> torch.Tensor:
        """The expert's mean projection on the unit direction of each layer (Eq. 36): steering's target."""
        unit_LD = torch.nn.functional.normalize(self.v_LD, dim=-1)
        return (self.mean_LD * unit_LD).sum(-1)  # the mean of projections is the projection of the mean


@torch.no_grad()
def ascend(stack: Stack, starts: Sequence[Start], depth: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Sweep up through layers 0 to depth-1 without gradients; after each, (layer, residual streams [B, T, D]).

    Layers are the outer loop, so each is read once however many batches there are. The list is the same one at
    every step; its entries are replaced.
    """
    streams = [start.stream_BTD for start in starts]
    for index, layer in enumerate(stack.layers(range(depth))):
        for i, start in enumerate(starts):
            streams[i] = stack.call(layer, streams[i], start.calls[index])
        yield index, streams


def extract_directions(
    base: Stack, expert: Stack, task: TaskTokens, depth: int, batch_size: int, tick: Tick = lambda _n: None
) -> Directions:
    """Directions after layers 0 to depth-1. Raises `BadInput` when one is not finite or vanishes everywhere."""
    with_capability_LD = mean_residuals(expert, task.extraction, depth, batch_size, tick)
    if task.contrasts:
        without_LD = mean_residuals(expert, task.contrasts, depth, batch_size, tick)
    else:
        without_LD = mean_residuals(base, task.extraction, depth, batch_size, tick)
    v_LD = with_capability_LD - without_LD
    if not torch.isfinite(v_LD).all() or not v_LD[-1].any():
        raise BadInput(
            f"task {task.task}: prompts and contrasts leave the same residual at layer {depth - 1}, so there is no "
            "anchor direction; check the pairs and the expert."
        )
    return Directions(v_LD.float(), with_capability_LD.float())


def mean_residuals(
    stack: Stack, prompts: Tokens, depth: int, batch_size: int, tick: Tick = lambda _n: None
) -> torch.Tensor:
    """Mean over prompts of z_l(x) after every layer, float64 [depth, D] on the stack's device."""
    parts = list(batches(prompts, batch_size, stack.device))
    starts = [stack.start(part) for part in parts]
    total_LD = torch.zeros(depth, stack.width, dtype=torch.float64, device=stack.device)
    for layer, streams in ascend(stack, starts, depth):
        for part, stream_BTD in zip(parts, streams, strict=True):
            total_LD[layer] += part.at_anchor(stream_BTD).double().sum(0)
    tick(len(prompts))
    return total_LD / len(prompts)
