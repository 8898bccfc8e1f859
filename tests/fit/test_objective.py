"""The loss and its gradient against autograd through a merge that is made by hand, prompt by prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from fit_world import ALONE, LessonWorld, V, quiet, random_weights
from hypothesis import given
from hypothesis import strategies as st
from streamed_world import resident, streamed

from mergekit_wp.console import no_progress
from mergekit_wp.fit import gradient as of_loss
from mergekit_wp.fit.families import WeightFamily
from mergekit_wp.fit.gradient import loss_and_gradient, weight_gradient
from mergekit_wp.fit.objective import (
    LEAST_GAP,
    Lesson,
    batch_lessons,
    branch_losses,
    loss_weights,
    losses,
    teachers_of,
    unrecovered,
    with_gaps,
)
from mergekit_wp.fit_file import FusionWeights
from mergekit_wp.scoring import sweep
from mergekit_wp.scoring.packing import PackedBatch

KINDS = ("llama-biased", "qwen2", "qwen3", "gemma2", *tiny.FAMILIES)


@pytest.mark.parametrize(("kind", "keep"), [(kind, kind in ("qwen2", "phi3")) for kind in KINDS])
def test_loss_and_gradient_are_autograds(tmp_path, monkeypatch, kind, keep):
    if keep:  # positions, rows of the output head, and rows that meet changes, in many parts
        monkeypatch.setattr(of_loss, "_MOST_LOGITS", 1200)
        monkeypatch.setattr(of_loss, "_MOST_MET", 100)
    world = LessonWorld(tmp_path, kind, keep=keep)
    assert_gradient_is_autograds(world)


@pytest.mark.parametrize("opened", [resident, streamed])
@pytest.mark.parametrize("kind", ["llama-biased", "qwen2", "granite"])
def test_also_where_prompts_begin_alike_and_share_a_row(tmp_path, kind, opened):
    world = LessonWorld(tmp_path, kind, opened, keep=kind == "qwen2", alike=range(20, 30))
    assert [isinstance(each.batch, PackedBatch) for each in world.batches][:2] == [True, True]
    run, apart = (sum(each.batch.ids_BT.numel() for each in of) for of in (world.batches, world.apart))
    assert run < 0.8 * apart
    assert_gradient_is_autograds(world)


def assert_gradient_is_autograds(world):
    weights_N = torch.tensor([0.3, 0.7, 0.1, 0.5, 0.2, 0.4, 0.6][: len(world.lessons)], dtype=torch.float64)
    kl_N, gradient = loss_and_gradient(world.merged, world.batches, weights_N, V, ALONE, quiet)

    leaves = FusionWeights(
        *(
            getattr(world.merged.weights, name).clone().requires_grad_()
            for name in ("heads_KLH", "neurons_KLF", "rest_K")
        )
    )
    wanted_N = world.by_hand(leaves)
    (weights_N * wanted_N).sum().backward()
    torch.testing.assert_close(kl_N, wanted_N.detach().double(), rtol=1e-4, atol=1e-6)
    for name in ("heads_KLH", "neurons_KLF", "rest_K"):
        got, wanted = getattr(gradient, name), getattr(leaves, name).grad
        assert (got - wanted).abs().max() < 2e-4 * wanted.abs().max(), name
        assert wanted.abs().min() > 0 or name != "rest_K"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_gradient_of_many_tokens_of_massive_activations_is_finite(dtype):
    """float16 ends at 65504, which the sum itself is past."""
    generator = torch.Generator().manual_seed(0)
    gradient_BTO, read_BTI = (torch.rand(2, 500, width, generator=generator) for width in (3, 5))
    gradient_BTO, read_BTI = 16 * gradient_BTO.to(dtype), (2000 * read_BTI).to(dtype)
    wanted = gradient_BTO.flatten(0, 1).double().T @ read_BTI.flatten(0, 1).double()
    assert wanted.min() > 1e6
    found = weight_gradient(gradient_BTO, read_BTI, dtype)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7 if dtype == torch.bfloat16 else 2**-9, atol=0)


@pytest.mark.parametrize("kind", ["llama-biased", "gemma2"])
def test_streamed_is_resident(tmp_path, kind):
    weights_N = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    found = []
    for opened in (resident, streamed):
        world = LessonWorld(tmp_path / opened.__name__, kind, opened, extra_rows=2)
        found.append(loss_and_gradient(world.merged, world.batches, weights_N, V, ALONE, quiet))
    (one_N, one), (other_N, other) = found
    torch.testing.assert_close(one_N, other_N, rtol=1e-5, atol=1e-7)
    for name in ("heads_KLH", "neurons_KLF", "rest_K"):
        wanted = getattr(one, name)
        assert (getattr(other, name) - wanted).abs().max() < 1e-5 * wanted.abs().max(), name


@pytest.mark.parametrize("opened", [resident, streamed])
def test_the_gradient_is_the_same_to_the_bit_whatever_memory_is_free(tmp_path, monkeypatch, opened):
    """Sums are in float32: what is added up together must not depend on it, or a killed fit ends in other bytes."""
    world = LessonWorld(tmp_path, "qwen2", opened)
    weights_N = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    monkeypatch.setattr(of_loss, "SUMMED", 16)  # two sums, of one batch and of two
    found, groups = [], []
    one_pass = of_loss._pass
    monkeypatch.setattr(of_loss, "_pass", lambda *args: (groups.append(len(args[1])), one_pass(*args)))
    for free in (1 << 40, 1):
        for module in (of_loss, sweep):
            monkeypatch.setattr(module, "free_memory", lambda _device, free=free: free)
        found.append(loss_and_gradient(world.merged, world.batches, weights_N, V, ALONE, quiet))
    assert [each.batch.ids_BT.numel() for each in world.batches] == [12, 10, 5]
    assert groups == ([1, 1, 1, 1] if opened is resident else [2, 1, 1])
    (one_N, one), (other_N, other) = found
    assert torch.equal(one_N, other_N)
    for name in ("heads_KLH", "neurons_KLF", "rest_K"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("opened", [resident, streamed])
def test_branches_are_merges_one_by_one(tmp_path, opened):
    world = LessonWorld(tmp_path, "qwen2", opened)
    candidates = [random_weights(world.geometry, 2, seed) for seed in (1, 2, 3)]
    before = world.merged.weights
    found_CN = branch_losses(world.merged, candidates, world.batches, V, ALONE, quiet)
    assert world.merged.weights is before
    for weights, kl_N in zip(candidates, found_CN, strict=True):
        torch.testing.assert_close(kl_N, world.by_hand(weights).double(), rtol=1e-4, atol=1e-6)


def test_an_expert_leaves_nothing_of_its_own_gap_open_and_the_base_all(tmp_path):
    world = LessonWorld(tmp_path, "llama")
    merged, teachers = world.merged, world.merged.experts
    base_N = losses(merged.base, teachers, world.batches, V, ALONE, quiet)
    lessons = [replace(x, gap=gap) for x, gap in zip(world.lessons, base_N.tolist(), strict=True)]
    assert torch.equal(unrecovered(lessons, base_N), torch.ones(2, dtype=torch.float64))
    merged.set(FusionWeights.uniform(world.geometry, [1.0, 0.0]))
    left_K = unrecovered(lessons, losses(merged, teachers, world.batches, V, ALONE, quiet))
    assert left_K[0].abs() < 1e-6
    assert left_K[1] > 0.1


def test_prompts_without_a_gap_do_not_outweigh_all_others():
    """Those of a step, or those held out, may all be ones of which the expert knows nothing new."""
    lessons = [Lesson(t, [1], [2], torch.zeros(1, 1), gap) for t, gap in ((0, 0.0), (0, 1e-6), (1, 2.0), (1, 1.0))]
    kl_N = torch.tensor([0.0, 1e-6, 0.3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(unrecovered(lessons, kl_N).tolist(), [0.5e-6 / LEAST_GAP, 0.1])
    weights_N = loss_weights(lessons)
    torch.testing.assert_close(float((weights_N * kl_N).sum()), float(unrecovered(lessons, kl_N).mean()))


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 9), st.floats(0, 5)), min_size=1, max_size=12))
def test_the_weights_make_the_loss(seen):
    """sum_x weight(x) KL(x) is the mean over teachers of R."""
    lessons = [Lesson(teacher, [1], [2], torch.zeros(1, 1), gap) for teacher, gap, _kl in seen]
    kl_N = torch.tensor([kl for _t, _gap, kl in seen], dtype=torch.float64)
    assert float((loss_weights(lessons) * kl_N).sum()) == pytest.approx(float(unrecovered(lessons, kl_N).mean()))


@pytest.mark.parametrize("opened", [resident, streamed])
def test_the_base_is_as_far_from_itself_as_its_experts_are_on_average(tmp_path, opened):
    world = LessonWorld(tmp_path, "llama", opened, keep=True)
    merged, teachers = world.merged, teachers_of(world.merged)
    lessons = [lesson for lesson in world.lessons if lesson.teacher == 2]
    lessons = with_gaps(lessons, merged.experts, merged, V, 2, ALONE, no_progress)
    batches, left = batch_lessons(lessons, 2, teachers), []
    for weights in ([1.0, 0.0], [0.0, 1.0], [0.0, 0.0]):
        merged.set(FusionWeights.uniform(world.geometry, weights))
        left += unrecovered(lessons, losses(merged, teachers, batches, V, ALONE, quiet)).tolist()
    one, other, base = left
    assert (one + other) / 2 == pytest.approx(1, rel=1e-4)
    assert base == pytest.approx(0, abs=1e-6)
    assert abs(one - other) > 0.01


@pytest.mark.parametrize("name", ["expert", "layer", "component"])
def test_a_family_adds_up_the_gradients_of_what_is_one_number(name):
    from mergekit_wp.geometry import Geometry

    shape = Geometry("LlamaForCausalLM", 3, 4, 2, 8, 5, 24, 97)
    family, K = WeightFamily.named(name, 2, shape), 2
    counts = {"expert": 2, "layer": 2 * (2 * 3 + 1), "component": 2 * (3 * 9 + 1)}
    assert family.numbers == counts[name]
    number_P = torch.randn(family.numbers, requires_grad=True)
    weights, gradient = family.spread(number_P), random_weights(shape, K)
    total = sum((getattr(weights, x) * getattr(gradient, x)).sum() for x in ("heads_KLH", "neurons_KLF", "rest_K"))
    total.backward()
    torch.testing.assert_close(family.gather(gradient), number_P.grad)
    torch.testing.assert_close(family.mean(weights), number_P)
    assert torch.equal(family.mean(weights), number_P.detach())
    assert torch.equal(family.nearest(weights).neurons_KLF, weights.neurons_KLF)
