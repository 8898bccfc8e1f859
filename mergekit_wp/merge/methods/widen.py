"""`merge_method: widen`: merging by weight disentanglement (Yu et al., arXiv 2408.03092), one tensor at a time.

Recipe:

    merge_method: widen
    base_model: BASE
    models:
      - model: EXPERT_A
      - model: EXPERT_B
    parameters: {t: 1.0, s: 1.0}    # the defaults, and the authors' choice for Llama-2-13B

Its authors' program holds all models in float32 at once; here a tensor is read
twice, and beyond the inputs there is the output and a few tiles.

Of mergekit it may import `merge_methods.base` alone, at the top (see `base`).

How much of each expert's change is taken (section 4 there): a weight W (out x in, as Hugging Face stores it) is taken
apart into the length m_j = |W_:j| of every column and its direction D_:j = W_:j / m_j. With W0 the base and Wn expert
n:

    dm_j = |m_j^n - m_j^0|        dd_j = 1 - cos(D_:j^n, D_:j^0)
    r_j  = place of dm_j (dd_j) among the C columns of its expert, ascending and stable, over C: 0 <= r_j < 1
    S_nj = softmax over the experts of r_j; but s wherever r_j > t * (mean over j of that expert's r)
    W*   = W0 + sum_n 1/2 (S_m + S_d)_nj (Wn - W0)_:j

The embedding matrix is taken transposed, so its columns are tokens; the LM head is not. A vector (a norm, a bias) has
no columns: there r is |Wn - W0| itself, element by element and unranked, and S alone is the weight.

Decided here, where the paper is silent or its authors' code is at the mercy of rounding:

- Differences are computed from sums over the change E = Wn - W0, in which nothing cancels:
  m^n - m^0 = (2 W0.E + E.E) / (m^n + m^0) and sin^2 = (W0.W0 E.E - (W0.E)^2) / (m^n m^0)^2. The literal
  1 - cos in float32 is a multiple of 6e-8, which is as large as the whole dd_j of a light fine-tune: its ranks
  would be ties, settled by the order of the columns.
- A column of length 0 has no direction: dd_j = 1, or 0 when both are 0.
- r_j > t * mean is compared in whole places, so that the middle place is never above the mean by rounding.

Elements are handled in float32 (float64 if an input is), a tile at a time; sums over a tile are added up in
float64. Beyond the inputs there are three tiles a thread and 2K + 1 numbers a column.

Legend: K experts, R rows, C columns of the matrix as taken apart, N = 2K + 1 sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from mergekit_wp.geometry import EMBEDDINGS, text_name
from mergekit_wp.merge.kernel import NotFiniteError, by_stripe, fuse, matrix, scratch, tile_shape
from mergekit_wp.merge.methods.base import CheckedMethod, not_finite, number, register_method
from mergekit_wp.merge.plan import WIDEN


def by_token(name: str) -> bool:
    """The one matrix that is taken apart by row: its rows are tokens, and tokens are what its columns shall be."""
    return text_name(name) == EMBEDDINGS


class WidenMerge(CheckedMethod):
    """W* = W0 + sum_n 1/2 (S_m + S_d)_n (Wn - W0), column by column.

    `t` (shared, default 1): a column whose rank is above t times the average is taken as important. `s` (shared,
    default 1): the weight of an important column. As with every number of a mergekit recipe, a list is a gradient
    over the layers.
    """

    spec = MergeMethodSpec(
        name=WIDEN,
        pretty_name="WIDEN",
        reference_url="https://arxiv.org/abs/2408.03092",
        parameters=(
            ParameterSpec(
                "t",
                number("t", "the authors use 1.0", least=0),
                ParameterScope.SHARED,
                default=1.0,
                description="A rank above t times the average makes a column important.",
            ),
            ParameterSpec(
                "s",
                number("s", "the authors use 1.0", least=0),
                ParameterScope.SHARED,
                default=1.0,
                description="The weight of an important column.",
            ),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    )

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        t: float = 1.0,
        s: float = 1.0,
        source_name: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """One output tensor of the base's shape; `out_dtype` falls back to the base's dtype.

        Raises `BadInput` when an input holds a NaN or an infinity, `ValueError` for a tensor of more than two axes.
        """
        assert group.base is not None  # the contract says so
        base, experts = group.base.tensor, [entry.tensor for entry in group.non_base]
        by_row = by_token(source_name or group.metadata.name or "")
        weights_Kn = column_weights(base, experts, by_row=by_row, t=t, s=s)
        try:
            return fuse(experts, weights_Kn, 0 if by_row or base.ndim == 1 else 1, out_dtype or base.dtype, base)
        except NotFiniteError:
            raise not_finite(group, source_name) from None


def register() -> None:
    """Add the method to mergekit's registry; idempotent. Raises `ValueError` if another `widen` is there."""
    register_method(WidenMerge)


# When this module's own import is what made mergekit load, `autoload` left it out.
register()


def column_weights(
    base: torch.Tensor, experts: Sequence[torch.Tensor], *, by_row: bool = False, t: float = 1.0, s: float = 1.0
) -> torch.Tensor:
    """The weight w_KC, float64, of each of the K experts' changes: of a matrix's column, or a vector's element.

    base, experts: tensors of one shape on one device, dtypes free. by_row: the matrix is taken transposed (the
    embeddings), so weights are of its rows. t, s: the paper's ratio to the average and score calibration.

    NaN and infinite inputs give arbitrary or NaN weights; `kernel.fuse` notices them. Raises `ValueError` for
    tensors that are neither matrix nor vector, or not of one shape.
    """
    if base.ndim not in (1, 2) or any(expert.shape != base.shape for expert in experts):
        raise ValueError(
            f"expected matrices or vectors of one shape, found {[tuple(e.shape) for e in (base, *experts)]}"
        )
    if base.ndim == 1:
        change_KC = torch.stack([expert.double() - base.double() for expert in experts]).abs_()
        return _calibrated(change_KC, change_KC > t * change_KC.mean(1, keepdim=True), s)
    length_KC, direction_KC = column_differences(base, experts, by_row=by_row)
    return (_ranked(length_KC, t, s) + _ranked(direction_KC, t, s)) / 2


def column_differences(
    base_RC: torch.Tensor, experts_RC: Sequence[torch.Tensor], *, by_row: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """dm_KC and dd_KC, float64: by how much each expert changed the length and the direction of each column."""
    sums_NC = _column_sums(base_RC, experts_RC, by_row)
    K = len(experts_RC)
    before_C, along_KC, change_KC = sums_NC[0], sums_NC[1 : K + 1], sums_NC[K + 1 :]
    after_KC = (before_C + 2 * along_KC + change_KC).clamp_(min=0)
    lengths_KC = after_KC.sqrt() + before_C.sqrt()
    # 0 over 0 where a column is 0 in both models: nothing has changed.
    length_KC = ((2 * along_KC + change_KC).abs() / lengths_KC).nan_to_num(nan=0.0)
    product_KC = after_KC * before_C
    sine2_KC = ((before_C * change_KC - along_KC.square()) / product_KC).clamp(0, 1)
    cosine_KC = (before_C + along_KC) / product_KC.sqrt()
    # 1 - cos = sin^2 / (1 + cos), which cancels nothing unless the column has turned round.
    direction_KC = torch.where(cosine_KC > 0, sine2_KC / (1 + cosine_KC), 1 - cosine_KC)
    one_is_zero_KC = (product_KC == 0) & (change_KC > 0)
    direction_KC = torch.where(one_is_zero_KC, 1.0, torch.where(change_KC == 0, 0.0, direction_KC))
    return length_KC, direction_KC


def _column_sums(base_RC: torch.Tensor, experts_RC: Sequence[torch.Tensor], by_row: bool) -> torch.Tensor:
    """sums_NC, float64: W0.W0, then W0.E of every expert, then E.E of every expert; [N, R] if by_row."""
    stacked = (base_RC, *experts_RC)
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in stacked) else torch.float32
    inputs_RC = [matrix(tensor) for tensor in stacked]
    if not base_RC.numel():
        shape = (2 * len(experts_RC) + 1, base_RC.shape[0 if by_row else 1])
        return torch.zeros(shape, dtype=torch.float64, device=base_RC.device)

    def sums(start: int, stop: int) -> torch.Tensor:
        return _stripe_sums(inputs_RC, by_row, (start, stop), wide)

    parts = by_stripe(inputs_RC[0], sums)
    return torch.cat(parts, 1) if by_row else torch.stack(parts).sum(0)


def _stripe_sums(
    inputs_RC: Sequence[torch.Tensor], by_row: bool, stripe: tuple[int, int], wide: torch.dtype
) -> torch.Tensor:
    """The sums of the rows `stripe`: over these rows for every column, or over the columns for each of them."""
    base_RC, *experts_RC = inputs_RC
    K, C, device = len(experts_RC), base_RC.shape[1], base_RC.device
    rows, columns = tile_shape(base_RC)
    tiles = scratch(3, rows * columns, wide, device)
    shape = (2 * K + 1, stripe[1] - stripe[0] if by_row else C)
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    for r in range(*stripe, rows):
        for c in range(0, C, columns):
            where = (slice(r, min(r + rows, stripe[1])), slice(c, c + columns))
            part = base_RC[where]
            base_rc, change_rc, product_rc = (flat[: part.numel()].view(part.shape) for flat in tiles)
            place = slice(r - stripe[0], where[0].stop - stripe[0]) if by_row else where[1]
            # A mixed-dtype operation would convert the tile into a fresh temporary: hence the copies.
            base_rc.copy_(part)
            sums[0, place] += torch.mul(base_rc, base_rc, out=product_rc).sum(1 if by_row else 0)
            for k, expert_RC in enumerate(experts_RC):
                change_rc.copy_(expert_RC[where]).sub_(base_rc)
                sums[1 + k, place] += torch.mul(base_rc, change_rc, out=product_rc).sum(1 if by_row else 0)
                sums[1 + K + k, place] += change_rc.square_().sum(1 if by_row else 0)
    return sums


def _ranked(difference_KC: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """S_KC of the paper from dm_KC or dd_KC."""
    C = difference_KC.shape[1]
    order_KC = torch.argsort(difference_KC, dim=1, stable=True)
    places = torch.arange(C, dtype=torch.float64, device=difference_KC.device)
    place_KC = torch.empty_like(difference_KC).scatter_(1, order_KC, places.expand_as(difference_KC).contiguous())
    # The mean place is (C - 1) / 2.
    return _calibrated(place_KC / C, place_KC > t * (C - 1) / 2, s)


def _calibrated(significance_KC: torch.Tensor, above_KC: torch.Tensor, s: float) -> torch.Tensor:
    """Softmax over the experts, and s in its place where `above_KC`."""
    return torch.where(above_KC, s, torch.softmax(significance_KC, dim=0))
