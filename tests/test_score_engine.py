"""How a run is carried out must not change its numbers: streaming, subsets, parts, killing it, several processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_scoring import job_for, write_pairs

from mergekit_wp.errors import BadInput
from mergekit_wp.scorefile import read_scores, write_scores
from mergekit_wp.scoring.engine import score
from mergekit_wp.scoring.job import METHODS
from mergekit_wp.scoring.subset import Subset, parse_layers


def assert_same(got, wanted, tolerance=1e-6):
    """Relative to the largest score of each tensor."""
    for name, tensor in wanted.tensors().items():
        assert (got.tensors()[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama-biased", "gemma2"])
def test_streaming_changes_nothing(tmp_path, kind, method):
    job = job_for(tmp_path, kind, method=method, offload="none", contrast=False)
    resident, streamed = score(job), score(replace(job, offload="stream"))
    assert_same(streamed, resident, 1e-5)


def test_streaming_a_lora(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny.random_model("llama", seed=1)
    tiny.save(base, tmp_path / "base")
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "lora")
    job = replace(
        job_for(tmp_path / "other", "llama", contrast=False, gap_floor=1e-4),
        base=str(tmp_path / "base"),
        expert=f"{tmp_path / 'base'}+{tmp_path / 'lora'}",
    )
    assert_same(score(replace(job, offload="stream")), score(replace(job, offload="none")), 1e-4)


@pytest.mark.parametrize("method", ["writeback", "attr", "exact"])
def test_subset_scores_equal_the_whole_runs(tmp_path, method):
    job = job_for(tmp_path, "qwen3", method=method)
    whole = score(job)
    assert whole.complete
    part = score(replace(job, components="neurons", layers="1-2"))
    assert not part.complete
    assert not part.heads.any()
    assert not part.neurons[[0, 3]].any()
    torch.testing.assert_close(part.neurons[1:3], whole.neurons[1:3], rtol=1e-5, atol=1e-7)
    assert part.scored["neurons"].sum() == 2 * tiny.SHAPE["intermediate_size"]


def test_top_takes_the_leaders_of_an_earlier_file(tmp_path):
    job = job_for(tmp_path, "llama")
    first = score(job)
    write_scores(first, tmp_path / "first.safetensors")
    validated = score(replace(job, method="exact", top=(3, str(tmp_path / "first.safetensors"))))
    whole = score(replace(job, method="exact"))
    for kind in ("heads", "neurons"):
        leaders = set(getattr(first, kind).flatten().topk(3).indices.tolist())
        mask = validated.scored[kind].flatten()
        assert set(mask.nonzero()[:, 0].tolist()) == leaders
        wanted = getattr(whole, kind).flatten() * mask
        torch.testing.assert_close(getattr(validated, kind).flatten(), wanted, rtol=1e-4, atol=1e-5)
    write_scores(validated, tmp_path / "top.safetensors")
    assert not read_scores(tmp_path / "top.safetensors").complete


def test_top_of_another_pair_is_refused(tmp_path):
    write_scores(score(job_for(tmp_path / "a", "llama")), tmp_path / "a.safetensors")
    job = job_for(tmp_path / "b", "llama-biased")
    with pytest.raises(BadInput, match="another base"):
        score(replace(job, top=(3, str(tmp_path / "a.safetensors"))))


@pytest.mark.parametrize("method", ["attr", "writeback"])
def test_parts_add_up(tmp_path, method):
    job = job_for(tmp_path, "llama-biased", method=method, parts=True)
    scores = score(job)
    write_scores(scores, tmp_path / "parts.safetensors")
    read = read_scores(tmp_path / "parts.safetensors")
    assert set(read.parts) == {"q", "o", "gate", "up", "down"}
    assert all(table.any() for table in read.parts.values())
    torch.testing.assert_close(read.parts["q"] + read.parts["o"], read.heads)
    torch.testing.assert_close(sum(read.parts[p] for p in ("gate", "up", "down")), read.neurons)
    torch.testing.assert_close(
        read.tasks["first"].parts["q"] + read.tasks["first"].parts["o"], read.tasks["first"].heads
    )


def test_a_part_is_the_score_when_only_its_tensor_differs(tmp_path):
    """With only gate_proj fine-tuned, the gate part is everything, in both methods."""
    for method in ("attr", "writeback"):
        job = job_for(tmp_path / method, "llama", method=method, parts=True, contrast=False, gap_floor=1e-5)
        base, expert = tiny.random_model("llama", seed=1), tiny.random_model("llama", seed=1)
        for layer in expert.model.layers:
            layer.mlp.gate_proj.weight.data += 0.05 * torch.randn(layer.mlp.gate_proj.weight.shape)
        tiny.save(base, Path(job.base))
        tiny.save(expert, Path(job.expert))
        scores = score(job)
        torch.testing.assert_close(scores.parts["gate"], scores.neurons)
        assert not scores.parts["up"].any()
        assert not scores.heads.any()


@pytest.mark.parametrize(
    ("text", "wanted"), [(None, [0, 1, 2, 3]), ("0", [0]), ("0-1,3", [0, 1, 3]), (" 2 , 1-2", [1, 2])]
)
def test_layers_text(text, wanted):
    assert parse_layers(text, 4) == wanted


@pytest.mark.parametrize("text", ["", "a", "1-", "4", "3-1", "-1", "0,,1"])
def test_bad_layers_text(text):
    with pytest.raises(BadInput, match="layers"):
        parse_layers(text, 4)


def test_subset_of_nothing_is_refused():
    geometry = score_geometry()
    empty = Subset.choose(geometry, "heads").heads
    assert empty.all()
    with pytest.raises(BadInput, match="out of range"):
        Subset.choose(geometry, "heads", "9")


def score_geometry():
    from mergekit_wp.components import Geometry

    return Geometry("LlamaForCausalLM", 4, 4, 2, 8, 20, 24, 97)


def command(job, out, *more):
    flags = ["--base", job.base, "--expert", job.expert, "--pairs", job.pairs, "--layer", "2", "--device", "cpu"]
    return ["-m", "mergekit_wp.scoring.cli", *flags, "--gap-floor", "0.001", "--out", str(out), *more]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "1700000000"}


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    """kill -9 once some layers are done; the second run takes those up and writes the undisturbed run's file."""
    job = job_for(tmp_path, "llama")
    write_pairs(tmp_path / "pairs.jsonl", rows=24)
    undisturbed, killed = tmp_path / "undisturbed.safetensors", tmp_path / "killed.safetensors"
    exact = ("--method", "exact", "--batch-size", "1")
    subprocess.run([sys.executable, *command(job, undisturbed, *exact, "--quiet")], env=ENVIRONMENT, check=True)
    folder = tmp_path / ".killed.safetensors.resume"
    process = subprocess.Popen([sys.executable, *command(job, killed, *exact, "--quiet")], env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("task-*.safetensors"))) < 2:
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    done = {file: file.stat().st_mtime_ns for file in folder.glob("task-*.safetensors")}
    assert len(done) < 8, "nothing was left to do"
    again = subprocess.run(
        [sys.executable, *command(job, killed, *exact)], env=ENVIRONMENT, check=True, capture_output=True, text=True
    )
    assert f"Going on after {len(done)} finished layers" in again.stderr
    assert killed.read_bytes() == undisturbed.read_bytes()
    assert not folder.exists()


def test_finished_layers_of_another_job_are_not_used(tmp_path):
    job = job_for(tmp_path, "llama", method="exact")
    out = tmp_path / "out.safetensors"
    score(job, out=out)  # nothing removes the folder: that is the command's part, after writing
    other = replace(job, seed=1)
    assert_same(score(other, out=out), score(other), 0)


@pytest.mark.parametrize("method", ["writeback", "exact"])
def test_two_processes_write_what_one_writes(tmp_path, method):
    job = job_for(tmp_path, "llama")
    write_pairs(tmp_path / "pairs.jsonl", rows=5)
    flags = ("--method", method, "--batch-size", "2")
    alone, together = tmp_path / "alone.safetensors", tmp_path / "together.safetensors"
    subprocess.run([sys.executable, *command(job, alone, *flags, "--quiet")], env=ENVIRONMENT, check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not --cpu, which starts a single process whatever the number asked for; the devices are the job's business.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    done = subprocess.run(
        [sys.executable, *launch, *command(job, together, *flags)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Shared by 2 processes.") == done.stderr.count("Written:") == 1
    one, two = read_scores(alone), read_scores(together)
    assert_same(two, one, 1e-6)
    assert json.dumps({k: str(v) for k, v in vars(one.meta.tasks["first"]).items() if k != "alpha"}) == json.dumps(
        {k: str(v) for k, v in vars(two.meta.tasks["first"]).items() if k != "alpha"}
    )
