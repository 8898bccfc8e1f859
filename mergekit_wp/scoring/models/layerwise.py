"""One model as a stack of decoder layers, run a layer at a time.

Scores need layers singly: to stop at the anchor, to start again in the middle, to read weights only when their
turn comes. A `Stack` gives `start` (embeddings and what each layer is called with), `layers` (the modules, in any
order), `call` (run one) and `logits`. `ResidentStack` holds the whole model; `streaming.StreamedStack` holds a layer.

The residual stream is float32 whatever the dtype of the weights: matrix products run in `dtype` under autocast, which
rounds weights that are held in another (see `precision`); their results are added in float32. What one neuron writes is
far below bfloat16's resolution of the stream.

Legend: B prompts, T tokens, S all tokens up to the last, D residual width, V vocabulary rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from mergekit_wp.geometry import FUSED, Geometry, text_tower
from mergekit_wp.scoring.batching import Batch, Lengths
from mergekit_wp.scoring.hooks import Constant, InFloat32, separate, substituted
from mergekit_wp.scoring.models.precision import run_in

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
        self.tower: Any = text_tower(model)
        path = next(name for name, module in model.named_modules() if module is self.tower)
        parent, _, self._tower_name = path.rpartition(".")
        self._tower_parent: Any = model.get_submodule(parent)
        self.depth: int = self.tower.config.num_hidden_layers
        self.width: int = self.tower.config.hidden_size
        self.lengths = Lengths(self.tower.config.to_dict())
        present = {name for name, _module in self.tower.layers[0].named_modules()}
        if not present.isdisjoint(FUSED):
            geometry = Geometry.from_config(model.config.to_dict(), where=type(model).__name__)
            for layer in self.tower.layers:
                separate(layer, geometry)

    @property
    def vocabulary(self) -> int:
        """V: rows of the embeddings, also while these are not read yet."""
        return len(self.model.get_input_embeddings().weight)

    @abstractmethod
    def layers(self, order: Sequence[int]) -> Generator[nn.Module, None, None]:
        """The decoder layers of `order`, one after the other; each holds its weights until the next is taken."""

    def stored_layers(self, order: Sequence[int]) -> Generator[nn.Module, None, None]:
        """As `layers`, but to be read and not to be run: streamed weights are in the dtype that they are stored in."""
        return self.layers(order)

    @torch.no_grad()
    def start(self, batch: Batch) -> Start:
        """Embed the prompts and find out what the architecture's own forward pass hands to each layer."""
        self.lengths.forget(self.model)
        embedded_BTD = self._embed(batch.ids_BT)
        options = batch.options(self.tower.config._attn_implementation)
        # Padded batches carry no mask, and a packed one is one row: one row's arguments are every row's.
        calls = [probe.call for probe in self._probe(embedded_BTD[:1], **options)]
        return Start(self._probe(embedded_BTD, **options)[0].stream_BTD, calls)

    @torch.no_grad()
    def go_on(self, ids_BT: torch.Tensor, mask_BS: torch.Tensor, cache: Cache, numbers: Sequence[int] = ()) -> Start:
        """As `start`, for tokens that stand behind those in `cache`, S with these; mask_BS: 0 where padding is, on the
        left. Calls are of this batch alone, and put its keys and values into the cache. numbers: of the rows' prompts,
        for a stack that is not the same model to each (`greedy`)."""
        self.lengths.forget(self.model)
        positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
        probes = self._probe(
            self._embed(ids_BT), attention_mask=mask_BS, past_key_values=cache, use_cache=True,
            position_ids=positions_BS[:, -ids_BT.shape[1] :],
        )  # fmt: skip
        return Start(probes[0].stream_BTD, [probe.call for probe in probes])

    @torch.no_grad()
    def entering(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """What enters layer 0 alone [B, T, D]; need not be the embedding: Granite multiplies it."""
        return self._probe(self._embed(ids_BT))[0].stream_BTD

    def _embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        embedded_BTD: torch.Tensor = run_in(self.dtype, self.tower.embed_tokens, ids_BT)
        return embedded_BTD.float()

    def _probe(self, embedded_BTD: torch.Tensor, **options: Any) -> list[_Probe]:
        """The model's own forward pass without its layers."""
        probes = [_Probe() for _ in range(self.depth)]
        with substituted(self.tower, layers=nn.ModuleList(probes)):
            self.tower(inputs_embeds=embedded_BTD, **{"use_cache": False, **options})
        return probes

    def call(self, layer: nn.Module, stream_BTD: torch.Tensor, call: Call) -> torch.Tensor:
        """The residual stream above `layer`, float32 [B, T, D]."""
        with self.autocast():
            output = layer(stream_BTD, **call)
        return output[0] if isinstance(output, tuple) else output

    @abstractmethod
    def read_head(self) -> None:
        """Make the final norm and the output head ready, where they are not held yet."""

    @abstractmethod
    def forget_head(self) -> None:
        """Let go of an output head that can be read or merged again."""

    def logits(self, final_BD: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """Next-token logits [..., V], float32, from streams [..., D] above the last layer; rows past `vocabulary` cut.

        The architecture's own code after the final norm (soft-capping, scaling) runs in float32.
        """
        with self.autocast():
            normed_N1D = self.tower.norm(final_BD).flatten(0, -2).unsqueeze(1)
            known = {self._tower_name: Constant(BaseModelOutputWithPast(last_hidden_state=normed_N1D))}
            head = InFloat32(self.model.lm_head, self.dtype)
            with substituted(self._tower_parent, **known), substituted(self.model, lm_head=head):
                logits_N1V = self.model(inputs_embeds=normed_N1D, use_cache=False).logits
        return logits_N1V[:, 0, :vocabulary].unflatten(0, final_BD.shape[:-1])

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in `dtype`, everything else in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


class ResidentStack(Stack):
    """The whole model on one device."""

    def layers(self, order: Sequence[int]) -> Generator[nn.Module, None, None]:
        for index in order:
            yield self.tower.layers[index]

    def read_head(self) -> None:
        """It is held."""

    def forget_head(self) -> None:
        """It stays."""


class _Probe(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with and passes the stream on."""

    stream_BTD: torch.Tensor
    call: Call

    def forward(self, stream_BTD: torch.Tensor, **call: Any) -> torch.Tensor:
        self.stream_BTD, self.call = stream_BTD, call
        return stream_BTD
