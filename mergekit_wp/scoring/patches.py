"""What a component writes to the residual stream before and after it is patched, for one layer and batch.

Heads do not mix before o_proj, nor neurons before down_proj. So the activations of *all* patched components come
from one run of the layer's own code (METHOD.md 3), and the write of component c, with a the input of o_proj or
down_proj at its columns and W those columns, changes by

    weights       a'_c W'_c - a_c W_c    a' with the expert's own rows on the base's residual (exact, writeback)
    activations   (a'_c - a_c) W_c       a' from the expert's own run on the same prompt       (ap, atp)

Everything is kept as differences, a' - a and W' - W, so that rounding is relative to the update and not to the
weights: a'W' - aW = (a' - a) W + a' (W' - W).

Legend: B prompts, T tokens, D residual width, Q = H*d_h, F neurons, W either of Q and F.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

from mergekit_wp.scoring.capture import PROJECTIONS, LayerRecord, rerun_attention
from mergekit_wp.scoring.stack import Stack


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

    @cached_property  # every stacked step of `restart` asks for it
    def change_BTW(self) -> torch.Tensor:
        return sum(list(self.changes.values())[1:], start=next(iter(self.changes.values())))


def patch_heads(stack: Stack, base: Any, expert: Any, record: LayerRecord) -> Patch:
    """Every head with the expert's slices of q_proj and o_proj."""
    q_BTQ = record.outputs["q"] + response_difference("q", base, expert, record)
    patched_BTQ = rerun_attention(stack, base.self_attn, record, q_BTQ)
    change_BTQ = patched_BTQ.float() - record.inputs["o"].float()
    return Patch({"q": change_BTQ}, patched_BTQ, weight_difference("o", base, expert))


def patch_neurons(_stack: Stack, base: Any, expert: Any, record: LayerRecord) -> Patch:
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


def patch_head_activations(_base: Any, record: LayerRecord, expert_record: LayerRecord) -> Patch:
    """Every head's output before o_proj from the expert's own run."""
    patched_BTQ = expert_record.inputs["o"]
    return Patch({"whole": patched_BTQ.float() - record.inputs["o"].float()}, patched_BTQ, None)


def patch_neuron_activations(base: Any, record: LayerRecord, expert_record: LayerRecord) -> Patch:
    """Every neuron's activation from the expert's own run."""
    patched_BTF = expert_record.inputs["down"]
    return Patch({"whole": patched_BTF.float() - record.mlp_activation(base.mlp).float()}, patched_BTF, None)


def response_difference(key: str, base: Any, expert: Any, record: LayerRecord) -> torch.Tensor:
    """What the expert's projection would put out beyond the base's on the base's input: x dW^T + db."""
    bias, expert_bias = (layer.get_submodule(PROJECTIONS[key]).bias for layer in (base, expert))
    difference = None if bias is None else expert_bias - bias
    return functional.linear(record.inputs[key], weight_difference(key, base, expert), difference)


def weight_difference(key: str, base: Any, expert: Any) -> torch.Tensor:
    """dW [out, in] of one projection, in the weights' dtype."""
    weight, expert_weight = (layer.get_submodule(PROJECTIONS[key]).weight for layer in (base, expert))
    difference: torch.Tensor = expert_weight - weight
    return difference.detach()
