"""`family: cross`: weights of every component in one shot, from what experts do to one another's answers.

At the base, J_ts(c, x) is to first order what component c of expert s does to the share of t's gap that is recovered on
t's prompt x (`attr` of the whole answer, Eq. 11, keys and values included). An expert t alone has the effect J_tt. Of
each component the weights are those with which the merge has, on everyone's prompts, the effect that each expert has on
its own:

    min over alpha(c) of   mean_t mean_x (sum_s alpha_s(c) J_ts(c, x) - J_tt(c, x))^2 + lambda |alpha(c) - alpha_0|^2

Where nobody's component does anything to the others' answers that is the sum (alpha = 1), where all do the same the
shares, and what does harm is shrunk. The ridge draws what has no effect towards the plain average at its best scale,
alpha_0. Then the scale of the whole is tried, as in every other family.

One forward and one backward pass of the base for each prompt, and K products a layer; nothing is repeated.

Legend: K experts, L layers, B prompts of a batch, n heads or neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mergekit_wp.console import Tick
from mergekit_wp.fit.gradient import Gradient, passes
from mergekit_wp.fit.objective import LessonBatch
from mergekit_wp.fit_file import FusionWeights
from mergekit_wp.geometry import Geometry
from mergekit_wp.scoring.batching import Batch
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.first_order import attr_heads, attr_neurons, attr_rows
from mergekit_wp.scoring.hooks import LayerRecord
from mergekit_wp.scoring.models.merged import MergedStack
from mergekit_wp.scoring.packing import PackedBatch

RIDGE = 0.1  # of the mean diagonal of a layer's heads or neurons


def cross_weights(
    merged: MergedStack,
    batches: Sequence[LessonBatch],
    weights_N: torch.Tensor,
    average: FusionWeights,
    vocabulary: int,
    processes: ProcessGroup,
    tick: Tick,
) -> FusionWeights:
    """alpha of every head and neuron, from 0 up; `average` is alpha_0, and stays where there is no component.

    batches: none of them packed, since effects are each prompt's own.
    weights_N: what effects on each prompt are multiplied by before they are squared: 1 / (g_t sqrt(K N_t)), with the
    mean gap g_t and the number of prompts N_t of its expert.
    """
    assert not any(isinstance(each.batch, PackedBatch) for each in batches)
    merged.set(average.scaled(0.0))
    products = EffectProducts(merged)
    passes(merged, batches, -weights_N, vocabulary, products, processes, tick)
    heads_KLH, neurons_KLF = (
        _solved(processes.add_up(gram).cpu(), processes.add_up(wanted).cpu(), prior_KLn)
        for (gram, wanted), prior_KLn in zip(products.sums, (average.heads_KLH, average.neurons_KLF), strict=True)
    )
    return FusionWeights(heads_KLH, neurons_KLF, average.rest_K)


def _solved(gram_LnKK: torch.Tensor, wanted_LnK: torch.Tensor, prior_KLn: torch.Tensor) -> torch.Tensor:
    """The alphas [K, L, n] of the sums over prompts of J J^T and J J_tt."""
    K = gram_LnKK.shape[-1]
    ridge_L = RIDGE * gram_LnKK.diagonal(dim1=-2, dim2=-1).mean((1, 2)).clamp(min=1e-30)
    eye_KK = torch.eye(K, dtype=gram_LnKK.dtype)
    left = gram_LnKK + ridge_L[:, None, None, None] * eye_KK
    right = wanted_LnK + ridge_L[:, None, None] * prior_KLn.permute(1, 2, 0).double()
    return torch.linalg.solve(left, right).clamp(min=0).permute(2, 0, 1).float()


class EffectProducts(Gradient):
    """For heads and neurons, the sums over prompts of J_s J_u [L, n, K, K] and of J_s J_tt [L, n, K], float64."""

    def __init__(self, merged: MergedStack):
        super().__init__(merged)
        shape, K, device = merged.geometry, len(merged.experts), merged.device
        self.sums = [
            tuple(torch.zeros(shape.layers, n, *size, dtype=torch.float64, device=device) for size in ((K, K), (K,)))
            for n in (shape.heads, shape.neurons)
        ]

    def of_layer(self, index: int, record: LayerRecord, teacher: int) -> None:
        record.by_prompt = True
        base, experts = self.merged.sources(index)
        effects: Any = [component_effects(base, expert, record, self.geometry) for expert in experts]
        for (gram, wanted), each in zip(self.sums, zip(*effects, strict=True), strict=True):
            effect_KBn = torch.stack(each).double()
            gram[index] += torch.einsum("kbn,jbn->nkj", effect_KBn, effect_KBn)
            wanted[index] += torch.einsum("kbn,bn->nk", effect_KBn, effect_KBn[teacher])

    def meet(self, index: int) -> None:
        """Every batch was taken as it came."""

    def of_outer(self, *_seen: Any) -> torch.Tensor:
        """Norm and output head are no components."""
        return torch.zeros_like(self.rest_K)

    def of_input(self, batch: Batch, gradient_BTD: torch.Tensor) -> None:
        """Embeddings are no component."""


def component_effects(
    base: nn.Module, expert: nn.Module, record: LayerRecord, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """dS/dalpha_k of every head [..., H] and neuron [..., F] of one layer, float32.

    Keys and values have the mean weight of their group's query heads, so each of these has its part of what they give.
    """
    queries_H, written_H = attr_heads(base, expert, record, geometry).values()
    rows_K = attr_rows("k", base, expert, record) + attr_rows("v", base, expert, record)
    groups = rows_K.unflatten(-1, (geometry.kv_heads, geometry.head_dim)).sum(-1) / geometry.group_size
    gate_F, up_F, down_F = attr_neurons(base, expert, record, geometry).values()
    return queries_H + written_H + groups.repeat_interleave(geometry.group_size, -1), gate_F + up_F + down_F
