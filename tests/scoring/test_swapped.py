"""Base and expert swapped, scored by kl: the contrasts of the prompts tell which model heeds what they ask for."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from merge_checks import rewrite
from score_jobs import job_for

from mergekit_wp.scoring.metrics import instruction_effect
from mergekit_wp.scoring.models.layerwise import ResidentStack
from mergekit_wp.scoring.score import score

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [3, 4], [11, 12, 13, 14]]
CONTRASTS = [[5, 6], [9, 8, 7], [3, 5], [11, 12, 13]]


@torch.no_grad()
def test_the_effect_is_the_divergence_of_two_runs():
    model = tiny.random_model("llama", seed=3)
    got_N = instruction_effect(ResidentStack(model, torch.device("cpu"), torch.float32), PROMPTS, CONTRASTS, 90, 3)
    for got, *both in zip(got_N, PROMPTS, CONTRASTS, strict=True):
        asked, plain = (model(torch.tensor([ids])).logits[0, -1, :90].double().log_softmax(-1) for ids in both)
        assert got == pytest.approx(float((asked.exp() * (asked - plain)).sum()), rel=1e-5)


@pytest.mark.parametrize("offload", ["none", "stream"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_base_that_heeds_the_instruction_more_is_doubted(tmp_path, caplog, swapped, offload):
    """The base's head hardly tells two streams apart, so every contrast moves the expert further."""
    base, expert = tiny.save_pair(tmp_path, "llama")
    rewrite(base, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] / 100})
    pair = (expert, base) if swapped else (base, expert)
    job = job_for(tmp_path, "llama", pair=pair, utility="kl", rows=12, tasks=("only",), layer=None, offload=offload)
    with caplog.at_level(logging.WARNING, logger="mergekit_wp"):
        score(job)
    told = "of 12 prompts what they ask for moves the base's next token more than the expert's; are base and expert"
    # Streamed, a second sweep over the weights would cost as much as the scores: nothing is said.
    assert (told in caplog.text) is (swapped and offload == "none")
