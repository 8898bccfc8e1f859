"""Run model-written functions where they can do no harm: one short-lived, limited process for each.

The process is isolated (`python -I -S`, empty environment, empty working folder, its own session) and limited
in CPU time, memory, file size, processes and open files; as root it becomes nobody first. It returns what the
function returned; what is right stays here and is compared here, so printing a verdict earns nothing.
The limits are those of an ordinary Unix user, not of a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_CHILD = Path(__file__).with_name("sandbox_child.py")
_MEMORY_BYTES = 256 * 2**20
_LARGEST_ANSWER_BYTES = 64 * 1024


def call_function(code: str, function: str, arguments: list[Any], seconds: int = 1) -> list[Any] | None:
    """What `function`, defined by `code`, returns for each argument; arguments and results are JSON values.

    `seconds` limits CPU time; wall time is limited to four times as much, since machines are shared. None
    when the code does not compile, raises, exits, exceeds a limit or returns what JSON cannot hold.
    """
    job: dict[str, Any] = {"code": code, "function": function, "arguments": arguments}
    job |= {"seconds": seconds, "memory_bytes": _MEMORY_BYTES}
    with tempfile.TemporaryDirectory(prefix="wp-sandbox-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        try:
            answer = _converse(process, json.dumps(job).encode(), time.monotonic() + 4 * seconds)
        finally:
            _end(process)
    try:
        results = json.loads(answer)
    except ValueError:
        return None
    return results if isinstance(results, list) and len(results) == len(arguments) else None


def passes(code: str, function: str, cases: list[list[Any]]) -> bool:
    """Whether the function returns the expected result, and of the same type, in every [argument, expected]."""
    results = call_function(code, function, [argument for argument, _ in cases])
    # JSON text tells 1 from true and 4 from 4.0, which == does not.
    return results is not None and json.dumps(results) == json.dumps([expected for _, expected in cases])


def _converse(process: subprocess.Popen[bytes], job: bytes, deadline: float) -> bytes:
    """Send the job and read the answer; empty when it is late or too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(job)
        process.stdin.close()
    answer = b""
    while len(answer) <= _LARGEST_ANSWER_BYTES:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return b""
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            return answer
        answer += chunk
    return b""


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
