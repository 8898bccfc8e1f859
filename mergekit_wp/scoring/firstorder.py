"""First-order scores of every head and neuron of one layer, from one backward pass and no weight gradient.

With delta the gradient at a projection's output, x its input and dW = W(expert) - W(base), for y = x W^T:

    attr, over row i        sum_t delta_t[i] (x_t . dW[i,:])  (+ delta_t[i] db[i])      Eq. 11, 60-66
    attr, over column j     sum_t x_t[j] (delta_t . dW[:,j])

    writeback of a neuron   sum_t a'_j (W'_down[:,j] . delta_t) - a_j (W_down[:,j] . delta_t)
    writeback of a head     the same with o', o and W_o, summed over the head's columns

where a' is the input of down_proj with the expert's gate and up rows on the base's residual, and o' the input of
o_proj with the expert's q_proj alone (METHOD.md 3): the component's own effect on what it writes is exact, only
what happens downstream of the write is linear. Both sum over the prompts of the batch, whose weights already
stand in the differentiated scalar.

Everything is computed from differences (x dW^T, never x W'^T - x W^T), so bfloat16 rounding is relative to the
update and not to the weights; sums run in float32.

Legend: B prompts, T tokens, N = B*T, D residual width, Q = H*d_h, H heads, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mergekit_wp.components import Geometry
from mergekit_wp.scoring.capture import PROJECTIONS, LayerRecord, rerun_attention

LayerScores = tuple[torch.Tensor, torch.Tensor]
ScoreLayer = Callable[[Any, Any, LayerRecord, Geometry], LayerScores]


def attr_scores(base: nn.Module, expert: nn.Module, record: LayerRecord, geometry: Geometry) -> LayerScores:
    """(heads [H], neurons [F]) by `attr`, float32, for one decoder layer of both models."""
    heads_Q = _rows("q", base, expert, record) + _columns("o", base, expert, record)
    neurons_F = _rows("gate", base, expert, record) + _rows("up", base, expert, record)
    return geometry.sum_per_head(heads_Q), neurons_F + _columns("down", base, expert, record)


def writeback_scores(base: nn.Module, expert: nn.Module, record: LayerRecord, geometry: Geometry) -> LayerScores:
    """(heads [H], neurons [F]) by `writeback`, float32, for one decoder layer of both models."""
    return geometry.sum_per_head(_writeback_heads(base, expert, record)), _writeback_neurons(base, expert, record)


SCORE_LAYER: dict[str, ScoreLayer] = {"attr": attr_scores, "writeback": writeback_scores}


def _writeback_heads(base: Any, expert: Any, record: LayerRecord) -> torch.Tensor:
    q_BTQ = record.outputs["q"] + _response_difference("q", base, expert, record)
    patched_BTQ = rerun_attention(base.self_attn, record, q_BTQ)
    return _write_difference("o", base, expert, record, patched_BTQ - record.inputs["o"], patched_BTQ)


def _writeback_neurons(base: Any, expert: Any, record: LayerRecord) -> torch.Tensor:
    act = base.mlp.act_fn
    gate_BTF, up_BTF = record.outputs["gate"].float(), record.outputs["up"].float()
    activation_BTF = act(gate_BTF) * up_BTF
    gate_BTF += _response_difference("gate", base, expert, record)
    up_BTF += _response_difference("up", base, expert, record)
    patched_BTF = act(gate_BTF) * up_BTF
    return _write_difference("down", base, expert, record, patched_BTF - activation_BTF, patched_BTF)


def _write_difference(
    key: str, base: Any, expert: Any, record: LayerRecord, change: torch.Tensor, patched: torch.Tensor
) -> torch.Tensor:
    """sum_t a'(delta W') - a(delta W) = sum_t (a' - a)(delta W) + a'(delta dW), one number a column of W."""
    moved = torch.matmul(record.grad_out[key], _weight_difference(key, base, expert))
    return _sum_products(change, record.grad_in[key]) + _sum_products(patched, moved)


def _rows(key: str, base: Any, expert: Any, record: LayerRecord) -> torch.Tensor:
    return _sum_products(record.grad_out[key], _response_difference(key, base, expert, record))


def _columns(key: str, base: Any, expert: Any, record: LayerRecord) -> torch.Tensor:
    moved = torch.matmul(record.grad_out[key], _weight_difference(key, base, expert))
    return _sum_products(record.inputs[key], moved)


def _response_difference(key: str, base: Any, expert: Any, record: LayerRecord) -> torch.Tensor:
    """What the expert's projection would put out beyond the base's on the base's input: x dW^T + db."""
    bias, expert_bias = (model.get_submodule(PROJECTIONS[key]).bias for model in (base, expert))
    difference = None if bias is None else expert_bias - bias
    return functional.linear(record.inputs[key], _weight_difference(key, base, expert), difference)


def _weight_difference(key: str, base: Any, expert: Any) -> torch.Tensor:
    weight, expert_weight = (model.get_submodule(PROJECTIONS[key]).weight for model in (base, expert))
    return expert_weight.detach() - weight.detach()


def _sum_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum over prompts and tokens of a*b in float32: [B, T, width] twice -> [width]."""
    # Not einsum: it becomes one tiny dot product a column, at three times the cost.
    return (a.float() * b.float()).sum((0, 1))
