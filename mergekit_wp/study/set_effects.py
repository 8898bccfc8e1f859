"""What an exchange of sets does, by forward passes: the share of the way from the recipient to the donor (Eq. 53).

    effect(S) = E_x[w(x) (F(recipient with S, x) - F(recipient, x))] / E_x[w(x) (F(donor, x) - F(recipient, x))]

Restored in the base it is what the set brings of the expert; taken out of the expert (its components are then the
base's), what of the expert goes with it. So both are shares of one gap. w is 1, or with `gap: sample` one over the
prompt's own gap, as in the score file.

F is the anchor or the projection along the score file's direction, and the kl to the *donor's* next token: towards the
expert where the base is restored, towards the base where something is taken out. (The gradient of the kl to the expert
vanishes at the expert, so that knock-outs would hardly show.)

Nothing is written and nothing undone (`exchanged`). Of streamed models each layer is read once for `STEP` sets.

Legend: C sets, N prompts, B those of a batch, T tokens, A positions read of each, D residual width, R resamples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import stdtrit

from mergekit_wp.console import Tick
from mergekit_wp.intervals import widened
from mergekit_wp.scoring.batching import Batch, TaskTokens, numbered_batches
from mergekit_wp.scoring.metrics import CosineMetric, GapLedger, KLMetric, Metric
from mergekit_wp.scoring.models.exchanged import Exchange, ExchangedStack
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.models.load import ModelPair
from mergekit_wp.scoring.packing import pack
from mergekit_wp.scoring.sweep import batch_groups, forward_sweep
from mergekit_wp.study.sets import INTERVAL

STEP = 64
RESAMPLES = 1000
KL = "kl"


@dataclass
class Asked:
    """One batch: the numbers of its prompts, and by metric what it compares with."""

    numbers: list[int]
    batch: Batch
    targets: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Passage:
    """One task's prompts, read by `metrics` on the way from a recipient to a donor.

    of_recipient, of_donor: F of the two models, by metric, float64 [N]
    """

    metrics: Mapping[str, Metric]
    asked: list[Asked]
    of_recipient: dict[str, torch.Tensor] = field(default_factory=dict)
    of_donor: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def prompts(self) -> int:
        return sum(len(each.numbers) for each in self.asked)

    def empty(self, count: int) -> dict[str, torch.Tensor]:
        """By metric, [C, N] float64, to be filled."""
        return {name: torch.zeros(count, self.prompts, dtype=torch.float64) for name in self.metrics}


Along = tuple[str, int, torch.Tensor]
"""A metric along a direction: anchor or projection, the layer that it reads, v [D]."""


def metrics_of(pair: ModelPair, along: Mapping[str, Along]) -> dict[str, Metric]:
    """The kl, and a metric along each direction, by name."""
    found: dict[str, Metric] = {KL: KLMetric(KL, pair.geometry.layers - 1, pair.vocabulary)}
    for name, (metric, layer, v_D) in along.items():
        found[name] = CosineMetric(metric, layer, v_D.to(pair.device))
    return found


@torch.no_grad()
def direction_of(
    recipient: Stack, donor: Stack, task: TaskTokens, metrics: Mapping[str, Metric], batch_size: int
) -> Passage:
    """The task's prompts with what either model makes of them."""
    batches = numbered_batches(task.scoring, batch_size, recipient, donor, answers=task.answers)
    found = Passage(metrics, [Asked(numbers, pack(batch, recipient, donor)) for numbers, batch in batches])
    found.of_donor, found.of_recipient = ({k: x[0] for k, x in found.empty(1).items()} for _ in range(2))

    def of_donor(name: str, metric: Metric, each: Asked, z_BAD: torch.Tensor) -> None:
        value_B, each.targets[name] = metric.expert(donor, z_BAD, each.batch.weights_BA)
        found.of_donor[name][each.numbers] = value_B.cpu()

    def of_recipient(name: str, metric: Metric, each: Asked, z_BAD: torch.Tensor) -> None:
        value_B = metric.read(recipient, z_BAD, each.targets[name], each.batch.weights_BA)
        found.of_recipient[name][each.numbers] = value_B.cpu()

    _swept(donor, found, of_donor)
    _swept(recipient, found, of_recipient)
    return found


def _swept(stack: Stack, direction: Passage, take: Callable[[str, Metric, Asked, torch.Tensor], None]) -> None:
    for group in batch_groups(stack, direction.asked, lambda each: each.batch.ids_BT.numel()):
        starts, reads = [stack.start(each.batch) for each in group], [each.batch.reads_BA for each in group]
        for layer, streams in forward_sweep(stack, starts, stack.depth, at=reads):
            for name, metric in direction.metrics.items():
                if metric.layer == layer:
                    for each, stream_BTD in zip(group, streams, strict=True):
                        take(name, metric, each, each.batch.at_reads(stream_BTD))


@torch.no_grad()
def values_of(
    stack: ExchangedStack, exchanges: Sequence[Exchange], direction: Passage, tick: Tick
) -> dict[str, torch.Tensor]:
    """F of every exchange on every prompt, by metric, float64 [C, N]. `tick` hears of sets."""
    found, asked, count = direction.empty(len(exchanges)), direction.asked, len(exchanges)
    groups = batch_groups(stack, asked, lambda e: count * e.batch.ids_BT.numel()) if stack.streamed else [asked]
    for group in groups:
        for layer, branch, i, stream_BTD in stack.branch_sweep(exchanges, [each.batch for each in group]):
            each = group[i]
            for name, metric in direction.metrics.items():
                if metric.layer == layer:
                    z_BAD = each.batch.at_reads(stream_BTD)
                    value_B = metric.read(stack, z_BAD, each.targets[name], each.batch.weights_BA)
                    found[name][branch, each.numbers] = value_B.cpu()
            tick(len(each.numbers) / (direction.prompts * stack.depth))
    return found


def key_of(exchange: Exchange) -> str:
    """What tells one exchange from another; equal ones are tried once."""
    subset = exchange.subset
    content = subset.heads.numpy().tobytes() + subset.neurons.numpy().tobytes()
    return hashlib.sha256(f"{exchange.in_expert}/{exchange.parts}/".encode() + content).hexdigest()


@dataclass(frozen=True)
class Effects:
    """Effects of some sets on the same prompts: value_C, and of resampled prompts drawn_RC."""

    value_C: np.ndarray
    drawn_RC: np.ndarray

    @classmethod
    def of(
        cls, values_CN: torch.Tensor, recipient_N: torch.Tensor, donor_N: torch.Tensor, ledger: GapLedger, task: str,
        seed: Sequence[int],
    ) -> Effects:  # fmt: skip
        """Raises `BadInput` where there is no gap to have a share of."""
        weight_N = ledger.weights(recipient_N, donor_N).numpy()
        ledger.normalizer(task)
        gained_CN = weight_N * (values_CN - recipient_N).numpy()
        gap_N = weight_N * (donor_N - recipient_N).numpy()
        count = len(gap_N)
        # Of one prompt there is nothing to resample.
        drawn_RN = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn_RC = drawn_RN @ gained_CN.T / (drawn_RN @ gap_N)[:, None]
        value_C, used = gained_CN.sum(1) / gap_N.sum(), int((weight_N != 0).sum())
        drawn_RC = widened(drawn_RC, value_C, used) if used > 1 else np.full_like(drawn_RC, np.nan)
        return cls(value_C, np.where(np.isfinite(drawn_RC), drawn_RC, np.nan))

    def beyond(self, c: int, others: Sequence[int]) -> Beyond:
        """What one set has over the mean of others, which were drawn at random, on the same prompts."""
        drawn, places = self.value_C[list(others)], list(others)
        return Beyond.of(self.value_C[c], drawn, self.drawn_RC[:, c] - self.drawn_RC[:, places].mean(1))


@dataclass(frozen=True)
class Beyond:
    """What sets have over random ones: of one task, or the mean over tasks.

    Other prompts would have given another difference, and so would other draws of the random sets: were the set one of
    them, it would differ from the mean of D by their standard deviation s times sqrt(1 + 1/D), and s is known of D - 1.

    drawn_R: of resampled prompts; draw_T, degrees_T: by task, s^2 (1 + 1/D) and D - 1, none of a single draw
    """

    value: float
    drawn_R: np.ndarray
    draw_T: tuple[float, ...]
    degrees_T: tuple[int, ...]

    @classmethod
    def of(cls, value: float, others_D: np.ndarray, drawn_R: np.ndarray) -> Beyond:
        """Of one task: the set's own value, those of the random sets, and the difference by resampled prompts."""
        count = len(others_D)
        spread = float(np.var(others_D, ddof=1)) * (1 + 1 / count) if count > 1 else math.nan
        return cls(float(value - np.mean(others_D)), drawn_R, (spread,), (count - 1,))

    @classmethod
    def mean(cls, every: Sequence[Beyond]) -> Beyond:
        """Of tasks, whose prompts and random sets are drawn apart."""
        drawn_R = np.mean([each.drawn_R for each in every], axis=0)
        draws = tuple(draw / len(every) ** 2 for each in every for draw in each.draw_T)
        return cls(
            float(np.mean([each.value for each in every])), drawn_R, draws,
            tuple(degrees for each in every for degrees in each.degrees_T),
        )  # fmt: skip

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """95 % over prompts and random sets: the two half widths as legs of a right angle. (None, None) of a single
        prompt, or of a single random set in some task, which does not say how far such sets differ."""
        low, high = interval_of(self.drawn_R)
        if low is None or high is None or not all(self.degrees_T):
            return None, None
        half = 0.0
        if total := sum(self.draw_T):
            # Degrees of freedom of a sum of variances that are known of a few draws each (Satterthwaite 1946).
            squares = sum(draw**2 / degrees for draw, degrees in zip(self.draw_T, self.degrees_T, strict=True))
            half = float(stdtrit(total**2 / squares, INTERVAL[1] / 100)) * math.sqrt(total)
        return self.value - math.hypot(self.value - low, half), self.value + math.hypot(high - self.value, half)


def interval_of(drawn_R: np.ndarray) -> tuple[float | None, float | None]:
    """95 % of resamples; of those without a gap nothing is known."""
    known_R = drawn_R[np.isfinite(drawn_R)]
    if not len(known_R):
        return None, None
    low, high = np.percentile(known_R, INTERVAL)
    return float(low), float(high)
