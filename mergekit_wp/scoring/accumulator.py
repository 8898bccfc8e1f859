"""The running sums of one task's scores.

Legend: L layers, H heads, F neurons, C components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mergekit_wp.geometry import Geometry, Kind
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.first_order import Parts
from mergekit_wp.scoring.metrics import GapLedger, Metric, metric_of
from mergekit_wp.scoring.models.precision import not_finite

_Parts = dict[Kind, tuple[str, ...]]
_WEIGHT_PARTS: _Parts = {Kind.HEAD: ("q", "o"), Kind.NEURON: ("gate", "up", "down")}
_WHOLE: _Parts = dict.fromkeys(Kind, ("whole",))
# The parts that a method's scores come in, which add up to the score.
PARTS: dict[str, _Parts] = {
    "attr": _WEIGHT_PARTS,
    "writeback": _WEIGHT_PARTS,
    "atp": _WHOLE,
    "exact": _WHOLE,
    "ap": _WHOLE,
}


@dataclass
class TaskAccumulator:
    """Weighted scores of one task over its prompts: `sums[kind][part]`, float64 [L, H] or [L, F].

    Of so many `prompts`, what each adds to a score is kept as well, by number: `by_prompt[kind]`, float32 [P, L, H] or
    [P, L, F]. Of the update shuffled by each of the seeds `shuffles`, scores are kept in `shuffled[kind]`, float64
    [S, L, H] or [S, L, F].
    """

    task: str
    method: str
    geometry: Geometry
    metrics: tuple[Metric, ...]
    gap: str
    gap_floor: float
    device: torch.device
    dtype: torch.dtype = torch.float32
    prompts: int = 0
    shuffles: Sequence[str] = ()
    ledgers: dict[str, GapLedger] = field(init=False)
    sums: dict[Kind, dict[str, torch.Tensor]] = field(init=False)
    by_prompt: dict[Kind, torch.Tensor] = field(init=False)
    shuffled: dict[Kind, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        kept = self.gap, self.gap_floor, self.dtype, self.prompts
        self.ledgers = {metric.name: GapLedger(metric.name, *kept) for metric in self.metrics}
        depth = self.geometry.layers
        self.sums = {
            kind: {
                part: torch.zeros(depth, self.geometry.count(kind), dtype=torch.float64, device=self.device)
                for part in parts
            }
            for kind, parts in PARTS[self.method].items()
        }
        self.by_prompt = {
            kind: torch.zeros(self.prompts, depth, self.geometry.count(kind), device=self.device)
            for kind in (Kind if self.prompts else ())
        }
        self.shuffled = {
            kind: torch.zeros(
                len(self.shuffles), depth, self.geometry.count(kind), dtype=torch.float64, device=self.device
            )
            for kind in (Kind if self.shuffles else ())
        }

    def metrics_at(self, layer: int) -> list[Metric]:
        """The metrics that are read above `layer`."""
        return [metric for metric in self.metrics if metric.layer == layer]

    def add(self, kind: Kind, layer: int, parts: Parts, numbers: Sequence[int]) -> None:
        """Add the scores of every component of a layer; [B, H] or [B, F] of the prompts of these numbers where prompts
        are kept, else summed over them."""
        if self.prompts:
            whole_BC = sum(parts.values(), start=torch.zeros((), device=self.device))
            self.by_prompt[kind][list(numbers), layer] = whole_BC.float()
            parts = {part: values_BC.sum(0) for part, values_BC in parts.items()}
        for part, values in parts.items():
            self.sums[kind][part][layer] += values

    def add_shuffled(self, kind: Kind, layer: int, number: int, parts: Parts) -> None:
        """Add the scores of every component of a layer of one shuffled update; [B, H] or [B, F] are summed over B."""
        whole = sum(parts.values(), start=torch.zeros((), device=self.device))
        self.shuffled[kind][number, layer] += whole.sum(0) if whole.ndim == 2 else whole

    def add_some(
        self, kind: Kind, layer: int, components_C: torch.Tensor, values_CB: torch.Tensor, numbers: Sequence[int]
    ) -> None:
        """Add the scores of some components of a layer, of the prompts of these numbers."""
        components_C = components_C.to(self.device)
        self.sums[kind]["whole"][layer, components_C] += values_CB.sum(1)
        if self.prompts:
            rows_B1 = torch.tensor(list(numbers), device=self.device)[:, None]
            self.by_prompt[kind][rows_B1, layer, components_C] = values_CB.T.float()

    def of(self, layer: int) -> dict[str, torch.Tensor]:
        """What was added up in a layer by a method whose scores are whole: float64 [H], [F]; and by prompt."""
        found = {str(kind): parts["whole"][layer] for kind, parts in self.sums.items()}
        return found | {f"{kind} by prompt": table[:, layer].contiguous() for kind, table in self.by_prompt.items()}

    def put(self, layer: int, found: Mapping[str, torch.Tensor]) -> None:
        """The opposite of `of`."""
        for kind, parts in self.sums.items():
            parts["whole"][layer] = found[str(kind)].to(self.device)
        for kind, table in self.by_prompt.items():
            table[:, layer] = found[f"{kind} by prompt"].to(self.device)

    def gather(self, processes: ProcessGroup) -> None:
        """Add up what the processes found on different prompts."""
        for ledger in self.ledgers.values():
            ledger.gather(processes, self.device)
        for parts in self.sums.values():
            for part in parts:
                parts[part] = processes.add_up(parts[part])
        self.by_prompt = {kind: processes.add_up(table) for kind, table in self.by_prompt.items()}
        self.shuffled = {kind: processes.add_up(table) for kind, table in self.shuffled.items()}

    def finish(self) -> dict[Kind, dict[str, torch.Tensor]]:
        """{heads: {part: [L, H]}, neurons: {part: [L, F]}} float64 on the CPU, divided by the gaps.

        Layers that no metric sees are 0. Raises `BadInput` when a utility has no gap to divide by, or a score is not
        finite.
        """
        divisor_L1 = self._of_layers({name: ledger.normalizer(self.task) for name, ledger in self.ledgers.items()})
        tables = {
            kind: {part: table.cpu() / divisor_L1 for part, table in parts.items()} for kind, parts in self.sums.items()
        }
        if not all(torch.isfinite(table).all() for parts in tables.values() for table in parts.values()):
            raise not_finite(f"task {self.task}: a score", self.dtype)
        return tables

    def finish_by_prompt(self) -> dict[Kind, torch.Tensor]:
        """`by_prompt` on the CPU, such that a score is the sum over the prompts divided by how many were used."""
        share = {name: ledger.used / ledger.normalizer(self.task) for name, ledger in self.ledgers.items()}
        return {kind: (table.cpu() * self._of_layers(share)).float() for kind, table in self.by_prompt.items()}

    def finish_shuffled(self) -> dict[str, torch.Tensor]:
        """`shuffled` as float32 scores on the CPU, by the gaps of the expert itself."""
        divisor_L1 = self._of_layers({name: ledger.normalizer(self.task) for name, ledger in self.ledgers.items()})
        return {str(kind): (table.cpu() / divisor_L1).float() for kind, table in self.shuffled.items()}

    def _of_layers(self, numbers: Mapping[str, float]) -> torch.Tensor:
        """The number of each layer's metric, float64 [L, 1]; 1 where no metric sees the layer."""
        found_L1 = torch.ones(self.geometry.layers, 1, dtype=torch.float64)
        for layer in range(self.geometry.layers):
            if metric := metric_of(self.metrics, layer):
                found_L1[layer] = numbers[metric.name]
        return found_L1
