"""Patch components one by one, many at a time: `exact` (Eq. 10) and `ap` (Eq. 12).

Patching component c in layer l changes nothing below l. So the base restarts inside layer l from its own stored
activations, with the exact change of what c writes added to the output of o_proj or down_proj, and runs on to
where the utility is read, with many components stacked in the batch dimension (METHOD.md 3). Equal to replacing
the weights in place, at the cost of the layers between l and the gauge alone.

Legend: C components, B prompts, T tokens, D residual width, w columns of a component, W columns of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mergekit_wp.components import PROJECTIONS, Geometry, Kind
from mergekit_wp.scoring.batches import Batch
from mergekit_wp.scoring.capture import LayerRecord
from mergekit_wp.scoring.gauges import Gauge
from mergekit_wp.scoring.patches import MixedPatch, Patch
from mergekit_wp.scoring.stack import Call, Stack, Start
from mergekit_wp.scoring.stand_ins import Constant, substituted
from mergekit_wp.scoring.sweep import ascend

KEY = {Kind.HEADS: "o", Kind.NEURONS: "down"}


@dataclass(frozen=True)
class Restart:
    """The base's run of one batch, stopped in layer `index`, ready to go on with patched components."""

    stack: Stack
    geometry: Geometry
    batch: Batch
    calls: list[Call]
    index: int
    layer: Any
    record: LayerRecord
    gauge: Gauge
    target: torch.Tensor

    def utilities(
        self, kind: Kind, patch: Patch | MixedPatch, components_C: torch.Tensor, fraction: float = 1.0
    ) -> torch.Tensor:
        """F of the base with each component patched alone, or that `fraction` of its write: float64 [C, B]."""
        last = self.index == self.gauge.layer  # nothing above: the anchors are all that is read
        changes_CBTD = fraction * self._changes(kind, patch, components_C, last)
        above = self._rest_of_layer(kind, changes_CBTD, last)
        anchors = self.batch.last_B.repeat(len(components_C))
        if last:
            z = above[:, 0]
        else:
            start = Start(above, self.calls)
            for _layer, streams in ascend(
                self.stack, [start], self.gauge.layer + 1, at=[anchors], below=self.index + 1
            ):
                above = streams[0]
            z = above[torch.arange(len(above), device=above.device), anchors]
        return self.gauge.read(self.stack, z.unflatten(0, (len(components_C), -1)), self.target)

    def _changes(self, kind: Kind, patch: Patch | MixedPatch, components_C: torch.Tensor, last: bool) -> torch.Tensor:
        """What each component writes beyond the base's, float32 [C, B, T, D]."""
        columns_Cw = self.geometry.columns(kind, components_C).to(self.stack.device)
        weight_DW = self.layer.get_submodule(PROJECTIONS[KEY[kind]]).weight
        return patch.writes(weight_DW, columns_Cw, partial(self._kept, last=last))

    def _rest_of_layer(self, kind: Kind, changes_CBTD: torch.Tensor, last: bool) -> torch.Tensor:
        """The stream above the layer [C*B, T, D] with the changes added where the components write."""
        count = len(changes_CBTD)
        attention_BTD = self._kept(self.record.outputs["o"], last)
        stream = self._kept(self.record.stream_BTD, last).repeat(count, 1, 1)
        if kind == Kind.HEADS:
            patched = (attention_BTD.float() + changes_CBTD).flatten(0, 1)
            with substituted(self.layer, self_attn=Constant((patched, None))):
                return self.stack.call(self.layer, stream, self.calls[self.index])
        patched = (self._kept(self.record.outputs["down"], last).float() + changes_CBTD).flatten(0, 1)
        attention = Constant((attention_BTD.float().repeat(count, 1, 1), None))
        with substituted(self.layer, self_attn=attention, mlp=Constant(patched)):
            return self.stack.call(self.layer, stream, self.calls[self.index])

    def _kept(self, x_BTD: torch.Tensor, last: bool) -> torch.Tensor:
        """All positions, or only the anchors where nothing else is read."""
        if last and x_BTD.shape[1] > 1:
            return self.batch.at_anchor(x_BTD).unsqueeze(1)
        return x_BTD


def chunks(components: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Cut the list into pieces of at most `width`, all but the last equally long."""
    for start in range(0, len(components), width):
        yield components[start : start + width]
