"""The arithmetic of the merge (METHOD.md 4; Eq. 17-18, 91-96 of Sun et al., arXiv 2604.13694).

    s+_k(c)     = max(s_k(c), 0)
    alpha_k(c)  = s+_k(c) / sum_m s+_m(c), or 1/K where that sum is 0
    theta(c)    = theta_base + sum_k alpha_k(c) (theta_k - theta_base) = sum_k alpha_k(c) theta_k

The alphas of a component sum to 1, so the base's weights cancel and are never read.

Two options of ours go beyond the paper; each is one number an expert, and 1 for all is the paper's rule:

    weight w_k  says how much an expert counts before anything is known of the component: alpha_k = w_k s+_k /
                sum_m w_m s+_m, or w_k / sum_m w_m where that sum is 0 and where there is no component (embeddings,
                norms, the output head). The alphas still sum to 1. An expert of weight 2 counts as if it were listed
                twice, one of weight 0 as if it were not listed.
    scale x_k   multiplies what an expert gives, as in task arithmetic: theta_base + sum_k x_k alpha_k (theta_k -
                theta_base). The same x for all multiplies the whole task vector.

Weights of a fit (METHOD.md 6) stand in the place of the alphas; they need not sum to 1, so the base is read:
theta_base + sum_k x_k w_k(c) (theta_k - theta_base).

A set patch computes nothing: `transplant` copies.

`fuse` walks the output in tiles: each expert's tile is converted to float32 in one reused scratch,
weighted into a second one, and the sum is rounded once, straight into the output. Every input is read once.

Tiles fit the processor's cache, scratch memory is reused, and there is never a temporary of the size of a tensor: fresh
pages cost as much as the arithmetic. On a CPU a few worker threads take stripes of tiles, each running torch's
operations on itself alone. torch's own threads would meet at a barrier after every tile; with another process on the
machine, each such meeting waits for a core, and the merge takes several times as long.

Legend: K experts, L layers, H heads, F neurons, n components of a layer, R rows, C columns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch


class NotFiniteError(ArithmeticError):
    """A merged tensor has a NaN or an infinity, so one of its inputs has."""


def component_weights(scores: Sequence[torch.Tensor], prior: Sequence[float] | None = None) -> torch.Tensor:
    """The share alpha_K...n of each expert in each component.

    scores: K tensors of one shape [..., n] (heads or neurons), any floating dtype. prior: the experts' weights w_K;
    None for equal ones. Returns float32 [K, ..., n]; for each component the shares are at least 0 and sum to 1, and
    are `prior_shares` where no expert of positive weight has a positive score. Computed in float64, so that float32
    scores of any magnitude neither overflow nor vanish. Equal weights change no bit.

    Raises `ValueError` for no scores, for scores of different shapes, and as `prior_shares` does.
    """
    if not scores or any(score.shape != scores[0].shape for score in scores):
        raise ValueError(f"expected scores of one shape, found {[tuple(s.shape) for s in scores]}")
    along_K = (len(scores), *[1] * scores[0].ndim)
    weight_K = _relative([1.0] * len(scores) if prior is None else prior, len(scores))
    positive_Kn = torch.stack([score.to(torch.float64) for score in scores]).clamp_(min=0)
    positive_Kn *= weight_K.to(positive_Kn.device).reshape(along_K)
    total_n = positive_Kn.sum(0)
    fallback_Kn = (weight_K / weight_K.sum()).to(positive_Kn.device).reshape(along_K)
    return torch.where(total_n > 0, positive_Kn / total_n, fallback_Kn).to(torch.float32)


def prior_shares(prior: Sequence[float]) -> torch.Tensor:
    """w_k / sum_m w_m, float32 [K]: the shares where nothing is known of a component, or there is none.

    Raises `ValueError` for a weight that is negative or not finite, and where none is above 0.
    """
    weight_K = _relative(prior, len(prior))
    return (weight_K / weight_K.sum()).to(torch.float32)


def _relative(prior: Sequence[float], count: int) -> torch.Tensor:
    """The weights over the largest, float64 [K]: exactly 1 where all are equal, whatever they are."""
    weight_K = torch.tensor(prior, dtype=torch.float64)
    good = len(weight_K) == count and bool(torch.isfinite(weight_K).all() and (weight_K >= 0).all())
    if not good or not bool((weight_K > 0).any()):
        raise ValueError(f"expected {count} weights of at least 0, one of them above, found {list(prior)}")
    return weight_K / weight_K.max()


def fuse(
    experts: Sequence[torch.Tensor],
    alpha_Kn: torch.Tensor | None,
    axis: int,
    out_dtype: torch.dtype,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_k alpha_k * theta_k, accumulated in float32 (float64 if an input is float64), rounded once.

    experts: K tensors of one shape on one device; dtypes may differ, strides are free. alpha_Kn: [K, n]
    weights along `axis` of the tensors, where n is their length on that axis, or None for 1/K everywhere.
    base: for weights that do not sum to 1, theta_base + sum_k alpha_k * (theta_k - theta_base) instead; of the
    experts' shape. Returns a new contiguous tensor of dtype `out_dtype`.

    Raises `ValueError` when shapes or weights do not fit, rather than broadcast, and `NotFiniteError` when an input
    holds a NaN or an infinity, or the result a value that `out_dtype` does not hold.
    """
    first, K = experts[0], len(experts)
    inputs = [*experts] if base is None else [*experts, base]
    if any(tensor.shape != first.shape for tensor in inputs):
        raise ValueError(f"expected experts of one shape, found {[tuple(e.shape) for e in inputs]}")
    if alpha_Kn is not None and tuple(alpha_Kn.shape) != (K, first.shape[axis]):
        raise ValueError(
            f"expected {(K, first.shape[axis])} weights along axis {axis} of a tensor of shape "
            f"{tuple(first.shape)}, found {tuple(alpha_Kn.shape)}"
        )
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in inputs) else torch.float32
    out = torch.empty(first.shape, dtype=out_dtype, device=first.device)
    if alpha_Kn is None:
        alpha_KRC = torch.full((K, 1, 1), 1 / K, dtype=wide, device=first.device)
    else:
        # A vector is one row, so its own axis 0 runs along columns.
        by_row = axis == 0 and first.ndim > 1
        alpha_KRC = alpha_Kn.to(first.device, wide).reshape((K, -1, 1) if by_row else (K, 1, -1))
    experts_RC, out_RC = [matrix(expert) for expert in experts], matrix(out)
    base_RC = None if base is None else matrix(base)
    if out.numel():
        parts = by_stripe(
            out_RC, lambda start, stop: _fuse_stripe(experts_RC, alpha_KRC, base_RC, out_RC, (start, stop))
        )
        if not all(bool(torch.isfinite(part)) for part in parts):
            raise NotFiniteError
    return out


def merge_tensor(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    alpha_Kn: torch.Tensor | None,
    axis: int,
    prior: Sequence[float],
    scales: Sequence[float],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """One tensor of a merge: shares alpha_Kn along `axis`, or None where there is no component, with the experts'
    weights w_K (`prior`) and scales x_K.

    The base's values are read only if a scale is not 1. Raises as `fuse`, and `ValueError` for weights all 0.
    """
    scaled = any(x != 1.0 for x in scales)
    if alpha_Kn is None:
        axis = 0
        if scaled or len(set(prior)) > 1:
            alpha_Kn = prior_shares(prior)[:, None].expand(-1, base.shape[0])
    if alpha_Kn is not None and scaled:
        alpha_Kn = torch.tensor(scales)[:, None] * alpha_Kn
    return fuse(experts, alpha_Kn, axis, out_dtype, base if scaled else None)


def merge_fitted(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weight_Kn: torch.Tensor,
    axis: int,
    scales: Sequence[float],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """One tensor of a merge by a fit: weights w_Kn along `axis`, or w_K1 for all of it, and the experts' scales x_K.

    Raises as `fuse`.
    """
    if weight_Kn.shape[1] == 1:
        axis, weight_Kn = 0, weight_Kn.expand(-1, base.shape[0])
    return fuse(experts, torch.tensor(scales)[:, None] * weight_Kn, axis, out_dtype, base)


def transplant(
    recipient: torch.Tensor,
    values: torch.Tensor | None,
    places_n: torch.Tensor | None,
    axis: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The recipient with `values` in the places [n] along an axis; both are copied, and rounded to `out_dtype` alone.

    values: of the recipient's shape but n long along the axis; both None for no place. It may be the recipient itself
    where nothing changes. Raises `ValueError` for values that do not fit, and `NotFiniteError` for a result that is not
    finite.
    """
    out = recipient.to(out_dtype, copy=places_n is not None)
    if places_n is not None and values is not None:
        want = [*recipient.shape[:axis], len(places_n), *recipient.shape[axis + 1 :]]
        if list(values.shape) != want:
            raise ValueError(f"expected values of shape {want}, found {list(values.shape)}")
        out.index_copy_(axis, places_n.to(out.device), values.to(out.device, out_dtype))
    if out.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(out))).all()):
        raise NotFiniteError
    return out


def _fuse_stripe(
    experts_RC: Sequence[torch.Tensor],
    alpha_KRC: torch.Tensor,
    base_RC: torch.Tensor | None,
    out_RC: torch.Tensor,
    stripe: tuple[int, int],
) -> torch.Tensor:
    """Fill the rows `stripe` of `out_RC`, tile by tile; returns a scalar that is finite if they are.

    alpha_KRC is [K, R, 1], [K, 1, C] or [K, 1, 1].
    """
    (rows, columns), C = tile_shape(out_RC), out_RC.shape[1]
    total, term, origin = scratch(3, rows * columns, alpha_KRC.dtype, out_RC.device)
    witness = torch.zeros((), dtype=alpha_KRC.dtype, device=out_RC.device)
    narrow = out_RC.dtype == torch.float16 or out_RC.dtype.itemsize < alpha_KRC.dtype.itemsize == 8
    for r in range(*stripe, rows):
        for c in range(0, C, columns):
            where = (slice(r, min(r + rows, stripe[1])), slice(c, c + columns))
            target = out_RC[where]
            sum_rc, term_rc, base_rc = (flat[: target.numel()].view(target.shape) for flat in (total, term, origin))
            # A mixed-dtype operation would convert the tile into a fresh temporary: hence the copies.
            if base_RC is not None:
                base_rc.copy_(base_RC[where])
                sum_rc.copy_(base_rc)
            for k, expert_RC in enumerate(experts_RC):
                weight = alpha_KRC[k]
                weight = weight[where[0]] if weight.shape[0] > 1 else weight
                weight = weight[:, where[1]] if weight.shape[1] > 1 else weight
                term_rc.copy_(expert_RC[where])
                if base_RC is not None:
                    sum_rc.addcmul_(term_rc.sub_(base_rc), weight)
                elif k == 0:
                    torch.mul(term_rc, weight, out=sum_rc)
                else:
                    sum_rc.addcmul_(term_rc, weight)
            target.copy_(sum_rc)
            # One NaN or infinity makes the sum of all elements one; weights are far too small to overflow it. What is
            # finite in the sum may not be in a narrower output.
            witness += target.sum(dtype=witness.dtype) if narrow else sum_rc.sum()
    return witness


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
