"""The tensors of a checkpoint, read one at a time.

Shards are read tensor by tensor, through a small buffer, with nothing mapped into memory. Memory-mapped shards count as
resident memory for as long as they are open, the whole file of them (measured: 1.1 GB for a 1 GB shard, against 150 MB
read this way, at the same speed). So tensors are read with plain reads, a block at a time, straight into a tensor of
the wanted dtype on the wanted device; a block is converted while the cache holds it.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

import torch

from mergekit_wp.checkpoint.weights import TensorHeader
from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.models.precision import STORED

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
