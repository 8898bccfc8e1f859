"""WIDEN's arithmetic against the paper's formulas, written out column by column in 60-digit decimals."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_widen import pair, plain
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_wp.merge import kernel as tiles
from mergekit_wp.merge.kernel import fuse
from mergekit_wp.merge.methods.widen import column_weights


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 8 elements, so that tiny tensors are cut along both axes and shared out to the workers."""
    monkeypatch.setattr(tiles, "_CPU_TILE", 8)
    monkeypatch.setattr(tiles, "_SERIAL", 8)


def merged(base, experts, *, by_row=False, t=1.0, s=1.0, dtype=torch.float64):
    """What the method does with one tensor."""
    weights = column_weights(base, experts, by_row=by_row, t=t, s=s)
    return fuse(experts, weights, 0 if by_row or base.ndim == 1 else 1, dtype, base)


SETTINGS = {"t": st.sampled_from([0.0, 0.5, 1.0, 1.3, 9.0]), "s": st.sampled_from([0.0, 0.5, 1.0, 2.0])}


@settings(max_examples=60, deadline=None)
@given(
    K=st.integers(1, 4),
    rows=st.integers(2, 6),
    columns=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    by_row=st.booleans(),
    special=st.lists(st.tuples(st.sampled_from(["same", "dead", "died", "born"]), st.integers(0, 8)), max_size=4),
    **SETTINGS,
)
def test_matrices(K, rows, columns, seed, by_row, special, t, s):
    """Columns that no expert changed, and columns of length 0 in the base, in an expert or in both, included."""
    base, experts = pair(K, (rows, columns), seed)
    for kind, j in special:
        at = (slice(None), j % columns)
        if kind in ("dead", "born"):
            base[at] = 0
        if kind in ("dead", "died"):
            experts[seed % K][at] = 0
        if kind == "same":
            experts[seed % K][at] = base[at]
    if by_row:
        base, experts = base.T.contiguous(), [expert.T.contiguous() for expert in experts]
    got = merged(base, experts, by_row=by_row, t=t, s=s)
    torch.testing.assert_close(got, plain(base, experts, by_row=by_row, t=t, s=s), rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(K=st.integers(1, 4), n=st.integers(1, 12), seed=st.integers(0, 10**6), **SETTINGS)
def test_vectors(K, n, seed, t, s):
    base, experts = pair(K, (n,), seed)
    got = merged(base, experts, t=t, s=s)
    torch.testing.assert_close(got, plain(base, experts, t=t, s=s), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (16, 16), (40,)])
@pytest.mark.parametrize("by_row", [False, True])
def test_working_precision_gives_the_same_ranks(dtype, shape, by_row):
    base, experts = pair(3, shape, seed=3, dtype=dtype)
    got = merged(base, experts, by_row=by_row and len(shape) > 1, dtype=torch.float32)
    want = plain(base, experts, by_row=by_row and len(shape) > 1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_a_light_fine_tune_is_ranked_by_its_changes_and_not_by_rounding():
    """A change of 1e-4 turns columns by 1e-9 of a cosine: far below a step of float32 at 1."""
    base, experts = pair(2, (20, 50), seed=5, size=1e-4, dtype=torch.float32)
    torch.testing.assert_close(
        column_weights(base, experts), column_weights(base.double(), [e.double() for e in experts])
    )
    literal = 1 - torch.cosine_similarity(base, experts[0], dim=0)
    assert len(literal.unique()) < 10  # what ranking it would go by: 50 columns, a few values


@pytest.mark.parametrize("shape", [(5, 7), (9,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_equal_to_the_base_give_the_base_bit_for_bit(shape, dtype):
    base, _ = pair(0, shape, dtype=dtype)
    assert torch.equal(merged(base, [base.clone()] * 3, dtype=dtype), base)


@pytest.mark.parametrize("shape", [(5, 7), (9,)])
def test_one_expert_alone_is_taken_whole(shape):
    """The softmax over one expert is 1, and so is s."""
    base, experts = pair(1, shape)
    torch.testing.assert_close(merged(base, experts), experts[0], rtol=1e-14, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 10**6), st.booleans())
def test_the_order_of_experts_does_not_matter(order, seed, by_row):
    base, experts = pair(4, (5, 7), seed)
    one, other = merged(base, experts, by_row=by_row), merged(base, [experts[k] for k in order], by_row=by_row)
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_equal_experts_share_what_is_not_above_average_and_double_what_is():
    base, (expert,) = pair(1, (6, 10))
    weights = column_weights(base, [expert, expert])
    assert set(weights.unique().tolist()) <= {0.5, 0.75, 1.0}
    assert torch.equal(weights[0], weights[1])
    for values in (weights, column_weights(base, [expert, expert], s=0.25)):
        assert (values != 0.5).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 10**6))
def test_what_t_and_s_do(K, C, seed):
    """No column is above a large t: the weights are a softmax and sum to 1. At t = 0 all but the least changed
    column of each measure have s; in between, larger t never makes more columns important."""
    base, experts = pair(K, (4, C), seed)
    none = column_weights(base, experts, t=2.0, s=5.0)
    torch.testing.assert_close(none.sum(0), torch.ones(C, dtype=torch.float64))
    all_but_first = column_weights(base, experts, t=0.0, s=5.0)
    assert ((all_but_first == 5.0).sum(1) >= C - 2).all()
    counts = [int((column_weights(base, experts, t=t, s=5.0) > 1.0).sum()) for t in (0.0, 0.5, 1.0, 1.5, 2.0)]
    assert counts == sorted(counts, reverse=True)


def test_only_embeddings_are_taken_apart_by_row():
    base, experts = pair(2, (6, 6))
    by_row = column_weights(base, experts, by_row=True)
    torch.testing.assert_close(by_row, column_weights(base.T.contiguous(), [e.T for e in experts]))


def test_inputs_are_left_alone_and_shapes_must_fit():
    base, experts = pair(2, (4, 6))
    before = [x.clone() for x in (base, *experts)]
    merged(base, experts)
    assert all(torch.equal(a, b) for a, b in zip((base, *experts), before, strict=True))
    with pytest.raises(ValueError, match="of one shape"):
        column_weights(base, [experts[0][:, :1]])
    with pytest.raises(ValueError, match="matrices or vectors"):
        column_weights(base[None], [experts[0][None]])
    assert column_weights(base[:0], [e[:0] for e in experts]).shape == (2, 6)
    assert column_weights(base[:, :0], [e[:, :0] for e in experts]).shape == (2, 0)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.nbytes = {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("by_row", [False, True])
def test_no_temporary_is_as_large_as_a_tensor(by_row, monkeypatch):
    """Beyond the output, tiles of 256 elements and a few numbers a column, however large the matrix."""
    monkeypatch.setattr(tiles, "_CPU_TILE", 256)
    monkeypatch.setattr(tiles, "_SERIAL", 10**9)  # on this thread, where it can be watched
    monkeypatch.setattr(tiles, "_scratch", threading.local())  # not what other tests left
    base, experts = pair(3, (400, 60) if by_row else (60, 400), dtype=torch.bfloat16)
    columns, K = 400, 3
    with Largest(base, *experts) as watched:
        weights = column_weights(base, experts, by_row=by_row)
    assert watched.nbytes <= (2 * K + 1) * columns * 8
    with Largest(base, *experts) as watched:
        fuse(experts, weights, 0 if by_row else 1, torch.bfloat16, base)
    assert watched.nbytes == base.numel() * 2  # the output itself
