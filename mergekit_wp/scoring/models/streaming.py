"""A model whose decoder layers are read from its shards when their turn comes, and dropped after it.

Of what lies outside the layers, the final norm and the rotary tables are held. Of the embeddings the rows of the
prompts are read, when these are (all of 256,000 rows would be more than a layer); the output head when logits are first
asked for, as it is stored, to be widened where it is used. While one layer computes, a thread reads the next, so a
sweep holds the weights of two layers.

Shards are read tensor by tensor, through a small buffer, with nothing mapped into memory. Memory-mapped shards count as
resident memory for as long as they are open, the whole file of them (measured: 1.1 GB for a 1 GB shard, against 150 MB
read this way, at the same speed). So tensors are read with plain reads, a block at a time, straight into a tensor of
the wanted dtype on the wanted device; a block is converted while the cache holds it.
"""

from __future__ import annotations

import mmap
import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.func import functional_call
from transformers import GenerationConfig

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.quantised import check_plain, plain_config
from mergekit_wp.checkpoint.vocabulary import head_equals_embeddings
from mergekit_wp.checkpoint.weights import TensorHeader
from mergekit_wp.errors import BadInput, reason_of
from mergekit_wp.geometry import EMBEDDINGS, auto_class, text_name, text_tower
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.models.lora import Adapter
from mergekit_wp.scoring.models.precision import STORED, held_dtype

_BLOCK = 4 << 20  # bytes, a multiple of every item size
# Windows has neither flags nor a way to share by accident; elsewhere a mapping is shared memory unless told.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Shards:
    """The tensors of one checkpoint by name; `name` is the model's in errors. Safe to read from several threads."""

    def __init__(self, name: str, tensors: Mapping[str, TensorHeader], device: torch.device):
        self.name, self.device = name, device
        self._tensors = tensors
        self._finite: set[str] = set()
        self._lock = threading.Lock()  # the blocks and the stream serve one reader at a time
        on_gpu = device.type == "cuda"
        self._blocks = [torch.empty(_BLOCK, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(1 + on_gpu)]
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def keys(self) -> Collection[str]:
        """The names of all tensors."""
        return self._tensors.keys()

    def check(self, wanted: Mapping[str, torch.Size]) -> None:
        """Raise `BadInput` unless every wanted tensor is there, of this shape and a float dtype; reads no weights."""
        if missing := sorted(set(wanted) - set(self._tensors)):
            raise BadInput(
                f"{self.name}: the checkpoint lacks {len(missing)} tensors, such as {missing[0]}; download it again."
            )
        for key, shape in wanted.items():
            header = self._tensors[key]
            if header.shape != tuple(shape):
                raise BadInput(
                    f"{self.name}: the tensor {key} has the shape {list(header.shape)}, config.json asks for "
                    f"{list(shape)}; download the checkpoint again."
                )
            if header.dtype not in STORED:
                raise BadInput(
                    f"{self.name}: the tensor {key} is stored as {header.dtype}, expected one of "
                    f"{', '.join(STORED)}; convert the checkpoint, or use --offload none."
                )
            if header.end - header.start != _bytes(header):
                raise BadInput(
                    f"{header.file}: the tensor {key} takes {header.end - header.start} bytes, its shape and dtype "
                    f"ask for {_bytes(header)}; download the checkpoint again."
                )

    def stored_dtype(self, key: str) -> torch.dtype:
        """The dtype in which the file holds a tensor."""
        return STORED[self._tensors[key].dtype]

    @contextmanager
    def transfer(self) -> Iterator[None]:
        """What is read and computed inside the block runs beside the device's own work, and is done at its end.

        On CUDA that is a side stream, whose memory must not be freed while another stream still uses it.
        """
        with torch.cuda.stream(self._stream):
            yield
            if self._stream is not None:
                self._stream.synchronize()

    @torch.no_grad()
    def read(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor that passed `check`, converted to `dtype`, complete on the device when this returns.

        Raises `BadInput` when the file does not give it, the device cannot hold it, or, found at the first reading,
        it holds a NaN or an infinity.
        """
        header = self._tensors[key]
        try:
            with self._lock, self.transfer(), open(header.file, "rb", buffering=0) as file:
                target = self._new(header.shape, dtype)
                finite = self._fill(target.view(-1), header, file, key in self._finite)
        except OSError as error:
            raise BadInput(f"{header.file}: cannot read this weight file ({error.strerror or error}).") from error
        if not finite:
            raise self._not_finite(key)
        self._finite.add(key)
        return target

    @torch.no_grad()
    def read_rows(self, key: str, rows_n: torch.Tensor) -> torch.Tensor:
        """Rows [n, columns] of a matrix that passed `check`, as stored, on the device. Raises as `read`."""
        header = self._tensors[key]
        if len(rows_n) and int(rows_n.max()) >= header.shape[0]:  # past them lies another tensor
            raise IndexError(f"{key} has {header.shape[0]} rows, and row {int(rows_n.max())} was asked for")
        found = torch.empty(len(rows_n), *header.shape[1:], dtype=STORED[header.dtype])
        size = found[:1].nbytes
        try:
            with open(header.file, "rb", buffering=0) as file:
                for row, into in zip(rows_n.tolist(), found.view(torch.uint8), strict=True):
                    file.seek(header.start + row * size)
                    _read_into(into.numpy().data, file, header)
        except OSError as error:
            raise BadInput(f"{header.file}: cannot read this weight file ({error.strerror or error}).") from error
        if not bool(torch.isfinite(found).all()):
            raise self._not_finite(key)
        return found.to(self.device)

    def _not_finite(self, key: str) -> BadInput:
        return BadInput(f"{self.name}: the tensor {key} holds a NaN or an infinity; the checkpoint is damaged.")

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor on the device, whose memory goes back to the system with it."""
        count = torch.Size(shape).numel()
        try:
            if self.device.type != "cpu" or count == 0:
                return torch.empty(shape, dtype=dtype, device=self.device)
            # malloc keeps what is freed for the thread that took it, and every layer has a thread of its own: three
            # sweeps of a pair with layers of 28 MB held 220 MB, of which half were free. A mapping leaves nothing.
            memory = mmap.mmap(-1, count * dtype.itemsize, **_PRIVATE)
        except (torch.OutOfMemoryError, OSError) as error:
            raise BadInput(
                f"{self.name}: a tensor of {count * dtype.itemsize / 1e6:.0f} MB does not fit on {self.device} beside "
                "what is there; use another device, or fewer prompts at a time."
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # most of the time of a read went into page faults
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def _fill(self, flat: torch.Tensor, header: TensorHeader, file: BinaryIO, known_finite: bool) -> bool:
        """Read a tensor's bytes into `flat`; whether every element is finite (True unchecked if known)."""
        extremes, filled = [], 0
        for block in self._read_blocks(header, file):
            values = block.view(STORED[header.dtype])
            part = flat[filled : filled + len(values)]
            if values.dtype != part.dtype:
                # On the device: a copy that also converts does so on the CPU first, into memory that is not pinned.
                values = values.to(part.device, non_blocking=True)
            part.copy_(values, non_blocking=True)
            if not known_finite:
                extremes.append(torch.stack(torch.aminmax(part)))  # after the conversion, which may overflow (float64)
            filled += len(values)
        return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())

    def _read_blocks(self, header: TensorHeader, file: BinaryIO) -> Iterator[torch.Tensor]:
        """The tensor's bytes, uint8, in order. On a GPU two blocks take turns: one is read while the other is copied;
        elsewhere each overwrites the one before."""
        file.seek(header.start)
        left, turn = header.end - header.start, 0
        copied: list[torch.cuda.Event | None] = [None] * len(self._blocks)
        while left:
            if (copying := copied[turn]) is not None:
                copying.synchronize()
            block = self._blocks[turn]
            wanted = min(left, _BLOCK)
            _read_into(block.numpy().data[:wanted], file, header)
            yield block[:wanted]
            if self._stream is not None:
                copied[turn] = self._stream.record_event()
            left, turn = left - wanted, (turn + 1) % len(self._blocks)


def _read_into(view: memoryview, file: BinaryIO, header: TensorHeader) -> None:
    """Fill `view` from where the file is; a read may bring less than it was asked for."""
    got = 0
    while got < len(view):
        count = file.readinto(view[got:])  # type: ignore[attr-defined]
        if not count:
            raise BadInput(f"{header.file}: cut short; download or save it again.")
        got += count


def _bytes(header: TensorHeader) -> int:
    return torch.Size(header.shape).numel() * STORED[header.dtype].itemsize


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
        """As `Stack.stored_layers`."""
        return self._sweep(order, None)

    def _sweep(self, order: Sequence[int], dtype: torch.dtype | None) -> Generator[nn.Module, None, None]:
        """The layers, the next one being read meanwhile. dtype: as for `_read`."""
        upcoming = iter(order)
        reading = self._read_ahead(upcoming, dtype)
        try:
            while reading is not None:
                index, weights = reading.index, reading.result()
                reading = self._read_ahead(upcoming, dtype)
                with self._holding(index, weights, dtype):
                    yield self.tower.layers[index]
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

    def _read_ahead(self, upcoming: Iterator[int], dtype: torch.dtype | None) -> _Reading | None:
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
