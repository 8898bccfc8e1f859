"""`layer: auto` through a whole scoring run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_scoring import job_for

from mergekit_wp.errors import BadInput
from mergekit_wp.scorefile import read_scores, write_scores
from mergekit_wp.scoring.engine import score


def test_scores_are_those_of_the_layer_that_was_chosen_and_the_file_says_why(tmp_path):
    job = job_for(tmp_path, "llama", layer="auto", anchor_layers="0-2", anchor_prompts=2)
    found = score(job)
    curve = found.meta.recovery
    assert curve.layers == (0, 1, 2)
    assert found.meta.anchor_layer == curve.chosen
    assert {task.grading for task in curve.tasks.values()} == {"kl"}
    given = score(replace(job, layer=curve.chosen))
    assert given.meta.recovery is None
    torch.testing.assert_close(found.heads, given.heads)
    torch.testing.assert_close(found.neurons, given.neurons)
    assert given.meta.tasks["first"].alpha == pytest.approx(found.meta.tasks["first"].alpha)
    write_scores(found, tmp_path / "scores.safetensors")
    assert read_scores(tmp_path / "scores.safetensors").meta.recovery == curve


def test_a_check_that_cannot_run_stops_the_job_before_models_are_loaded(tmp_path, monkeypatch):
    from mergekit_wp.scoring import engine

    monkeypatch.setattr(engine, "load_pair", lambda *_args: pytest.fail("models were loaded"))
    job = job_for(tmp_path, "llama", layer="auto")
    rows = [{"task": "t", "prompt": f"w{i} w2", "check": {"ifeval": "no:such"}} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match="IFEval has no type 'no:such'"):
        score(job)
