"""What of a merge has a weight of its own: from a few numbers to the weight of every component, and back.

    expert      one number an expert, for all that it has                                          K
    layer       of each expert, one for the heads of a layer, one for its neurons, one for the rest K (2 L + 1)
    component   of each expert, one for every head, every neuron, and one for the rest              K (L (H + F) + 1)

A family is a map from each weight to the number that it is, so that what the loss says of weights is added up for
those that are the same number (the chain rule of a copy).

Legend: K experts, L layers, H heads, F neurons a layer, P numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergekit_wp.fit_file import FusionWeights
from mergekit_wp.geometry import Geometry


@dataclass(frozen=True)
class WeightFamily:
    """Of every weight, the number (0 to P-1) that it is: heads_KLH, neurons_KLF, rest_K, all int64."""

    heads_KLH: torch.Tensor
    neurons_KLF: torch.Tensor
    rest_K: torch.Tensor

    @classmethod
    def named(cls, name: str, experts: int, geometry: Geometry) -> WeightFamily:
        """`expert`, `layer` or `component`."""
        K, L, H, F = experts, geometry.layers, geometry.heads, geometry.neurons
        k = torch.arange(K)[:, None, None]
        if name == "expert":
            return cls(k.repeat(1, L, H), k.repeat(1, L, F), torch.arange(K))
        layer = torch.arange(L)[None, :, None]
        if name == "layer":
            each = 2 * L + 1
            first = k * each + 2 * layer
            return cls(first.repeat(1, 1, H), (first + 1).repeat(1, 1, F), torch.arange(K) * each + 2 * L)
        each = L * (H + F) + 1
        first = k * each + layer * (H + F)
        return cls(first + torch.arange(H), first + H + torch.arange(F), torch.arange(K) * each + L * (H + F))

    @property
    def numbers(self) -> int:
        """P."""
        return 1 + max(int(x.max()) for x in (self.heads_KLH, self.neurons_KLF, self.rest_K))

    def spread(self, number_P: torch.Tensor) -> FusionWeights:
        """The weights of these numbers."""
        return FusionWeights(number_P[self.heads_KLH], number_P[self.neurons_KLF], number_P[self.rest_K])

    def gather(self, gradient: FusionWeights) -> torch.Tensor:
        """dL/dnumber [P] from dL/dweight: the sum over the weights that a number is."""
        return self._sum(gradient).float()

    def mean(self, weights: FusionWeights) -> torch.Tensor:
        """The numbers [P] nearest to these weights: the mean of those that a number is."""
        ones = FusionWeights(*(torch.ones_like(x) for x in (weights.heads_KLH, weights.neurons_KLF, weights.rest_K)))
        return (self._sum(weights) / self._sum(ones)).float()

    def nearest(self, weights: FusionWeights) -> FusionWeights:
        """The weights of the family that are nearest to these."""
        return self.spread(self.mean(weights))

    def _sum(self, weights: FusionWeights) -> torch.Tensor:
        """Of what every number is, float64 [P]."""
        total_P = torch.zeros(self.numbers, dtype=torch.float64)
        for index, values in (
            (self.heads_KLH, weights.heads_KLH), (self.neurons_KLF, weights.neurons_KLF), (self.rest_K, weights.rest_K)
        ):  # fmt: skip
            total_P.index_add_(0, index.flatten(), values.double().flatten())
        return total_P
