"""A command of ours as several processes that share the work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "1700000000"}


def two_processes(*command: str) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` (`-m`, a module, ...) under accelerate launch, to its end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not --cpu, which starts a single process whatever the number asked for; the devices are the job's business.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    return subprocess.run([sys.executable, *launch, *command], env=ENVIRONMENT, capture_output=True, text=True)
