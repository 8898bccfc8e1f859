"""Processes that find torch and the other libraries imported: forks of one interpreter that has done nothing else.

A command pays ten seconds of imports before it does anything; where a test is about what happens after that, it is
started here. Everything else is as in a process of its own: memory, working directory, environment, output, signals,
exit code, and an end like any interpreter's. Imported are libraries alone, neither this package nor mergekit, so what
these do when they are imported happens in the fork, and huggingface_hub reads its environment again. What a user's
interpreter does from its first moment on (.pth files, executables, imports under --quiet or Ctrl-C) is tested by real
ones: tests/test_quiet.py, test_commands.py, merge/test_merge_stock.py, eval/test_eval_process.py, wheel_test.sh.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module, reload
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

HELPERS = Path(__file__).parent
LIBRARIES = [
    "torch", "torch._dynamo", "transformers", "transformers.models.auto.auto_factory",
    "transformers.models.llama.modeling_llama", "transformers.generation.utils", "peft", "accelerate", "datasets",
    "scipy.stats", "matplotlib.pyplot", "huggingface_hub.hf_api", "jinja2", "yaml", "lm_eval.evaluator",
    "lm_eval.tasks", "lm_eval.models.huggingface",
]  # fmt: skip
COMMAND = "from mergekit_wp.console import run; run({!r})"
_DIES_WITH_PARENT = 1  # Linux: PR_SET_PDEATHSIG


class Fork:
    """One process; `out` and `err` are the files that it prints to."""

    def __init__(self, ask: Callable[[dict[str, Any]], Any], pid: int, out: Path, err: Path) -> None:
        self._ask, self.pid, self.out, self.err = ask, pid, out, err

    def said(self) -> str:
        """What it printed so far, stdout before stderr."""
        return self.out.read_text(encoding="utf-8") + self.err.read_text(encoding="utf-8")

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        return int(self._ask({"wait": self.pid}))


class Warm:
    """The interpreter that is forked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MERGEKIT_WP_DISABLE": "1"},
        )  # fmt: skip

    def start(self, code: str, *arguments: object, cwd: Path | None = None, **environment: str) -> Fork:
        """Run this code; `sys.argv` is [program, *arguments]."""
        self._count += 1
        out, err = (Path(self._folder.name) / f"{self._count}.{name}" for name in ("out", "err"))
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        request = {
            "code": code, "argv": ["program", *map(str, arguments)], "cwd": str(cwd or Path.cwd()),
            "environment": variables, "out": str(out), "err": str(err),
        }  # fmt: skip
        return Fork(self._ask, self._ask(request), out, err)

    def run(self, code: str, *arguments: object, **how: Any) -> subprocess.CompletedProcess[str]:
        fork = self.start(code, *arguments, **how)
        number = fork.wait()
        said = [file.read_text(encoding="utf-8") for file in (fork.out, fork.err)]
        return subprocess.CompletedProcess([code, *map(str, arguments)], number, *said)

    def command(self, module: str, *arguments: object, **how: Any) -> subprocess.CompletedProcess[str]:
        """One of this package's commands, by its module."""
        return self.run(COMMAND.format(module), *arguments, **how)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


@lru_cache
def warm() -> Warm:
    """The one that all tests of this process share; it ends with this process."""
    one = Warm()
    atexit.register(one.close)
    return one


def _serve() -> dict[str, Any]:
    """Fork for every request; comes back in the fork, with its request. The parent ends here, with its reader."""
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()  # else the end of every fork copies all pages to look for cycles
    parent = os.getpid()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            die_with(parent, signal.SIGKILL)
            return request
        print(answer, flush=True)
    raise SystemExit(0)


def _become(request: dict[str, Any]) -> None:
    """Be an interpreter that was started in this folder, with this environment, and read its .pth files just now."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    redirect(os.devnull, 0, os.O_RDONLY)
    redirect(request["out"], 1)
    redirect(request["err"], 2)
    sys.argv[:] = request["argv"]
    reload(import_module("huggingface_hub.constants"))
    from mergekit_wp.autoload import install

    install()
    exec(request["code"], {"__name__": "__main__"})


def end_after(work: Callable[[], object]) -> NoReturn:
    """Do this and end as an interpreter does, but for taking itself to pieces, which costs a second."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def redirect(path: str, number: int, flags: int = os.O_WRONLY | os.O_CREAT | os.O_APPEND) -> None:
    opened = os.open(path, flags)
    os.dup2(opened, number)
    os.close(opened)


def die_with(parent: int, number: int) -> None:
    """In a fork: get this signal when the parent has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, number)
        if os.getppid() != parent:
            os._exit(1)


def script(name: str) -> str:
    """What the executable of this name runs: the code of its entry point."""
    (entry,) = entry_points(group="console_scripts", name=name)
    return f"from {entry.module} import {entry.attr} as main; main()"


WP_RUN = "import warm; warm.fork_steps(); " + COMMAND.format("mergekit_wp.pipeline.cli")


def fork_steps() -> None:
    """For wp-run in a fork: its steps, and the processes of these, are forks too, ended as `execute._run` does it."""
    import multiprocessing

    from mergekit_wp import execute
    from mergekit_wp.console import MODULES, run
    from mergekit_wp.eval import process

    def run_step(command: Sequence[str]) -> None:
        if command[0] != sys.executable:
            sys.argv[:] = command
            return run(MODULES[Path(command[0]).name])
        dash_m, module, *arguments = command[1:]
        assert dash_m == "-m"
        sys.argv[:] = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    def run_by_fork(command: Sequence[str]) -> int:
        parent = os.getpid()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            die_with(parent, signal.SIGTERM)
            end_after(lambda: run_step(command))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    execute._run = run_by_fork
    process._context = lambda: multiprocessing.get_context("fork")


if __name__ == "__main__":
    sys.path[:] = ["", *sys.path]
    request = _serve()
    end_after(lambda: _become(request))
