"""The running sums of one task's scores.

Legend: L layers, H heads, F neurons, C components.
"""

from __future__ import annotations

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
    """Weighted scores of one task over its prompts: `sums[kind][part]`, float64 [L, H] or [L, F]."""

    task: str
    method: str
    geometry: Geometry
    metrics: tuple[Metric, ...]
    gap: str
    gap_floor: float
    device: torch.device
    dtype: torch.dtype = torch.float32
    ledgers: dict[str, GapLedger] = field(init=False)
    sums: dict[Kind, dict[str, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        kept = self.gap, self.gap_floor, self.dtype
        self.ledgers = {metric.name: GapLedger(metric.name, *kept) for metric in self.metrics}
        depth = self.geometry.layers
        self.sums = {
            kind: {
                part: torch.zeros(depth, self.geometry.count(kind), dtype=torch.float64, device=self.device)
                for part in parts
            }
            for kind, parts in PARTS[self.method].items()
        }

    def metrics_at(self, layer: int) -> list[Metric]:
        """The metrics that are read above `layer`."""
        return [metric for metric in self.metrics if metric.layer == layer]

    def add(self, kind: Kind, layer: int, parts: Parts) -> None:
        """Add the scores of every component of a layer."""
        for part, values in parts.items():
            self.sums[kind][part][layer] += values

    def add_some(self, kind: Kind, layer: int, components_C: torch.Tensor, values_C: torch.Tensor) -> None:
        """Add the scores of some components of a layer."""
        self.sums[kind]["whole"][layer, components_C.to(self.device)] += values_C

    def of(self, layer: int) -> dict[str, torch.Tensor]:
        """What was added up in a layer by a method whose scores are whole: float64 [H], [F]."""
        return {str(kind): parts["whole"][layer] for kind, parts in self.sums.items()}

    def gather(self, processes: ProcessGroup) -> None:
        """Add up what the processes found on different prompts."""
        for ledger in self.ledgers.values():
            ledger.gather(processes, self.device)
        for parts in self.sums.values():
            for part in parts:
                parts[part] = processes.add_up(parts[part])

    def finish(self) -> dict[Kind, dict[str, torch.Tensor]]:
        """{heads: {part: [L, H]}, neurons: {part: [L, F]}} float64 on the CPU, divided by the gaps.

        Layers that no metric sees are 0. Raises `BadInput` when a utility has no gap to divide by, or a score is not
        finite.
        """
        divisor_L = torch.ones(self.geometry.layers, 1, dtype=torch.float64)
        normalizers = {name: ledger.normalizer(self.task) for name, ledger in self.ledgers.items()}
        for layer in range(self.geometry.layers):
            if metric := metric_of(self.metrics, layer):
                divisor_L[layer] = normalizers[metric.name]
        tables = {
            kind: {part: table.cpu() / divisor_L for part, table in parts.items()} for kind, parts in self.sums.items()
        }
        if not all(torch.isfinite(table).all() for parts in tables.values() for table in parts.values()):
            raise not_finite(f"task {self.task}: a score", self.dtype)
        return tables
