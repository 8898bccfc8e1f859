"""A command of ours as several processes that share the work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from warm import COMMAND, warm

# No GPU is shown: two processes cannot share one.
ENVIRONMENT = {"SOURCE_DATE_EPOCH": "1700000000", "CUDA_VISIBLE_DEVICES": ""}


def launched(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command of a module under accelerate launch, as two processes, to their end."""
    # Not --cpu, which starts a single process whatever the number asked for; the devices are the job's business.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(_free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **ENVIRONMENT}
    return subprocess.run(
        [sys.executable, *launch, "-m", module, *arguments], env=environment, capture_output=True, text=True
    )


def two_processes(module: str, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The same as two forks with the environment that the launcher gives its processes; `before`: code of both."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    forks = [
        warm().start(
            before + COMMAND.format(module), *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared, **ENVIRONMENT
        )
        for rank in range(2)
    ]
    codes = [fork.wait() for fork in forks]
    said = ["".join(file.read_text() for file in files) for files in zip(*((f.out, f.err) for f in forks), strict=True)]
    return subprocess.CompletedProcess([module, *arguments], max(codes, key=abs), *said)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
