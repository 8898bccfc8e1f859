"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(ready: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Return once `ready()` holds; an AssertionError that names `what` when it does not in time."""
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.02)
