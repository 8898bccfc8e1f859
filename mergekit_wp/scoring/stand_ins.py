"""Modules that stand in for a model's own while it runs, so that one code serves every architecture.

Legend: B prompts, T tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mergekit_wp.components import FUSED, PROJECTIONS, Geometry, slot_of


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
    """Runs a module and gives its output in float32, so that what follows is computed there."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(x)
        return output.float()


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
