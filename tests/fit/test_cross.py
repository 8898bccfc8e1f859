"""Cross effects against autograd prompt by prompt, and the three cases that the weights are meant for."""

from __future__ import annotations

import pytest
import torch
from fit_world import ALONE, LessonWorld, V, quiet
from hypothesis import given
from hypothesis import strategies as st

from mergekit_wp.fit.cross import RIDGE, EffectProducts, _solved, cross_weights
from mergekit_wp.fit.gradient import loss_and_gradient, passes
from mergekit_wp.fit_file import FusionWeights


@pytest.mark.parametrize("kind", ["llama-biased", "gemma2", "phi3"])
def test_products_are_those_of_the_effects_of_each_prompt(tmp_path, kind):
    """J_s(c, x) is the derivative of what is recovered on x by expert s's weight of c, at the base."""
    world = LessonWorld(tmp_path, kind)
    zero = FusionWeights.uniform(world.geometry, [0.0, 0.0])
    weights_N = torch.tensor([0.3, 0.7, 0.1, 0.5, 0.2], dtype=torch.float64)
    world.merged.set(zero)
    products = EffectProducts(world.merged)
    passes(world.merged, world.apart, -weights_N, V, products, ALONE, quiet)

    leaves = FusionWeights(*(x.requires_grad_() for x in (zero.heads_KLH, zero.neurons_KLF, zero.rest_K)))
    kl_N = world.by_hand(leaves)
    for (gram, wanted), leaf in zip(products.sums, (leaves.heads_KLH, leaves.neurons_KLF), strict=True):
        right_gram, right_wanted = torch.zeros_like(gram), torch.zeros_like(wanted)
        for x, lesson in enumerate(world.lessons):
            (effect,) = torch.autograd.grad(-weights_N[x] * kl_N[x], leaf, retain_graph=True)
            effect_KLn = effect.double()
            right_gram += torch.einsum("kln,jln->lnkj", effect_KLn, effect_KLn)
            right_wanted += torch.einsum("kln,ln->lnk", effect_KLn, effect_KLn[lesson.teacher])
        for got, right in ((gram, right_gram), (wanted, right_wanted)):
            assert (got - right).abs().max() < 1e-3 * right.abs().max()


def test_to_first_order_nothing_moves_what_the_base_says(tmp_path):
    """So prompts of the base have no say in the weights, but in the scale."""
    world = LessonWorld(tmp_path, "llama-biased", keep=True)
    world.merged.set(FusionWeights.uniform(world.geometry, [0.0, 0.0]))
    weights_N = torch.tensor([0.0] * 5 + [1.0] * 2, dtype=torch.float64)
    _kl, of_base = loss_and_gradient(world.merged, world.batches, weights_N, V, ALONE, quiet)
    _kl, of_experts = loss_and_gradient(world.merged, world.batches, 1 - weights_N, V, ALONE, quiet)
    for name in ("heads_KLH", "neurons_KLF", "rest_K"):
        assert getattr(of_base, name).abs().max() < 1e-4 * getattr(of_experts, name).abs().max()


def weights_of(effects_TKX):
    """Of one component from J_ts(x), with a plain average of 1/2."""
    gram_KK = torch.einsum("tkx,tjx->kj", effects_TKX, effects_TKX)
    own_TX = torch.stack([effects_TKX[t, t] for t in range(2)])
    wanted_K = torch.einsum("tkx,tx->k", effects_TKX, own_TX)
    return _solved(gram_KK[None, None], wanted_K[None, None], torch.full((2, 1, 1), 0.5))[:, 0, 0]


@given(st.lists(st.floats(0.2, 3), min_size=6, max_size=6))
def test_no_cross_effect_gives_the_sum_and_equal_effects_shares(sizes):
    own_TX = torch.tensor(sizes, dtype=torch.float64).reshape(2, 3)
    apart_TKX = torch.zeros(2, 2, 3, dtype=torch.float64)
    apart_TKX[0, 0], apart_TKX[1, 1] = own_TX
    diagonal = torch.einsum("tx,tx->t", own_TX, own_TX)
    ridge = RIDGE * diagonal.mean()
    torch.testing.assert_close(weights_of(apart_TKX), ((diagonal + 0.5 * ridge) / (diagonal + ridge)).float())
    torch.testing.assert_close(weights_of(own_TX[:, None].repeat(1, 2, 1)).sum(), torch.tensor(1.0))


def test_harm_is_shrunk_and_no_weight_is_below_nothing():
    effects_TKX = torch.ones(2, 2, 3, dtype=torch.float64)
    effects_TKX[1, 0] = -3.0  # expert 0 undoes three times what expert 1 does for its own
    found_K = weights_of(effects_TKX)
    assert found_K[0] < 0.2 < found_K[1]
    assert found_K.min() >= 0


def test_packed_prompts_are_no_input(tmp_path):
    world = LessonWorld(tmp_path, "llama", alike=range(20, 30))
    average = FusionWeights.uniform(world.geometry, [0.4, 0.6])
    with pytest.raises(AssertionError):
        cross_weights(world.merged, world.batches, torch.ones(5, dtype=torch.float64), average, V, ALONE, quiet)


def test_what_is_no_component_keeps_the_average(tmp_path):
    world = LessonWorld(tmp_path, "llama")
    average = FusionWeights.uniform(world.geometry, [0.4, 0.6])
    found = cross_weights(world.merged, world.apart, torch.ones(5, dtype=torch.float64), average, V, ALONE, quiet)
    assert torch.equal(found.rest_K, average.rest_K)
    assert (found.heads_KLH - average.heads_KLH).abs().max() > 0.05
