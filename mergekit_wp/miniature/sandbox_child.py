"""The other side of `sandbox.py`: run one function on given arguments, in a process that can do little else.

Started as a script by `python -I -S`; imports nothing of this package. Reads one JSON document from stdin,
{"code", "function", "arguments", "seconds", "memory_bytes"}, and writes the JSON list of what the function
returned to the stdout it was started with. It is never told which results are right.
"""

import contextlib
import json
import os
import sys
from typing import Any

try:
    import resource
except ImportError:  # Windows: only the parent's time limit holds there.
    resource = None  # type: ignore[assignment]

_NOBODY = 65534


def _limit(name: str, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        resource.setrlimit(getattr(resource, name), (value, value))


def _give_up_rights(seconds: int, memory_bytes: int) -> None:
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # Root is not bound by RLIMIT_NPROC and may read every file.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _limit("RLIMIT_CPU", seconds)
    _limit("RLIMIT_AS", memory_bytes)
    _limit("RLIMIT_FSIZE", 0)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_NPROC", 0)
    # Last: no file, socket or pipe can be opened from here on.
    _limit("RLIMIT_NOFILE", 0)


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    results = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    _give_up_rights(job["seconds"], job["memory_bytes"])
    try:
        names: dict[str, Any] = {"__name__": "answer"}
        exec(job["code"], names)
        function = names[job["function"]]
        answer = json.dumps([function(argument) for argument in job["arguments"]])
    except BaseException:
        # SystemExit and KeyboardInterrupt too: whatever the answer raises, it is only wrong.
        os._exit(1)
    os.write(results, answer.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
