"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil


def wait_for(ready: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Return once `ready()` holds; an AssertionError that names `what` when it does not in time."""
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.02)


def is_gone(process: int | psutil.Process) -> bool:
    """Whether a process has ended, be it that nobody has asked for its exit code; a number may be another's by now."""
    try:
        found = psutil.Process(process) if isinstance(process, int) else process
        return not found.is_running() or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
