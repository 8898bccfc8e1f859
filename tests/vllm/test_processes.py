"""What vLLM leaves behind: nothing, when wp-eval is killed; and one model is gone before the next one comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
from conftest import DEVICE, environment, wp_eval
from eval_world import write_held_tasks, write_suite
from tiny import random_model, save
from waiting import is_gone, wait_for
from worlds import MODELS

GONE_S = 20
# Each worker of vLLM on a CPU is bound to cores: two of them on one node must be told which.
CORES = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """model/, suite.yaml with the tasks held_a and held_b; the latter waits while it grades, engine and all."""
    save(random_model("llama", 1, head_dim=32), tmp_path / "model")
    write_suite(
        tmp_path / "suite.yaml", tasks=write_held_tasks(tmp_path / "tasks", tmp_path / "model"), batch_size=None
    )
    (tmp_path / "marks" / "hold-middle").touch()
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_when_wp_eval_is_killed_no_process_of_vllm_stays_and_the_rerun_does_what_is_missing(
    held: Path, workers: int
) -> None:
    if workers > 1 and (DEVICE != "cpu" or "|" not in CORES):
        pytest.skip("two workers are tested on two cores of a CPU")
    arguments = [held / "suite.yaml", f"m={held / 'model'}", "--backend", "vllm", "--dtype", "float32", "--out"]
    command = [sys.executable, "-m", "mergekit_wp.eval.cli", *map(str, arguments), str(held / "out")]
    more = {"VLLM_CPU_OMP_THREADS_BIND": CORES} if workers > 1 else {}
    with (held / "log").open("w") as said:
        parent = subprocess.Popen(
            [*command, "--tensor-parallel", str(workers)], stdout=said, stderr=said, env=environment(**more)
        )
    try:
        mark = held / "marks" / "at-middle"
        wait_for(lambda: mark.exists() or parent.poll() is not None, "the second task", 300)
        assert mark.exists(), (held / "log").read_text()
        everyone = psutil.Process(parent.pid).children(recursive=True)
        engine = psutil.Process(int(mark.read_text().split()[0]))
        assert engine in everyone
        # In one process with lm-eval, or a process for each worker beside it.
        spawned = [p for p in engine.children(recursive=True) if p.memory_info().rss > 100e6]
        assert len(spawned) == (workers if workers > 1 else 0)
        parent.kill()  # SIGKILL: nobody can tidy up
        parent.wait()
        wait_for(lambda: all(map(is_gone, everyone)), "vLLM to end", GONE_S)
    finally:
        parent.kill()
    assert not (held / "out" / "results.json").exists()
    if workers > 1:
        return  # how many share a model does not change what is missing
    (held / "marks" / "hold-middle").unlink()
    again = wp_eval(*arguments, held / "out")
    assert again.returncode == 0, again.stderr
    assert [line.split()[2] for line in again.stderr.splitlines() if line.endswith(" ...")] == ["held_b"]
    assert "held_a A " in again.stderr  # from the cache
    measured = json.loads((held / "out" / "results.json").read_text())["rows"][0]["measured"]
    assert {about["backend"] for about in measured.values()} == {"vllm"}


def test_one_model_is_gone_before_the_next_one_comes(outs: dict[str, Path], engines: list[set[int]]) -> None:
    """As many processes have held vLLM as there are models, and never two at a time."""
    # A program of a model's starts as a copy of the process that grades it, for an instant.
    lasting = {pid for pid, samples in Counter(pid for seen in engines for pid in seen).items() if samples > 2}
    assert len(lasting) == len(MODELS)
    assert max(len(seen & lasting) for seen in engines) == 1
