"""What the fit makes small, and its gradient (METHOD.md 6).

Every expert t answered its own prompts greedily. With KL_t(x) the mean over the positions of the answer to x of
KL(p_t || p) (Eq. 72, 84), the share of t's gap that a merge leaves open, and the loss, are

    R_t(w) = mean_x KL_t(x | merge) / mean_x KL_t(x | base)            L(w) = mean_t R_t(w)

The base may be one more teacher, of what no expert teaches. It has no gap to itself: of the base, R is divided by the
mean over the experts of mean_x KL(p_base || p_expert), so that at 1 the merge is as far from it as experts are.

The merge is linear in its weights w, so the gradient is Weight Patching's attribution (Eq. 11) with the merge in the
place of the base:

    dL/dw_k(c) = sum over the parameters p of c of (theta_k - theta_base)_p dL/dp

1. forward    the merge runs up to its output, keeping the input of every layer
2. loss       at the positions of the answers alone; there, what output head and final norm contribute
3. backward   layer by layer, dL/dW of each projection from all prompts that go through the layers together, which then
              meets the changes W_k - W_base of every expert element by element, and is gone before the next layer's
              is formed. So a step takes three products a projection (forward, through it, dL/dW) however many experts
              there are, and the memory of one layer more. Norms, which are small, by autograd; the embeddings, in which
              layer 0's input is linear, by what enters it

Legend: K experts (as a teacher, the base is number K), L layers, H heads, F neurons, B prompts, A positions of an
answer, N = positions of all answers of a batch, T tokens, D residual width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn

from mergekit_wp.checkpoint.vocabulary import align_rows
from mergekit_wp.console import Tick
from mergekit_wp.fit.merged import MergedStack, outer_modules
from mergekit_wp.fit_file import FusionWeights
from mergekit_wp.geometry import PROJECTIONS, TensorSlot, slot_of
from mergekit_wp.memory import free_memory
from mergekit_wp.scoring.batching import Batch, Tokens, numbered_batches
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.hooks import SCORED, LayerRecord
from mergekit_wp.scoring.metrics import KLMetric, answer_mean, kl_utility
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.models.precision import loss_scale
from mergekit_wp.scoring.sweep import ActivationCache, backward_sweep, batch_groups, forward_sweep, portions

_FITTED = (*SCORED, "k", "v")
_MOST_LOGITS = 1 << 27  # numbers at once: half a gigabyte


@dataclass(frozen=True)
class Lesson:
    """One prompt of teacher number `teacher` with the teacher's answer, as token ids, and what the teacher says there.

    final_AD   the teacher's own stream above its last layer at the positions of the answer, float32 in host memory: its
               logits are made of it anew each time, which costs one product and saves V numbers a position
    gap        what R divides by, before the mean: KL_t(x | base), or of the base its mean over the experts
    """

    teacher: int
    prompt: list[int]
    answer: list[int]
    final_AD: torch.Tensor
    gap: float = 0.0


@dataclass(frozen=True)
class LessonBatch:
    """Lessons of one teacher that run together. `numbers`: their places in the list that was batched."""

    numbers: list[int]
    lessons: list[Lesson]
    batch: Batch

    @property
    def teacher(self) -> int:
        return self.lessons[0].teacher

    @property
    def mask_BA(self) -> torch.Tensor:
        """Which of the positions read belong to an answer."""
        return self.batch.weights_BA > 0

    def targets(self, device: torch.device) -> torch.Tensor:
        """The teacher's stream at those positions [N, D]."""
        return torch.cat([lesson.final_AD for lesson in self.lessons]).to(device)


@dataclass(frozen=True)
class TeacherKL(KLMetric):
    """-KL(p_t || p) with the `teacher`'s logits made, as they are needed, of its own stream [N, D]."""

    teacher: Stack

    def values(self, stack: Stack, z_ND: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return kl_utility(stack.logits(z_ND, self.vocabulary), self.teacher.logits(target, self.vocabulary))


@torch.no_grad()
def read_lessons(
    stack: Stack, teacher: int, prompts: Tokens, answers: Tokens, batch_size: int, tick: Tick
) -> list[Lesson]:
    """What the teacher `stack` says along its own answers, in the order of the prompts. `tick` is told of prompts."""
    found: dict[int, Lesson] = {}
    numbered = list(numbered_batches(prompts, batch_size, stack, answers=answers))
    for group in batch_groups(stack, numbered, lambda each: each[1].ids_BT.numel()):
        batches = [batch for _numbers, batch in group]
        for (numbers, batch), final_BTD in zip(group, _final_streams(stack, batches, tick), strict=True):
            for number, final_AD in zip(numbers, batch.at_reads(final_BTD).cpu(), strict=True):
                answer = answers[number]
                found[number] = Lesson(teacher, prompts[number], answer, final_AD[: len(answer)].clone())
    return [found[number] for number in range(len(prompts))]


def batch_lessons(lessons: Sequence[Lesson], batch_size: int, stacks: Sequence[Stack]) -> list[LessonBatch]:
    """In batches of one teacher each, that all `stacks` may run."""
    found = []
    for teacher in sorted({lesson.teacher for lesson in lessons}):
        own = [number for number, lesson in enumerate(lessons) if lesson.teacher == teacher]
        prompts, answers = [lessons[i].prompt for i in own], [lessons[i].answer for i in own]
        for chosen, batch in numbered_batches(prompts, batch_size, *stacks, answers=answers):
            numbers = [own[i] for i in chosen]
            found.append(LessonBatch(numbers, [lessons[i] for i in numbers], batch))
    return found


def teachers_of(merged: MergedStack) -> list[Stack]:
    """Whoever may have spoken a lesson, by number: the experts, and the base."""
    return [*merged.experts, merged.base]


@torch.no_grad()
def losses(
    stack: Stack,
    teachers: Sequence[Stack],
    batches: Sequence[LessonBatch],
    vocabulary: int,
    processes: ProcessGroup,
    tick: Tick,
) -> torch.Tensor:
    """KL_t(x | stack) of every lesson, float64, by its number, on the CPU; each process reads some of the batches."""
    found_N = torch.zeros(sum(len(each.numbers) for each in batches), dtype=torch.float64)
    for group in batch_groups(stack, processes.share(batches), lambda each: each.batch.ids_BT.numel()):
        streams = _final_streams(stack, [each.batch for each in group], processes.ticking(tick))
        for each, final_BTD in zip(group, streams, strict=True):
            found_N[each.numbers] = _loss_of(stack, teachers, each, final_BTD, vocabulary)
    return _add_up(found_N, processes, stack)


@torch.no_grad()
def branch_losses(
    merged: MergedStack,
    candidates: Sequence[FusionWeights],
    batches: Sequence[LessonBatch],
    vocabulary: int,
    processes: ProcessGroup,
    tick: Tick,
) -> torch.Tensor:
    """As `losses`, of the merges by each of C weights: float64 [C, N]. Every layer is read once (but for memory)."""
    count, before = len(candidates), merged.weights
    found_CN = torch.zeros(count, sum(len(each.numbers) for each in batches), dtype=torch.float64)
    if not merged.streamed:  # nothing is read, and each merge is made once for all batches
        for branch, weights in enumerate(candidates):
            merged.set(weights)
            told = lambda done: tick(done / count)  # noqa: E731
            found_CN[branch] = losses(merged, teachers_of(merged), batches, vocabulary, processes, told)
        merged.set(before)
        return found_CN
    for group in batch_groups(merged, processes.share(batches), lambda each: count * each.batch.ids_BT.numel()):
        starts = [merged.starts(each.batch, candidates) for each in group]
        streams = [[start[branch].stream_BTD for start in starts] for branch in range(count)]
        for index, branch, layer in merged.branches(range(merged.depth), candidates):
            for i, stream_BTD in enumerate(streams[branch]):
                streams[branch][i] = merged.call(layer, stream_BTD, starts[i][branch].calls[index])
            processes.ticking(tick)(sum(len(each.numbers) for each in group) / merged.depth)
        for branch, weights in enumerate(candidates):
            merged.set(weights)
            for each, final_BTD in zip(group, streams[branch], strict=True):
                found_CN[branch, each.numbers] = _loss_of(merged, teachers_of(merged), each, final_BTD, vocabulary)
    merged.set(before)
    return _add_up(found_CN, processes, merged)


def loss_and_gradient(
    merged: MergedStack,
    batches: Sequence[LessonBatch],
    weights_N: torch.Tensor,
    vocabulary: int,
    processes: ProcessGroup,
    tick: Tick,
) -> tuple[torch.Tensor, FusionWeights]:
    """(KL_t(x | merge) of every lesson, float64 [N]; the gradient of sum_x weights(x) KL(x)), on the CPU."""
    gradient = Gradient(merged)
    found_N = passes(merged, batches, weights_N, vocabulary, gradient, processes, tick)
    return found_N, gradient.total(processes)


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
    for group in _groups(merged, processes.share(batches)):
        _pass(merged, group, weights_N, vocabulary, found_N, gradient, processes.ticking(tick))
    return _add_up(found_N, processes, merged)


def _groups(merged: MergedStack, batches: Sequence[LessonBatch]) -> Iterator[list[LessonBatch]]:
    """As `batch_groups`; of resident models as many batches at once as may keep their graphs, or one."""
    if merged.streamed:
        return batch_groups(merged, batches, _tokens)
    return portions(batches, _tokens, _most_graphs(merged))


def _tokens(each: LessonBatch) -> int:
    return each.batch.ids_BT.numel()


def _pass(
    merged: MergedStack,
    group: Sequence[LessonBatch],
    weights_N: torch.Tensor,
    vocabulary: int,
    found_N: torch.Tensor,
    gradient: Gradient,
    tick: Tick,
) -> None:
    """Forward and backward of one group; writes its losses and adds to the gradient."""
    starts = [merged.start(each.batch) for each in group]
    cache = ActivationCache(
        starts,
        [each.batch.reads_BA for each in group],
        merged.depth,
        keep_graphs=not merged.streamed and sum(map(_tokens, group)) <= _most_graphs(merged),
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
        rows_BA = torch.arange(len(final_BTD), device=merged.device)[:, None].expand_as(each.batch.reads_BA)
        mask_BA = each.mask_BA
        gradient_BTD[rows_BA[mask_BA], each.batch.reads_BA[mask_BA]] = gradient_ND
        tops.append(gradient_BTD)

    def inject(_index: int, i: int, above_BTD: torch.Tensor | None) -> torch.Tensor:
        return tops[i] if above_BTD is None else above_BTD

    def consume(index: int, i: int, _layer: nn.Module, _other: None, record: LayerRecord) -> None:
        gradient.of_layer(index, record, group[i].teacher)
        if i == len(group) - 1:
            gradient.layer_done(index)
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
        self._sums: dict[str, torch.Tensor] = {}

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
        norm, head = outer_modules(merged)

        def catch(_module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            seen["read"], seen["written"] = args[0], output

        small = {name: p for name, p in norm.named_parameters() if p.requires_grad}
        # Weights are a share of a prompt's: in float16, gradients that small would vanish.
        scale = 2.0**10 / weights_N.abs().max().clamp(min=1e-30)
        handle = head.register_forward_hook(catch)
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
            base, *experts = (outer_modules(stack) for stack in (merged.base, *merged.experts))
            for k, (own_norm, own_head) in enumerate(experts):
                for name, gradient in zip(small, found[2:], strict=True):
                    change = _met(gradient.float(), base[0].get_parameter(name), own_norm.get_parameter(name), None)
                    self.rest_K[k] += change.sum() / scale
                self.rest_K[k] += _through(base[1], own_head, seen["read"].flatten(0, -2), gradient_NV) / scale
        return kl_N.detach(), gradient_ND

    def of_layer(self, index: int, record: LayerRecord, _teacher: int) -> None:
        """Take one batch's gradients of what layer `index` holds."""
        mlp = self.merged.tower.layers[index].mlp
        for key in _FITTED:
            read = record.mlp_activation(mlp) if key == "down" else record.inputs[key]
            self._add(
                f"{PROJECTIONS[key]}.weight",
                weight_gradient(record.grad_out[key], read, self.merged.dtype),
                record.scale,
            )
        for name, gradient in record.grad_parameters.items():
            self._add(name, gradient.float(), record.scale)

    def _add(self, name: str, gradient: torch.Tensor, scale: torch.Tensor) -> None:
        gradient = gradient / scale
        self._sums[name] = self._sums[name].add_(gradient) if name in self._sums else gradient

    def layer_done(self, index: int) -> None:
        """Every batch was seen: what the sums give to the weight of each row or column, and so to the components."""
        base, experts = self.merged.sources(index)
        shape, count = self.geometry, len(experts)
        heads_KH, neurons_KF = (
            torch.zeros(count, n, dtype=torch.float64, device=self.rest_K.device, requires_grad=True)
            for n in (shape.heads, shape.neurons)
        )
        total = torch.zeros((), dtype=torch.float64, device=self.rest_K.device)
        for name, gradient in self._sums.items():
            slot, tensor_of = slot_of(f"model.layers.{index}.{name}"), attrgetter(name)
            found_Kn = torch.stack([_met(gradient, tensor_of(base), tensor_of(expert), slot) for expert in experts])
            if slot is None:
                self.rest_K += found_Kn.sum(1)
                continue
            with torch.enable_grad():  # the derivative of `expand` is what takes rows to components
                total = total + (shape.expand(slot, heads_KH, neurons_KF) * found_Kn).sum()
        of_heads_KH, of_neurons_KF = torch.autograd.grad(total, (heads_KH, neurons_KF))
        self.heads_KLH[:, index] += of_heads_KH
        self.neurons_KLF[:, index] += of_neurons_KF
        self._sums = {}

    @torch.no_grad()
    def of_input(self, batch: Batch, gradient_BTD: torch.Tensor) -> None:
        """Add what the embeddings give, from the gradient at the stream that enters layer 0."""
        for k, change_BTD in enumerate(self.merged.start_changes(batch)):
            self.rest_K[k] += (gradient_BTD * change_BTD).sum(dtype=torch.float64)


def weight_gradient(gradient_BTO: torch.Tensor, read_BTI: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """sum over prompts and tokens of gradient x input, [O, I] float32; products run in `dtype`.

    The gradient's largest entry is of the size that `loss_scale` gives it.
    """
    gradient_NO, read_NI = gradient_BTO.flatten(0, -2), read_BTI.flatten(0, -2)
    if dtype != torch.float16:
        return (gradient_NO.T @ read_NI).float()
    # The largest factors are then 16 and 1/4, so that 16,000 tokens cannot add up to more than float16 holds.
    scale = loss_scale(read_NI) / 64
    return (gradient_NO.T @ (scale * read_NI).half()).float() / scale


def _met(gradient: torch.Tensor, base: torch.Tensor, expert: torch.Tensor, slot: TensorSlot | None) -> torch.Tensor:
    """sum of gradient . (theta_k - theta_base) along the other axis than the slot's, float64 [n]; all, if 1-D."""
    each = (expert.float() - base.float()).mul_(gradient)
    if each.ndim > 1:
        each = each.sum(0 if slot is not None and slot.axis else 1)
    return each.double()


def _through(base: nn.Module, expert: nn.Module, read_ND: torch.Tensor, gradient_NV: torch.Tensor) -> torch.Tensor:
    """sum over an output head's weights (and bias) of dS/dW . (W_k - W_base), float64 [], some rows at a time."""
    total = torch.zeros((), dtype=torch.float64, device=read_ND.device)
    own, others = dict(base.named_parameters()), dict(expert.named_parameters())
    weight_VD, other_VD = own["weight"], align_rows(others["weight"], own["weight"])
    for begin in range(0, gradient_NV.shape[-1], rows := max(1, _MOST_LOGITS // (4 * weight_VD.shape[1]))):
        part = slice(begin, begin + rows)
        change_VD = other_VD[part].float() - weight_VD[part].float()
        written_NV = read_ND @ change_VD.T.to(read_ND.dtype)
        total += (written_NV.float() * gradient_NV[:, part].float()).sum(dtype=torch.float64)
    if "bias" in own:
        change_V = align_rows(others["bias"], own["bias"]).float() - own["bias"].float()
        total += (gradient_NV.float().sum(0) * change_V[: gradient_NV.shape[-1]]).sum(dtype=torch.float64)
    return total


def _loss_of(
    stack: Stack, teachers: Sequence[Stack], each: LessonBatch, final_BTD: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """KL_t(x | stack) of each prompt of the batch, float64 [B] on the CPU."""
    metric = TeacherKL("kl", stack.depth - 1, vocabulary, teachers[each.teacher])
    z_BAD = each.batch.at_reads(final_BTD)
    return -metric.read(stack, z_BAD, each.targets(stack.device), each.batch.weights_BA).cpu()


def _add_up(found_N: torch.Tensor, processes: ProcessGroup, stack: Stack) -> torch.Tensor:
    """Over the processes, which talk through the device's memory."""
    return processes.add_up(found_N.to(stack.device)).cpu()


def _parts(count: int, vocabulary: int) -> Iterator[slice]:
    """Positions whose logits are made together."""
    size = max(1, _MOST_LOGITS // vocabulary)
    yield from (slice(begin, begin + size) for begin in range(0, count, size))


def _final_streams(stack: Stack, batches: Sequence[Batch], tick: Tick) -> list[torch.Tensor]:
    """The streams above the last layer [B, T, D], right at the positions read."""
    starts = [stack.start(batch) for batch in batches]
    streams: list[torch.Tensor] = []
    for _layer, streams in forward_sweep(stack, starts, stack.depth, at=[batch.reads_BA for batch in batches]):  # noqa: B007
        tick(sum(len(batch.last_B) for batch in batches) / stack.depth)
    return list(streams)
