"""An expert's update with its numbers in random places, a layer at a time: the null that scores stand beside.

Each projection that components are cut from is W + shuffle(W' - W), biases likewise: a change as large as the expert's
and as spread in its numbers, that aims at nothing. Its components are scored as the expert's are, by the same utility,
gap and prompts. What they get is what any change of this size does to the capability: the floor (`floor`). It is not
what the shuffled model as a whole restores of a gap of its own, by which every null would be a capability.

Nothing is written: a layer is shuffled where it is scored, in an order drawn on the device by a seed, the layer and the
projection, so that it is the same for all prompts.
"""

from __future__ import annotations

import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from mergekit_wp.geometry import PROJECTIONS

_KEYS = {path: key for key, path in PROJECTIONS.items()}


def shuffle(change: torch.Tensor, seed: str) -> torch.Tensor:
    """The same numbers in the order that the seed draws on the tensor's device."""
    generator = torch.Generator(change.device).manual_seed(random.Random(seed).getrandbits(63))
    order = torch.randperm(change.numel(), generator=generator, device=change.device)
    return change.flatten()[order].view_as(change)


class ShuffledLayer:
    """Stands in for the expert's layer where its weights are held against the base's (`patching.weight_difference`)."""

    def __init__(self, base: Any, expert: Any, seed: str):
        self._base, self._expert, self._seed = base, expert, seed
        self.get_submodule = cache(self._shuffled)

    @torch.no_grad()
    def _shuffled(self, path: str) -> SimpleNamespace:
        """weight [out, in] and bias [out] or None, float32, of a projection."""
        own, expert = self._base.get_submodule(path), self._expert.get_submodule(path)
        return SimpleNamespace(**{
            name: None if (mine := getattr(own, name)) is None else mine.float()
            + shuffle(getattr(expert, name).float() - mine.float(), f"{self._seed}/{_KEYS[path]}/{name}")
            for name in ("weight", "bias")
        })  # fmt: skip
