"""wp-anchor: directions out of score files and out of jobs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from safetensors import safe_open
from score_jobs import job_for
from where import DEVICE

from mergekit_wp.scores import Scores, write_scores
from mergekit_wp.scoring.anchor.cli import main
from mergekit_wp.scoring.score import score

LAYER = 2


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A score file of two tasks, the job it is from, and its scores."""
    folder = tmp_path_factory.mktemp("scored")
    job = job_for(folder, "llama", utility="anchor", gap_floor=0.0)
    scores = score(job)
    write_scores(scores, folder / "scores.safetensors")
    chosen = {name: getattr(job, name) for name in ("base", "expert", "pairs", "layer", "dtype", "batch_size")}
    (folder / "job.yaml").write_text(yaml.safe_dump({**chosen, "device": DEVICE}))
    return folder, scores


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize("source", ["scores.safetensors", "job.yaml"])
def test_safetensors_holds_the_direction_alpha_and_where_it_belongs(scored, tmp_path, source):
    folder, scores = scored
    result = run(folder / source, "--task", "second", "--out", tmp_path / "direction.safetensors")
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "direction.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["wp_anchor"])
        direction_D, alpha = file.get_tensor("direction"), file.get_tensor("alpha")
    torch.testing.assert_close(direction_D, scores.tasks["second"].anchor, rtol=1e-5, atol=1e-6)
    assert float(alpha) == pytest.approx(scores.meta.tasks["second"].alpha, rel=1e-5)
    assert (about["task"], about["layer"]) == ("second", LAYER)
    assert about["hookpoint"] == f"layers.{LAYER}"
    assert about["base"].endswith("base")


@pytest.mark.parametrize("name", ["direction.pt", "direction.pth", "direction.bin"])
def test_pt_is_what_lm_eval_reads(scored, tmp_path, name):
    """The answer to whether it steers is in test_steering; here, that the command writes that file."""
    folder, scores = scored
    extra = ["--format", "pt"] if name.endswith("bin") else []
    result = run(folder / "scores.safetensors", "--task", "first", "--out", tmp_path / name, *extra)
    assert result.exit_code == 0, result.output
    ((hookpoint, steering),) = torch.load(tmp_path / name, weights_only=True).items()
    assert hookpoint in dict(tiny.random_model("llama").base_model.named_modules())
    assert steering["action"] == "clamp"
    assert steering["steering_coefficient"] == pytest.approx(scores.meta.tasks["first"].alpha)
    assert torch.equal(steering["steering_vector"], scores.tasks["first"].anchor)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scores.safetensors", "--out", "d.pt"], "no task was named; give --task with one of first, second"),
        (["scores.safetensors", "--task", "third", "--out", "d.pt"], "it has no task 'third'"),
        (["job.yaml", "--task", "third", "--out", "d.pt"], "it has no task 'third'"),
        (["scores.safetensors", "--task", "first", "--out", "d.npy"], "ends in .safetensors or .pt"),
        (["scores.safetensors", "--task", "first", "--format", "safetensors", "--out", "d.pt"], "writes no such file"),
        (["scores.safetensors", "--task", "first", "--format", "pt", "--out", "d.safetensors"], "writes no such file"),
        (["nothing.safetensors", "--out", "d.pt"], "no such score file"),
        (["nothing.yaml", "--out", "d.pt"], "cannot read this scoring job"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_sentence(scored, tmp_path, words, message):
    folder, _scores = scored
    out = tmp_path / words[-1]
    result = run(folder / words[0], *words[1:-1], out)
    assert result.exit_code == 2
    assert message in result.output
    assert not out.exists()


def test_a_score_file_without_a_direction_points_to_its_job(scored, tmp_path):
    _folder, scores = scored
    tasks = {name: replace(task, anchor=None) for name, task in scores.tasks.items()}
    bare = Scores.from_tasks(replace(scores.meta, utility="kl", anchor_layer=None), tasks)
    write_scores(bare, tmp_path / "kl.safetensors")
    result = run(tmp_path / "kl.safetensors", "--task", "first", "--out", tmp_path / "d.pt")
    assert result.exit_code == 2
    assert "by kl, were read along no direction; give the JOB.yaml" in result.output
    assert not (tmp_path / "d.pt").exists()


def test_one_task_needs_no_name(scored, tmp_path):
    folder, _scores = scored
    rows = [line for line in (folder / "pairs.jsonl").read_text().splitlines() if '"second"' in line]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    job = yaml.safe_load((folder / "job.yaml").read_text())
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**job, "pairs": str(tmp_path / "pairs.jsonl")}))
    result = run(tmp_path / "job.yaml", "--out", tmp_path / "d.safetensors")
    assert result.exit_code == 0, result.output
    assert "Task second, layers.2" in result.output
