"""Which sets are tried, and on which prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from score_jobs import write_pairs
from study_world import scores

from mergekit_wp.geometry import Kind
from mergekit_wp.scores import PromptStyle, Scores, TaskMeta, TaskScores
from mergekit_wp.scoring.batching import TaskTokens
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.pairs import load_pairs, split_pairs
from mergekit_wp.scoring.score import ids_of_prompts
from mergekit_wp.study.held_out import Unseen, about_prompts, unseen
from mergekit_wp.study.set_effects import key_of
from mergekit_wp.study.set_plan import DRAWS, MATCHED, RANDOM, TOP, WHOLE, WORST, ranked, sizes_of


def mask_of(trial):
    return trial.exchange.subset.masks[trial.kind]


def test_sizes_are_shares_of_what_is_ranked() -> None:
    assert sizes_of(1000) == [5, 10, 20, 50, 100, 300]
    assert sizes_of(16) == [1, 2, 5]
    assert sizes_of(1) == [1]


@pytest.mark.parametrize("utility", ["kl", "anchor", "staged"])
def test_controls_are_like_the_top(utility) -> None:
    found = scores(utility=utility)
    trials = [trial for trial in ranked(found, "a", 0) if not trial.branch]
    sides = {"kl": {"all"}, "anchor": {"up"}, "staged": {"up", "down"}}[utility]
    assert {trial.side for trial in trials} == sides
    layers = {"all": [0, 1, 2, 3], "up": [0, 1], "down": [2, 3]}
    tops = {(t.kind, t.side, t.k): t for t in trials if t.what == TOP and not t.removed}
    for trial in trials:
        mask = mask_of(trial)
        assert set(mask.any(1).nonzero()[:, 0].tolist()) <= set(layers[trial.side])
        assert trial.exchange.subset.count == int(mask.sum()) == trial.size
        table = getattr(found.tasks["a"], trial.kind).double()
        assert trial.expected == pytest.approx(float(table[mask].sum()))
        if trial.what == WHOLE:
            assert trial.size == trial.k == len(layers[trial.side]) * mask.shape[1]
            continue
        top = tops[trial.kind, trial.side, trial.k]
        assert trial.size == top.size == trial.k
        if trial.what == MATCHED:
            assert torch.equal(mask.sum(1), mask_of(top).sum(1))
        inside = table[layers[trial.side]]
        if trial.what in (TOP, WORST):
            ordered = inside.flatten().sort(descending=trial.what == TOP).values[: trial.k]
            assert sorted(table[mask].tolist()) == sorted(ordered.tolist())
    for what in (RANDOM, MATCHED):
        drawn = {(t.kind, t.side, t.k, t.draw): mask_of(t) for t in trials if t.what == what and not t.removed}
        assert {draw for *_, draw in drawn} == set(range(DRAWS))
        for (kind, side, k, draw), mask in drawn.items():
            larger = [other for (*at, size, d), other in drawn.items() if at == [kind, side] and d == draw and size > k]
            assert not any(bool((mask & ~other).any()) for other in larger), "a larger draw holds the smaller"
    assert sum(t.removed for t in trials) * 2 == len(trials)


def test_no_set_holds_what_was_not_scored_and_equals_lead_nothing() -> None:
    found, heads = scores(tasks=("a",)), torch.zeros(4, 4)
    heads[1, 2] = 1.0
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    masks = {"heads": mask, "neurons": torch.zeros(4, 20, dtype=torch.bool)}
    part = Scores.from_tasks(found.meta, {"a": TaskScores(heads, torch.zeros(4, 20))}, masks)
    trials = list(ranked(part, "a", 0))
    assert {trial.kind for trial in trials} == {Kind.HEAD}
    assert not any(bool((mask_of(trial) & ~mask).any()) for trial in trials)
    assert {trial.size for trial in trials if trial.what == TOP} == {1}
    assert not any(trial.what == WORST for trial in trials), "three share the last place"


def test_random_sets_and_all_are_those_of_every_file() -> None:
    one, other = (list(ranked(scores(seed, method=how), "a", 0)) for seed, how in ((0, "writeback"), (1, "ap")))
    for what, same in ((WHOLE, True), (RANDOM, True), (TOP, False)):
        keys = [[key_of(t.exchange) for t in trials if t.what == what] for trials in (one, other)]
        assert (keys[0] == keys[1]) == same, what


def test_branches_and_rankings_by_one() -> None:
    found = scores(tasks=("a",))
    own, random = found.tasks["a"], torch.Generator().manual_seed(9)
    sizes = {"q": (4, 4), "o": (4, 4)} | dict.fromkeys(("gate", "up", "down"), (4, 20))
    parts = {name: torch.randn(size, generator=random) for name, size in sizes.items()}
    with_parts = Scores.from_tasks(found.meta, {"a": replace(own, parts=parts)})
    for each, whats in ((found, {"branch"}), (with_parts, {"branch", "by branch"})):
        trials = [trial for trial in ranked(each, "a", 0) if trial.branch]
        assert {trial.what for trial in trials} == whats
        assert {trial.branch for trial in trials} == {"gate", "up", "down", "gate+up"}
    (best,) = (t for t in trials if t.what == "by branch" and t.branch == "gate+up" and t.k == 1)
    summed = parts["gate"] + parts["up"]
    assert float(summed[mask_of(best)]) == float(summed.max())


def test_prompts_that_were_scored_are_left_out_where_others_remain(tmp_path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", tasks=("a", "b"), rows=20)
    job = ScoringJob(base="b", expert="e", pairs=path, utility="anchor", split="shared")
    rows = [pair.prompt for pair in load_pairs(path, None, 0) if pair.task == "a"]
    meta = replace(scores(utility="kl").meta, seed=7)
    for drawn, held_out in ((8, True), (12, True), (13, False), (20, False), (40, False)):
        tasks = {"a": replace(next(iter(meta.tasks.values())), extraction=0, scoring=drawn)}
        found = unseen(job, [replace(meta, tasks=tasks)])
        assert found["a"].held_out == held_out
        assert found["b"].held_out, "no file was scored on it"
        used = [rows[number] for number in found["a"].numbers]
        scored = [pair.prompt for pair in load_pairs(path, min(drawn, 20), 7) if pair.task == "a"]
        assert used == ([row for row in rows if row not in scored] if held_out else rows)
    half = replace(meta, split="half", anchor_layer=1, tasks={"a": TaskMeta(6, 6, {})})
    assert len(unseen(job, [half])["a"].numbers) == 8


def test_a_file_that_keeps_single_prompts_says_which_were_scored(tmp_path) -> None:
    """The first 12 lines of the study's 30, and not 12 that a draw from all of them takes."""
    path = write_pairs(tmp_path / "pairs.jsonl", tasks=("a",), rows=30)
    job, tokens = ScoringJob(base="b", expert="e", pairs=path), TaskTokens("a", [], None, [[n] for n in range(30)])
    about, ids = replace(scores(utility="kl").meta, prompts=PromptStyle("{prompt}")), ids_of_prompts(tokens)
    told = replace(about, tasks={"a": TaskMeta(0, 12, {})}, prompt_ids={"a": ids[:12]})

    def found(*metas, style="{prompt}"):
        return unseen(job, metas, [tokens], PromptStyle(style))["a"]

    def says(each):
        return about_prompts([{"task": "a", "prompts": 18, "held_out": each.held_out, "known": each.known}])

    assert found(told) == Unseen([*range(12, 30)], held_out=True, known=True)
    assert says(found(told)) == "On 18 prompts a task that no score was read off."
    assert found(replace(told, prompt_ids={"a": ids[:25]})).held_out is False
    for guessed in (found(replace(told, prompt_ids=None)), found(told, style="Q: {prompt}")):
        assert guessed.held_out
        assert not guessed.known
        assert "if these were drawn from the study's own pairs: not every score file says" in says(guessed)
    assert not found(told, replace(told, prompt_ids=None)).known
    # Off which prompts a direction was taken no file says; if its scores are those of the draw, the other half is too.
    (drawn,) = split_pairs(load_pairs(path, 12, told.seed), "half", told.seed)
    rows = [pair.prompt for pair in load_pairs(path, None, 0)]
    scored, taken = ([rows.index(pair.prompt) for pair in half] for half in (drawn.scoring, drawn.extraction))
    half = replace(told, split="half", anchor_layer=1, tasks={"a": TaskMeta(6, 6, {})})
    other = found(replace(half, prompt_ids={"a": tuple(ids[n] for n in scored)}))
    assert other.known
    assert set(other.numbers) == set(range(30)) - {*scored, *taken}
    assert not found(replace(half, prompt_ids={"a": ids[:6]})).known
