"""One trained world, and wp-eval run on it with each backend, for all tests of this folder.

`make test-vllm` runs them, in an environment of its own; without vLLM they fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import worlds


def wp_eval(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it, in a process of its own."""
    command = [sys.executable, "-m", "mergekit_wp.eval.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.build(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="session")
def outs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """backend -> the folder of its results on all four models, with logs."""
    found = {}
    models = [f"{name}={world / name}" for name in worlds.MODELS]
    for backend in ("hf", "vllm"):
        found[backend] = tmp_path_factory.mktemp(backend)
        outcome = wp_eval(
            world / "suite.yaml", *models, "--backend", backend, "--device", "cpu", "--allow-code-execution",
            "--log-samples", "--out", found[backend],
        )  # fmt: skip
        assert outcome.returncode == 0, outcome.stderr
    return found
