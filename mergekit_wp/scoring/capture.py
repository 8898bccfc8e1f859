"""What a forward and backward pass of the base leaves behind, one decoder layer at a time.

Parameters stay frozen, so autograd computes gradients of activations only. Forward hooks keep the inputs and
outputs of the projections (references, no copies: autograd holds most of them anyway); tensor hooks keep the
gradients at their outputs. The gradient at a layer's input is the last to arrive, so a hook there hands the full
`LayerRecord` to the consumer and forgets it: one layer's gradients are alive at a time.

Legend: B prompts, T tokens, D residual width, Q = H*d_h query width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass
class LayerRecord:
    """One layer of the base run, keyed by projection (q, k, v, o, gate, up, down).

    inputs[p], outputs[p]   activations of the base run [B, T, width]
    grad_out[p]             dS/d(output of p), S the scalar that was differentiated
    grad_in[p]              dS/d(input of p), for o and down: there it is delta W, one product saved
    attention_call          args and kwargs that self_attn was called with
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    grad_out: dict[str, torch.Tensor] = field(default_factory=dict)
    grad_in: dict[str, torch.Tensor] = field(default_factory=dict)
    attention_call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


Consumer = Callable[[int, LayerRecord], None]


@contextmanager
def capture_layers(layers: Sequence[nn.Module], consume: Consumer) -> Iterator[None]:
    """Within the block, every backward pass through `layers` calls `consume(layer index, record)`, top down."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            for handle in _LayerHooks(index, layer, consume).handles:
                stack.callback(handle.remove)
        yield


@contextmanager
def differentiable_embeddings(model: Any) -> Iterator[None]:
    """Make the embeddings the leaves of autograd; otherwise, with frozen parameters, there would be no graph."""
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: output.requires_grad_(True)
    )
    try:
        yield
    finally:
        handle.remove()


class _LayerHooks:
    """Fills one `LayerRecord` over a forward and a backward pass of one decoder layer, then hands it over."""

    def __init__(self, index: int, layer: Any, consume: Consumer):
        self.index, self.consume = index, consume
        self.record = LayerRecord()
        self.handles = [
            layer.register_forward_pre_hook(self.on_layer, with_kwargs=True),
            layer.self_attn.register_forward_pre_hook(self.on_attention, with_kwargs=True),
        ]
        for key, path in PROJECTIONS.items():
            hook = partial(self.on_projection, key)
            self.handles.append(layer.get_submodule(path).register_forward_hook(hook))

    def on_layer(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        # A new record every forward pass: one whose backward pass never came must not leak into the next.
        self.record = LayerRecord()
        stream = args[0] if args else kwargs["hidden_states"]
        stream.register_hook(self.on_layer_gradient)

    def on_attention(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.record.attention_call = (args, kwargs)

    def on_projection(self, key: str, _module: nn.Module, args: Any, output: torch.Tensor) -> None:
        record = self.record
        record.inputs[key], record.outputs[key] = args[0].detach(), output.detach()
        if key not in ("k", "v"):  # keys and values belong to no component
            output.register_hook(partial(record.grad_out.__setitem__, key))
        if key in ("o", "down"):
            args[0].register_hook(partial(record.grad_in.__setitem__, key))

    def on_layer_gradient(self, _gradient: torch.Tensor) -> None:
        with torch.no_grad():
            self.consume(self.index, self.record)
        self.record = LayerRecord()


class _Constant(nn.Module):
    """Stands in for a projection whose output is known already."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output = output

    def forward(self, _x: torch.Tensor) -> torch.Tensor:
        return self.output


class _Catch(nn.Module):
    """Stands in for o_proj: keeps its input [B, T, Q] and multiplies nothing."""

    def forward(self, x_BTQ: torch.Tensor) -> torch.Tensor:
        self.seen = x_BTQ
        return x_BTQ


def rerun_attention(attention: Any, record: LayerRecord, q_BTQ: torch.Tensor) -> torch.Tensor:
    """The input of o_proj [B, T, Q] if q_proj had put out `q_BTQ` while keys and values stay the base's.

    Runs the architecture's own code (q/k norms, rotary, soft-capping, masks), so it is exact for each; only the
    four projections are replaced by constants, so it costs the attention kernel alone.
    """
    catch = _Catch()
    stubs = {
        "q_proj": _Constant(q_BTQ),
        "k_proj": _Constant(record.outputs["k"]),
        "v_proj": _Constant(record.outputs["v"]),
        "o_proj": catch,
    }
    originals = {name: getattr(attention, name) for name in stubs}
    args, kwargs = record.attention_call
    try:
        for name, stub in stubs.items():
            setattr(attention, name, stub)
        attention.forward(*args, **kwargs)  # not __call__: the capturing hooks must not fire again
    finally:
        for name, original in originals.items():
            setattr(attention, name, original)
    return catch.seen
