"""One trained world, and wp-eval run on it with each backend, for all tests of this folder.

`make test-vllm` runs them, in an environment of its own; without vLLM they fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
import worlds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def wp_eval(*arguments: object, seen: list[set[int]] | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it, in a process of its own.

    `seen` gets, five times a second, the processes that hold vLLM.
    """
    command = [sys.executable, "-m", "mergekit_wp.eval.cli", *map(str, arguments)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    while True:
        try:
            said, errors = running.communicate(timeout=0.2)
            return subprocess.CompletedProcess(command, running.returncode, said, errors)
        except subprocess.TimeoutExpired:
            if seen is not None:
                seen.append(_engines(running.pid))


def _engines(pid: int) -> set[int]:
    """Those of a process's descendants that have vLLM's kernels in memory."""
    found = set()
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "/vllm/_C" in Path(f"/proc/{process.pid}/maps").read_text():
                found.add(process.pid)
        except OSError:  # it has just ended
            continue
    return found


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.build(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="session")
def engines() -> list[set[int]]:
    """The processes that held vLLM, sample by sample, while it ran for `outs`."""
    return []


@pytest.fixture(scope="session")
def outs(world: Path, engines: list[set[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """backend -> the folder of its results on all four models, with logs; the two run side by side."""
    found = {backend: tmp_path_factory.mktemp(backend) for backend in ("hf", "vllm")}
    models = [f"{name}={world / name}" for name in worlds.MODELS]

    def run(backend: str) -> subprocess.CompletedProcess[str]:
        return wp_eval(
            world / "suite.yaml", *models, "--backend", backend, "--allow-code-execution", "--log-samples",
            "--out", found[backend], seen=engines if backend == "vllm" else None,
        )  # fmt: skip

    with ThreadPoolExecutor() as pool:
        for outcome in pool.map(run, found):
            assert outcome.returncode == 0, outcome.stderr
    return found
