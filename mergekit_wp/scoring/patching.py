"""Patching components of one layer: what each writes then (`Patch`), and the run from there on (`PatchedForward`).

Heads do not mix before o_proj, nor neurons before down_proj. So the activations of *all* patched components come
from one run of the layer's own code (METHOD.md 3), `Patch`, and the write of component c, with a the input of o_proj
or down_proj at its columns and W those columns, changes by

    weights       a'_c W'_c - a_c W_c    a' with the expert's own rows on the base's residual (exact, writeback)
    write         a'_c W'_c - a_c W_c    a' from the expert's own run on the same prompt       (ap, atp)
    activation    (a'_c - a_c) W_c       the same a', written by the base                      (ap, atp; `object`)

Everything is kept as differences, a' - a and W' - W, so that rounding is relative to the update and not to the
weights: a'W' - aW = (a' - a) W + a' (W' - W).

Where a norm runs over the queries of all heads (OLMo), they do mix: with c's own rows of q_proj, the other heads ask
the same but louder or softer. There, `MixedPatch`, the attention runs once for every head c, and what o_proj writes
changes by (a' - a) W over the columns of all heads, and by a'_c (W'_c - W_c).

`exact` (Eq. 10) and `ap` (Eq. 12) patch components one by one, many at a time. Patching component c in layer l
changes nothing below l. So the base starts again inside layer l from its own stored
activations, with the exact change of what c writes added to the output of o_proj or down_proj, and runs on to
where the utility is read, with many components stacked in the batch dimension (METHOD.md 3). Equal to replacing
the weights in place, at the cost of the layers between l and the metric alone.

Legend: C components, B prompts, T tokens, A positions read of each, D residual width, Q = H*d_h, d = d_h, F neurons,
W either of Q and F, w columns of a component.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch.nn import functional

from mergekit_wp.geometry import PROJECTIONS, Geometry, Kind
from mergekit_wp.scoring.batching import Batch, pick
from mergekit_wp.scoring.hooks import Constant, LayerRecord, rerun_attention, substituted
from mergekit_wp.scoring.metrics import Metric
from mergekit_wp.scoring.models.layerwise import Call, Stack, Start
from mergekit_wp.scoring.sweep import forward_sweep

Kept = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Patch:
    """All components of one kind in one layer, patched each on its own.

    changes       by what the activations move, summing to a' - a: {name of the part: [B, T, W] float32}
    patched_BTW   a'
    moved_DW      W' - W, or None where the base's weights write
    """

    changes: dict[str, torch.Tensor]
    patched_BTW: torch.Tensor
    moved_DW: torch.Tensor | None

    @cached_property  # every stacked step of `PatchedForward` asks for it
    def change_BTW(self) -> torch.Tensor:
        return sum(list(self.changes.values())[1:], start=next(iter(self.changes.values())))

    def writes(self, weight_DW: torch.Tensor, columns_Cw: torch.Tensor, kept: Kept) -> torch.Tensor:
        """What the components with these columns write beyond the base's, each alone: [C, B, T, D] float32.

        weight_DW: the base's W. kept: cuts activations to the positions that are wanted.
        """
        changes_CBTD = _write(kept(self.change_BTW), weight_DW, columns_Cw)
        if self.moved_DW is not None:
            changes_CBTD = changes_CBTD + _write(kept(self.patched_BTW), self.moved_DW, columns_Cw)
        return changes_CBTD

    def scores(self, key: str, record: LayerRecord, width: int) -> dict[str, torch.Tensor]:
        """delta . (change of the write) of every component, in parts, `key` (o or down) that of W: {part: [C]} float32,
        [B, C] of a record that is kept by prompt.

        record: of the base, with gradients; width: columns of a component.
        """
        parts = {name: record.dot(change, record.grad_in[key]) for name, change in self.changes.items()}
        if self.moved_DW is not None:
            parts[key] = record.dot(self.patched_BTW, torch.matmul(record.grad_out[key], self.moved_DW))
        return {name: values_W.unflatten(-1, (-1, width)).sum(-1) for name, values_W in parts.items()}


@dataclass(frozen=True)
class MixedPatch:
    """All heads of one layer, patched each on its own, where a head's queries change what other heads ask.

    rerun        the input of o_proj, float32, for queries of the B prompts, repeated any number of times
    q_BTQ        the base's queries before the norm, float32; change_BTQ: the expert's beyond those
    moved_DQ     W' - W of o_proj
    most_tokens  of patched prompts in a step
    """

    rerun: Callable[[torch.Tensor], torch.Tensor]
    q_BTQ: torch.Tensor
    change_BTQ: torch.Tensor
    moved_DQ: torch.Tensor
    most_tokens: int = 1 << 13

    @cached_property
    def base_BTQ(self) -> torch.Tensor:
        return self.rerun(self.q_BTQ)

    def activations(self, columns_Cd: torch.Tensor) -> torch.Tensor:
        """a' of all heads when the head with these columns is patched: [C, B, T, Q] float32."""
        own_CQ = torch.zeros(len(columns_Cd), self.q_BTQ.shape[-1], device=self.q_BTQ.device)
        own_CQ.scatter_(1, columns_Cd, 1.0)
        queries_CBTQ = self.q_BTQ + own_CQ[:, None, None] * self.change_BTQ
        return self.rerun(queries_CBTQ.flatten(0, 1)).unflatten(0, (len(columns_Cd), -1))

    def writes(self, weight_DW: torch.Tensor, columns_Cw: torch.Tensor, kept: Kept) -> torch.Tensor:
        """As `Patch.writes`."""
        changes = []
        for columns_1d, patched_BTQ in zip(columns_Cw.split(1), self.activations(columns_Cw), strict=True):
            shared_BTD = functional.linear(kept(patched_BTQ - self.base_BTQ), weight_DW.float())
            changes.append(shared_BTD + _write(kept(patched_BTQ), self.moved_DQ, columns_1d)[0])
        return torch.stack(changes)

    def scores(self, key: str, record: LayerRecord, width: int) -> dict[str, torch.Tensor]:
        """As `Patch.scores`."""
        Q, tokens = self.q_BTQ.shape[-1], self.q_BTQ.shape[0] * self.q_BTQ.shape[1]
        moved_BTQ = torch.matmul(record.grad_out[key], self.moved_DQ).float()
        delta_BTQ = record.grad_in[key].float()
        parts: dict[str, list[torch.Tensor]] = {"q": [], key: []}
        columns_Hd = torch.arange(Q, device=self.q_BTQ.device).unflatten(0, (-1, width))
        for columns_Cd in columns_Hd.split(max(1, self.most_tokens // tokens)):
            for columns_d, patched_BTQ in zip(columns_Cd, self.activations(columns_Cd), strict=True):
                parts["q"].append(record.dot(patched_BTQ - self.base_BTQ, delta_BTQ).sum(-1))
                parts[key].append(record.dot(patched_BTQ[..., columns_d], moved_BTQ[..., columns_d]).sum(-1))
        return {name: torch.stack(values, -1) for name, values in parts.items()}


def patch_heads(stack: Stack, base: Any, expert: Any, record: LayerRecord, geometry: Geometry) -> Patch | MixedPatch:
    """Every head with the expert's slices of q_proj and o_proj."""
    change_BTQ, moved_DQ = response_difference("q", base, expert, record), weight_difference("o", base, expert)
    rerun = partial(rerun_attention, stack, base.self_attn, record)
    q_BTQ = record.outputs["q"].float()
    if geometry.heads_mix:
        return MixedPatch(rerun, q_BTQ, change_BTQ.float(), moved_DQ)
    patched_BTQ = rerun(q_BTQ + change_BTQ)
    # In fewer bits than float32 the record's own attention is rounded like the whole, not like the update.
    own_BTQ = record.inputs["o"] if stack.dtype == torch.float32 else rerun(q_BTQ)
    return Patch({"q": patched_BTQ - own_BTQ}, patched_BTQ, moved_DQ)


def patch_neurons(_stack: Stack, base: Any, expert: Any, record: LayerRecord, _geometry: Geometry) -> Patch:
    """Every neuron with the expert's slices of gate_proj, up_proj and down_proj.

    The change of the activation is told apart as gate first, then up: (f(g') - f(g)) u and f(g') (u' - u).
    """
    act = base.mlp.act_fn
    gate_BTF, up_BTF = record.outputs["gate"].float(), record.outputs["up"].float()
    up_change_BTF = response_difference("up", base, expert, record).float()
    open_BTF = act(gate_BTF)
    patched_open_BTF = act(gate_BTF + response_difference("gate", base, expert, record))
    changes = {"gate": (patched_open_BTF - open_BTF) * up_BTF, "up": patched_open_BTF * up_change_BTF}
    patched_BTF = patched_open_BTF * (up_BTF + up_change_BTF)
    return Patch(changes, patched_BTF, weight_difference("down", base, expert))


def patch_head_activations(
    base: Any, expert: Any, record: LayerRecord, expert_record: LayerRecord, write: bool
) -> Patch:
    """Every head's output before o_proj from the expert's own run; with `write`, through the expert's o_proj too."""
    patched_BTQ = expert_record.inputs["o"]
    change_BTQ = patched_BTQ.float() - record.inputs["o"].float()
    return Patch({"whole": change_BTQ}, patched_BTQ, weight_difference("o", base, expert) if write else None)


def patch_neuron_activations(
    base: Any, expert: Any, record: LayerRecord, expert_record: LayerRecord, write: bool
) -> Patch:
    """Every neuron's activation from the expert's own run; with `write`, through the expert's down_proj too."""
    patched_BTF = expert_record.inputs["down"]
    change_BTF = patched_BTF.float() - record.mlp_activation(base.mlp).float()
    return Patch({"whole": change_BTF}, patched_BTF, weight_difference("down", base, expert) if write else None)


def response_difference(key: str, base: Any, expert: Any, record: LayerRecord) -> torch.Tensor:
    """What the expert's projection would put out beyond the base's on the base's input: x dW^T + db."""
    bias, expert_bias = (layer.get_submodule(PROJECTIONS[key]).bias for layer in (base, expert))
    difference = None if bias is None else expert_bias.float() - bias.float()
    return functional.linear(record.inputs[key], weight_difference(key, base, expert), difference)


def weight_difference(key: str, base: Any, expert: Any) -> torch.Tensor:
    """dW [out, in] of one projection, float32, from the weights as stored."""
    weight, expert_weight = (layer.get_submodule(PROJECTIONS[key]).weight for layer in (base, expert))
    difference: torch.Tensor = expert_weight.float() - weight.float()
    return difference.detach()


def _write(activation_BTW: torch.Tensor, weight_DW: torch.Tensor, columns_Cw: torch.Tensor) -> torch.Tensor:
    """Each component's own activation through its own columns: [C, B, T, D] float32."""
    prompts, tokens = activation_BTW.shape[:2]
    own_CNw = activation_BTW[..., columns_Cw].float().flatten(0, 1).transpose(0, 1)
    own_CwD = weight_DW[:, columns_Cw].float().permute(1, 2, 0)
    return torch.bmm(own_CNw, own_CwD).unflatten(1, (prompts, tokens))


KEY = {Kind.HEAD: "o", Kind.NEURON: "down"}


@dataclass(frozen=True)
class PatchedForward:
    """The base's run of one batch, stopped in layer `index`, ready to go on with patched components."""

    stack: Stack
    geometry: Geometry
    batch: Batch
    calls: list[Call]
    index: int
    layer: Any
    record: LayerRecord
    metric: Metric
    target: torch.Tensor

    def utilities(
        self, kind: Kind, patch: Patch | MixedPatch, components_C: torch.Tensor, fraction: float = 1.0
    ) -> torch.Tensor:
        """F of the base with each component patched alone, or that `fraction` of its write: float64 [C, B]."""
        last = self.index == self.metric.layer  # nothing above: only what is read matters
        changes_CBTD = fraction * self._changes(kind, patch, components_C, last)
        above = self._rest_of_layer(kind, changes_CBTD, last)
        z = above
        if not last:
            reads = self.batch.reads_BA.repeat(len(components_C), 1)
            start = Start(above, self.calls)
            for _layer, streams in forward_sweep(
                self.stack, [start], self.metric.layer + 1, at=[reads], below=self.index + 1
            ):
                above = streams[0]
            z = pick(above, reads)
        z_CBAD = z.unflatten(0, (len(components_C), -1))
        return self.metric.read(self.stack, z_CBAD, self.target, self.batch.weights_BA)

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
        if kind == Kind.HEAD:
            patched = (attention_BTD.float() + changes_CBTD).flatten(0, 1)
            with substituted(self.layer, self_attn=Constant((patched, None))):
                return self.stack.call(self.layer, stream, self.calls[self.index])
        patched = (self._kept(self.record.outputs["down"], last).float() + changes_CBTD).flatten(0, 1)
        attention = Constant((attention_BTD.float().repeat(count, 1, 1), None))
        with substituted(self.layer, self_attn=attention, mlp=Constant(patched)):
            return self.stack.call(self.layer, stream, self.calls[self.index])

    def _kept(self, x_BTD: torch.Tensor, last: bool) -> torch.Tensor:
        """All positions, or only those that are read, if no layer above sees the others."""
        # Of A positions, all are read: such a prompt is one token, or cut already.
        return self.batch.at_reads(x_BTD) if last and x_BTD.shape[1] > self.batch.reads_BA.shape[1] else x_BTD


def chunks(components: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Cut the list into pieces of at most `width`, all but the last equally long."""
    for start in range(0, len(components), width):
        yield components[start : start + width]
