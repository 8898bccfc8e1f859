"""What tests of streamed stacks share: a model opened both ways, and the comparison."""

from __future__ import annotations

import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.geometry import layer_of, text_name
from mergekit_wp.scoring.batching import batches
from mergekit_wp.scoring.models.layerwise import ResidentStack
from mergekit_wp.scoring.models.load import _load_model
from mergekit_wp.scoring.models.streaming import StreamedStack, open_streamed
from mergekit_wp.scoring.sweep import forward_sweep

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3, 4]]


def streamed(folder, dtype=torch.float32, adapter=None) -> StreamedStack:
    return open_streamed(str(folder), Checkpoint.open(str(folder)), dtype, CPU, adapter=adapter)


def resident(folder, dtype=torch.float32) -> ResidentStack:
    return ResidentStack(_load_model(str(folder), str(folder), dtype, CPU, False), CPU, dtype)


def swept(stack) -> list[torch.Tensor]:
    """The residual stream after every layer for two ragged batches, and the logits."""
    parts = list(batches(PROMPTS, 2, stack))
    found = []
    for _layer, streams in forward_sweep(stack, [stack.start(part) for part in parts], stack.depth):
        found += [stream.clone() for stream in streams]
    return found + [stack.logits(part.at_anchor(x), 97) for part, x in zip(parts, found[-2:], strict=True)]


def assert_same(stack, whole) -> None:
    """Weights bit for bit; streams and logits to rounding, since products also depend on where memory begins."""
    layers = whole.tower.layers
    for index, layer in zip(range(stack.depth), stack.layers(range(stack.depth)), strict=True):
        for key, wanted in layers[index].state_dict().items():
            assert torch.equal(layer.state_dict()[key], wanted), key
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[stack.dtype]
    for got, wanted in zip(swept(stack), swept(whole), strict=True):
        torch.testing.assert_close(got, wanted, rtol=close, atol=close)
    for name, wanted in whole.model.named_parameters():
        if text_name(name) and layer_of(name) is None and not stack.model.get_parameter(name).is_meta:
            assert torch.equal(stack.model.get_parameter(name).to(wanted.dtype), wanted), name
    buffers = dict(stack.tower.named_buffers())
    for name, wanted in whole.tower.named_buffers():
        assert torch.equal(buffers[name], wanted), name
