"""Steering a model along a direction.

    v^ = v / |v|,   alpha = mean <z_a(x+ | expert), v^>,   z <- z + (alpha - <z, v^>) v^        Eq. 34-37

input-adaptive: whatever z has along v^, it leaves with alpha. By default the whole prompt is steered and the answer
runs free: alpha is what the expert has where an answer is about to begin, and a model held there begins again and
again (`<<<<<<<<` instead of a title). In the miniature world (seed 0, 32 prompts a type) the six instruction types
recover 65 % of the gap so at the best layer, 58 % if the anchor position alone is steered, 10 % if the answer is
steered too. That last way, `all`, is what lm-eval's steered model does with the .pt of `wp-anchor` (a test holds the
two together).

`steered` does it to a model of transformers, `SteeredRows` to every row of a batch in its own way, so that a base
steered at many layers answers in one pass.

Legend: B prompts, T tokens, S all tokens up to the last, N prompts answered, D residual width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from mergekit_wp.errors import BadInput, shown
from mergekit_wp.geometry import text_tower
from mergekit_wp.scoring.models.layerwise import Call, ResidentStack, Stack, Start

POSITIONS = ("prompt", "all", "anchor", "answer")
_STEERED = "steered_rows"  # of a layer's call: ways, and the rows of each


def check_positions(positions: str) -> None:
    """Raises `BadInput` for a word that is none of `POSITIONS`."""
    if positions not in POSITIONS:
        raise BadInput(f"positions: found {shown(positions)}, expected one of {', '.join(POSITIONS)}.")


@dataclass(frozen=True)
class Steering:
    """Clamp the stream above decoder layer `layer` to `alpha` along `v_D` (any length but 0).

    positions  prompt: the prompt's tokens; all: those and everything generated; anchor: the prompt's last token, the
               anchor position; answer: that and everything generated
    """

    layer: int
    v_D: torch.Tensor
    alpha: float
    positions: str = "prompt"

    def __post_init__(self) -> None:
        check_positions(self.positions)

    def changes(self, reads_prompt: bool) -> bool:
        """Whether anything is steered in a pass that reads prompts, or in one that goes on from them."""
        return reads_prompt or self.positions in ("all", "answer")

    def clamp(self, z_BTD: torch.Tensor) -> torch.Tensor:
        """Eq. 37 at every position given, in float32; same shape and dtype as `z_BTD`."""
        unit_D = nn.functional.normalize(self.v_D.to(z_BTD.device, torch.float32), dim=-1)
        z = z_BTD.float()
        return (z + (self.alpha - z @ unit_D)[..., None] * unit_D).to(z_BTD.dtype)

    def at(self, z_BTD: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
        """The stream of whole prompts, steered; `last_B` is where each prompt's last token stands."""
        if self.positions in ("all", "prompt"):
            return self.clamp(z_BTD)
        rows_B, steered_BTD = torch.arange(len(z_BTD), device=z_BTD.device), z_BTD.clone()
        steered_BTD[rows_B, last_B] = self.clamp(z_BTD[rows_B, last_B])
        return steered_BTD


@contextmanager
def steered(model: Any, steering: Steering) -> Iterator[None]:
    """Inside the block, `model` (a causal LM of transformers) runs steered.

    A forward pass that finds nothing in its cache (or has none) reads prompts, padded on the left if at all; later ones
    go on from what is in the cache, a generated token each. So any number of answers may be generated.
    """
    reads_prompt = True

    def on_input(_module: nn.Module, _args: Any, call: dict[str, Any]) -> None:
        nonlocal reads_prompt
        cache = call.get("past_key_values")
        reads_prompt = cache is None or not cache.get_seq_length(steering.layer)

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not steering.changes(reads_prompt):
            return None
        z_BTD = output[0] if isinstance(output, tuple) else output
        last_B = torch.full((len(z_BTD),), z_BTD.shape[1] - 1, device=z_BTD.device)
        changed = steering.at(z_BTD, last_B)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    layer = text_tower(model).layers[steering.layer]
    handles = [layer.register_forward_pre_hook(on_input, with_kwargs=True), layer.register_forward_hook(on_output)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class SteeredRows(ResidentStack):
    """A resident model that answers every prompt steered in one of several ways, or not; for `Stack.go_on` alone, which
    is told the numbers of the prompts.

    ways  None: as the model is
    of_N  each prompt's place in them
    """

    def __init__(self, stack: Stack, ways: Sequence[Steering | None], of_N: Sequence[int]):
        super().__init__(stack.model, stack.device, stack.dtype)
        self.ways, self.of_N = ways, of_N

    def go_on(self, ids_BT: torch.Tensor, mask_BS: torch.Tensor, cache: Cache, numbers: Sequence[int] = ()) -> Start:
        reads_prompt = not cache.get_seq_length()
        start = super().go_on(ids_BT, mask_BS, cache)
        rows: dict[int, list[int]] = {}
        for row, number in enumerate(numbers):
            rows.setdefault(self.of_N[number], []).append(row)
        for way, of_way in rows.items():
            steering = self.ways[way]
            if steering is not None and steering.changes(reads_prompt):
                start.calls[steering.layer].setdefault(_STEERED, []).append((steering, of_way))
        return start

    def call(self, layer: nn.Module, stream_BTD: torch.Tensor, call: Call) -> torch.Tensor:
        above_BTD = super().call(layer, stream_BTD, {name: value for name, value in call.items() if name != _STEERED})
        for steering, rows in call.get(_STEERED, ()):
            # Prompts are padded on the left here, so the last token of each is the last of all.
            last_B = torch.full((len(rows),), above_BTD.shape[1] - 1, device=above_BTD.device)
            above_BTD[rows] = steering.at(above_BTD[rows], last_B)
        return above_BTD
