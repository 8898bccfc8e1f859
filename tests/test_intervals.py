"""Bootstrap intervals against loops over the same draws, and against what statistics says of means."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from prompt_scores import made
from scipy import stats
from score_example import example

from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import Component, Kind
from mergekit_wp.intervals import Bootstrap, differences, ends
from mergekit_wp.score_tables import as_data, as_text, of_components
from mergekit_wp.scores import Scores


@pytest.mark.parametrize(("gap", "dropped"), [("sample", 0), ("sample", 4), ("mean", 0)])
def test_intervals_and_ranks_are_those_of_a_loop_over_the_draws(gap, dropped):
    scores = made(gap=gap, dropped=dropped)
    sure = Bootstrap(scores, draws=200)
    drawn = []
    for draw in range(200):
        tables = []
        for task in scores:
            prompts, again = scores.tasks[task].prompts, sure._counts[task][draw].int()
            rows = [p for p in range(30) for _ in range(int(again[p]))]
            assert len(rows) == 30
            if gap == "sample":
                rows = [p for p in rows if prompts.used["kl"][p]]
                tables.append(torch.stack([prompts.heads[p] for p in rows]).mean(0))
            else:  # e_p / mean gap is kept, of all prompts; sum e / sum g of those drawn
                mean_gap = prompts.gaps["kl"].mean()
                effects = sum(prompts.heads[p] * mean_gap for p in rows)
                tables.append(effects / sum(prompts.gaps["kl"][p] for p in rows))
        drawn.append(torch.stack(tables).mean(0))
    drawn_DLH = torch.stack(drawn)
    drawn_DLH = scores.heads + by_t(30 - dropped) * (drawn_DLH - scores.heads)
    for layer, index in ((0, 0), (2, 3), (1, 2)):
        (found,) = sure.intervals([Component(Kind.HEAD, layer, index)])
        low, high = ends(drawn_DLH[:, layer, index, None], 0.95)
        assert (found.low, found.high) == pytest.approx((float(low), float(high)), abs=1e-5)
        ranks_D = 1 + (drawn_DLH > drawn_DLH[:, layer, index, None, None]).sum((1, 2))
        assert (found.best_rank, found.worst_rank) == tuple(int(x) for x in ends(ranks_D[:, None].float(), 0.95))
        assert found.score == pytest.approx(float(scores.heads[layer, index]))


def by_t(prompts):
    """How much wider the interval of a mean is than that of a normal distribution with the variance of resamples."""
    return math.sqrt(prompts / (prompts - 1)) * stats.t.ppf(0.975, prompts - 1) / 1.959964


@pytest.mark.parametrize("prompts", [4, 8, 30])
def test_where_no_score_is_above_zero_as_many_are_called_so_as_is_said(prompts):
    """2.5 % on either side, and 5 % of differences; without widening it is 11 and 20 % of 4 prompts."""
    sure, differ, count, compared = 0, 0, 0, 0
    for seed in range(40):
        scores = made(seed=seed, prompts=prompts, tasks=("a",))
        for kind in Kind:
            for drawn_Dn in Bootstrap(scores, draws=400).layers(kind):
                low_n, high_n = ends(drawn_Dn, 0.95)
                sure, count = sure + int(((low_n > 0) | (high_n < 0)).sum()), count + len(low_n)
        low_Ln, high_Ln = differences(
            scores, made(seed=1000 + seed, prompts=prompts, tasks=("a",)), "neurons", draws=400
        )
        differ, compared = differ + int(((low_Ln > 0) | (high_Ln < 0)).sum()), compared + low_Ln.numel()
    assert 0.03 < sure / count < 0.075
    assert 0.03 < differ / compared < 0.08


def test_of_a_mean_the_interval_is_two_standard_errors_to_either_side():
    scores = made(prompts=200, tasks=("a",))
    components = [Component(Kind.NEURON, layer, index) for layer in range(3) for index in range(10)]
    for found in Bootstrap(scores, draws=4000).intervals(components):
        values_P = scores.tasks["a"].prompts.neurons[:, found.component.layer, found.component.index]
        error = float(values_P.std()) / math.sqrt(200)
        assert (found.high - found.low) == pytest.approx(2 * 1.96 * error, rel=0.1)
        assert found.low < found.score < found.high


def test_it_covers_the_truth_as_often_as_it_says():
    """120 components of worlds whose true scores are all 0.3: about 5 % lie outside, and surely not 12 or none."""
    outside = 0
    for seed in range(4):
        scores = made(seed=seed, prompts=60, tasks=("a",), shift=0.3)
        every = [Component(Kind.NEURON, layer, index) for layer in range(3) for index in range(10)]
        outside += sum(not x.low <= 0.3 <= x.high for x in Bootstrap(scores).intervals(every))
    assert 1 <= outside <= 16


def test_tasks_are_drawn_apart():
    """The second task's prompts give the opposite of the first one's: their order, which is of no account, decides
    nothing, and the mean is as unsure as half of one task."""
    one = made(tasks=("a",)).tasks["a"]
    turned = replace(one.prompts, heads=1 - one.prompts.heads, neurons=1 - one.prompts.neurons)
    other = replace(one, heads=turned.heads.mean(0), neurons=turned.neurons.mean(0), prompts=turned)
    both = Bootstrap(Scores.from_tasks(made().meta, {"a": one, "b": other}))
    (alone,) = Bootstrap(made(tasks=("a",))).intervals([Component(Kind.HEAD, 0, 0)])
    (found,) = both.intervals([Component(Kind.HEAD, 0, 0)])
    assert found.high - found.low == pytest.approx((alone.high - alone.low) / math.sqrt(2), rel=0.1)


def test_a_difference_on_the_same_prompts_is_drawn_together():
    one = made()
    noise = made(seed=5)
    tasks = {
        name: replace(
            task, heads=task.heads + 0.1 * noise.tasks[name].heads,
            prompts=replace(task.prompts, heads=task.prompts.heads + 0.1 * noise.tasks[name].prompts.heads),
        )
        for name, task in one.tasks.items()
    }  # fmt: skip
    other = Scores.from_tasks(one.meta, tasks)
    low_Ln, high_Ln = differences(other, one, Kind.HEAD)
    (alone,) = Bootstrap(one).intervals([Component(Kind.HEAD, 0, 0)])
    assert float((high_Ln - low_Ln).max()) < 0.3 * (alone.high - alone.low)
    assert ((low_Ln <= other.heads - one.heads) & (other.heads - one.heads <= high_Ln)).all()
    same_low, same_high = differences(one, one, Kind.NEURON)
    assert not same_low.any()
    assert not same_high.any()


def test_a_draw_without_a_prompt_that_was_used_is_drawn_again():
    scores = made(prompts=6, dropped=4, tasks=("a",))
    for scores_Dn in Bootstrap(scores, draws=500).layers(Kind.HEAD):
        assert scores_Dn.isfinite().all()


def test_two_files_are_drawn_alike_even_where_they_used_other_prompts():
    """Where one alone has to draw again, the other does too."""
    few, all_used = made(prompts=6, dropped=4, tasks=("a",)), made(prompts=6, tasks=("a",))
    for kind in Kind:
        low_Ln, high_Ln = differences(few, all_used, kind, draws=300)
        together = [Bootstrap(a, draws=300, beside=b) for a, b in ((few, all_used), (all_used, few))]
        apart = [Bootstrap(scores, draws=300) for scores in (few, all_used)]
        wanted_Dn, other_Dn = (next(a.layers(kind)) - next(b.layers(kind)) for a, b in (together, apart))
        assert (low_Ln[0] == ends(wanted_Dn, 0.95)[0]).all()
        assert (high_Ln[0] == ends(wanted_Dn, 0.95)[1]).all()
        assert not torch.equal(wanted_Dn, other_Dn)
    counts = [drawn._counts["a"] for drawn in together]
    assert torch.equal(*counts)


def test_a_task_taken_out_has_its_own_prompts_alone():
    both = made()
    alone = both["a"]
    assert alone.meta.prompt_ids == {"a": both.meta.prompt_ids["a"]}
    low_Ln, high_Ln = differences(alone, made(seed=1)["a"], Kind.HEAD)
    assert (low_Ln <= high_Ln).all()


def test_what_cannot_be_said_is_refused():
    plain = example()
    with pytest.raises(BadInput, match=r"task a: the score file keeps no single prompts; make it again with wp-score"):
        Bootstrap(plain)
    with pytest.raises(BadInput, match="one prompt was used"):
        Bootstrap(made(prompts=5, dropped=4))
    with pytest.raises(BadInput, match="no scores of a task"):
        Bootstrap(made(), "c")
    with pytest.raises(BadInput, match="scored on different prompts"):
        differences(made(), made(prompts=20), Kind.HEAD)
    with pytest.raises(BadInput, match="have the tasks a, b and a"):
        differences(made(), made(tasks=("a",)), Kind.HEAD)


def test_tables_and_data_say_how_sure_the_leaders_are():
    scores = made()
    cell = of_components(scores, 2)[1][1]
    assert cell.count("[") == cell.count(", ") == 1
    first = as_data({"x": scores}, 2)["files"]["x"]["all_tasks"]["top"]["heads"][0]
    (found,) = Bootstrap(scores).intervals([Component.parse(first["name"])])
    assert first["interval"] == [found.low, found.high]
    assert first["ranks"] == [found.best_rank, found.worst_rank]
    # Of one prompt there is none, nor of a mean over tasks of which one used one: the rest is shown all the same.
    two, one = made(prompts=5), made(prompts=5, dropped=4)
    tasks = {"a": two.tasks["a"], "b": one.tasks["b"]}
    mixed = replace(two.meta, tasks={"a": two.meta.tasks["a"], "b": one.meta.tasks["b"]})
    shown = as_data({"x": Scores.from_tasks(mixed, tasks)}, 2)["files"]["x"]
    where = {"all": shown["all_tasks"], **shown["tasks"]}
    assert ["interval" in found["top"]["heads"][0] for found in where.values()] == [False, True, False]
    assert "[" not in as_text({"x": one}, 2).split("rank")[1]
    assert "interval" not in as_data({"x": example()}, 2)["files"]["x"]["all_tasks"]["top"]["heads"][0]
