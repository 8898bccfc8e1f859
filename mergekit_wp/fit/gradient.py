"""The gradient of the fit's loss by the weights of a merge (METHOD.md 6).

The merge is linear in its weights w, so the gradient is Weight Patching's attribution (Eq. 11) with the merge in the
place of the base:

    dL/dw_k(c) = sum over the parameters p of c of (theta_k - theta_base)_p dL/dp

1. forward    the merge runs up to its output, keeping the input of every layer
2. loss       at the positions of the answers alone; there, what output head and final norm contribute
3. backward   layer by layer, dL/dW of each projection, summed over `SUMMED` tokens, which then meets the changes
              W_k - W_base of every expert element by element, and is gone before the next projection's is formed. So a
              step takes three products a projection (forward, through it, dL/dW) however many experts there are, and
              the memory of one matrix more, and of those tokens' activations and gradients. Norms and biases, which are
              small, by autograd; the embeddings, in which layer 0's input is linear, by what enters it

What is summed together depends on the prompts alone and not on the memory that happens to be free: a fit that was
killed goes on to the same bytes.

Legend: K experts, L layers, H heads, F neurons, B prompts, A positions of an answer, N = positions of all answers of a
batch, or all its tokens, T tokens, D residual width, O rows and I columns of a matrix, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from operator import attrgetter

import torch
from torch import nn

from mergekit_wp.checkpoint.vocabulary import align_rows
from mergekit_wp.console import Tick
from mergekit_wp.fit.objective import LessonBatch, add_up, finite, teachers_of
from mergekit_wp.fit_file import FusionWeights
from mergekit_wp.geometry import PROJECTIONS, TensorSlot, slot_of
from mergekit_wp.memory import free_memory
from mergekit_wp.scoring.batching import Batch, rows_of
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.hooks import SCORED, LayerRecord
from mergekit_wp.scoring.metrics import answer_mean, kl_utility
from mergekit_wp.scoring.models.merged import MergedStack, outer_modules
from mergekit_wp.scoring.models.precision import loss_scale
from mergekit_wp.scoring.sweep import ActivationCache, backward_sweep, batch_groups, portions

SUMMED = 2048  # tokens whose dL/dW is summed (a batch at least): enough that the changes are read seldom
_FITTED = (*SCORED, "k", "v")
_MOST_LOGITS = 1 << 27  # numbers at once: half a gigabyte
_MOST_MET = 1 << 20  # of a matrix, numbers that meet the experts' changes at once: 4 MB


def loss_and_gradient(
    merged: MergedStack,
    batches: Sequence[LessonBatch],
    weights_N: torch.Tensor,
    vocabulary: int,
    processes: ProcessGroup,
    tick: Tick,
) -> tuple[torch.Tensor, FusionWeights]:
    """(KL_t(x | merge) of every lesson, float64 [N]; the gradient of sum_x weights(x) KL(x)), on the CPU.

    Raises `BadInput` where one of them is not finite.
    """
    gradient = Gradient(merged)
    found_N = passes(merged, batches, weights_N, vocabulary, gradient, processes, tick)
    total = gradient.total(processes)
    for each_K in (total.heads_KLH, total.neurons_KLF, total.rest_K):
        finite(each_K, merged)
    return found_N, total


def passes(
    merged: MergedStack,
    batches: Sequence[LessonBatch],
    weights_N: torch.Tensor,
    vocabulary: int,
    gradient: Gradient,
    processes: ProcessGroup,
    tick: Tick,
) -> torch.Tensor:
    """As `loss_and_gradient`, into a `gradient` of the caller's, which holds this process's share of the sums."""
    found_N = torch.zeros(len(weights_N), dtype=torch.float64)
    together = list(portions(processes.share(batches), lambda each: each.batch.ids_BT.numel(), SUMMED))
    for group in batch_groups(merged, together, _tokens):
        _pass(merged, group, weights_N, vocabulary, found_N, gradient, processes.ticking(tick))
    return finite(add_up(found_N, processes, merged), merged)


def _tokens(batches: Sequence[LessonBatch]) -> int:
    return sum(each.batch.ids_BT.numel() for each in batches)


def _pass(
    merged: MergedStack,
    together: Sequence[Sequence[LessonBatch]],
    weights_N: torch.Tensor,
    vocabulary: int,
    found_N: torch.Tensor,
    gradient: Gradient,
    tick: Tick,
) -> None:
    """Forward and backward of batches that go through the layers together, in the portions whose dL/dW is summed;
    writes their losses and adds to the gradient."""
    group = [each for batches in together for each in batches]
    ends = set(accumulate(map(len, together)))
    starts = [merged.start(each.batch) for each in group]
    cache = ActivationCache(
        starts,
        [each.batch.reads_BA for each in group],
        merged.depth,
        keep_graphs=not merged.streamed and _tokens(group) <= _most_graphs(merged),
        offload=merged.streamed and merged.device.type != "cpu",
        projections=_FITTED,
    )
    prompts, streams = sum(len(each.numbers) for each in group), [start.stream_BTD for start in starts]
    for _index, above in cache.forward(merged):
        streams = above
        tick(prompts / (2 * merged.depth))
    tops: list[torch.Tensor] = []
    for each, final_BTD in zip(group, streams, strict=True):
        kl_B, gradient_ND = gradient.of_output(each, final_BTD, weights_N[each.numbers], vocabulary)
        found_N[each.numbers] = kl_B
        gradient_BTD = torch.zeros_like(final_BTD)
        mask_BA, reads_BA = each.mask_BA, each.batch.reads_BA
        rows_BA = rows_of(final_BTD, reads_BA).expand_as(reads_BA)
        gradient_BTD[rows_BA[mask_BA], reads_BA[mask_BA]] = gradient_ND
        tops.append(gradient_BTD)
    merged.forget_head()

    def inject(_index: int, i: int, above_BTD: torch.Tensor | None) -> torch.Tensor:
        return tops[i] if above_BTD is None else above_BTD

    def consume(index: int, i: int, _layer: nn.Module, _other: None, record: LayerRecord) -> None:
        gradient.of_layer(index, record, group[i].teacher)
        if i + 1 in ends:
            gradient.meet(index)
        tick(len(group[i].numbers) / (2 * merged.depth))

    entering = backward_sweep(merged, None, cache, inject, consume, through=True)
    for each, gradient_BTD in zip(group, entering, strict=True):
        gradient.of_input(each.batch, gradient_BTD)


def _most_graphs(merged: MergedStack) -> int:
    """Of how many tokens the graphs of all layers may be kept, which saves the second forward pass: what takes a
    quarter of the memory that is free."""
    shape = merged.geometry
    floats = 10 * shape.d_model + 6 * shape.heads * shape.head_dim + 6 * shape.neurons
    return free_memory(merged.device) // (4 * 4 * floats * shape.layers)


class Gradient:
    """The sums of dS/dw_k, float64, where S = sum_x weight(x) KL(x)."""

    def __init__(self, merged: MergedStack):
        self.merged, self.geometry, count = merged, merged.geometry, len(merged.experts)
        shape = self.geometry
        sizes = (shape.layers, shape.heads), (shape.layers, shape.neurons), ()
        self.heads_KLH, self.neurons_KLF, self.rest_K = (
            torch.zeros(count, *size, dtype=torch.float64, device=merged.device) for size in sizes
        )
        self._held: list[LayerRecord] = []

    def total(self, processes: ProcessGroup) -> FusionWeights:
        sums = (processes.add_up(x) for x in (self.heads_KLH, self.neurons_KLF, self.rest_K))
        return FusionWeights(*(x.float().cpu() for x in sums))

    def of_output(
        self, each: LessonBatch, final_BTD: torch.Tensor, weights_B: torch.Tensor, vocabulary: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(KL [B] float64 on the CPU, dS/d(stream at the answers' positions) [N, D]); adds what norm and head give."""
        final_ND, targets_ND = each.batch.at_reads(final_BTD)[each.mask_BA], each.targets(self.merged.device)
        spread_BA = weights_B.to(final_ND.device)[:, None] * each.batch.weights_BA
        weights_N = spread_BA[each.mask_BA]
        kl, gradients = [], []
        for part in _parts(len(final_ND), vocabulary):
            with torch.no_grad():
                teacher_NV = teachers_of(self.merged)[each.teacher].logits(targets_ND[part], vocabulary)
            kl_N, gradient_ND = self._through_head(final_ND[part], teacher_NV, weights_N[part], vocabulary)
            kl.append(kl_N)
            gradients.append(gradient_ND)
        return answer_mean(torch.cat(kl), each.batch.weights_BA).cpu(), torch.cat(gradients)

    def _through_head(
        self, final_ND: torch.Tensor, teacher_NV: torch.Tensor, weights_N: torch.Tensor, vocabulary: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        merged, seen = self.merged, {}
        merged.read_head()
        outer = outer_modules(merged)

        def catch(_module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            seen["read"], seen["written"] = args[0], output

        small = {(i, name): p for i, each in enumerate(outer) for name, p in each.named_parameters() if p.requires_grad}
        # Weights are a share of a prompt's: in float16, gradients that small would vanish.
        scale = 2.0**10 / weights_N.abs().max().clamp(min=1e-30)
        handle = outer[1].register_forward_hook(catch)
        try:
            with torch.enable_grad():
                z_ND = final_ND.detach().requires_grad_(True)
                kl_N = -kl_utility(merged.logits(z_ND, vocabulary), teacher_NV)
                leaves = [z_ND, seen["written"], *small.values()]
                found = torch.autograd.grad((scale * weights_N * kl_N).sum(), leaves)
        finally:
            handle.remove()
        gradient_ND, gradient_NV = found[0] / scale.float(), found[1].flatten(0, -2)
        with torch.no_grad(), merged.autocast():
            of_small = dict(zip(small, found[2:], strict=True))
            self.rest_K += self.of_outer(of_small, seen["read"].flatten(0, -2), gradient_NV) / scale
        return kl_N.detach(), gradient_ND

    def of_outer(
        self, of_small: Mapping[tuple[int, str], torch.Tensor], read_ND: torch.Tensor, gradient_NV: torch.Tensor
    ) -> torch.Tensor:
        """What final norm and output head (0 and 1) give, float64 [K]: from autograd what is small, and the head's
        matrix some rows at a time."""
        base, *experts = (outer_modules(stack) for stack in (self.merged.base, *self.merged.experts))
        total_K = torch.zeros_like(self.rest_K)
        for (i, name), gradient in of_small.items():
            own = base[i].get_parameter(name)
            total_K += _met(gradient.float(), own, [align_rows(x[i].get_parameter(name), own) for x in experts]).sum(1)
        weight_VD, count = base[1].get_parameter("weight"), gradient_NV.shape[1]
        others = [align_rows(head.get_parameter("weight"), weight_VD) for _norm, head in experts]
        step = max(1, _MOST_LOGITS // (4 * weight_VD.shape[1]))
        for rows in (slice(begin, min(count, begin + step)) for begin in range(0, count, step)):
            gradient_OD = weight_gradient(gradient_NV[:, rows], read_ND, self.merged.dtype)
            total_K += _met(gradient_OD, weight_VD[rows], [other_VD[rows] for other_VD in others]).sum(1)
        return total_K

    def of_layer(self, index: int, record: LayerRecord, _teacher: int) -> None:
        """Keep one batch's gradients of what layer `index` holds until `meet`."""
        record.grad_in.clear()  # not read here; a column's own gradient is in dL/dW
        self._held.append(record)

    def meet(self, index: int) -> None:
        """Let the gradients of a layer, summed over the batches kept, meet the changes of every expert: what they give
        to the weight of each row or column, and so to the components. One parameter's after the other's."""
        base, experts = self.merged.sources(index)
        shape, count = self.geometry, len(experts)
        heads_KH, neurons_KF = (
            torch.zeros(count, n, dtype=torch.float64, device=self.rest_K.device, requires_grad=True)
            for n in (shape.heads, shape.neurons)
        )
        total = torch.zeros((), dtype=torch.float64, device=self.rest_K.device)
        for name, gradient in self._summed(index):
            slot, tensor_of = slot_of(f"model.layers.{index}.{name}"), attrgetter(name)
            found_Kn = _met(gradient, tensor_of(base), [tensor_of(expert) for expert in experts], slot)
            if slot is None:
                self.rest_K += found_Kn.sum(1)
                continue
            with torch.enable_grad():  # the derivative of `expand` is what takes rows to components
                total = total + (shape.expand(slot, heads_KH, neurons_KF) * found_Kn).sum()
        of_heads_KH, of_neurons_KF = torch.autograd.grad(total, (heads_KH, neurons_KF))
        self.heads_KLH[:, index] += of_heads_KH
        self.neurons_KLF[:, index] += of_neurons_KF
        self._held.clear()

    def _summed(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, dS/d(parameter) summed over the batches kept) of all parameters of a layer; each matrix is formed when
        its turn comes, so that one is there at a time."""
        mlp, dtype = self.merged.tower.layers[index].mlp, self.merged.dtype
        for key in _FITTED:
            total = None
            for record in self._held:
                read = record.mlp_activation(mlp) if key == "down" else record.inputs[key]
                gradient = weight_gradient(record.grad_out[key], read, dtype).div_(record.scale)
                total = gradient if total is None else total.add_(gradient)
            assert total is not None
            yield f"{PROJECTIONS[key]}.weight", total
        for name in self._held[0].grad_parameters:
            parts = [record.grad_parameters[name].float() / record.scale for record in self._held]
            yield name, torch.stack(parts).sum(0)

    @torch.no_grad()
    def of_input(self, batch: Batch, gradient_BTD: torch.Tensor) -> None:
        """Add what the embeddings give, from the gradient at the stream that enters layer 0."""
        for k, change_BTD in enumerate(self.merged.start_changes(batch)):
            self.rest_K[k] += (gradient_BTD * change_BTD).sum(dtype=torch.float64)


def weight_gradient(gradient_BTO: torch.Tensor, read_BTI: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """sum over prompts and tokens of gradient x input, [O, I] float32; products run in `dtype`."""
    gradient_NO, read_NI = gradient_BTO.flatten(0, -2), read_BTI.flatten(0, -2)
    if dtype != torch.float16:
        return (gradient_NO.T @ read_NI).float()
    # The largest factors are then 16 and 1/4, so that 16,000 tokens cannot add up to more than float16 holds.
    scale, shrink = loss_scale(gradient_NO), loss_scale(read_NI) / 64
    return ((scale * gradient_NO).half().T @ (shrink * read_NI).half()).float() / (scale * shrink)


def _met(
    gradient: torch.Tensor, base: torch.Tensor, experts: Sequence[torch.Tensor], slot: TensorSlot | None = None
) -> torch.Tensor:
    """sum of gradient . (theta_k - theta_base) along the other axis than the slot's, float64 [K, n]; all, if 1-D."""
    if gradient.ndim == 1:
        return torch.stack([(expert.float() - base.float()) * gradient for expert in experts]).double()
    columns = slot is not None and slot.axis
    found: list[list[torch.Tensor]] = [[] for _ in experts]
    # Some rows at a time: what is formed of them stays in the processor's caches.
    step = max(1, _MOST_MET // gradient.shape[1])
    for rows in (slice(begin, begin + step) for begin in range(0, len(gradient), step)):
        own = base[rows].float()
        for of_expert, expert in zip(found, experts, strict=True):
            of_expert.append((expert[rows].float() - own).mul_(gradient[rows]).sum(0 if columns else 1).double())
    return torch.stack([torch.stack(parts).sum(0) if columns else torch.cat(parts) for parts in found])


def _parts(count: int, vocabulary: int) -> Iterator[slice]:
    """Positions whose logits are made together."""
    size = max(1, _MOST_LOGITS // vocabulary)
    yield from (slice(begin, begin + size) for begin in range(0, count, size))
