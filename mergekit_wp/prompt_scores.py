"""What single prompts give to a task's scores, as a score file keeps it with `wp-score --per-prompt`.

Legend: P scoring prompts, L layers, H query heads, F neurons a layer, n either of H and F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

_TOLERANCE = 1e-4  # a prompt's products are summed apart


@dataclass(frozen=True)
class PromptScores:
    """What each prompt gives: heads [P, L, H], neurons [P, L, F]; its gap and whether it was used (0 or 1), by metric:
    [P]; float32. A score is the sum over the prompts, divided by how many were used."""

    heads: torch.Tensor
    neurons: torch.Tensor
    gaps: dict[str, torch.Tensor]
    used: dict[str, torch.Tensor]

    @classmethod
    def taken(cls, tensors: dict[str, torch.Tensor], prefix: str) -> PromptScores | None:
        """Those of a file, out of `tensors`; None where it has none. Raises KeyError and ValueError."""
        own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        if not own:
            return None
        heads, neurons = own.pop("heads"), own.pop("neurons")
        gaps, used = (
            {name.removeprefix(f"{part}/"): own.pop(name) for name in list(own) if name.startswith(f"{part}/")}
            for part in ("gaps", "used")
        )
        if own or set(gaps) != set(used):
            raise ValueError(f"unexpected tensors of single prompts {sorted([*own, *gaps, *used])}")
        return cls(heads, neurons, gaps, used)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors under the names that they have in the file, below the task's."""
        named = {"prompts/heads": self.heads, "prompts/neurons": self.neurons}
        named |= {f"prompts/gaps/{metric}": x for metric, x in self.gaps.items()}
        return named | {f"prompts/used/{metric}": x for metric, x in self.used.items()}

    def check(self, task: str, prompts: int, used: Mapping[str, int]) -> None:
        """Raise ValueError unless they are of so many prompts, of which each metric used so many."""
        if len(self.heads) != prompts or set(self.used) != set(used):
            raise ValueError(f"{task} does not say of every prompt and metric what single prompts give")
        if any(float(self.used[metric].sum()) != count for metric, count in used.items()):
            raise ValueError(f"{task} marks other prompts as used than it counts")

    def check_mean(self, task: str, kind: str, table_Ln: torch.Tensor, used_L: Sequence[int]) -> None:
        """Raise ValueError unless the scores of a kind are theirs, within the rounding of float32; `used_L`: how many
        prompts the metric of each layer used."""
        values_PLn, used_L1 = getattr(self, kind), torch.tensor(used_L)[:, None]
        rounding_Ln = _TOLERANCE * values_PLn.abs().sum(0) / used_L1
        if ((values_PLn.sum(0) / used_L1 - table_Ln).abs() > rounding_Ln + 1e-12).any():
            raise ValueError(f"{task}: {kind} is not the mean over its prompts")
