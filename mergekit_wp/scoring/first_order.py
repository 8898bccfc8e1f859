"""First-order scores of every head and neuron of one layer, from one backward pass and no weight gradient.

With delta the gradient at a projection's output, x its input and dW = W(expert) - W(base), for y = x W^T:

    attr, over row i       sum_t delta_t[i] (x_t . dW[i,:])  (+ delta_t[i] db[i])      Eq. 11, 60-66
    attr, over column j    sum_t x_t[j] (delta_t . dW[:,j])
    writeback, atp         sum_t delta_t . (change of what the component writes)       METHOD.md 3, Eq. 58

`writeback` and `atp` differ in what is put in the place of the component (`patches`); both are exact in the write
and linear in what happens downstream of it, while `attr` is linear in the weights themselves. All sum over the
prompts of the batch, whose weights already stand in the differentiated scalar, or keep them apart where the record is
kept by prompt ([B, H] for [H] below). Sums run in float32.

Scores come in parts that add up: q and o of a head, gate, up and down of a neuron; atp has the whole alone.

Legend: B prompts, T tokens, D residual width, Q = H*d_h, H heads, F neurons, W either of Q and F.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from mergekit_wp.geometry import Geometry
from mergekit_wp.scoring.hooks import LayerRecord
from mergekit_wp.scoring.patching import response_difference, weight_difference

Parts = dict[str, torch.Tensor]


class Moves:
    """What the expert changes in one layer, for the record of one call, each formed once for all its gradients."""

    def __init__(self, base: Any, expert: Any, record: LayerRecord):
        self.weight = cache(lambda key: weight_difference(key, base, expert))
        self.response = cache(lambda key: response_difference(key, base, expert, record))
        self.activation = cache(lambda: record.mlp_activation(base.mlp))


def attr_heads(base: Any, expert: Any, record: LayerRecord, geometry: Geometry, moves: Moves | None = None) -> Parts:
    """{q, o: [H]} float32; `moves`: of this call, where it has several gradients."""
    moves = moves or Moves(base, expert, record)
    rows_Q = record.dot(record.grad_out["q"], moves.response("q"))
    columns_Q = _columns("o", moves, record, record.inputs["o"])
    return {"q": geometry.sum_per_head(rows_Q), "o": geometry.sum_per_head(columns_Q)}


def attr_neurons(base: Any, expert: Any, record: LayerRecord, _geometry: Geometry, moves: Moves | None = None) -> Parts:
    """{gate, up, down: [F]} float32; `moves` as above."""
    moves = moves or Moves(base, expert, record)
    rows = {key: record.dot(record.grad_out[key], moves.response(key)) for key in ("gate", "up")}
    return rows | {"down": _columns("down", moves, record, moves.activation())}


def attr_rows(key: str, base: Any, expert: Any, record: LayerRecord) -> torch.Tensor:
    """What each row of one projection (and of its bias) gives, [rows of the projection] float32."""
    return record.dot(record.grad_out[key], response_difference(key, base, expert, record))


def _columns(key: str, moves: Moves, record: LayerRecord, read_BTW: torch.Tensor) -> torch.Tensor:
    moved_BTW = torch.matmul(record.grad_out[key], moves.weight(key))
    return record.dot(read_BTW, moved_BTW)
