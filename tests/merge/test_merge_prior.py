"""`weight` and `scale` of wp: the arithmetic alone, through mergekit against the slow reference, and in wp-merge."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_checks import assert_merged, plan_of, refused, run, same_files
from merge_world import World, merge, reference, tensors_of

from mergekit_wp.merge.audit import AuditFailed, audit
from mergekit_wp.merge.kernel import component_weights, prior_shares

POSITIVE = st.floats(1e-6, 1e6)


def random_scores(K, n, seed):
    """Some below 0, some exactly 0 in all experts."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(2, n, generator=generator) for _ in range(K)]
    for score in scores:
        score[:, ::3] = -1
    return scores


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), POSITIVE), min_size=1, max_size=5).filter(any), st.integers(0, 10**6))
def test_shares_sum_to_one_and_follow_the_definition(prior, seed):
    scores = random_scores(len(prior), 7, seed)
    alpha_KLn = component_weights(scores, prior)
    assert (alpha_KLn >= 0).all()
    torch.testing.assert_close(alpha_KLn.sum(0), torch.ones(2, 7))
    for layer in range(2):
        for c in range(7):
            weighted = [w * max(float(s[layer, c]), 0) for w, s in zip(prior, scores, strict=True)]
            total = sum(weighted) or sum(prior)
            want = [x / total for x in (weighted if sum(weighted) else prior)]
            torch.testing.assert_close(alpha_KLn[:, layer, c].double(), torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(prior_shares(prior), torch.tensor(prior, dtype=torch.float64).div(sum(prior)).float())


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), POSITIVE, st.integers(0, 10**6))
def test_equal_weights_change_no_bit(K, weight, seed):
    scores = random_scores(K, 7, seed)
    assert torch.equal(component_weights(scores, [weight] * K), component_weights(scores))
    assert prior_shares([weight] * K).tolist() == torch.full((K,), 1 / K).tolist()


@pytest.mark.parametrize("weight", [1e308, 1e-308, 0.1])
def test_equal_weights_of_any_size_change_no_bit(weight):
    scores = random_scores(3, 200, 0)
    assert torch.equal(component_weights(scores, [weight] * 3), component_weights(scores))
    assert torch.equal(prior_shares([weight] * 3), prior_shares([1, 1, 1]))


@settings(max_examples=50, deadline=None)
@given(st.lists(POSITIVE, min_size=1, max_size=4), st.integers(0, 4), st.integers(0, 10**6))
def test_weight_0_is_not_listed_and_weight_2_is_listed_twice(prior, place, seed):
    scores = random_scores(len(prior) + 1, 7, seed)
    place = min(place, len(prior))
    kept = scores[:place] + scores[place + 1 :]
    without, zero = component_weights(kept, prior), component_weights(scores, [*prior[:place], 0.0, *prior[place:]])
    assert not zero[place].any()
    assert torch.equal(zero[[k for k in range(len(scores)) if k != place]], without)
    twice = component_weights([kept[0], *kept], [prior[0], *prior])
    torch.testing.assert_close(component_weights(kept, [2 * prior[0], *prior[1:]])[0], twice[0] + twice[1])


@pytest.mark.parametrize("prior", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [1.0], []])
def test_weights_that_are_none(prior):
    with pytest.raises(ValueError, match="weights of at least 0"):
        component_weights([torch.ones(3), torch.ones(3)], prior)


def parameters(prior=(), scales=()):
    return [
        {**({"weight": prior[k]} if prior else {}), **({"scale": scales[k]} if scales else {})}
        for k in range(max(len(prior), len(scales)))
    ]


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
@pytest.mark.parametrize(
    ("prior", "scales"),
    [([0.3, 2, 1], []), ([0, 2, 1], []), ([], [1.5, 1, -0.5]), ([0.3, 0, 2], [2, 1, 0.7])],
)
def test_against_the_slow_reference(kind, prior, scales, tmp_path):
    """All kinds of tensors: GQA, biases, norms, tied embeddings; an expert has rows more."""
    world = World(tmp_path, kind, experts=3, extra_rows=[0, 1, 0]).build()
    out = merge(world, world.config(parameters(prior, scales)))
    assert_merged(tensors_of(out), reference(world, prior=prior or None, scales=scales or None))


def test_half_precision_is_rounded_once(tmp_path):
    world = World(tmp_path, "llama", dtypes=[torch.bfloat16] * 3).build()
    out = merge(world, world.config(parameters([1, 3], [1.5, 1])))
    assert_merged(tensors_of(out), reference(world, prior=[1, 3], scales=[1.5, 1]), torch.bfloat16)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "w", "llama").build()


def test_equal_weights_and_scale_1_write_the_same_bits(world):
    plain = merge(world)
    assert same_files(plain, merge(world, world.config(parameters([0.3, 0.3], [1, 1])), "equal"))
    assert not same_files(plain, merge(world, world.config(parameters([0.3, 0.4])), "other"))


def test_one_expert_is_copied_whatever_its_weight(tmp_path):
    world = World(tmp_path, "mistral", experts=1, dtypes=[torch.bfloat16] * 2).build()
    assert same_files(merge(world, world.config(parameters([0.2]))), world.expert(0))


def test_weight_0_leaves_an_expert_out(world):
    """Its own scores count for nothing, also where nobody else has any."""
    assert same_files(merge(world, world.config(parameters([1, 0]))), world.expert(0))


def test_an_experts_own_scale_wins_over_that_of_all(world):
    own = [{"scale": 0.5}, {}]
    out = merge(world, world.config(own, parameters={"scale": 1.5}))
    assert_merged(tensors_of(out), reference(world, scales=[0.5, 1.5]))
    out = merge(world, world.config(parameters={"weight": 7, "scale": 1.5}), "all")
    assert_merged(tensors_of(out), reference(world, scales=[1.5, 1.5]))


def test_gradients_and_filters(world):
    """The four layers have the weights 0, 1/3, 2/3, 1 of expert 0 against 1; the MLP is that of expert 1 alone."""
    own = [{"weight": [{"filter": "mlp", "value": 0.0}, {"value": [0.0, 1.0]}]}, {"weight": 1.0}]
    out = tensors_of(merge(world, world.config(own)))
    alone = reference(world, prior=[0, 1])
    by_layer = [reference(world, prior=[layer / 3, 1]) for layer in range(4)]
    want = {}
    for name in alone:
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if ".mlp." in name or layer is None:  # outside the layers, mergekit's gradients stand at their beginning
            want[name] = alone[name]
        else:
            want[name] = by_layer[layer][name]
    assert_merged(out, want)


def test_no_weight_anywhere_is_refused(world):
    message = refused(world, world.config(parameters([0, 0])))
    assert "the weights of all experts are 0" in message
    gradient = world.config(parameters([[1.0, 0.0], [1.0, 0.0]]))
    assert refused(world, gradient).startswith("model.layers.3.")


@pytest.mark.parametrize("name", ["weight", "scale"])
@pytest.mark.parametrize("value", ["x", True, float("inf"), float("nan")])
def test_values_that_are_no_numbers(name, value, world):
    assert refused(world, world.config(parameters={name: value})).startswith(f"{name}: found {value!r}, expected a num")


def test_a_negative_weight(world):
    assert "weight: found -1, expected a number of at least 0" in refused(world, world.config(parameters([-1, 1])))


def test_the_audit_knows_weights_and_scales(world):
    out = world.root / "out"
    asked, others = ([1, 3], [1.5, -1]), [([1, 2], [1.5, -1]), ([1, 3], [1.5, -0.8]), ([3, 1], [1.5, -1])]
    assert "48 slices of 12 kinds" in run(world.recipe(world.config(parameters(*asked))), out)
    plan = plan_of(world, out, world.config(parameters(*asked)))
    for other in others:
        run(world.recipe(world.config(parameters(*other))), out, "--overwrite", "--no-audit")
        with pytest.raises(AuditFailed, match="is not what its inputs and wp give"):
            audit(out, plan, say=lambda _: None, load=False)


def shown(text):
    rows = [line.split() for line in text.splitlines() if re.match(r"\d+ ", line)]
    return torch.tensor([[float(x) for x in row[1:]] for row in rows])


def test_the_dry_run_shows_the_shares_with_weights(world):
    def table(*prior):
        return shown(run(world.recipe(world.config(parameters(prior))), "--dry-run"))

    plain, twice = table(), table(2, 1)
    assert plain.shape == (4, 4)
    assert torch.equal(plain, table(1, 1))
    assert (twice[:, [0, 2]] > plain[:, [0, 2]]).all()
    assert table(0, 1).tolist() == [[0, 1, 0, 1]] * 4
    only_mlp = [{"weight": [{"filter": "mlp", "value": 0.0}, {"value": 1.0}]}, {}]
    mixed = shown(run(world.recipe(world.config(only_mlp)), "--dry-run"))
    assert torch.equal(mixed[:, :2], plain[:, :2])
    assert mixed[:, 2:].tolist() == [[0, 1]] * 4
