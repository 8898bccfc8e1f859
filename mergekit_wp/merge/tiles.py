"""Walking a tensor in tiles that fit the cache, on worker threads, with scratch memory that is reused.

There is never a temporary of the size of a tensor: fresh pages cost as much as the arithmetic. On a CPU a few
worker threads take stripes of tiles, each running torch's operations on itself alone. torch's own threads would
meet at a barrier after every tile; with another process on the machine, each such meeting waits for a core, and
the merge takes several times as long.

Legend: R rows, C columns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

# Elements in a tile: large enough that the cost of calling torch vanishes, small enough for the cache (measured:
# 512 K is 1.2 times as fast as 256 K, 1 M no faster); a GPU wants few launches instead.
_CPU_TILE = 512 * 1024
_GPU_TILE = 16 * 1024 * 1024
# Below this torch runs an operation on the calling thread anyway.
_SERIAL = 32 * 1024
_MAX_WORKERS = 8

_scratch = threading.local()
_Result = TypeVar("_Result")


def matrix(tensor: torch.Tensor) -> torch.Tensor:
    """A 2-D view: a scalar or vector is one row; leading axes stay apart (reshaping an output must not copy)."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def tile_shape(x_RC: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the tiles of a non-empty matrix: whole rows, unless one alone is too long."""
    R, C = x_RC.shape
    size = _CPU_TILE if x_RC.device.type == "cpu" else _GPU_TILE
    columns = min(C, size)
    return max(1, min(R, size // columns)), columns


def by_stripe(x_RC: torch.Tensor, work: Callable[[int, int], _Result]) -> list[_Result]:
    """work(start, stop) for stripes of rows that make up `x_RC`, in order; each begins where a tile does."""
    R, (rows, _) = x_RC.shape[0], tile_shape(x_RC)
    if x_RC.device.type != "cpu" or x_RC.numel() <= _SERIAL:
        return [work(0, R)]
    count = min(_MAX_WORKERS, torch.get_num_threads())
    # More stripes than workers, so that one worker that waits for a core does not hold up the rest.
    height = rows * -(-R // (rows * 4 * count))
    parts = [_workers(count).submit(work, start, min(R, start + height)) for start in range(0, R, height)]
    return [part.result() for part in parts]


def scratch(count: int, size: int, dtype: torch.dtype, device: torch.device) -> Sequence[torch.Tensor]:
    """`count` flat tensors of at least `size` elements, kept for this thread (one thread a GPU)."""
    held: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = _scratch.__dict__.setdefault("held", {})
    tensors = held.setdefault((dtype, device), [])
    if tensors and tensors[0].numel() < size:
        tensors.clear()
    while len(tensors) < count:
        tensors.append(torch.empty(max(size, tensors[0].numel() if tensors else 0), dtype=dtype, device=device))
    return tensors[:count]


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    """Threads on which torch's operations run alone; the caller's own number of threads is as before."""
    all_started = threading.Barrier(count + 1)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # makes torch settle this thread's number now, before it is set back below

    pool = ThreadPoolExecutor(count, thread_name_prefix="wp-fuse", initializer=start)
    before = torch.get_num_threads()
    for _ in range(count):
        pool.submit(all_started.wait)
    all_started.wait()
    torch.set_num_threads(before)
    return pool
