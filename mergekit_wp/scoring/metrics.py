"""Metrics: how far a run has recovered the expert, one number a prompt, read above one layer.

    anchor       F = cos(z_a(x | M), v)                          Eq. 5, at the anchor layer and position
    projection   F = cos(z(x | M), v)                            Eq. 74, at the last layer
    kl           F = -KL(p_sft || p_M) of the next token, nats   Eq. 72, at the output

Where prompts have answers, `projection` and `kl` are means over the answer: of F of each of its tokens, given the
prompt and the tokens before (Eq. 72, 84).

A utility is one metric, or two: `staged` reads `anchor` for components up to the anchor layer, and `kl` for those above
it, which the anchor cannot see; `staged-projection` reads `projection` there.

`instruction_effect` is no metric of recovery: it says how much a model heeds what a prompt asks for, and so whether
base and expert may have changed places, which kl cannot see (by it, the expert is right by definition).

The gap is G(x) = F(expert, x) - F(base, x) (Eq. 6), and scores are divided by it. The mean of ratios (`sample`)
drops prompts whose |G| is below a floor: they say nothing, and 1/G would let them dominate. The ratio of means
(`mean`) keeps every prompt.

Legend: B prompts, A positions read of each, N of all of them, D residual width, V vocabulary rows; ... any leading
dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from mergekit_wp.errors import BadInput
from mergekit_wp.scores import UtilityStats
from mergekit_wp.scoring.batching import numbered_batches
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.models.precision import not_finite
from mergekit_wp.scoring.sweep import forward_sweep


def anchor_utility(z_BD: torch.Tensor, direction_D: torch.Tensor) -> torch.Tensor:
    """cos(z, v) per prompt, float64 [..., B]: one component moves it by less than float32 rounds it."""
    return functional.cosine_similarity(z_BD.double(), direction_D.double(), dim=-1)


def kl_utility(logits_BV: torch.Tensor, expert_logits_BV: torch.Tensor) -> torch.Tensor:
    """-KL(p_expert || p) per prompt, float64 [..., B]; 0 where the two agree."""
    log_p_BV = functional.log_softmax(logits_BV, dim=-1)
    log_p_expert_BV = functional.log_softmax(expert_logits_BV, dim=-1)
    terms_BV = functional.kl_div(log_p_BV, log_p_expert_BV, log_target=True, reduction="none")
    return -terms_BV.sum(-1, dtype=torch.float64)


@dataclass
class GapLedger:
    """Collects the gaps of one utility over the batches of one task, and gives each prompt its weight.

    A score is sum_x w(x) s(x) / `normalizer()`: with `sample`, w = 1/G(x) and the normalizer counts prompts;
    with `mean`, w = 1 and the normalizer is the sum of gaps. Both make it independent of the batching.
    `negative` counts prompts, of those used, that the base does better on than the expert. `dtype` is
    what products run in. Of so many `prompts`, `gaps_P` and `used_P` (0 or 1) are kept by number, float64.
    """

    utility: str
    gap: str
    floor: float
    dtype: torch.dtype = torch.float32
    prompts: int = 0
    used: int = 0
    dropped: int = 0
    negative: int = 0
    total: float = 0.0

    def __post_init__(self) -> None:
        self.gaps_P, self.used_P = torch.zeros(2, self.prompts, dtype=torch.float64)

    def weights(self, base_B: torch.Tensor, expert_B: torch.Tensor, numbers: Sequence[int] = ()) -> torch.Tensor:
        """w(x) [B], float64, from F(base, x) and F(expert, x), counted here; `numbers`: of the prompts, where they are
        kept. Raises `BadInput` if not finite."""
        gap_B = (expert_B - base_B).detach().double()
        if not torch.isfinite(gap_B).all():
            raise not_finite(f"utility {self.utility}: its value for a prompt", self.dtype)
        keep_B = gap_B.abs() >= self.floor if self.gap == "sample" else torch.ones_like(gap_B, dtype=torch.bool)
        self.used += int(keep_B.sum())
        self.dropped += int((~keep_B).sum())
        self.negative += int((gap_B[keep_B] < 0).sum())
        self.total += float(gap_B[keep_B].sum())
        if self.prompts:
            self.gaps_P[list(numbers)], self.used_P[list(numbers)] = gap_B.cpu(), keep_B.double().cpu()
        inverse_B = torch.where(keep_B, 1 / torch.where(keep_B, gap_B, 1.0), 0.0)
        return inverse_B if self.gap == "sample" else torch.ones_like(gap_B)

    def gather(self, processes: ProcessGroup, device: torch.device) -> None:
        """Add up the counts of processes that saw different prompts."""
        counts = [self.used, self.dropped, self.negative, self.total]
        *whole, self.total = processes.add_up(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
        self.used, self.dropped, self.negative = map(int, whole)
        if self.prompts:
            both = processes.add_up(torch.stack([self.gaps_P, self.used_P]).to(device))
            self.gaps_P, self.used_P = both.cpu()

    def normalizer(self, task: str) -> float:
        """What the weighted sum is divided by. Raises `BadInput` when nothing is left to divide."""
        if self.gap == "mean":
            if abs(self.total) < self.floor * self.used:
                raise BadInput(
                    f"task {task}: the mean {self.utility} gap between expert and base is "
                    f"{self.total / self.used:.2g}, below the floor {self.floor:g}; this expert does not differ here."
                )
            return self.total
        if not self.used:
            raise BadInput(
                f"task {task}: all {self.dropped} scoring prompts were dropped, each with its {self.utility} gap below "
                f"the floor {self.floor:g}; this expert does not differ from the base on them."
            )
        return float(self.used)

    def stats(self) -> UtilityStats:
        return UtilityStats(self.used, self.dropped, self.total / max(self.used, 1))


# dF/dlogits is a difference of probabilities, mostly far below what float16 products keep; at most 1, though.
_SCALE = 2.0**10
_MOST_NUMBERS = 1 << 24  # that `values` takes at once: of 128k logits, 131 positions


@dataclass(frozen=True)
class Metric(ABC):
    """`name` of the utility and the `layer` above which it is read.

    F of a prompt is the mean of F over the positions where it is read (`Batch.reads_BA`), by their weights. Of B
    prompts N positions count (`weights_BA` > 0), in the order of their rows.
    """

    name: str
    layer: int

    @abstractmethod
    def target(self, stack: Stack, z_ND: torch.Tensor) -> torch.Tensor:
        """What `values` compares with, from the expert's stream: a row a position."""

    @abstractmethod
    def values(self, stack: Stack, z_ND: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """F of each position, float64 [..., N], from streams [..., N, D]."""

    def weights(self, weights_BA: torch.Tensor) -> torch.Tensor:
        """The share of each position in F [B, A], of that in a mean over the answer."""
        return weights_BA

    def numbers(self, width: int) -> int:
        """How many numbers `values` makes of a stream at one position, of D = `width`."""
        return width

    def expert(self, stack: Stack, z_BAD: torch.Tensor, weights_BA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(F(expert) [B], what `read` compares with), from the expert's stream."""
        target = self.target(stack, z_BAD[self.weights(weights_BA) > 0])
        return self.read(stack, z_BAD, target, weights_BA), target

    def read(self, stack: Stack, z_BAD: torch.Tensor, target: torch.Tensor, weights_BA: torch.Tensor) -> torch.Tensor:
        """F [..., B] float64 from streams [..., B, A, D]."""
        share_BA = self.weights(weights_BA)
        z_ND = z_BAD[..., share_BA > 0, :]
        parts = [
            self.values(stack, z_ND[..., rows, :], target[rows].to(z_ND.device)) for rows in self._steps(z_BAD, z_ND)
        ]
        return answer_mean(torch.cat(parts, -1), share_BA)

    def read_with_gradient(
        self, stack: Stack, z_BAD: torch.Tensor, target: torch.Tensor, weights_BA: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(F [B], dF/dz [B, A, D]); a prompt's F depends on its own z alone."""
        share_BA = self.weights(weights_BA)
        keep_BA = share_BA > 0
        z_ND, share_N, gradient_BAD = z_BAD[keep_BA], share_BA[keep_BA], torch.zeros_like(z_BAD)
        values: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for rows in self._steps(z_BAD, z_ND):
            with torch.enable_grad():
                some_ND = z_ND[rows].detach().requires_grad_(True)
                values.append(self.values(stack, some_ND, target[rows].to(some_ND.device)))
                gradients += torch.autograd.grad(_SCALE * (share_N[rows] * values[-1]).sum(), some_ND)
            values[-1] = values[-1].detach()
        gradient_BAD[keep_BA] = torch.cat(gradients)
        return answer_mean(torch.cat(values), share_BA), gradient_BAD / _SCALE

    def _steps(self, z_BAD: torch.Tensor, z_ND: torch.Tensor) -> Iterator[slice]:
        """Which of the N positions are taken at a time: at least as many as there are prompts."""
        stacked, (prompts, _positions, width) = z_ND[..., 0, 0].numel(), z_BAD.shape[-3:]
        step = max(prompts, _MOST_NUMBERS // (stacked * self.numbers(width)))
        yield from (slice(start, start + step) for start in range(0, z_ND.shape[-2], step))


def answer_mean(values_N: torch.Tensor, share_BA: torch.Tensor) -> torch.Tensor:
    """[..., N] -> [..., B]: the mean over each prompt's positions."""
    values_BA = values_N.new_zeros(*values_N.shape[:-1], *share_BA.shape)
    values_BA[..., share_BA > 0] = values_N
    return (values_BA * share_BA).sum(-1)


@dataclass(frozen=True)
class CosineMetric(Metric):
    """cos(z, v) with the direction v [D]; `anchor` reads the prompt's last token alone, whatever is answered."""

    direction_D: torch.Tensor

    def target(self, stack: Stack, z_ND: torch.Tensor) -> torch.Tensor:
        return self.direction_D.expand_as(z_ND)

    def values(self, stack: Stack, z_ND: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return anchor_utility(z_ND, target)

    def weights(self, weights_BA: torch.Tensor) -> torch.Tensor:
        if self.name != "anchor":
            return weights_BA
        return torch.zeros_like(weights_BA).index_fill(1, weights_BA.new_zeros(1, dtype=torch.long), 1.0)


@dataclass(frozen=True)
class KLMetric(Metric):
    """-KL(p_expert || p) of the next token over the first `vocabulary` rows.

    Compares with the expert's logits at the positions that count, float32 [N, V]: kept in host memory where layers are
    streamed and all prompts wait for the base's turn.
    """

    vocabulary: int

    def target(self, stack: Stack, z_ND: torch.Tensor) -> torch.Tensor:
        logits_NV = stack.logits(z_ND, self.vocabulary)
        return logits_NV.cpu() if stack.streamed else logits_NV

    def values(self, stack: Stack, z_ND: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return kl_utility(stack.logits(z_ND, self.vocabulary), target)

    def numbers(self, width: int) -> int:
        return self.vocabulary

    def expert(self, stack: Stack, z_BAD: torch.Tensor, weights_BA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        target = self.target(stack, z_BAD[self.weights(weights_BA) > 0])
        return torch.zeros(len(z_BAD), dtype=torch.float64, device=z_BAD.device), target


def make_metrics(
    utility: str, layers: int, vocabulary: int, anchor_layer: int | None, v_LD: torch.Tensor | None
) -> tuple[Metric, ...]:
    """The metrics of a utility, lowest first; `kl` alone takes no anchor layer and no directions."""
    kl = KLMetric("kl", layers - 1, vocabulary)
    if utility == "kl":
        return (kl,)
    assert anchor_layer is not None
    assert v_LD is not None
    anchor = CosineMetric("anchor", anchor_layer, v_LD[anchor_layer])
    if utility == "anchor":
        return (anchor,)
    above = kl if utility == "staged" else CosineMetric("projection", layers - 1, v_LD[layers - 1])
    if utility == "projection":
        return (above,)
    # An anchor at the last layer leaves nothing above it.
    return (anchor, above) if anchor_layer < layers - 1 else (anchor,)


def metric_of(metrics: tuple[Metric, ...], layer: int) -> Metric | None:
    """The metric that scores the components of `layer`: the lowest that sees it; None if none does."""
    return next((metric for metric in metrics if layer <= metric.layer), None)


@torch.no_grad()
def instruction_effect(
    stack: Stack, prompts: Sequence[Sequence[int]], contrasts: Sequence[Sequence[int]], vocabulary: int, size: int
) -> torch.Tensor:
    """KL(p(. | x+) || p(. | x-)) of the next token, nats, float64 [N], for every prompt x+ and its contrast x-."""
    with_N, without_N = (_next_logits(stack, texts, vocabulary, size) for texts in (prompts, contrasts))
    return -kl_utility(without_N, with_N)


def _next_logits(stack: Stack, prompts: Sequence[Sequence[int]], vocabulary: int, size: int) -> torch.Tensor:
    """[N, V], in the order of the prompts, on the CPU."""
    found: dict[int, torch.Tensor] = {}
    for chosen, batch in numbered_batches(prompts, size, stack):
        *_, (_top, (final_BTD,)) = forward_sweep(stack, [stack.start(batch)], stack.depth, at=[batch.reads_BA])
        found |= zip(chosen, stack.logits(batch.at_anchor(final_BTD), vocabulary).cpu(), strict=True)
    return torch.stack([found[i] for i in range(len(prompts))])
