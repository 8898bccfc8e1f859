"""The parent's side of the sandbox: start a process, give it the code, take one answer, end it, clear up after it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import logger
from mergekit_wp.sandbox.confine import NOBODY

LOG = logger(__name__)
_CHILD = Path(__file__).with_name("child.py")
_LARGEST_ANSWER_BYTES = 64 * 1024
_STARTS_WITHIN_S = 30.0
_LOOKS_EVERY_S = 0.05  # into the folder of a program that has no disk of its own
_DEEPEST = 40  # folders in one another
_PREFIX = "wp-sandbox-"
_ABANDONED_S = 3600.0  # no program lives as long: its parent was killed
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
    disk_bytes: int = 16 * 2**20  # in all its files
    disk_files: int = 1000  # files and folders


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


@dataclass(frozen=True)
class _Ended:
    """What the process said after its first line, `why` it was ended (empty: by itself), and that line."""

    said: bytes
    why: str = ""
    walls: frozenset[str] = frozenset()


def run_programs(programs: Sequence[str], seconds: int = 3, workers: int | None = None) -> list[Verdict]:
    """Run each program, which ends with its own assertions, in a process of its own; verdicts in the same order.

    `seconds` limits CPU time, and the wall to twice as much. `workers` processes run side by side, by default
    one a core and at most 4. A program passes when control reaches its end: what it prints counts for nothing,
    and leaving early, by whatever means, is a failure.
    """
    _clear_abandoned()
    count = workers or min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=count) as pool:
        return list(pool.map(lambda program: _run_program(program, seconds)[0], programs))


def call_function(code: str, function: str, arguments: list[Any], seconds: int = 1) -> list[Any] | None:
    """What `function`, defined by `code`, returns for each argument; arguments and results are JSON values.

    `seconds` limits CPU time, and the wall to four times as much. None when the code does not compile, raises,
    exits, exceeds a limit or returns what JSON cannot hold. What is right is never sent to the process.
    """
    job = {"code": code, "function": function, "arguments": arguments}
    answer, _, _ = _run(job, function_limits(seconds), ["-S"])
    return answer if isinstance(answer, list) and len(answer) == len(arguments) else None


def check() -> None:
    """Raises `BadInput` where right programs do not pass here: every model would get nothing, and nobody know.

    Warns where the system does not keep a program from the user's files or from what a process may ask of it.
    """
    right, walls = _run_program("import math\nassert math.gcd(4, 6) == 2", seconds=10)
    wrong, _ = _run_program("assert False", seconds=10)
    if not right.passed or wrong.passed:
        raise BadInput(
            f"model-written code cannot be judged on this machine: a right program gave `{right.result}` and a wrong "
            f"one `{wrong.result}` under {sys.executable}; run as another user or with a Python that all may read."
        )
    if open_to := [what for wall, what in _BEHIND.items() if wall not in walls]:
        LOG.warning(
            "Model-written code runs with your rights here: nothing on this system keeps it from %s. Use Linux 5.13 or "
            "later on x86-64 or ARM64, or a virtual machine.",
            " or ".join(open_to),
        )


# What a program can do where a wall is missing.
_BEHIND = {
    "landlock": "reading and writing the files that you can",
    "seccomp": "the network and your other processes",
}


def _run_program(program: str, seconds: int) -> tuple[Verdict, frozenset[str]]:
    answer, ended, walls = _run({"code": program}, program_limits(seconds), [])
    return (Verdict(True, "passed") if answer == "reached the end" else Verdict(False, ended)), walls


def _run(job: dict[str, Any], limits: Limits, flags: list[str]) -> tuple[Any, str, frozenset[str]]:
    """The answer, which only code that came to its end gives, or None; in words how the process ended; its walls."""
    token = secrets.token_hex(16)
    with _folder() as folder:
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
            ended = _converse(process, b"%d\n%b%b" % (len(text), text, token.encode()), limits, folder)
        finally:
            _end(process)
    return (*_judge(ended, token, process.returncode), ended.walls)


def _judge(ended: _Ended, token: str, status: int) -> tuple[Any, str]:
    """Only an answer that begins with the token counts; the process gives it after the code's last line."""
    if status == -getattr(signal, "SIGXCPU", 0):
        return None, "timed out"
    if ended.why:
        return None, ended.why
    try:
        message = json.loads(ended.said)
        if "failed" in message:
            return None, f"failed: {message['failed']}"
        if secrets.compare_digest(str(message["token"]), token):
            return message["answer"], "passed"
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return None, f"failed: the process ended before the code did (status {status})"


def _converse(process: subprocess.Popen[bytes], job: bytes, limits: Limits, folder: str) -> _Ended:
    """Send the job and read what comes after the line that says that the code begins, until it ends or must end.

    The clock starts with that line: how long an interpreter takes to start says nothing about the code.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(job)
        process.stdin.close()
    said, walls = b"", None
    deadline = time.monotonic() + _STARTS_WITHIN_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(said) <= _LARGEST_ANSWER_BYTES:
            left = max(0.0, deadline - time.monotonic())
            watched = walls is not None and "disk" not in walls
            ready = selector.select(min(left, _LOOKS_EVERY_S) if watched else left)
            if watched and _overfull(folder, limits):
                return _Ended(b"", f"failed: it left more than {limits.disk_files} files or {limits.disk_bytes} bytes")
            if not ready and left <= _LOOKS_EVERY_S * watched:
                return _Ended(b"", "timed out")
            if not ready:
                continue
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return _Ended(said, walls=walls or frozenset())
            said += chunk
            if walls is None and b"\n" in said:
                first, _, said = said.partition(b"\n")
                walls = frozenset(first.decode(errors="replace").split())
                deadline = time.monotonic() + limits.patience * limits.seconds
    return _Ended(b"")


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


# What a program leaves. Where it has a disk of its own (see `confine`) this is nothing at all.


@contextmanager
def _folder() -> Iterator[str]:
    """A folder for one program, removed whatever the program made of it."""
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        with contextlib.suppress(OSError):  # see confine: a namespace may have no nobody
            os.chown(folder, NOBODY, NOBODY)
    try:
        yield folder
    finally:
        _remove(folder)


def _overfull(folder: str, limits: Limits) -> bool:
    """Whether a program that still runs has left more than it may; looks at no more than that.

    A folder that it made unreadable, or one deeper than anybody needs, counts as too much.
    """
    files, size, left = 0, 0, [(folder, 0)]
    while left:
        path, depth = left.pop()
        if depth > _DEEPEST:
            return True
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    files += 1
                    with contextlib.suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_size
                        if entry.is_dir(follow_symlinks=False):
                            left.append((entry.path, depth + 1))
                    if files > limits.disk_files or size > limits.disk_bytes:
                        return True
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return False


def _remove(folder: str) -> None:
    """Remove the folder of a program that has ended; never raises, and depth costs neither stack nor open files.

    Folders inside are moved up to the top one after another, so no path is ever longer than two names.
    """
    if not (os.scandir in os.supports_fd and os.rename in os.supports_dir_fd):  # Windows
        with contextlib.suppress(RecursionError):
            shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _empty(top)
        finally:
            os.close(top)
        os.rmdir(folder)


def _empty(top: int) -> None:
    moved = 0
    while folders := _without_files(top):
        for name in folders:
            with contextlib.suppress(OSError):
                os.chmod(name, 0o700, dir_fd=top)  # a folder, and nobody else is left to put a link in its place
                inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                try:
                    for below in _without_files(inner):
                        moved += 1
                        os.rename(below, f"{_PREFIX}{moved}-{secrets.token_hex(4)}", src_dir_fd=inner, dst_dir_fd=top)
                finally:
                    os.close(inner)
        before = len(folders)
        removed = sum(_removed(name, top) for name in folders)
        if not removed and before == len(_without_files(top)):
            return  # what cannot be removed is left


def _removed(name: str, top: int) -> bool:
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=top)
        return True
    return False


def _without_files(folder: int) -> list[str]:
    """The names of the folders in an open folder, everything else being removed."""
    folders = []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
                folders.append(name)
            else:
                os.unlink(name, dir_fd=folder)
    return folders


def _clear_abandoned() -> None:
    """Remove the folders of programs whose parent was killed, an hour after the last of them can have run."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
                found = entry.stat(follow_symlinks=False)
                mine = not hasattr(os, "geteuid") or found.st_uid in (os.geteuid(), NOBODY)
                if mine and time.time() - found.st_mtime > _ABANDONED_S:
                    _remove(entry.path)
