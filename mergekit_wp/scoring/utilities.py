"""Utilities: how far a run has recovered the expert, one number a prompt.

    anchor   F = cos(z_a(x | M), v)                          Eq. 5, read at the anchor layer
    projection   the same at the last layer                  Eq. 74
    kl       F = -KL(p_sft || p_M) of the next token, nats   Eq. 72, read at the output
    staged   anchor for components up to the anchor layer, kl for those above (METHOD.md 2);
             staged-projection: projection for those

and the gap G(x) = F(expert, x) - F(base, x) (Eq. 6) that scores are divided by. The mean of ratios (`sample`)
drops prompts whose |G| is below a floor: they say nothing, and 1/G would let them dominate. The ratio of means
(`mean`) keeps every prompt.

Legend: B prompts, D residual width, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from mergekit_wp.errors import BadInput
from mergekit_wp.scorefile import UtilityStats
from mergekit_wp.scoring.precision import not_finite
from mergekit_wp.scoring.team import Team


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
    what products run in.
    """

    utility: str
    gap: str
    floor: float
    dtype: torch.dtype = torch.float32
    used: int = 0
    dropped: int = 0
    negative: int = 0
    total: float = 0.0

    def weights(self, base_B: torch.Tensor, expert_B: torch.Tensor) -> torch.Tensor:
        """w(x) [B], float64, from F(base, x) and F(expert, x), counted here. Raises `BadInput` if not finite."""
        gap_B = (expert_B - base_B).detach().double()
        if not torch.isfinite(gap_B).all():
            raise not_finite(f"utility {self.utility}: its value for a prompt", self.dtype)
        keep_B = gap_B.abs() >= self.floor if self.gap == "sample" else torch.ones_like(gap_B, dtype=torch.bool)
        self.used += int(keep_B.sum())
        self.dropped += int((~keep_B).sum())
        self.negative += int((gap_B[keep_B] < 0).sum())
        self.total += float(gap_B[keep_B].sum())
        inverse_B = torch.where(keep_B, 1 / torch.where(keep_B, gap_B, 1.0), 0.0)
        return inverse_B if self.gap == "sample" else torch.ones_like(gap_B)

    def gather(self, team: Team, device: torch.device) -> None:
        """Add up the counts of a team whose processes saw different prompts."""
        counts = [self.used, self.dropped, self.negative, self.total]
        *whole, self.total = team.add_up(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
        self.used, self.dropped, self.negative = map(int, whole)

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
