"""Top sets, overlaps and correlations against sets of Python and enumeration."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_wp.ranking import spearman
from mergekit_wp.study.sets import Shared, in_exactly, in_exactly_by_chance, top_set, with_control

values = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def brute_top(found: list[int], k: int) -> set[int]:
    """By definition: at most k have a value of at least its own."""
    return {c for c, value in enumerate(found) if sum(other >= value for other in found) <= k}


@settings(max_examples=120, deadline=None)
@given(values, st.integers(1, 14), st.randoms(use_true_random=False))
def test_overlaps_are_those_of_sets(one: list[int], k: int, random) -> None:
    other = random.sample(one, len(one))
    a, b = brute_top(one, k), brute_top(other, k)
    shared = Shared.of(*(top_set(torch.tensor(x, dtype=torch.float64), k) for x in (one, other)))
    assert (shared.one, shared.other, shared.both, shared.components) == (len(a), len(b), len(a & b), len(one))
    assert shared.share == (len(a & b) / max(len(a), len(b)) if a or b else None)
    if k >= len(one):
        assert shared.share == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=12, unique=True), st.integers(1, 12))
def test_a_ranking_against_itself_and_scaled(found: list[float], k: int) -> None:
    value_n = torch.tensor(found, dtype=torch.float64)
    assert Shared.of(top_set(value_n, k), top_set(value_n, k)).share == 1
    assert Shared.of(top_set(value_n, k), top_set(3 * value_n, k)).share == 1
    assert int(top_set(value_n, k).sum()) == min(k, len(found))


def test_equal_zeros_are_no_finding() -> None:
    """Ten neurons moved, and two hundred are asked for: the sets are not filled up with the same zeros."""
    one, other = torch.zeros(1000), torch.zeros(1000)
    one[:10], other[5:15] = torch.arange(1, 11), torch.arange(1, 11)
    shared = Shared.of(top_set(one, 200), top_set(other, 200))
    assert (shared.one, shared.other, shared.both, shared.share) == (10, 10, 5, 0.5)


def test_chance_is_the_mean_over_all_draws() -> None:
    sizes, components = (2, 1, 1), 4
    draws = list(product(*(list(combinations(range(components), size)) for size in sizes)))
    masks = [torch.tensor([[c in drawn for c in range(components)] for drawn in draw]) for draw in draws]
    mean = torch.tensor([in_exactly(mask) for mask in masks], dtype=torch.float64).mean(0)
    assert in_exactly_by_chance(sizes, components) == pytest.approx(mean.tolist())
    pairs = [Shared.of(mask[0], mask[2]) for mask in masks]
    assert pairs[0].both_by_chance == pytest.approx(np.mean([pair.both for pair in pairs]))
    assert pairs[0].by_chance == pytest.approx(np.mean([pair.share for pair in pairs]))


@settings(max_examples=30, deadline=None)
@given(values.filter(lambda x: len(x) > 2), st.randoms(use_true_random=False))
def test_correlation_is_spearmans(drift: list[int], random) -> None:
    scores = random.sample(drift, len(drift))
    found = with_control(np.array(drift, float), np.array([scores], float), np.zeros(len(drift), int), 0)[0]
    want = spearman(torch.tensor(drift, dtype=torch.float64), torch.tensor(scores, dtype=torch.float64))
    assert found.spearman == (None if want is None else pytest.approx(want))


def test_the_control_is_what_the_layer_explains() -> None:
    random = np.random.default_rng(0)
    layer_n = np.repeat(np.arange(4), 50)
    by_layer = layer_n.astype(float)  # equal within a layer: permuting there changes nothing
    flat = with_control(by_layer, by_layer[None] + random.normal(size=200) / 9, layer_n, 0)[0]
    assert flat.spearman == pytest.approx(flat.low) == pytest.approx(flat.high)
    assert flat.spearman > 0.9
    noise = random.normal(size=200)
    mixed, none, constant = with_control(
        by_layer + noise, np.stack([by_layer + noise, random.normal(size=200), np.zeros(200)]), layer_n, 0
    )
    assert mixed.spearman == pytest.approx(1)
    assert 0.3 < mixed.low < mixed.high < 0.9
    assert none.low < none.spearman < none.high
    assert none.low < 0 < none.high
    assert constant.spearman is None
    again = with_control(by_layer + noise, (by_layer + noise)[None], layer_n, 0)[0]
    assert (again.low, again.high) == pytest.approx((mixed.low, mixed.high)), "by seed"
