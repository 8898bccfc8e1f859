"""One model as a stack of decoder layers, run a layer at a time.

Scores need layers singly: to stop at the anchor, to start again in the middle, to read weights only when their
turn comes. A `Stack` gives `start` (embeddings and what each layer is called with), `layers` (the modules, in any
order), `call` (run one) and `logits`. `ResidentStack` holds the whole model; `streamed.StreamedStack` holds a layer.

The residual stream is float32 whatever the dtype of the weights: matrix products run in `dtype` under autocast,
their results are added in float32. What one neuron writes is far below bfloat16's resolution of the stream.

Legend: B prompts, T tokens, D residual width, V vocabulary rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mergekit_wp.scoring.batches import Batch
from mergekit_wp.scoring.rotary import Lengths, forget_lengths

Call = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """Where a forward pass begins: the embedded prompts, and the keyword arguments of every layer.

    stream_BTD  residual stream below layer 0, float32
    calls       one a layer: masks, positions; their batch dimension is 1, so they serve any number of prompts
    """

    stream_BTD: torch.Tensor
    calls: list[Call]


class Stack(ABC):
    """A frozen causal LM of transformers whose decoder layers are reached through `layers` alone."""

    streamed = False  # whether layers are read when their turn comes

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype):
        self.model, self.device, self.dtype = model, device, dtype
        self.depth: int = model.config.num_hidden_layers
        self.width: int = model.config.hidden_size
        self.lengths = Lengths(model.config.to_dict())

    @abstractmethod
    def layers(self, order: Sequence[int]) -> Iterator[nn.Module]:
        """The decoder layers of `order`, one after the other; each holds its weights until the next is taken."""

    @torch.no_grad()
    def start(self, batch: Batch) -> Start:
        """Embed the prompts and find out what the architecture's own forward pass hands to each layer."""
        forget_lengths(self.model)
        inner = self.model.model
        stream_BTD = inner.embed_tokens(batch.ids_BT).float()
        whole, probes = inner.layers, [_Probe() for _ in range(self.depth)]
        inner.layers = nn.ModuleList(probes)
        try:
            # Batches are padded on the right and carry no mask, so one row's arguments are every row's.
            inner(inputs_embeds=stream_BTD[:1], use_cache=False)
        finally:
            inner.layers = whole
        return Start(stream_BTD, [probe.seen for probe in probes])

    def call(self, layer: nn.Module, stream_BTD: torch.Tensor, call: Call) -> torch.Tensor:
        """The residual stream above `layer`, float32 [B, T, D]."""
        with self.autocast():
            output = layer(stream_BTD, **call)
        return output[0] if isinstance(output, tuple) else output

    def logits(self, final_BD: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """Next-token logits [B, V], float32, from the stream above the last layer; rows past `vocabulary` are cut."""
        with self.autocast():
            logits_BV = self.model.lm_head(self.model.model.norm(final_BD)).float()
        if cap := getattr(self.model.config, "final_logit_softcapping", None):
            logits_BV = cap * torch.tanh(logits_BV / cap)
        return logits_BV[:, :vocabulary]

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in `dtype`, everything else in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


class ResidentStack(Stack):
    """The whole model on one device."""

    def layers(self, order: Sequence[int]) -> Iterator[nn.Module]:
        for index in order:
            yield self.model.model.layers[index]


class _Probe(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with and passes the stream on."""

    def forward(self, stream_BTD: torch.Tensor, **call: Any) -> torch.Tensor:
        self.seen = call
        return stream_BTD
