"""One process a model: its memory, a GPU's above all, comes back for certain when it ends.

The child finds and loads the tasks again, runs those that it is told to, and sends each one's entry through a pipe
as JSON; the parent keeps it. The child and all that it starts form a session of their own. It goes when it is done,
when the parent says so, or when the parent is no more, however that died.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from mergekit_wp.console import quieten, silence_as_parent
from mergekit_wp.errors import BadInput, OneSentence, reason_of
from mergekit_wp.eval.measure import OnDone, Say, Settings, measure
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.suite import Suite
from mergekit_wp.eval.tasks import ReadyTask, ready_tasks
from mergekit_wp.foreign import echo_lines

# Imported once by the fork server, for all models. Nothing here may start CUDA, or a thread.
_PRELOAD = [
    "torch", "transformers", "datasets", "lm_eval.evaluator", "lm_eval.tasks", "lm_eval.models.huggingface", __name__,
]  # fmt: skip
_GRACE_S = 5.0  # between asking and killing
_FAREWELL_S = 30.0  # what a child that is done may take to shut down


@dataclass(frozen=True)
class ModelRun:
    """What a child is given. `keys` are the tasks to run, `environment` the parent's as it is now."""

    model: EvalModel
    suite: Suite
    include_path: Path | None
    settings: Settings
    keys: tuple[str, ...]
    environment: dict[str, str]
    threads: int


def start_importing() -> None:
    """Let the fork server import the heavy libraries while the parent is still checking its input."""
    context = _context()
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        with _interrupts_ignored():
            forkserver.ensure_running()


def measure_in_child(
    model: EvalModel,
    tasks: list[ReadyTask],
    settings: Settings,
    say: Say,
    on_done: OnDone,
    *,
    suite: Suite,
    include_path: Path | None,
) -> None:
    """`measure.measure` in a process of its own; `tasks` come from `ready_tasks(suite, include_path, ...)`.

    Raises `BadInput` also when that process is killed, and `OneSentence` (exit code 1) when it fails
    in a way that nobody foresaw; its traceback then goes to stderr. Tasks that were finished have been handed on.
    """
    import torch

    start_importing()
    by_key = {task.key: task for task in tasks}
    wanted = [task.spec for task in tasks]
    few = replace(suite, tasks=tuple(spec for spec in suite.tasks if spec in wanted))
    job = ModelRun(model, few, include_path, settings, tuple(by_key), dict(os.environ), torch.get_num_threads())
    receiver, sender = _context().Pipe(duplex=False)
    process = _context().Process(target=_work, args=(job, sender), name=f"wp-eval {model.name}")
    at = ""
    with _running(process), receiver:
        sender.close()
        for kind, *rest in _messages(process, receiver):
            if kind == "say":
                at = rest[0]
                say(at)
            elif kind == "done":
                on_done(by_key[rest[0]], rest[1])
            else:  # its last message
                process.join(_FAREWELL_S)
                break
        else:
            process.join(_GRACE_S)
            raise BadInput(_epitaph(model, process.exitcode, at))
    if kind == "bad":
        raise BadInput(rest[0])
    if kind == "failed":
        echo_lines(rest[1], err=True)
        raise OneSentence(rest[0])


def _epitaph(model: EvalModel, code: int | None, at: str) -> str:
    """One sentence on a child that ended without a word."""
    where = f" (at `{at}`)" if at else ""
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        what = f"was killed by signal {-code} ({name})"
        cure = "most often the machine ran out of memory: use a smaller --batch-size, or a machine with more"
    else:
        what, cure = f"ended with exit code {code}", "what it said is above"
    return (
        f"{model.reference}: the process that evaluated it {what}{where}; {cure}; "
        "finished tasks are kept, so the same command goes on from there."
    )


def _messages(process: Any, receiver: Any) -> Iterator[Any]:
    """What the child sends, until it is dead and nothing is left to read.

    The pipe alone would not tell: processes that the child started may hold its end open.
    """
    while receiver in connection.wait([receiver, process.sentinel]):
        try:
            message = receiver.recv_bytes()
        except (EOFError, OSError):  # the latter when it died within a message
            return
        yield json.loads(message)


@contextmanager
def _running(process: Any) -> Iterator[None]:
    """Start a child; when this is left, in whatever way, it and all of its session are gone."""
    process.start()
    try:
        yield
    finally:
        try:
            if process.is_alive():
                _signal(process, signal.SIGTERM)
                process.join(_GRACE_S)
        finally:  # also when the grace is cut short by a second Ctrl-C
            _signal(process, signal.SIGKILL)
            process.join()
            _wait_for_the_rest(process.pid)


def _signal(process: Any, number: int) -> None:
    """To the child's session (it may be dead and others in it alive) or, before it has one, to the child."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError, AttributeError):
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _wait_for_the_rest(session: int) -> None:
    """Until a killed session is empty: an engine's own processes may take a while to hand back a GPU."""
    until = time.monotonic() + _FAREWELL_S
    while hasattr(os, "killpg") and time.monotonic() < until:
        try:
            os.killpg(session, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.02)


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a process of its own, as JSON; None when it fails.

    For questions that leave something behind, as asking CUDA does: hundreds of MB on the GPU.
    """
    start_importing()
    receiver, sender = _context().Pipe(duplex=False)
    process = _context().Process(target=_answer, args=(function, arguments, sender))
    with _running(process), receiver:
        sender.close()
        for answer in _messages(process, receiver):
            process.join(_GRACE_S)
            return answer
    return None


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...], sender: Any) -> None:
    _set_apart()
    with contextlib.suppress(Exception):
        sender.send_bytes(json.dumps(function(*arguments)).encode())


def _context() -> Any:
    """Processes by fork server, which pays the imports once; elsewhere, where forking is unsafe, each anew."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """For a process to start with: Ctrl-C is the parent's to handle, and the fork server would print a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(job: ModelRun, sender: Any) -> None:
    """The child."""

    one_at_a_time = threading.Lock()  # progress is told by a thread of its own

    def tell(*message: Any) -> None:
        with one_at_a_time:
            sender.send_bytes(json.dumps(message).encode())

    _set_apart()
    os.environ.clear()
    os.environ.update(job.environment)
    try:
        import torch

        torch.set_num_threads(job.threads)
        silence_as_parent()
        quieten(job.settings.progress_bars)
        tasks = {task.key: task for task in ready_tasks(job.suite, job.include_path, job.settings.allow_code)}
        if any(key not in tasks for key in job.keys):
            raise BadInput(f"{job.suite.name}: a file of its tasks changed while this ran; run it again.")
        measure(
            job.model,
            [tasks[key] for key in job.keys],
            job.settings,
            lambda text: tell("say", text),
            lambda task, entry: tell("done", task.key, entry),
        )
        tell("end")
    except BadInput as error:
        tell("bad", error.message)
    except BrokenPipeError:
        pass  # the parent is gone, and so is this process in a moment
    except Exception as error:
        sentence = (
            f"{job.model.reference}: evaluating it failed ({reason_of(error, 300, typed=True)}); the "
            "traceback is above, finished tasks are kept."
        )
        tell("failed", sentence, traceback.format_exc())


def _set_apart() -> None:
    """A session of its own that ends with the parent; and stdout, which is for the table, goes to stderr."""
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(2, 1)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns when the parent is gone, killed or not
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
