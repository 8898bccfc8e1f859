"""The arithmetic of the merge (METHOD.md 4; Eq. 17-18, 91-96 of Sun et al., arXiv 2604.13694).

    s+_k(c)     = max(s_k(c), 0)
    alpha_k(c)  = s+_k(c) / sum_m s+_m(c), or 1/K where that sum is 0
    theta(c)    = theta_base + sum_k alpha_k(c) (theta_k - theta_base) = sum_k alpha_k(c) theta_k

The alphas of a component sum to 1, so the base's weights cancel and are never read.

`fuse` walks the output in tiles that fit the cache: each expert's tile is converted to float32 in one reused
scratch, weighted into a second one, and the sum is rounded once, straight into the output. Every input is
read once, and there is no temporary of the size of a tensor: fresh pages cost as much as the arithmetic.

On a CPU a few worker threads take stripes of tiles, each running torch's operations on itself alone. torch's own
threads would meet at a barrier after every tile; with another process on the machine, each such meeting waits
for a core, and the merge takes several times as long.

Legend: K experts, L layers, H heads, F neurons, n components of a layer, R rows, C columns.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

# Elements in a tile: large enough that the cost of calling torch vanishes, small enough for the cache (measured:
# 512 K is 1.2 times as fast as 256 K, 1 M no faster); a GPU wants few launches instead.
_CPU_TILE = 512 * 1024
_GPU_TILE = 16 * 1024 * 1024
# Below this torch runs an operation on the calling thread anyway.
_SERIAL = 32 * 1024
_MAX_WORKERS = 8

_scratch = threading.local()


class NotFiniteError(ArithmeticError):
    """A merged tensor has a NaN or an infinity, so one of its inputs has."""


def component_weights(scores: Sequence[torch.Tensor]) -> torch.Tensor:
    """The share alpha_KLn of each expert in each component.

    scores: K tensors of one shape [L, n] (heads or neurons), any floating dtype. Returns float32 [K, L, n];
    for each component the shares are at least 0 and sum to 1, and are 1/K where no expert has a positive
    score. Computed in float64, so that float32 scores of any magnitude neither overflow nor vanish.

    Raises `ValueError` for no scores or for scores of different shapes.
    """
    if not scores or any(score.shape != scores[0].shape for score in scores):
        raise ValueError(f"expected scores of one shape, found {[tuple(s.shape) for s in scores]}")
    positive_KLn = torch.stack([score.to(torch.float64) for score in scores]).clamp_(min=0)
    total_Ln = positive_KLn.sum(0)
    alpha_KLn = positive_KLn / total_Ln
    return torch.where(total_Ln > 0, alpha_KLn, 1 / len(scores)).to(torch.float32)


def fuse(
    experts: Sequence[torch.Tensor],
    alpha_Kn: torch.Tensor | None,
    axis: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """sum_k alpha_k * theta_k, accumulated in float32 (float64 if an expert is float64), rounded once.

    experts: K tensors of one shape on one device; dtypes may differ, strides are free. alpha_Kn: [K, n]
    weights along `axis` of the tensors, where n is their length on that axis, or None for 1/K everywhere.
    Returns a new contiguous tensor of dtype `out_dtype`.

    Raises `ValueError` when shapes or weights do not fit, rather than broadcast, and `NotFiniteError` when an expert
    holds a NaN or an infinity.
    """
    first, K = experts[0], len(experts)
    if any(expert.shape != first.shape for expert in experts):
        raise ValueError(f"expected experts of one shape, found {[tuple(e.shape) for e in experts]}")
    if alpha_Kn is not None and tuple(alpha_Kn.shape) != (K, first.shape[axis]):
        raise ValueError(
            f"expected {(K, first.shape[axis])} weights along axis {axis} of a tensor of shape "
            f"{tuple(first.shape)}, found {tuple(alpha_Kn.shape)}"
        )
    wide = torch.float64 if any(expert.dtype == torch.float64 for expert in experts) else torch.float32
    out = torch.empty(first.shape, dtype=out_dtype, device=first.device)
    if alpha_Kn is None:
        alpha_KRC = torch.full((K, 1, 1), 1 / K, dtype=wide, device=first.device)
    else:
        # A vector is one row, so its own axis 0 runs along columns.
        by_row = axis == 0 and first.ndim > 1
        alpha_KRC = alpha_Kn.to(first.device, wide).reshape((K, -1, 1) if by_row else (K, 1, -1))
    if not _fuse_matrix([_matrix(expert) for expert in experts], alpha_KRC, _matrix(out)):
        raise NotFiniteError
    return out


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """A 2-D view: a scalar or vector is one row; leading axes stay apart (reshaping `out` must not copy)."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def _fuse_matrix(experts_RC: Sequence[torch.Tensor], alpha_KRC: torch.Tensor, out_RC: torch.Tensor) -> bool:
    """Fill `out_RC`; alpha_KRC is [K, R, 1], [K, 1, C] or [K, 1, 1]. True if all came out finite."""
    R, C = out_RC.shape
    if not out_RC.numel():
        return True
    on_cpu = out_RC.device.type == "cpu"
    columns = min(C, _CPU_TILE if on_cpu else _GPU_TILE)
    rows = max(1, min(R, (_CPU_TILE if on_cpu else _GPU_TILE) // columns))
    if not on_cpu or out_RC.numel() <= _SERIAL:
        return bool(torch.isfinite(_fuse_stripe(experts_RC, alpha_KRC, out_RC, (0, R), (rows, columns))))
    workers = min(_MAX_WORKERS, torch.get_num_threads())
    # More stripes than workers, so that one worker that waits for a core does not hold up the rest.
    height = rows * -(-R // (rows * 4 * workers))
    parts = [
        _workers(workers).submit(
            _fuse_stripe, experts_RC, alpha_KRC, out_RC, (start, min(R, start + height)), (rows, columns)
        )
        for start in range(0, R, height)
    ]
    return all(bool(torch.isfinite(part.result())) for part in parts)


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


def _fuse_stripe(
    experts_RC: Sequence[torch.Tensor],
    alpha_KRC: torch.Tensor,
    out_RC: torch.Tensor,
    stripe: tuple[int, int],
    tile: tuple[int, int],
) -> torch.Tensor:
    """Fill the rows `stripe` of `out_RC`, tile by tile; returns a scalar that is finite if they are."""
    (rows, columns), C = tile, out_RC.shape[1]
    total, term = _tiles(rows * columns, alpha_KRC.dtype, out_RC.device)
    witness = torch.zeros((), dtype=alpha_KRC.dtype, device=out_RC.device)
    for r in range(*stripe, rows):
        for c in range(0, C, columns):
            where = (slice(r, min(r + rows, stripe[1])), slice(c, c + columns))
            target = out_RC[where]
            sum_rc = total[: target.numel()].view(target.shape)
            term_rc = term[: target.numel()].view(target.shape)
            for k, expert_RC in enumerate(experts_RC):
                weight = alpha_KRC[k]
                weight = weight[where[0]] if weight.shape[0] > 1 else weight
                weight = weight[:, where[1]] if weight.shape[1] > 1 else weight
                # A mixed-dtype multiply would convert the tile into a fresh temporary.
                term_rc.copy_(expert_RC[where])
                if k == 0:
                    torch.mul(term_rc, weight, out=sum_rc)
                else:
                    sum_rc.addcmul_(term_rc, weight)
            # One NaN or infinity makes the sum of all elements one; weights are far too small to overflow it.
            witness += sum_rc.sum()
            target.copy_(sum_rc)
    return witness


def _tiles(size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two flat scratch tensors of at least `size` elements, kept for this thread (one thread a GPU)."""
    pool = _scratch.__dict__.setdefault("pool", {})
    held = pool.get((dtype, device))
    if held is None or held[0].numel() < size:
        held = (torch.empty(size, dtype=dtype, device=device), torch.empty(size, dtype=dtype, device=device))
        pool[(dtype, device)] = held
    return held
