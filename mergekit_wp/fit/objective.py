"""What the fit makes small: lessons, and how far a model is from them (METHOD.md 6).

Every expert t answered its own prompts greedily. With KL_t(x) the mean over the positions of the answer to x of
KL(p_t || p) (Eq. 72, 84), the share of t's gap that a merge leaves open, and the loss, are

    R_t(w) = mean_x KL_t(x | merge) / mean_x KL_t(x | base)            L(w) = mean_t R_t(w)

The base may be one more teacher, of what no expert teaches. It has no gap to itself: of the base, R is divided by the
mean over the experts of mean_x KL(p_base || p_expert), so that at 1 the merge is as far from it as experts are.

What a teacher says is kept as its stream above the last layer, so that nothing of V numbers a position is. The gradient
of the loss is in `gradient`.

Legend: K experts (as a teacher, the base is number K), B prompts, A positions of an answer, N = positions of all
answers of a batch, T tokens, D residual width, V vocabulary rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mergekit_wp.console import StartProgress, Tick
from mergekit_wp.errors import BadInput
from mergekit_wp.fit.job import FitJob
from mergekit_wp.fit_file import FusionWeights
from mergekit_wp.scoring.batching import Batch, Tokens, numbered_batches
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.metrics import KLMetric, kl_utility
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.models.merged import MergedStack
from mergekit_wp.scoring.models.precision import not_finite
from mergekit_wp.scoring.packing import pack
from mergekit_wp.scoring.score import Prepared
from mergekit_wp.scoring.sweep import batch_groups, forward_sweep
from mergekit_wp.scoring.whole_answers import answers_beside, answers_for

LEAST_GAP = 1e-3  # nats: below, an expert says along its own answers what the base would say


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


def batch_lessons(
    lessons: Sequence[Lesson], batch_size: int, stacks: Sequence[Stack], *, by_prompt: bool = False
) -> list[LessonBatch]:
    """In batches of one teacher each, that all `stacks` may run; packed where that pays, unless something is to be kept
    apart `by_prompt`."""
    found = []
    for teacher in sorted({lesson.teacher for lesson in lessons}):
        own = [number for number, lesson in enumerate(lessons) if lesson.teacher == teacher]
        prompts, answers = [lessons[i].prompt for i in own], [lessons[i].answer for i in own]
        for chosen, batch in numbered_batches(prompts, batch_size, *stacks, answers=answers):
            numbers = [own[i] for i in chosen]
            batch = batch if by_prompt else pack(batch, *stacks)
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
    """KL_t(x | stack) of every lesson, float64, by its number, on the CPU; each process reads some of the batches.

    Raises `BadInput` for one that is not finite.
    """
    found_N = torch.zeros(sum(len(each.numbers) for each in batches), dtype=torch.float64)
    for group in batch_groups(stack, processes.share(batches), lambda each: each.batch.ids_BT.numel()):
        streams = _final_streams(stack, [each.batch for each in group], processes.ticking(tick))
        for each, final_BTD in zip(group, streams, strict=True):
            found_N[each.numbers] = _loss_of(stack, teachers, each, final_BTD, vocabulary)
        _forget_heads(stack, *teachers)
    return finite(add_up(found_N, processes, stack), stack)


@torch.no_grad()
def branch_losses(
    merged: MergedStack,
    candidates: Sequence[FusionWeights],
    batches: Sequence[LessonBatch],
    vocabulary: int,
    processes: ProcessGroup,
    tick: Tick,
) -> torch.Tensor:
    """As `losses`, of the merges by each of C weights: float64 [C, N], finite or not. Every layer is read once (but for
    memory)."""
    count, before = len(candidates), merged.weights
    found_CN = torch.zeros(count, sum(len(each.numbers) for each in batches), dtype=torch.float64)
    mine, told = processes.share(batches), processes.ticking(tick)
    # Of resident models nothing is read, and each merge is made once for all batches.
    groups = batch_groups(merged, mine, lambda each: count * each.batch.ids_BT.numel()) if merged.streamed else [mine]
    for group in groups:
        for index, branch, i, stream_BTD in merged.branch_sweep(candidates, [each.batch for each in group]):
            told(len(group[i].numbers) / (count * merged.depth))
            if index == merged.depth - 1:
                kl_B = _loss_of(merged, teachers_of(merged), group[i], stream_BTD, vocabulary)
                found_CN[branch, group[i].numbers] = kl_B
        _forget_heads(merged)
    merged.set(before)
    return add_up(found_CN, processes, merged)


def _forget_heads(*stacks: Stack) -> None:
    """Output heads are a layer's share of a small model's memory, and more of one with many tokens."""
    for stack in stacks:
        stack.forget_head()


def _loss_of(
    stack: Stack, teachers: Sequence[Stack], each: LessonBatch, final_BTD: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """KL_t(x | stack) of each prompt of the batch, float64 [B] on the CPU."""
    metric = TeacherKL("kl", stack.depth - 1, vocabulary, teachers[each.teacher])
    z_BAD = each.batch.at_reads(final_BTD)
    return -metric.read(stack, z_BAD, each.targets(stack.device), each.batch.weights_BA).cpu()


def add_up(found_N: torch.Tensor, processes: ProcessGroup, stack: Stack) -> torch.Tensor:
    """Over the processes, which talk through the device's memory."""
    return processes.add_up(found_N.to(stack.device)).cpu()


def finite(found: torch.Tensor, stack: Stack) -> torch.Tensor:
    """What was found with `stack`. Raises `BadInput` where a number of it is none."""
    if not found.isfinite().all():
        raise not_finite("how far a model is from an expert's answer", stack.dtype)
    return found


def _final_streams(stack: Stack, batches: Sequence[Batch], tick: Tick) -> list[torch.Tensor]:
    """The streams above the last layer [B, T, D], right at the positions read."""
    starts = [stack.start(batch) for batch in batches]
    streams: list[torch.Tensor] = []
    for _layer, streams in forward_sweep(stack, starts, stack.depth, at=[batch.reads_BA for batch in batches]):  # noqa: B007
        tick(sum(len(batch.last_B) for batch in batches) / stack.depth)
    return list(streams)


def shared_vocabulary(ready: Sequence[Prepared]) -> int:
    """V: vocabulary rows that all models have."""
    return ready[0].checked.vocabulary


def read_teachers(
    job: FitJob, ready: Sequence[Prepared], merged: MergedStack, processes: ProcessGroup, start: StartProgress,
    out: Path | None,
) -> list[Lesson]:  # fmt: skip
    """Every teacher's prompts with its answers, what it says there, and its gap. Raises `BadInput` for a teacher that
    has none."""
    lessons: list[Lesson] = []
    K, vocabulary, batch_size = len(job.experts), shared_vocabulary(ready), job.batch_size
    names = [*(f"expert {k + 1} of {K}" for k in range(K)), "the base"]
    for j, (each, stack) in enumerate(zip(ready, teachers_of(merged), strict=False)):  # the base without keep is none
        prompts = [ids for task in each.tasks for ids in task.scoring]
        scoring, beside = (job.keeping(), "base") if j == K else (job.scoring(job.models[j]), f"expert{j + 1}")
        path = None if out is None else answers_beside(out.with_name(f"{out.stem}.{beside}{out.suffix}"), job.reads())
        answers = _answers(scoring, each, stack, processes, start, path)
        tick = start(len(prompts), f"Reading answers of {names[j]}", "prompt")
        lessons += read_lessons(stack, j, prompts, answers, batch_size, tick)
    own, kept = ([x for x in lessons if (x.teacher == K) == base] for base in (False, True))
    lessons = with_gaps(own, [merged.base], merged, vocabulary, batch_size, processes, start)
    if kept:
        lessons += with_gaps(kept, merged.experts, merged, vocabulary, batch_size, processes, start)
    for j, teacher in enumerate(job.teachers):
        gaps = [lesson.gap for lesson in lessons if lesson.teacher == j]
        if (gap := sum(gaps) / len(gaps)) < LEAST_GAP:
            small = f"(a KL of {gap:.2g} nats a token, less than {LEAST_GAP:g})"
            raise BadInput(
                f"keep: along the base's own answers to {teacher.pairs} the experts say what the base says {small}, so "
                "there is nothing to be lost; leave keep out, or give other prompts."
                if j == K
                else f"expert {teacher.expert}: along its own answers to {teacher.pairs} it says what the base says "
                f"{small}; give prompts of what it was tuned for."
            )
    return lessons


def with_gaps(
    lessons: Sequence[Lesson], others: Sequence[Stack], merged: MergedStack, vocabulary: int, batch_size: int,
    processes: ProcessGroup, start: StartProgress,
) -> list[Lesson]:  # fmt: skip
    """Lessons with their gaps: the mean over `others` of how far these are from the teacher."""
    teachers = teachers_of(merged)
    batches = batch_lessons(lessons, batch_size, teachers)
    what = "the base" if others == [merged.base] else "the experts on the base's prompts"
    tick = start(len(lessons) * len(others), f"Reading {what}", "prompt")
    found_N = torch.stack([losses(each, teachers, batches, vocabulary, processes, tick) for each in others]).mean(0)
    return [replace(lesson, gap=gap) for lesson, gap in zip(lessons, found_N.tolist(), strict=True)]


def _answers(
    scoring: ScoringJob, ready: Prepared, stack: Stack, processes: ProcessGroup, start: StartProgress, path: Path | None
) -> Tokens:
    """A teacher's answers to its prompts, made or read; where none are wanted, any one token, which is not read."""
    if not scoring.answer_tokens:
        return [[0] for task in ready.tasks for _prompt in task.scoring]
    tasks = answers_for(scoring, ready.checked, stack, ready.tokenizer, ready.tasks, path, processes, start)
    return [answer for task in tasks for answer in task.answers]


def hold_out(lessons: Sequence[Lesson], share: float, seed: int) -> tuple[list[Lesson], list[Lesson]]:
    """(fitted, held out): of each teacher's prompts this share is held out, rounded down but at least one, drawn by the
    seed; none where the share is 0. A prompt that a teacher has several times counts once, and lies on one side."""
    fitted: list[Lesson] = []
    held: list[Lesson] = []
    for teacher in sorted({lesson.teacher for lesson in lessons}):
        own = [lesson for lesson in lessons if lesson.teacher == teacher]
        prompts = list(dict.fromkeys(tuple(lesson.prompt) for lesson in own))
        count = max(1, int(share * len(prompts))) if share else 0
        drawn = random.Random(f"{seed}/hold out/{teacher}").sample(range(len(prompts)), count)
        chosen = {prompts[i] for i in drawn}
        held += [lesson for lesson in own if tuple(lesson.prompt) in chosen]
        fitted += [lesson for lesson in own if tuple(lesson.prompt) not in chosen]
    return fitted, held


def mean_gaps(lessons: Sequence[Lesson]) -> torch.Tensor:
    """Of each lesson, what R of its teacher divides by: the mean gap of the teacher's lessons here, float64 [N].

    At least `LEAST_GAP`: the few prompts of a step, or those held out, may be ones to which the teacher says what the
    base says, and would outweigh all others.
    """
    teachers = torch.tensor([lesson.teacher for lesson in lessons])
    gap_N = torch.tensor([lesson.gap for lesson in lessons], dtype=torch.float64)
    mean_N = torch.zeros(len(lessons), dtype=torch.float64)
    for j in teachers.unique():
        mean_N[teachers == j] = gap_N[teachers == j].mean().clamp(min=LEAST_GAP)
    return mean_N


def unrecovered(lessons: Sequence[Lesson], kl_N: torch.Tensor) -> torch.Tensor:
    """R of every teacher: its mean KL over its mean gap, float64 [J]."""
    teachers = torch.tensor([lesson.teacher for lesson in lessons])
    gap_N = mean_gaps(lessons)
    return torch.stack([kl_N[teachers == j].mean() / gap_N[teachers == j][0] for j in teachers.unique()])


def loss_weights(lessons: Sequence[Lesson]) -> torch.Tensor:
    """Of KL(x) in the loss, float64 [N]: 1 / (J N_t mean gap of t)."""
    teachers = torch.tensor([lesson.teacher for lesson in lessons])
    _teachers, place_N, count_J = teachers.unique(return_inverse=True, return_counts=True)
    return 1 / (len(count_J) * count_J[place_N] * mean_gaps(lessons))
