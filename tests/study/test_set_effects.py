"""Effects of sets against slices copied by hand into models of transformers, and what follows from the definition."""

from __future__ import annotations

import math

import numpy as np
import plain_patch
import pytest
import tiny
import torch
from fit_world import geometry_of
from merge_world import tensors_of
from scipy import stats
from score_jobs import job_for
from streamed_world import PROMPTS, resident, streamed
from torch.nn import functional
from transformers import AutoConfig

from mergekit_wp.geometry import Kind
from mergekit_wp.scoring.batching import TaskTokens
from mergekit_wp.scoring.metrics import GapLedger
from mergekit_wp.scoring.models.exchanged import Exchange, ExchangedStack
from mergekit_wp.scoring.models.load import ModelPair, load_pair
from mergekit_wp.scoring.packing import PackedBatch
from mergekit_wp.scoring.score import prepare, score
from mergekit_wp.study.set_effects import RESAMPLES, Beyond, Effects, direction_of, interval_of, metrics_of, values_of
from mergekit_wp.study.set_plan import ceilings
from mergekit_wp.study.sets import top_set
from mergekit_wp.subset import Subset

HEADS, NEURONS = [(0, 1), (2, 3), (3, 0)], [(0, 4), (1, 0), (1, 3), (3, 2)]
LAYER = 2
PAIRED = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]


def quiet(_done: float) -> None:
    pass


def set_of(geometry, heads=(), neurons=()) -> Subset:
    masks = [torch.zeros(geometry.layers, n, dtype=torch.bool) for n in (geometry.heads, geometry.neurons)]
    for mask, places in zip(masks, (heads, neurons), strict=True):
        for place in places:
            mask[place] = True
    return Subset(*masks)


def opened(folders, how=resident) -> tuple[ModelPair, ExchangedStack]:
    base, expert = map(how, folders)
    geometry = geometry_of(folders[0])
    pair = ModelPair(base, expert, geometry, base.device, base.dtype)
    return pair, ExchangedStack(base, expert, geometry)


def read_by_hand(folder, tensors, prompts):
    """(stream above the anchor layer [N, D], next token's log-probabilities [N, V]) of every prompt, by itself."""
    config = AutoConfig.from_pretrained(folder)
    model = tiny.auto_class(config).from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(tensors, strict=not config.tie_word_embeddings)
    model.tie_weights()
    streams = []
    hook = model.model.layers[LAYER].register_forward_hook(
        lambda _m, _a, out: streams.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    )
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0, -1, :97] for prompt in prompts]
    hook.remove()
    return torch.stack(streams), functional.log_softmax(torch.stack(logits), -1)


@pytest.mark.parametrize(
    ("kind", "alike", "how"),
    [*((kind, 0, resident) for kind in PAIRED), ("llama", 20, resident), ("qwen3", 20, streamed)],
)
def test_is_the_effect_of_slices_copied_by_hand(tmp_path, kind, alike, how) -> None:
    folders = tiny.save_pair(tmp_path, kind)
    pair, stack = opened(folders, how)
    prompts = [[*range(20, 20 + alike), *own] for own in PROMPTS]
    v_D = torch.randn(24, generator=torch.Generator().manual_seed(0))
    metrics = metrics_of(pair, {"anchor of x": ("anchor", LAYER, v_D)})
    plain = [read_by_hand(folder, tensors_of(folder), prompts) for folder in folders]
    sets = [(HEADS, []), ([], NEURONS), (HEADS[1:], NEURONS[:2])]
    for removed in (False, True):
        recipient, donor = (1, 0) if removed else (0, 1)
        stacks = [pair.base, pair.expert]
        task = TaskTokens("t", [], None, prompts)
        direction = direction_of(stacks[recipient], stacks[donor], task, metrics, 3 if alike else 2)
        if alike:
            assert [type(each.batch) for each in direction.asked] == [PackedBatch]
        exchanges = [Exchange(set_of(pair.geometry, *places), removed) for places in sets]
        values = values_of(stack, exchanges, direction, quiet)

        def utilities(z_ND, log_p_NV, target=plain[donor][1]):
            kl_N = -(target.exp() * (target - log_p_NV)).sum(1)
            return {"anchor of x": functional.cosine_similarity(z_ND, v_D[None]), "kl": kl_N}

        for name, want in utilities(*plain[recipient]).items():
            torch.testing.assert_close(direction.of_recipient[name], want.double(), rtol=1e-4, atol=1e-5)
        for name, want in utilities(*plain[donor]).items():
            torch.testing.assert_close(direction.of_donor[name], want.double(), rtol=1e-4, atol=1e-5)
        for c, places in enumerate(sets):
            folder, other = folders[recipient], folders[donor]
            by_hand = utilities(*read_by_hand(folder, plain_patch.patched(folder, other, *places), prompts))
            for name, want in by_hand.items():
                torch.testing.assert_close(values[name][c], want.double(), rtol=1e-4, atol=1e-5)
                assert (values[name][c] - direction.of_recipient[name]).abs().max() > 1e-3


@pytest.mark.parametrize("gap", ["sample", "mean"])
def test_sets_of_one_are_the_exact_scores(tmp_path, gap) -> None:
    job = job_for(
        tmp_path, "qwen3", method="exact", utility="staged", gap=gap, gap_floor=1e-4, tasks=("first",), rows=6
    )
    scores, ready = score(job), prepare(job)
    pair, (task,) = load_pair(job, ready.checked), ready.tasks
    metrics = metrics_of(pair, {"anchor": ("anchor", LAYER, scores.tasks["first"].anchor)})
    direction = direction_of(pair.base, pair.expert, task, metrics, 2)
    stack = ExchangedStack(pair.base, pair.expert, pair.geometry)
    places = [(Kind.HEAD, 0, 2), (Kind.HEAD, 3, 1), (Kind.NEURON, 1, 5), (Kind.NEURON, 2, 19), (Kind.NEURON, 3, 0)]
    exchanges = [Exchange(set_of(pair.geometry, **{str(kind): [(layer, i)]})) for kind, layer, i in places]
    values = values_of(stack, exchanges, direction, quiet)
    for c, (kind, layer, index) in enumerate(places):
        metric = "anchor" if layer <= LAYER else "kl"
        ledger = GapLedger(metric, gap, job.gap_floor)
        ends = direction.of_recipient[metric], direction.of_donor[metric]
        found = Effects.of(values[metric], *ends, ledger, "first", [0]).value_C[c]
        want = getattr(scores.tasks["first"], kind)[layer, index]
        assert found == pytest.approx(float(want), rel=1e-3, abs=1e-5)
    assert scores.tasks["first"].neurons.abs().max() > 1e-3


def effects_of(pair, stack, exchanges, removed=False, metric="kl"):
    ends = (pair.expert, pair.base) if removed else (pair.base, pair.expert)
    direction = direction_of(*ends, TaskTokens("t", [], None, PROMPTS), metrics_of(pair, {}), 2)
    values = values_of(stack, exchanges, direction, quiet)[metric]
    ends_N = direction.of_recipient[metric], direction.of_donor[metric]
    return Effects.of(values, *ends_N, GapLedger(metric, "mean", 0.0), "t", [0])


def test_everything_is_the_other_model(tmp_path) -> None:
    folders = tiny.save_pair(tmp_path, "llama-biased")
    pair, stack = opened(folders)

    trials = list(ceilings(pair.geometry))
    for removed in (False, True):
        own = [trial for trial in trials if trial.removed == removed]
        assert [trial.what for trial in own] == ["heads", "neurons", "components", "rest", "everything"]
        found = effects_of(pair, stack, [trial.exchange for trial in own], removed)
        assert found.value_C[-1] == pytest.approx(1, abs=1e-5)
        assert all(abs(value) < 0.999 for value in found.value_C[:-1])
        assert found.drawn_RC[:, -1] == pytest.approx(1, abs=1e-5)


def test_an_expert_of_ten_neurons_is_restored_by_ten_and_not_by_nine(tmp_path) -> None:
    base = tiny.random_model("llama", seed=1)
    expert = tiny.fine_tuned(base, seed=2, size=0.0)
    moved = [(i % 4, (7 * i) % 20) for i in range(10)]
    with torch.no_grad():
        for number, (layer, j) in enumerate(moved):
            expert.model.layers[layer].mlp.down_proj.weight[:, j] += 0.2 + 0.1 * number
    folders = tiny.save(base, tmp_path / "base"), tiny.save(expert, tmp_path / "expert")
    pair, stack = opened(folders)
    single = [Exchange(set_of(pair.geometry, neurons=[(layer, j)])) for layer in range(4) for j in range(20)]
    score_n = torch.tensor(effects_of(pair, stack, single).value_C).abs()
    tops = [top_set(score_n, k).view(4, 20) for k in (9, 10, 30)]
    assert [int(top.sum()) for top in tops] == [9, 10, 10], "the others all have 0"
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    nine, ten, _all = effects_of(pair, stack, [Exchange(Subset(nothing, top)) for top in tops]).value_C
    assert ten == pytest.approx(1, abs=1e-5)
    assert abs(nine - 1) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_streamed_is_resident(tmp_path, kind) -> None:
    folders = tiny.save_pair(tmp_path, kind)
    found = []
    for how in (resident, streamed):
        pair, stack = opened(folders, how)
        subset = set_of(pair.geometry, HEADS, NEURONS)
        exchanges = [Exchange(subset), Exchange(subset, parts=("gate", "up")), Exchange(subset, in_expert=True)]
        found.append([effects_of(pair, stack, exchanges, removed).value_C for removed in (False, True)])
    assert np.array(found[1]) == pytest.approx(np.array(found[0]), abs=1e-5)


def by_t(prompts):
    return math.sqrt(prompts / (prompts - 1)) * stats.t.ppf(0.975, prompts - 1) / 1.959964


@pytest.mark.parametrize("gap", ["sample", "mean"])
def test_intervals_are_those_of_resampled_prompts(gap) -> None:
    random = np.random.default_rng(1)
    recipient_N, gap_N = random.normal(size=12), random.uniform(0.5, 2, 12)
    gap_N[3] = 1e-9  # below the floor
    values_CN = recipient_N + gap_N * random.uniform(0, 1, (2, 12))
    tensors = [torch.tensor(x) for x in (values_CN, recipient_N, recipient_N + gap_N)]
    found = Effects.of(*tensors, GapLedger("kl", gap, 1e-3), "t", [5])
    used = [n for n in range(12) if gap == "mean" or n != 3]

    def effect(c, numbers):
        gained = values_CN[c] - recipient_N
        if gap == "mean":
            return gained[numbers].sum() / gap_N[numbers].sum()
        return (gained[numbers] / gap_N[numbers]).mean()

    # Prompts are drawn with their gaps, so that of `sample` a resample has only those that count in its own mean.
    counts_RN = np.random.default_rng([5]).multinomial(12, np.full(12, 1 / 12), size=RESAMPLES)
    resamples = [[n for n in range(12) for _ in range(count_N[n]) if n in used] for count_N in counts_RN]
    drawn_RC = np.array([[effect(c, numbers) for c in (0, 1)] for numbers in resamples])
    for c in (0, 1):
        assert found.value_C[c] == pytest.approx(effect(c, used))
        drawn_RC[:, c] = effect(c, used) + by_t(len(used)) * (drawn_RC[:, c] - effect(c, used))
        np.testing.assert_allclose(interval_of(found.drawn_RC[:, c]), np.percentile(drawn_RC[:, c], [2.5, 97.5]))
    beyond = np.percentile(drawn_RC[:, 0] - drawn_RC[:, 1], [2.5, 97.5])
    np.testing.assert_allclose(interval_of(found.beyond(0, [1]).drawn_R), beyond, atol=1e-12)
    one = Effects.of(*(x[..., :1] for x in tensors), GapLedger("kl", gap, 1e-3), "t", [5])
    assert interval_of(one.drawn_RC[:, 0]) == (None, None)
    assert one.beyond(0, [1]).interval == (None, None)


def exchangeable(random, sets, prompts, apart):
    """Effects of sets of which none is better than another: they differ by `apart`, and from prompt to prompt."""
    own_C1, hard_N = random.normal(0.2, apart, (sets, 1)), random.normal(0, 0.1, prompts)
    values_CN = own_C1 + hard_N + random.normal(0, 0.05, (sets, prompts))
    ends = torch.zeros(prompts, dtype=torch.float64), torch.ones(prompts, dtype=torch.float64)
    return Effects.of(torch.tensor(values_CN), *ends, GapLedger("kl", "mean", 0.0), "t", [0])


@pytest.mark.parametrize(("prompts", "apart", "draws", "tasks"), [(32, 0.05, 5, 1), (8, 0.05, 5, 1), (32, 0.05, 2, 3)])
def test_a_random_set_is_seldom_more_than_others(prompts, apart, draws, tasks) -> None:
    """Nominally in 2.5 %; where only prompts are resampled, in a third. Means of two draws are safer than that."""
    random, worlds = np.random.default_rng(0), 200 // tasks
    more = 0
    for _world in range(worlds):
        every = [exchangeable(random, draws + 1, prompts, apart).beyond(0, range(1, draws + 1)) for _ in range(tasks)]
        more += (every[0] if tasks == 1 else Beyond.mean(every)).interval[0] > 0
    assert more / worlds < 0.05


def test_what_is_beyond_random_sets_is_told_from_them() -> None:
    """By hand: five values, whose mean is known to s sqrt(1 + 1/5) with 4 degrees of freedom; of tasks, by all."""
    drawn_D, sure_R = np.array([0.1, 0.2, 0.15, 0.12, 0.18]), np.full(10, 0.45)
    one = Beyond.of(0.6, drawn_D, sure_R)
    half = stats.t.ppf(0.975, 4) * drawn_D.std(ddof=1) * math.sqrt(1.2)
    assert one.value == pytest.approx(0.45)
    assert one.interval == pytest.approx((0.45 - half, 0.45 + half))
    by_prompts = Beyond.of(0.6, drawn_D, np.linspace(0.35, 0.55, 1001))
    assert by_prompts.interval == pytest.approx((0.45 - math.hypot(half, 0.095), 0.45 + math.hypot(half, 0.095)))
    both = Beyond.mean([one, one])
    half = stats.t.ppf(0.975, 8) * drawn_D.std(ddof=1) * math.sqrt(1.2 / 2)
    assert both.interval == pytest.approx((0.45 - half, 0.45 + half))
    assert Beyond.of(0.6, drawn_D[:1], sure_R).interval == (None, None), "one draw does not say how draws differ"
    assert Beyond.of(0.6, np.full(5, 0.15), sure_R).interval == pytest.approx((0.45, 0.45))
