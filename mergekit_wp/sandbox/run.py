"""The parent's side of the sandbox: start a process, give it the code, take one answer, end it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_wp.errors import BadInput
from mergekit_wp.sandbox.confine import NOBODY

_CHILD = Path(__file__).with_name("child.py")
_LARGEST_ANSWER_BYTES = 64 * 1024
_STARTS_WITHIN_S = 30.0
# Numerical libraries start a thread for each core as they are imported; no thread can be started there.
_ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}


@dataclass(frozen=True)
class Limits:
    """What a process may use. `seconds` is CPU time, counted from the first line of the code; the clock on the
    wall may show `patience` times as much, since machines are shared."""

    seconds: int
    patience: int
    memory_bytes: int
    file_bytes: int
    open_files: int


def function_limits(seconds: int) -> Limits:
    """For one function on JSON values: no file at all, so nothing can be imported that was not before."""
    return Limits(seconds, patience=4, memory_bytes=256 * 2**20, file_bytes=0, open_files=0)


def program_limits(seconds: int) -> Limits:
    """For a program that may import what is installed here; numpy reserves more memory than it uses."""
    return Limits(seconds, patience=2, memory_bytes=4 * 2**30, file_bytes=64 * 1024, open_files=64)


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end without an exception, and what happened if not."""

    passed: bool
    result: str  # "passed", "timed out" or "failed: ..."


def run_programs(programs: Sequence[str], seconds: int = 3, workers: int | None = None) -> list[Verdict]:
    """Run each program, which ends with its own assertions, in a process of its own; verdicts in the same order.

    `seconds` limits CPU time, and the wall to twice as much. `workers` processes run side by side, by default
    one a core and at most 4. A program passes when control reaches its end: what it prints counts for nothing,
    and leaving early, by whatever means, is a failure.
    """
    count = workers or min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=count) as pool:
        return list(pool.map(lambda program: _run_program(program, seconds), programs))


def call_function(code: str, function: str, arguments: list[Any], seconds: int = 1) -> list[Any] | None:
    """What `function`, defined by `code`, returns for each argument; arguments and results are JSON values.

    `seconds` limits CPU time, and the wall to four times as much. None when the code does not compile, raises,
    exits, exceeds a limit or returns what JSON cannot hold. What is right is never sent to the process.
    """
    job = {"code": code, "function": function, "arguments": arguments}
    answer, _ = _run(job, function_limits(seconds), ["-S"])
    return answer if isinstance(answer, list) and len(answer) == len(arguments) else None


def check() -> None:
    """Raises `BadInput` where right programs do not pass here: every model would get nothing, and nobody know."""
    right, wrong = run_programs(["import math\nassert math.gcd(4, 6) == 2", "assert False"], seconds=10)
    if not right.passed or wrong.passed:
        raise BadInput(
            f"model-written code cannot be judged on this machine: a right program gave `{right.result}` and a wrong "
            f"one `{wrong.result}` under {sys.executable}; run as another user or with a Python that all may read."
        )


def _run_program(program: str, seconds: int) -> Verdict:
    answer, ended = _run({"code": program}, program_limits(seconds), [])
    return Verdict(True, "passed") if answer == "reached the end" else Verdict(False, ended)


def _run(job: dict[str, Any], limits: Limits, flags: list[str]) -> tuple[Any, str]:
    """The answer, which only code that came to its end gives, or None; and in words how the process ended."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="wp-sandbox-", ignore_cleanup_errors=True) as folder:
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            with contextlib.suppress(OSError):  # see confine: a namespace may have no nobody
                os.chown(folder, NOBODY, NOBODY)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", *flags, str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"HOME": folder, "TMPDIR": folder, **_ONE_THREAD},
            cwd=folder,
            close_fds=True,
            start_new_session=True,
        )
        try:
            text = json.dumps({**job, "limits": asdict(limits), "folder": folder}).encode()
            said = _converse(process, b"%d\n%b%b" % (len(text), text, token.encode()), limits)
        finally:
            _end(process)
    return _judge(said, token, process.returncode)


def _judge(said: bytes | None, token: str, status: int) -> tuple[Any, str]:
    """Only an answer that begins with the token counts; the process gives it after the code's last line."""
    if said is None or status == -getattr(signal, "SIGXCPU", 0):
        return None, "timed out"
    try:
        message = json.loads(said)
        if "failed" in message:
            return None, f"failed: {message['failed']}"
        if secrets.compare_digest(str(message["token"]), token):
            return message["answer"], "passed"
    except (ValueError, TypeError, KeyError):
        pass
    return None, f"failed: the process ended before the code did (status {status})"


def _converse(process: subprocess.Popen[bytes], job: bytes, limits: Limits) -> bytes | None:
    """Send the job and read what comes after the line that says that the code begins; None when it is late.

    The clock starts with that line: how long an interpreter takes to start says nothing about the code.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(job)
        process.stdin.close()
    said, begun = b"", False
    deadline = time.monotonic() + _STARTS_WITHIN_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(said) <= _LARGEST_ANSWER_BYTES:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return said
            said += chunk
            if not begun and b"\n" in said:
                begun, said = True, said.partition(b"\n")[2]
                deadline = time.monotonic() + limits.patience * limits.seconds
    return b""


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
