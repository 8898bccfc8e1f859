"""The arithmetic of the merge alone: shares, and the kernel against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_wp.merge import kernel as tiles
from mergekit_wp.merge.kernel import NotFiniteError, component_weights, fuse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 8 elements, so that tiny tensors are cut along both axes and shared out to the workers."""
    monkeypatch.setattr(tiles, "_CPU_TILE", 8)
    monkeypatch.setattr(tiles, "_SERIAL", 8)


def random_experts(K, shape, dtypes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtypes[k % len(dtypes)]) for k in range(K)]


def random_shares(K, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return component_weights([torch.randn(1, n, generator=generator) for _ in range(K)])[:, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6), st.floats(-30, 30))
def test_shares_sum_to_one_and_are_not_negative(K, n, seed, magnitude):
    generator = torch.Generator().manual_seed(seed)
    alpha_KLn = component_weights([torch.randn(3, n, generator=generator) * 10**magnitude for _ in range(K)])
    assert alpha_KLn.dtype == torch.float32
    assert (alpha_KLn >= 0).all()
    torch.testing.assert_close(alpha_KLn.sum(0), torch.ones(3, n))


def test_shares_where_nobody_scores_are_uniform():
    scores = [torch.tensor([[-1.0, 0.0, 2.0, -1.0]]), torch.tensor([[-3.0, 0.0, -9.0, 4.0]])]
    assert component_weights(scores)[:, 0].tolist() == [[0.5, 0.5, 1.0, 0.0], [0.5, 0.5, 0.0, 1.0]]


def test_shares_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        component_weights([torch.zeros(2, 3), torch.zeros(3, 2)])


@settings(max_examples=80, deadline=None)
@given(
    K=st.integers(1, 4),
    shape=st.sampled_from([(), (1,), (21,), (3, 5), (1, 40), (17, 2), (2, 3, 5)]),
    axis=st.sampled_from([None, 0, 1]),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    out=st.sampled_from(DTYPES),
    flipped=st.booleans(),
)
def test_kernel_against_float64(K, shape, axis, dtypes, out, flipped):
    """Any shape, any mix of dtypes, strided inputs, weights along rows, columns or uniform: rounded once."""
    if axis is not None and axis >= len(shape):
        axis = None
    if axis is not None and len(shape) == 3:
        axis = 0
    experts = random_experts(K, shape, dtypes)
    if flipped and len(shape) > 1:
        experts = [e.transpose(0, -1).contiguous().transpose(0, -1) for e in experts]
    alpha = None if axis is None else random_shares(K, shape[axis])
    weights = torch.full((K, 1), 1 / K) if axis is None else alpha
    side = [-1 if i == axis else 1 for i in range(len(shape))]
    want = sum(weights[k].double().reshape(side) * experts[k].double() for k in range(K))
    got = fuse(experts, alpha, axis or 0, out)
    assert got.dtype == out
    assert got.is_contiguous()
    assert got.shape == torch.Size(shape)
    size = sum(e.double().abs() for e in experts)
    allowed = torch.finfo(out).eps / 2 * want.abs() + (K + 1) * 2**-23 * size + 1e-7
    assert ((got.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_merges_to_itself_bit_for_bit(dtype):
    (expert,) = random_experts(1, (5, 7), [dtype])
    expert[0, 0] = -0.0
    got = fuse([expert], random_shares(1, 5), 0, dtype)
    assert torch.equal(got.view(torch.uint8), expert.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_equal_experts_merge_to_that_expert(dtype, axis):
    (expert,) = random_experts(1, (5, 5), [dtype])
    got = fuse([expert] * 3, random_shares(3, 5), axis, dtype)
    assert ((got - expert).double().abs() <= torch.finfo(dtype).eps * expert.double().abs()).all()


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.sampled_from(DTYPES))
def test_the_order_of_experts_does_not_matter(order, dtype):
    experts, alpha = random_experts(4, (5, 7), [dtype]), random_shares(4, 7)
    one = fuse(experts, alpha, 1, dtype).double()
    other = fuse([experts[k] for k in order], alpha[list(order)], 1, dtype).double()
    step = torch.finfo(dtype).eps * torch.maximum(one.abs(), other.abs())
    assert ((one - other).abs() <= step + 4 * 2**-23 * 4).all()


def test_float64_experts_are_not_narrowed():
    experts = [e.double() / 3 for e in random_experts(2, (4, 4), DTYPES)]
    assert torch.equal(fuse(experts, None, 0, torch.float64), experts[0] * 0.5 + experts[1] * 0.5)


def test_inputs_are_left_alone_and_nothing_broadcasts():
    experts = random_experts(2, (4, 6), DTYPES)
    before = [e.clone() for e in experts]
    fuse(experts, None, 0, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(experts, before, strict=True))
    with pytest.raises(ValueError, match="weights along axis 0"):
        fuse(experts, random_shares(2, 1), 0, torch.float32)
    with pytest.raises(ValueError, match="one shape"):
        fuse([experts[0], experts[1][:1]], None, 0, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_nan_is_noticed_even_under_weight_zero(bad):
    experts = [torch.ones(5, 7), torch.ones(5, 7)]
    experts[1][4, 6] = bad
    with pytest.raises(NotFiniteError):
        fuse(experts, torch.tensor([[1.0] * 5, [0.0] * 5]), 0, torch.float32)
