"""The other side of `run.py`: a script that confines its own process, then runs one piece of code in it.

Started by `python -I -B`; imports nothing of the package but its neighbour `confine`. Reads from stdin the length
of a JSON document, the document, {"code", "limits", "folder"} and perhaps "function" and "arguments", and leaves
there, unread until the code has come to its end, the token that makes an answer count. Writes to the stdout it
was started with: a line with the walls that stand, as the code begins, then {"token", "answer"} or {"failed"}.
"""

import io
import json
import os
import signal
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confine

del sys.path[0], sys.modules["confine"]

_LONGEST_REASON = 500


def main() -> None:
    stdin = io.FileIO(0, closefd=False)  # unbuffered: the token stays in the pipe
    job = json.loads(_exactly(stdin, int(stdin.readline())))
    to_parent, from_parent = os.dup(1), os.dup(0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    # The code may put others in their places.
    write, read, leave, dumps = os.write, os.read, os._exit, json.dumps
    try:
        limits = job["limits"]
        walls = confine.confine(limits, job["folder"])
        # The parent's clock rings first; this one is for code that outlives a parent that was killed.
        signal.alarm(limits["patience"] * limits["seconds"] + 1)
        write(to_parent, " ".join(walls).encode() + b"\n")
        answer = _call(job) if "function" in job else _run(job)
        write(to_parent, dumps({"token": read(from_parent, 64).decode(), "answer": answer}).encode())
        leave(0)
    except BaseException as error:
        # SystemExit and KeyboardInterrupt too: whatever the code raises, it is only wrong.
        reason = type(error).__name__
        try:
            reason = f"{reason}: {error}"[:_LONGEST_REASON]
            write(to_parent, dumps({"failed": reason}).encode())
        finally:
            leave(1)


def _exactly(stream: Any, size: int) -> bytes:
    data = b""
    while len(data) < size and (chunk := stream.read(size - len(data))):
        data += chunk
    return data


def _run(job: dict[str, Any]) -> str:
    # No __name__, as under code_eval: a block for `__main__` is not part of what is asked.
    exec(job["code"], {})
    return "reached the end"


def _call(job: dict[str, Any]) -> list[Any]:
    names: dict[str, Any] = {"__name__": "answer"}
    exec(job["code"], names)
    function = names[job["function"]]
    answer = [function(argument) for argument in job["arguments"]]
    json.dumps(answer)  # what JSON cannot hold fails here, before the token is read
    return answer


if __name__ == "__main__":
    main()
