"""Gauges: a utility read off the residual stream above one layer, at the anchor position.

    anchor       cos(z, v) at the anchor layer                                   Eq. 5
    projection   cos(z, v) at the last layer                                     Eq. 74
    kl           -KL(p_sft || p_M) of the next token, at the last layer, nats    Eq. 72

A scoring utility is one gauge, or two: `staged` reads `anchor` for components up to the anchor layer, and `kl` for
those above it, which the anchor cannot see (METHOD.md 2); `staged-projection` reads `projection` there.

Legend: B prompts, D residual width, V vocabulary rows; ... any leading dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from mergekit_wp.scoring.stack import Stack
from mergekit_wp.scoring.utilities import anchor_utility, kl_utility

# dF/dlogits is a difference of probabilities, mostly far below what float16 products keep; at most 1, though.
_SCALE = 2.0**10


@dataclass(frozen=True)
class Gauge(ABC):
    """`name` of the utility and the `layer` above which it is read."""

    name: str
    layer: int

    @abstractmethod
    def expert(self, stack: Stack, z_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(F(expert) [B], what `read` compares with), from the expert's stream."""

    @abstractmethod
    def read(self, stack: Stack, z_BD: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """F [..., B] float64 from streams [..., B, D]."""

    def read_with_pull(
        self, stack: Stack, z_BD: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(F [B], dF/dz [B, D]); a prompt's F depends on its own z alone."""
        with torch.enable_grad():
            z_BD = z_BD.detach().requires_grad_(True)
            value_B = self.read(stack, z_BD, target)
            (pull_BD,) = torch.autograd.grad(_SCALE * value_B.sum(), z_BD)
        return value_B.detach(), pull_BD / _SCALE


@dataclass(frozen=True)
class CosineGauge(Gauge):
    """cos(z, v) with the direction v [D]."""

    direction_D: torch.Tensor

    def expert(self, stack: Stack, z_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.read(stack, z_BD, self.direction_D), self.direction_D

    def read(self, stack: Stack, z_BD: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return anchor_utility(z_BD, target)


@dataclass(frozen=True)
class DivergenceGauge(Gauge):
    """-KL(p_expert || p) of the next token over the first `vocabulary` rows."""

    vocabulary: int

    def expert(self, stack: Stack, z_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(z_BD), dtype=torch.float64, device=z_BD.device), stack.logits(z_BD, self.vocabulary)

    def read(self, stack: Stack, z_BD: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return kl_utility(stack.logits(z_BD, self.vocabulary), target)


def make_gauges(
    utility: str, layers: int, vocabulary: int, anchor_layer: int | None, v_LD: torch.Tensor | None
) -> tuple[Gauge, ...]:
    """The gauges of a utility, lowest first; `kl` alone takes no anchor layer and no directions."""
    kl = DivergenceGauge("kl", layers - 1, vocabulary)
    if utility == "kl":
        return (kl,)
    assert anchor_layer is not None
    assert v_LD is not None
    anchor = CosineGauge("anchor", anchor_layer, v_LD[anchor_layer])
    if utility == "anchor":
        return (anchor,)
    above = kl if utility == "staged" else CosineGauge("projection", layers - 1, v_LD[layers - 1])
    if utility == "projection":
        return (above,)
    # An anchor at the last layer leaves nothing above it.
    return (anchor, above) if anchor_layer < layers - 1 else (anchor,)


def gauge_of(gauges: tuple[Gauge, ...], layer: int) -> Gauge | None:
    """The gauge that scores the components of `layer`: the lowest that sees it; None if none does."""
    return next((gauge for gauge in gauges if layer <= gauge.layer), None)
