"""A model whose decoder layers are read from its shards when their turn comes, and dropped after it.

Of what lies outside the layers, the final norm and the rotary tables are held. Of the embeddings the rows of the
prompts are read, when these are (all of 256,000 rows would be more than a layer); the output head when logits are first
asked for, as it is stored, to be widened where it is used. While one layer computes, a thread reads the next, so a
sweep holds the weights of two layers; of one, where that is not worth its memory (`stored_layers`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import GenerationConfig

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.quantised import check_plain, plain_config
from mergekit_wp.checkpoint.vocabulary import head_equals_embeddings
from mergekit_wp.errors import BadInput, reason_of
from mergekit_wp.geometry import EMBEDDINGS, auto_class, text_name, text_tower
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.models.lora import Adapter
from mergekit_wp.scoring.models.precision import held_dtype
from mergekit_wp.scoring.models.shards import Shards

Weights = dict[str, torch.Tensor]
_NORM = "model.norm."  # read once


def open_streamed(
    name: str,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    adapter: str | None = None,
) -> StreamedStack:
    """The model of `checkpoint`, with the LoRA `adapter` of a folder over it, ready to be swept.

    `name` is what the user calls the whole (`base+lora`). Every tensor's presence and shape is checked here, from
    the headers; NaNs and infinities when a tensor is first read. Raises `BadInput` for what transformers cannot
    build, damaged or quantised checkpoints, and adapters that only a whole model can take.
    """
    check_plain(checkpoint)
    shards, held = Shards(name, checkpoint.tensors, device), held_dtype(checkpoint.tensors, dtype)
    model = skeleton(name, checkpoint, held, trust_remote_code)
    if not head_equals_embeddings(checkpoint):
        model.all_tied_weights_keys.clear()  # as transformers does, whatever the config says
    lora = None
    if adapter is not None:
        lora = Adapter(name, adapter, skeleton(name, checkpoint, held, trust_remote_code), device)
    return StreamedStack(model, shards, dtype, held, lora)


class StreamedStack(Stack):
    """Made by `open_streamed`. `model` is a causal LM of transformers without weights, which come from `shards`.

    Products run in `dtype`, weights are read in `held` (see `precision`).
    """

    streamed = True

    def __init__(self, model: Any, shards: Shards, dtype: torch.dtype, held: torch.dtype, lora: Adapter | None = None):
        super().__init__(model, shards.device, dtype)
        self._shards, self._held, self._lora = shards, held, lora
        self._users: Counter[int] = Counter()  # of a layer's weights: sweeps that are at this layer
        self._as_stored: set[int] = set()  # layers that are held in the dtype of the files
        # The text tower alone, by the model's names; a wrapper's other towers are never read.
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if text_name(name)}
        self._source = _sources(model, shapes, shards)
        shards.check({source: shapes[name] for name, source in self._source.items()})
        if lora is not None:
            _check_targets(lora, model)
        self._layers = next(name for name, module in model.named_modules() if module is self.tower.layers)
        self._empty: list[Weights] = [dict(layer.state_dict()) for layer in self.tower.layers]
        move_buffers(model, self.device)
        self._embedding = next(name for name in shapes if text_name(name) == EMBEDDINGS)
        self.tower.embed_tokens.padding_idx = None  # it has no part in a forward pass, and may be past the rows read
        at_once = [name for name in shapes if (text_name(name) or "").startswith(_NORM)]
        if lora is not None and self._embedding in lora.targets:
            at_once.append(self._embedding)
        model.load_state_dict(self._read(at_once, held), strict=False, assign=True)

    def layers(self, order: Sequence[int]) -> Generator[nn.Module, None, None]:
        """As `Stack.layers`; a layer's weights go when the next is asked for, or when the iterator is closed.

        A sweep may run inside another, at the price of two layers more. Raises `BadInput` when a layer cannot be
        read.
        """
        return self._sweep(order, self._held)

    def stored_layers(self, order: Sequence[int]) -> Generator[nn.Module, None, None]:
        """As `Stack.stored_layers`. On a CPU no layer is read before its turn: these are of the many models of a merge,
        so that layers which wait would be most of the memory, and a CPU computes far longer than it reads."""
        return self._sweep(order, None, ahead=self.device.type != "cpu")

    def _sweep(
        self, order: Sequence[int], dtype: torch.dtype | None, ahead: bool = True
    ) -> Generator[nn.Module, None, None]:
        """The layers, the next one being read meanwhile if `ahead`. dtype: as for `_read`."""
        upcoming = iter(order)
        reading = self._begin_reading(upcoming, dtype)
        try:
            while reading is not None:
                index, weights = reading.index, reading.result()
                reading = self._begin_reading(upcoming, dtype) if ahead else None
                with self._holding(index, weights, dtype):
                    yield self.tower.layers[index]
                if not ahead:
                    reading = self._begin_reading(upcoming, dtype)
        finally:
            if reading is not None:
                reading.cancel()

    def _embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        embed = self.tower.embed_tokens
        if not embed.weight.is_meta:
            return super()._embed(ids_BT)
        rows_n, places_BT = ids_BT.cpu().unique(return_inverse=True)
        weight_nD = self._shards.read_rows(self._source[self._embedding], rows_n).to(self._held)
        embedded_BTD: torch.Tensor = functional_call(embed, {"weight": weight_nD}, (places_BT.to(self.device),))
        return embedded_BTD.float()

    def logits(self, final_BD: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """As `Stack.logits`; the first call reads the output head, which stays until it is forgotten."""
        self.read_head()
        return super().logits(final_BD, vocabulary)

    def read_head(self) -> None:
        """Read the output head, unless it is there."""
        if any(parameter.is_meta for parameter in self.model.lm_head.parameters()):
            names = (name for name in self._source if name.startswith("lm_head."))
            self.model.load_state_dict(self._read(names, None), strict=False, assign=True)

    def forget_head(self) -> None:
        """Let the output head go; `logits` reads it again."""
        self.model.lm_head.to("meta")

    def _begin_reading(self, upcoming: Iterator[int], dtype: torch.dtype | None) -> _Reading | None:
        """Start to read the next layer of a sweep; None at its end."""
        index = next(upcoming, None)
        return None if index is None else _Reading(index, partial(self._read_layer, dtype=dtype))

    def _read_layer(self, index: int, cancelled: Callable[[], bool], dtype: torch.dtype | None) -> Weights:
        prefix = f"{self._layers}.{index}."
        read = self._read((prefix + key for key in self._empty[index]), dtype, cancelled)
        return {name.removeprefix(prefix): tensor for name, tensor in read.items()}

    @torch.no_grad()
    def _read(
        self, names: Iterable[str], dtype: torch.dtype | None, cancelled: Callable[[], bool] = lambda: False
    ) -> Weights:
        """The model's tensors of these names, LoRA applied; incomplete when cancelled. dtype: None for each as it is
        stored (those with a LoRA as layers are held)."""
        weights: Weights = {}
        with self._shards.transfer():
            for name in names:
                if cancelled():
                    break
                weights[name] = self._read_one(name, dtype)
        return weights

    def _read_one(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        source = self._source[name]
        if self._lora is None or name not in self._lora.targets:
            stored = self._shards.stored_dtype(source)
            return self._shards.read(source, dtype or (self._held if stored == torch.float64 else stored))
        base_weight = self._shards.read(source, torch.float32)
        return self._lora.merge(name, base_weight, self._shards.stored_dtype(source)).to(self._held)

    @contextmanager
    def _holding(self, index: int, weights: Weights, dtype: torch.dtype | None) -> Iterator[None]:
        """The layer has `weights` inside the block, and none after it unless an outer sweep is at the same layer. Of
        two sweeps that want two dtypes, the one that only reads gets the other's."""
        layer = self.tower.layers[index]
        if not self._users[index] or (index in self._as_stored and dtype is not None):
            layer.load_state_dict(weights, assign=True)
            (self._as_stored.add if dtype is None else self._as_stored.discard)(index)
        weights.clear()  # the caller's frame still holds the dict
        self._users[index] += 1
        try:
            yield
        finally:
            self._users[index] -= 1
            if not self._users[index]:
                if self.device.type == "cuda":
                    # The next layer may be copied into this memory, on another stream than the one computing here.
                    torch.cuda.current_stream(self.device).synchronize()
                layer.load_state_dict(self._empty[index], assign=True)


class _Reading(threading.Thread):
    """One layer being read; ends with it, so no thread outlives a sweep."""

    def __init__(self, index: int, read: Callable[[int, Callable[[], bool]], Weights]):
        super().__init__(name=f"wp-read-layer-{index}")
        self.index, self._reader = index, read
        self._stop_asked = threading.Event()
        self._weights: Weights = {}
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._weights = self._reader(self.index, self._stop_asked.is_set)
        except BaseException as error:  # raised where the layer is used
            self._error = error

    def result(self) -> Weights:
        """Wait for the layer; raises what reading it raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._weights

    def cancel(self) -> None:
        """Stop after the tensor at hand, and wait for that."""
        self._stop_asked.set()
        self.join()


def skeleton(name: str, checkpoint: Checkpoint, dtype: torch.dtype, remote_code: bool) -> Any:
    """The frozen model of the checkpoint's config: parameters on the meta device, tables real, on the CPU."""
    auto = auto_class(checkpoint.config, name)
    try:
        config = plain_config(checkpoint, remote_code)
        # Only the eager attention knows soft-capping; SDPA elsewhere, for its memory.
        attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype, attn_implementation=attention, trust_remote_code=remote_code)
        with suppress(OSError):  # there is none
            model.generation_config = GenerationConfig.from_pretrained(str(checkpoint.folder))
    except Exception as error:
        raise BadInput(f"{name}: transformers could not load this model ({reason_of(error)}).") from error
    _compute_tables(name, model)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _compute_tables(name: str, model: Any) -> None:
    """Fill the buffers that no checkpoint stores (rotary frequencies, Gemma's embedding scale), as transformers does.

    They start as NaNs, so one that the model's own code does not fill is found. A wrapper's other towers have no use
    for theirs here.
    """
    tower = text_tower(model)
    for prefix, module in tower.named_modules(prefix="model"):
        keys = [key for key in module._non_persistent_buffers_set if module._buffers.get(key) is not None]
        for key in keys:
            buffer = module._buffers[key]
            if buffer.is_floating_point():
                module._buffers[key] = torch.full_like(buffer, torch.nan, device="cpu")
        if keys:
            tower._init_weights(module)
        for key in keys:
            if module._buffers[key].is_meta or module._buffers[key].isnan().any():
                raise BadInput(
                    f"{name}: this architecture does not say how to compute its table {prefix}.{key}, so it cannot be "
                    "streamed; use --offload none."
                )


def _sources(model: Any, names: Iterable[str], shards: Shards) -> dict[str, str]:
    """The checkpoint's tensor for every tensor of the model: its namesake, or of a tied pair the one that is stored."""
    stored = {text_name(key): key for key in shards.keys()}  # noqa: SIM118  (not a dict)
    sources = {name: stored.get(text_name(name), name) for name in names}
    for one, other in model.all_tied_weights_keys.items():
        sources[one] = sources[other] = sources[one] if sources[one] in shards else sources[other]
    return sources


def _check_targets(lora: Adapter, model: Any) -> None:
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    if shared := sorted(lora.targets & tied):
        raise BadInput(
            f"{lora.name}: the LoRA changes {shared[0]}, which this model shares between input and output; that "
            "cannot be streamed; use --offload none, which merges it whole."
        )


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put the buffers that hold values on the device; parameters stay where they are."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)
