"""`layer: auto` through a whole scoring run."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from score_jobs import job_for

from mergekit_wp.errors import BadInput
from mergekit_wp.recovery import TaskRecovery
from mergekit_wp.scores import read_scores, write_scores
from mergekit_wp.scoring.anchor import search as recovery
from mergekit_wp.scoring.score import score


def test_scores_are_those_of_the_layer_that_was_chosen_and_the_file_says_why(tmp_path):
    job = job_for(tmp_path, "llama", layer="auto", anchor_layers="0-2", anchor_prompts=2, utility="staged")
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
    assert found.meta.format == 2  # what earlier programs read


def test_a_check_that_cannot_run_stops_the_job_before_models_are_loaded(tmp_path, monkeypatch):
    from mergekit_wp.scoring import score as engine

    monkeypatch.setattr(engine, "load_pair", lambda *_args: pytest.fail("models were loaded"))
    job = job_for(tmp_path, "llama", layer="auto", utility="anchor")
    rows = [{"task": "t", "prompt": f"w{i} w2", "check": {"ifeval": "no:such"}} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match="IFEval has no type 'no:such'"):
        score(job)


def test_kl_looks_for_no_anchor_extracts_no_direction_and_scores_on_all_prompts(tmp_path, monkeypatch, caplog):
    """Even where contrasts say nothing: an expert whose residuals they do not move is scored all the same."""
    from mergekit_wp.scoring import score as engine

    monkeypatch.setattr(engine, "locate", lambda *_a, **_k: pytest.fail("a direction was extracted"))
    job = job_for(tmp_path, "llama", layer="auto", utility="kl", split="half", gap_floor=1e-6)
    rows = [{"task": "t", "prompt": f"w{i} w2 w5", "contrast": f"w{i} w2 w5"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level("INFO", logger="mergekit_wp"):
        found = score(job)
    assert "layer: auto is left aside" in caplog.text
    assert (found.meta.tasks["t"].extraction, found.meta.tasks["t"].scoring) == (0, 4)
    assert (found.meta.split, found.meta.anchor_layer, found.meta.recovery) == (None, None, None)
    assert found.tasks["t"].anchor is None
    write_scores(found, tmp_path / "scores.safetensors")
    read = read_scores(tmp_path / "scores.safetensors")
    assert read.meta == found.meta
    assert read.meta.read_at is None
    for other in (replace(job, split="shared"), replace(job, layer=None), replace(job, layer=1)):
        assert torch.equal(score(other).neurons, found.neurons)


@pytest.mark.parametrize(("depth", "most"), [(6, 5), (17, 16), (28, 13), (32, 14), (40, 16), (80, 24)])
def test_two_scans_find_every_layer_of_a_curve_with_one_peak(depth, most, monkeypatch):
    """At every layer but the last, in no more tries than the docstring says; the paper's 17 of 28 and 27 of 40 too."""
    tried = []

    def planted(_run, _tasks, _directions, layers, _known, _start):
        tried.extend(layers)
        values = tuple(1 - abs(layer - peak) / depth for layer in layers)
        return {"t": TaskRecovery("kl", 4, -1.0, 0.0, values, values)}

    monkeypatch.setattr(recovery, "_try", planted)
    monkeypatch.setattr(recovery, "_Behaviour", lambda *asked: SimpleNamespace())
    base = SimpleNamespace(depth=depth)
    for peak in range(depth - 1):
        tried.clear()
        curve = recovery.find_anchor(base, None, None, [], [], recovery.Search())
        assert curve.chosen == peak
        assert len(tried) == len(set(tried)) <= most
        assert curve.layers == tuple(sorted(tried))
