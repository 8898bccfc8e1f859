"""Run one decoder layer and keep what scoring needs of it; modules that stand in for its own while it runs.

The architecture's own code runs, so that one engine serves every family: hooks read it (`run_layer`), and stand-ins
(`substituted`) give it a known output, or a fused projection in its parts.

Parameters stay frozen, so autograd computes gradients of activations only. Hooks keep the inputs and outputs of
the projections (references, no copies: autograd holds most of them anyway); one call of autograd gives the
gradients at all of them and at the layer's input. What neither autograd nor a score needs is not held: for its
gradient, the place in the graph is enough.

The topmost layer that is run matters only where it is read (`Batch.reads_BA`): `at_reads` lets o_proj and the MLP
compute those positions alone. There, and in the record, T is then A.

Legend: B prompts, T tokens, A positions read of each, D residual width, Q = H*d_h query width, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from mergekit_wp.geometry import FUSED, PROJECTIONS, Geometry, slot_of
from mergekit_wp.scoring.batching import pick, rows_of
from mergekit_wp.scoring.models.precision import loss_scale, run_in

if TYPE_CHECKING:
    from mergekit_wp.scoring.models.layerwise import Call, Stack


@contextmanager
def substituted(parent: Any, **stubs: nn.Module) -> Iterator[None]:
    """Put `stubs` in the place of submodules of `parent` inside the block."""
    originals = {name: getattr(parent, name) for name in stubs}
    try:
        for name, stub in stubs.items():
            setattr(parent, name, stub)
        yield
    finally:
        for name, original in originals.items():
            setattr(parent, name, original)


class Constant(nn.Module):
    """Stands in for a module whose output is known already."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.output


class InFloat32(nn.Module):
    """Runs a module, products in `dtype`, and gives its output in float32, so that what follows is computed there."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_in(self.dtype, self.inner, x).float()


def separate(layer: Any, geometry: Geometry) -> None:
    """Make the projections that `layer` keeps in one module (`FUSED`) reachable one by one, under their usual names.

    Afterwards the layer is read, hooked and patched like one that has them apart; its parameters and their names stay
    as they were.
    """
    for path, keys in FUSED.items():
        parent_path, _, name = path.rpartition(".")
        parent = layer.get_submodule(parent_path)
        whole = getattr(parent, name, None)
        if whole is None or isinstance(whole, _Joined):
            continue
        slot = slot_of(f"model.layers.0.{path}.weight")
        assert slot is not None  # `FUSED` says so
        joined, names, begin = _Joined(whole, parent), [], 0
        for key, length in zip(keys, geometry.lengths(slot), strict=True):
            names.append(PROJECTIONS[key].rpartition(".")[2])
            setattr(parent, names[-1], _Part(joined, slice(begin, begin + length)))
            begin += length
        joined.names = names
        setattr(parent, name, joined)
    if not hasattr(layer.mlp, "act_fn"):
        layer.mlp.act_fn = layer.mlp.activation_fn  # Phi-3's name for it


class _Joined(nn.Module):
    """Stands in for a fused projection: calls its parts, which `parent` has under their own names."""

    def __init__(self, whole: Any, parent: nn.Module):
        super().__init__()
        self.weight, self.bias = whole.weight, whole.bias
        self.names: Sequence[str] = ()
        self._parent = [parent]  # in a list, or the parent would be a submodule of its own submodule

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return torch.cat([getattr(self._parent[0], name)(x_BTD) for name in self.names], -1)


class _Part(nn.Module):
    """Some rows of a fused projection, as a linear layer. It has no parameters of its own."""

    def __init__(self, joined: _Joined, rows: slice):
        super().__init__()
        self._joined, self._rows = [joined], rows

    @property
    def weight(self) -> torch.Tensor:
        return self._joined[0].weight[self._rows]

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self._joined[0].bias
        return None if bias is None else bias[self._rows]

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return functional.linear(x_BTD, self.weight, self.bias)


SCORED = ("q", "o", "gate", "up", "down")  # projections that components are cut from; not keys and values
_INPUT_GRADIENTS = ("o", "down")
# Not held while a graph is kept: what was written, and the product that `mlp_activation` computes again.
_DROPPED = {"inputs": ("down",), "outputs": ("o", "down")}


@dataclass
class LayerRecord:
    """One layer of one model on one batch, keyed by projection (q, k, v, o, gate, up, down).

    stream_BTD              the layer's input
    inputs[p], outputs[p]   activations [B, T, width]; T is A for o and the MLP if only reads were computed.
                            With a graph, the input of down and the outputs of o and down are not held
    grad_out[p]             `scale` times dS/d(output of p), S the scalar that was differentiated (after `backward`)
    grad_in[p]              `scale` times dS/d(input of p), for o and down: there it is delta W, one product saved
    scale                   a power of two, float32 [], that keeps gradients within float16 (see `precision`)
    attention_call          args and kwargs that self_attn was called with
    reads_BA                the positions that were computed, where not all were; else None
    projections             those whose gradients are wanted
    by_prompt               whether what is read off the record is kept apart for each prompt
    grad_parameters[name]   `scale` times dS/d(parameter), of those parameters of the layer that have gradients
    """

    stream_BTD: torch.Tensor
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    grad_out: dict[str, torch.Tensor] = field(default_factory=dict)
    grad_in: dict[str, torch.Tensor] = field(default_factory=dict)
    scale: torch.Tensor = field(default_factory=lambda: torch.ones(()))
    attention_call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    reads_BA: torch.Tensor | None = None
    projections: Sequence[str] = SCORED
    by_prompt: bool = False
    grad_parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    edges: dict[tuple[str, str], GradientEdge] = field(default_factory=dict)

    def keep(self, key: str, read: torch.Tensor, written: torch.Tensor) -> None:
        """Take what a projection read and wrote, while its layer runs."""
        graph = self.stream_BTD.requires_grad
        for side, tensor, wanted in (("inputs", read, _INPUT_GRADIENTS), ("outputs", written, self.projections)):
            if graph and key in wanted:
                self.edges[side, key] = get_gradient_edge(tensor)
            if not (graph and key in _DROPPED[side]):
                getattr(self, side)[key] = tensor.detach()

    def mlp_activation(self, mlp: Any) -> torch.Tensor:
        """The input of down_proj [B, T, F], kept or computed again from what gate_proj and up_proj put out."""
        if "down" in self.inputs:
            return self.inputs["down"]
        product: torch.Tensor = mlp.act_fn(self.outputs["gate"]) * self.outputs["up"]
        return product

    def kept(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """`x_BTD` at the positions that were computed: all of them, or the reads [B, A, D]."""
        return x_BTD if self.reads_BA is None else pick(x_BTD, self.reads_BA)

    def dot(self, a_BTW: torch.Tensor, b_BTW: torch.Tensor) -> torch.Tensor:
        """sum over prompts and tokens of a*b in float32, one of them (times) a gradient of this record: [W].

        `by_prompt`: over tokens alone, [B, W].
        """
        # Not einsum: it becomes one tiny dot product a column, at three times the cost.
        return (a_BTW.float() * b_BTW.float()).sum((1,) if self.by_prompt else (0, 1)) / self.scale

    def backward(
        self,
        above_BTD: torch.Tensor,
        gradient_BTD: torch.Tensor,
        *,
        below: bool = True,
        parameters: Mapping[str, torch.Tensor] | None = None,
        keep: bool = False,
    ) -> torch.Tensor:
        """Fill the gradients from dS/d(layer's output) and return dS/d(layer's input), unless not `below`.

        `above_BTD` is the output of the recorded call; `parameters`, those of the layer that gradients are wanted of.
        The graph is freed, unless it is to `keep` for other gradients (see `another`).
        """
        parameters = parameters or {}
        leaves: list[Any] = [self.stream_BTD] if below else []
        leaves += [self.edges["outputs", p] for p in self.projections]
        leaves += [self.edges["inputs", p] for p in _INPUT_GRADIENTS]
        leaves += parameters.values()
        self.scale = loss_scale(gradient_BTD)
        found = iter(torch.autograd.grad(above_BTD, leaves, self.scale * gradient_BTD, retain_graph=keep))
        gradient_below = next(found) / self.scale if below else torch.zeros(0)
        self.grad_out = {p: next(found) for p in self.projections}
        self.grad_in = {p: next(found) for p in _INPUT_GRADIENTS}
        self.grad_parameters = {name: next(found) for name in parameters}
        if not keep:
            self.edges.clear()
        return gradient_below

    def another(self, above_BTD: torch.Tensor, gradient_BTD: torch.Tensor) -> tuple[torch.Tensor, LayerRecord]:
        """(dS/d(layer's input), a record of the same call with the gradients) of one more S; the graph stays."""
        record = replace(self)
        return record.backward(above_BTD, gradient_BTD, keep=True), record

    def branch(self, key: str, columns_W: torch.Tensor) -> tuple[torch.Tensor, LayerRecord]:
        """As `another`, of what passes some columns of the input of `key` (o or down), bool [W], alone.

        Of this record's own gradient there, the other columns are left out, and the rest goes on through what lies
        below: the attention (o), or the MLP and all below it in the layer (down). The new record has the gradients of
        the projections on that way: q; of down, q and o.
        """
        masked = self.grad_in[key] * columns_W
        more = loss_scale(masked)
        reached = ("q",) if key == "o" else ("q", "o")
        leaves: list[Any] = [self.stream_BTD, *(self.edges["outputs", p] for p in reached)]
        edge = self.edges["inputs", key]
        below_BTD, *found = torch.autograd.grad((edge,), leaves, (more.to(masked.dtype) * masked,), retain_graph=True)
        scale = self.scale * more
        return below_BTD / scale, replace(
            self, grad_out=dict(zip(reached, found, strict=True)), grad_in={}, scale=scale
        )


def run_layer(
    stack: Stack,
    layer: Any,
    stream_BTD: torch.Tensor,
    call: Call,
    *,
    gradient: bool,
    reads_BA: torch.Tensor | None = None,
    projections: Sequence[str] = SCORED,
) -> tuple[torch.Tensor, LayerRecord]:
    """The stream above `layer` and its record; with `gradient`, ready for `LayerRecord.backward`."""
    record = LayerRecord(stream_BTD.detach(), reads_BA=reads_BA, projections=projections)
    if gradient:
        record.stream_BTD.requires_grad_(True)
    handles = [layer.self_attn.register_forward_pre_hook(partial(_on_attention, record), with_kwargs=True)]
    for key, path in PROJECTIONS.items():
        handles.append(layer.get_submodule(path).register_forward_hook(partial(_on_projection, record, key)))
    try:
        with torch.set_grad_enabled(gradient), at_reads(layer, reads_BA):
            above_BTD = stack.call(layer, record.stream_BTD, call)
    finally:
        for handle in handles:
            handle.remove()
    return above_BTD, record


def _on_attention(record: LayerRecord, _module: nn.Module, args: Any, kwargs: Any) -> None:
    record.attention_call = (args, kwargs)


def _on_projection(record: LayerRecord, key: str, _module: nn.Module, args: Any, output: torch.Tensor) -> None:
    record.keep(key, args[0], output)


@contextmanager
def at_reads(layer: Any, reads_BA: torch.Tensor | None) -> Iterator[None]:
    """Inside the block, `layer` computes o_proj and the MLP at the positions `reads_BA` alone (None: everywhere).

    The stream above it is then right at those positions only.
    """
    if reads_BA is None:
        yield
        return
    attention = layer.self_attn
    with (
        substituted(attention, o_proj=_AtReads(attention.o_proj, reads_BA)),
        substituted(layer, mlp=_AtReads(layer.mlp, reads_BA)),
    ):
        yield


class _AtReads(nn.Module):
    """Runs a module at some positions of each prompt, all different, and puts zeros elsewhere."""

    def __init__(self, inner: nn.Module, reads_BA: torch.Tensor):
        super().__init__()
        self.inner, self.reads_BA = inner, reads_BA

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        some_BAD = self.inner(pick(x_BTD, self.reads_BA))
        all_BTD = some_BAD.new_zeros(*x_BTD.shape[:-1], some_BAD.shape[-1])
        return all_BTD.index_put((rows_of(x_BTD, self.reads_BA), self.reads_BA), some_BAD)


class _Catch(nn.Module):
    """Stands in for o_proj: keeps its input [B, T, Q] and multiplies nothing."""

    def forward(self, x_BTQ: torch.Tensor) -> torch.Tensor:
        self.seen = x_BTQ
        return x_BTQ


def rerun_attention(
    stack: Stack, attention: Any, record: LayerRecord, q_BTQ: torch.Tensor, v_BTK: torch.Tensor | None = None
) -> torch.Tensor:
    """The input of o_proj [B, T, Q], float32, if q_proj had put out `q_BTQ` while keys and values stay the record's.

    `v_BTK`: and v_proj these values. It is linear in them, so what heads attend to can be read off what it makes of
    indicators.

    Runs the architecture's own code (q/k norms, rotary, soft-capping, masks), so it is exact for each; only the
    four projections are replaced by constants, so it costs the attention kernel alone. Where the record has
    reads only, so has the result (T = A). `q_BTQ` may hold the queries of the B prompts several times over.
    In float32 whatever products run in: two such runs differ by little.
    """
    catch, times = _Catch(), len(q_BTQ) // len(record.stream_BTD)
    v_BTK = record.outputs["v"] if v_BTK is None else v_BTK
    k_BTK, v_BTK = (x_BTK.float().repeat(times, 1, 1) for x_BTK in (record.outputs["k"], v_BTK))
    args, kwargs = record.attention_call
    if times > 1:  # the attention reads off its input how many prompts there are, and nothing else
        shape_only = record.stream_BTD.new_empty(1).expand(len(q_BTQ), *record.stream_BTD.shape[1:])
        args, kwargs = (
            (shape_only, *args[1:]) if args else args,
            kwargs | ({} if args else {"hidden_states": shape_only}),
        )
    with (
        torch.autocast(stack.device.type, enabled=False),
        substituted(
            attention, q_proj=Constant(q_BTQ.float()), k_proj=Constant(k_BTK), v_proj=Constant(v_BTK), o_proj=catch
        ),
    ):
        attention.forward(*args, **kwargs)
    return catch.seen if record.reads_BA is None else pick(catch.seen, record.reads_BA.repeat(times, 1))
