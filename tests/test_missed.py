"""What leaders and a random sample say of what a ranking missed: against all ways in which it can lie, draw upon draw
where all exact scores are known, and end to end."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from audited import HEADS, LAYERS, NEURONS, WIDE, audit_of, file_of, populations
from click.testing import CliRunner
from scipy.stats import binom, hypergeom
from score_jobs import job_for
from test_scores import damage

from mergekit_wp import missed
from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import Kind
from mergekit_wp.missed import draw, kept, upper_end
from mergekit_wp.scores import Scores, read_scores, write_scores
from mergekit_wp.scores_cli import main
from mergekit_wp.scoring.score import score
from mergekit_wp.subset import Amount, Ranking, Subset


def highest(scores: Scores, k: int) -> set[int]:
    return set(scores.neurons.flatten().topk(k).indices.tolist())


@pytest.mark.parametrize("bands", [[(12, 3), (12, 3), (9, 3)], [(20, 9), (10, 5)], [(8, 4), (5, 3), (4, 2)]])
def test_however_the_missed_lie_over_the_bands_the_end_is_too_low_in_5_percent_at_most(bands):
    rest, share = sum(of for of, _n in bands), min(n / of for of, n in bands)
    most = sum(n for _of, n in bands)
    end_X = np.array([upper_end(found, share, rest) for found in range(most + 1)])
    tables = [[hypergeom.pmf(np.arange(n + 1), of, lie, n) for lie in range(of + 1)] for of, n in bands]
    worst = 0.0
    for lie in itertools.product(*(range(of + 1) for of, _n in bands)):
        chance_X = np.ones(1)
        for table, here in zip(tables, lie, strict=True):
            chance_X = np.convolve(chance_X, table[here])
        worst = max(worst, float(chance_X[end_X < sum(lie)].sum()))
    assert 0.01 < worst <= 0.05


def test_the_end_is_the_largest_number_that_is_not_refuted():
    for share in (0.01, 0.1, 0.37, 0.9):
        for found in (0, 1, 4):
            counts = np.arange(found, 1500)
            left = (binom.cdf(found, counts, share) > 0.05) | (found > np.maximum(share * counts - 1, 0))
            assert upper_end(found, share, 1499) == counts[left].max()
    assert [upper_end(x, 0.01, 10**6) for x in (0, 1)] == [298, 472]
    assert upper_end(3, 1.0, 50) == 3
    assert upper_end(0, 0.01, 40) == 40


@pytest.mark.parametrize("how", ["near", "anywhere"])
def test_draw_upon_draw_it_holds_as_often_as_it_says(how):
    exact, cheap = (file_of(table) for table in populations()[how])
    outside, overlaps, ends, k, draws = 0, 0, [], 40, 200
    true_overlap = len(highest(exact, k) & highest(cheap, k)) / k
    for seed in range(draws):
        audit = audit_of(cheap, exact, 60, "40%", seed)
        found = missed.missed(audit, "a", Kind.NEURON, k)
        truth = len(highest(exact, k) - highest(audit, k))
        outside += truth > found.at_most
        ends.append(found.at_most)
        overlap = kept(cheap, audit, found)
        overlaps += not overlap.low <= true_overlap <= overlap.high + 1e-9
    most = 0.05 * draws + 3 * (0.05 * 0.95 * draws) ** 0.5
    assert outside <= most
    assert overlaps <= most
    assert 0 < sum(ends) / draws < 36  # it says something, and never that nothing can be missed


@pytest.mark.parametrize("at_random", [True, False])
def test_it_does_not_hold_for_a_sample_that_was_not_drawn(at_random):
    """The lowest of the rest in the place of a random third of it, said to be one."""
    exact, cheap = (file_of(table) for table in populations()["anywhere"])
    outside = 0
    for leaders in range(42, 62):
        audit = audit_of(cheap, exact, leaders, "35%", 0)
        chance_LF, mask_LF = audit.chance["neurons"], audit.scored["neurons"].bool()
        if not at_random:
            rest_LF = chance_LF < 1
            by_score = cheap.neurons.masked_fill(~rest_LF, torch.inf).flatten().argsort()
            mask_LF = (
                (~rest_LF).flatten().index_fill(0, by_score[: int((mask_LF & rest_LF).sum())], True).view_as(rest_LF)
            )
        chosen = file_of(exact.neurons * mask_LF, {"heads": HEADS, "neurons": mask_LF}, {"neurons": chance_LF})
        found = missed.missed(chosen, "a", Kind.NEURON, 40)
        outside += len(highest(exact, 40) - highest(chosen, 40)) > found.at_most
    assert outside <= 4 if at_random else outside >= 16


def test_every_component_is_drawn_as_often_as_its_chance_says():
    cheap = file_of(populations()["near"][1])
    ranking, among = Ranking(Amount.parse("neurons=60"), cheap), Subset.choose(WIDE, "neurons")
    leaders = Subset.choose(WIDE, "neurons", None, ranking)
    times_LF, draws = torch.zeros(LAYERS, NEURONS), 300
    for seed in range(draws):
        subset, chance = draw(leaders, among, ranking, Amount.parse("10%"), seed)
        times_LF += subset.neurons
    chance_LF = chance[Kind.NEURON]
    assert (chance_LF == 1).equal(leaders.neurons)
    assert (chance_LF >= 0.1 - 1e-6).all()
    assert (times_LF[leaders.neurons] == draws).all()
    rest_LF = ~leaders.neurons
    spread_N = ((times_LF / draws - chance_LF) / (chance_LF * (1 - chance_LF) / draws).sqrt())[rest_LF]
    assert spread_N.abs().max() < 5
    assert abs(float(spread_N.std()) - 1) < 0.15


def test_kinds_that_are_not_sampled_say_nothing_and_all_of_a_kind_leave_nothing_open():
    exact, cheap = (file_of(table) for table in populations()["near"])
    ranking = Ranking(Amount(Fraction(1), 60), cheap)
    leaders = Subset.choose(WIDE, "all", None, ranking)
    _subset, chance = draw(leaders, Subset.choose(WIDE), ranking, Amount.parse("neurons=10"), 0)
    assert chance[Kind.HEAD].eq(1).all()
    few = Subset.choose(WIDE, "all", None, Ranking(Amount(3, 60), cheap))
    subset, chance = draw(few, Subset.choose(WIDE), ranking, Amount.parse("neurons=10"), 0)
    assert set(chance) == {Kind.NEURON}
    assert 10 <= int(subset.neurons.sum()) - 60 <= 20
    whole = audit_of(cheap, exact, 60, "100%", 0)
    found = missed.missed(whole, "a", Kind.NEURON, 40)
    assert (found.at_most, found.estimate) == (0, 0.0)
    assert missed.missed(exact, "a", Kind.NEURON, 40) is None


def test_of_bands_with_other_chances_the_least_counts_and_what_was_found_is_not_missed():
    exact = file_of(torch.arange(LAYERS * NEURONS).flip(0).view(LAYERS, NEURONS) / 800.0 + 1)
    chance_LF, mask_LF = torch.full((LAYERS, NEURONS), 0.5), torch.zeros(LAYERS, NEURONS, dtype=torch.bool)
    chance_LF[4:], chance_LF[1, 50:] = 0.25, 1.0  # the leaders are 150th to 199th, and the rest above them was missed
    mask_LF[::2], mask_LF[1, 50:], mask_LF[0, 10:] = True, True, False
    audit = file_of(exact.neurons * mask_LF, {"heads": HEADS, "neurons": mask_LF}, {"neurons": chance_LF})
    found = missed.missed(audit, "a", Kind.NEURON, 50)
    assert (found.leaders, found.drawn, found.rest, found.share) == (50, 310, 750, 0.25)
    assert (found.found, found.threshold) == (10, float(exact.neurons[1, 99]))
    assert found.estimate == 10
    assert found.at_most == min(50, upper_end(10, 0.25, 750) - 10)
    assert missed.missed(audit, "a", Kind.NEURON, 5).at_most == 5


def test_wp_score_samples_and_wp_scores_says_what_can_be_missed(tmp_path):
    job = job_for(tmp_path, "llama", method="exact", utility="kl", contrast=False, tasks=("first",))
    whole = score(job)
    write_scores(score(replace(job, method="attr")), tmp_path / "attr.safetensors")
    asked = replace(job, top=(10, str(tmp_path / "attr.safetensors")), sample="heads=100%,neurons=40%", layers="0-2")
    write_scores(score(asked), tmp_path / "audit.safetensors")
    audit = read_scores(tmp_path / "audit.safetensors")
    assert audit.meta.format == 5
    assert audit.meta.subset["sample"] == "heads=100%,neurons=40%"
    for kind in Kind:
        scored_Ln, chance_Ln = audit.seen(kind), audit.chance[kind]
        assert not chance_Ln[3].any()
        assert chance_Ln[:3].gt(0).all()
        torch.testing.assert_close(getattr(audit, kind)[scored_Ln], getattr(whole, kind)[scored_Ln])
    assert audit.seen(Kind.HEAD)[:3].all()
    assert 30 <= int(audit.seen(Kind.NEURON).sum()) <= 34  # 10, and 40 % of 50 in two bands
    assert 0.3 < missed.cost(audit) < 0.8
    files = [f"{name}={tmp_path / name}.safetensors" for name in ("attr", "audit")]
    text = CliRunner().invoke(main, files).output
    assert "above the k-th leader" in text
    assert "in the audit's top k of all (95 %)" in text
    data = json.loads(CliRunner().invoke(main, [*files, "--json"]).output)
    rows = data["files"]["audit"]["missed"]
    assert {row["kind"] for row in rows} == {"heads", "neurons"}
    assert all(row["at_most"] == 0 for row in rows if row["kind"] == "heads")
    low, high = next(row["overlap"] for row in data["audits"] if row["kind"] == "neurons")
    assert 0 <= low <= high <= 1
    assert data["files"]["attr"]["missed"] == []


def test_a_sample_above_the_anchor_is_left_aside(tmp_path):
    job = job_for(tmp_path, "llama", method="exact", utility="anchor", tasks=("first",))
    write_scores(score(replace(job, method="attr", utility="kl")), tmp_path / "kl.safetensors")
    audit = score(replace(job, top=(10, str(tmp_path / "kl.safetensors")), sample="40%"))
    for each in missed.every(audit):
        assert each.rest <= 3 * 20
    assert missed.cost(audit) < 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sample": "5%"}, "sample: is drawn from what --top leaves"),
        ({"sample": "5%", "top": (3, "f"), "method": "attr"}, "sample: attr scores everything for the price of one"),
        ({"sample": 0, "top": (3, "f"), "method": "exact"}, "sample: found 0, expected a number or a percentage"),
    ],
)
def test_samples_that_mean_nothing_are_refused(fields, said):
    from mergekit_wp.scoring.config import ScoringJob

    with pytest.raises(BadInput, match=said):
        ScoringJob("base", "expert", "pairs", **fields)


def test_text_that_is_no_amount_is_refused(tmp_path):
    job = job_for(tmp_path, "llama", method="attr", utility="kl", contrast=False)
    write_scores(score(job), tmp_path / "s.safetensors")
    with pytest.raises(BadInput, match="sample: found 'some', expected a number or a percentage"):
        score(replace(job, method="exact", top=(3, str(tmp_path / "s.safetensors")), sample="some"))


@pytest.mark.parametrize("change", [lambda c: c * 0, lambda c: c + 1, lambda c: torch.where(c > 0, 1.0, c)])
def test_chances_that_cannot_be_are_refused(tmp_path, change):
    exact, cheap = (file_of(table) for table in populations()["near"])
    audit = audit_of(cheap, exact, 60, "10%", 0)
    write_scores(audit, tmp_path / "s.safetensors")
    assert read_scores(tmp_path / "s.safetensors").chance["neurons"].equal(audit.chance["neurons"])
    damage(tmp_path / "s.safetensors", lambda tensors, _meta: tensors.update(
        {"chance/neurons": change(tensors["chance/neurons"])}
    ))  # fmt: skip
    with pytest.raises(BadInput, match="chance/neurons is not how likely"):
        read_scores(tmp_path / "s.safetensors")
