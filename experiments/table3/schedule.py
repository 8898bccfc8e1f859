"""Jobs on a few worker processes: plans that go stage by stage, side by side, what is done already left alone.

A plan is a generator. It yields the jobs of a stage, gets their results in the same order, and returns its outcome.
Plans know nothing of one another; while one waits for its last job, the workers do another's.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol

import click

from mergekit_wp.errors import BadInput
from mergekit_wp.execute import die_with
from mergekit_wp.foreign import one_line

_HEARTBEAT_S = 30


@dataclass(frozen=True)
class TableJob:
    """One piece of work. `function(*arguments)` runs in a worker; `kept` gives the result of an earlier run, or None.

    `name` tells the same job in two plans apart from another; `kind` is what jobs of like duration share.
    """

    name: str
    kind: str
    title: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kept: Callable[[], Any]


Plan = Generator[list[TableJob], list[Any], Any]
"""Yields the jobs of a stage, receives their results, returns what came of it all."""


class Runner(Protocol):
    """Where jobs are run: worker processes, or, in a test, something simpler."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]: ...


def run(plans: Sequence[Plan], runner: Runner, progress: TableProgress) -> list[Any]:
    """Run all plans to their ends; their outcomes in order. What a job raises is raised here."""
    stages = [_Stage(plan) for plan in plans]
    running: dict[Future[Any], str] = {}
    results: dict[str, Any] = {}
    asked: set[str] = set()
    while True:
        for stage in stages:
            stage.advance(results, asked)
            for job in stage.take_new(results, asked):
                progress.begin(job)
                running[runner.submit(timed, job.function, *job.arguments)] = job.name
        if all(stage.over for stage in stages):
            return [stage.outcome for stage in stages]
        finished, _ = wait(running, timeout=_HEARTBEAT_S, return_when=FIRST_COMPLETED)
        for future in finished:
            name = running.pop(future)
            try:
                seconds, results[name] = future.result()
            except BrokenProcessPool as error:
                raise BadInput(
                    "a worker process was killed (out of memory, perhaps); start the command again: what is done "
                    "is kept."
                ) from error
            progress.end(name, seconds, results[name])
        if not finished:
            progress.heartbeat()


class _Stage:
    """Where one plan stands."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.outcome, self.over = plan, None, False
        self.jobs: list[TableJob] = []
        self._send(None)

    def advance(self, results: dict[str, Any], asked: set[str]) -> None:
        """Go on as long as everything that the current stage needs is there."""
        while not self.over:
            for job in self.jobs:
                if job.name not in results and job.name not in asked and (kept := job.kept()) is not None:
                    results[job.name] = kept
            if any(job.name not in results for job in self.jobs):
                return
            self._send([results[job.name] for job in self.jobs])

    def take_new(self, results: dict[str, Any], asked: set[str]) -> list[TableJob]:
        """The jobs that nobody has asked for yet; the same job twice is one."""
        new = {job.name: job for job in self.jobs if job.name not in results and job.name not in asked}
        asked.update(new)
        return [] if self.over else list(new.values())

    def _send(self, results: list[Any] | None) -> None:
        try:
            self.jobs = next(self.plan) if results is None else self.plan.send(results)
        except StopIteration as end:
            self.over, self.outcome, self.jobs = True, end.value, []


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds and result of a call."""
    started = time.monotonic()
    result = function(*arguments)
    return time.monotonic() - started, result


def pool(workers: int, prepare: Callable[[], None]) -> ProcessPoolExecutor:
    """Long-lived fresh processes, each of which begins with `prepare`, and ends with this one however that ends."""
    fresh = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, fresh, initializer=_begin, initargs=(os.getpid(), prepare))


def _begin(parent: int, prepare: Callable[[], None]) -> None:
    if ask := die_with(parent):
        ask()
    prepare()


class TableProgress:
    """One line that says what was finished last and how long the rest will take; now and then where nobody watches.

    seconds: what a job of each kind takes, until enough have been measured. expected: how many of each will be run.
    """

    def __init__(self, seconds: dict[str, float], expected: dict[str, int], workers: int, quiet: bool = False) -> None:
        self.seconds, self.left, self.workers, self.quiet = dict(seconds), dict(expected), workers, quiet
        self.jobs: dict[str, tuple[TableJob, float]] = {}
        self.done, self.total, self.measured = 0, sum(expected.values()), dict.fromkeys(seconds, 0)
        self.shown = 0.0
        self.terminal = sys.stderr.isatty()

    def begin(self, job: TableJob) -> None:
        self.jobs[job.name] = (job, time.monotonic())

    def end(self, name: str, seconds: float, result: Any) -> None:
        job, _ = self.jobs.pop(name)
        self.done += 1
        self.left[job.kind] = max(0, self.left.get(job.kind, 0) - 1)
        count = self.measured[job.kind] = self.measured.get(job.kind, 0) + 1
        old = self.seconds.get(job.kind, seconds)
        self.seconds[job.kind] = old + (seconds - old) / (count + 1)  # the estimate counts as one measurement
        right = getattr(result, "right", None)
        value = f": {', '.join(f'{k} {100 * v:.1f}' for k, v in right.items())}" if right else ""
        self._show(f"{job.title}{value} ({seconds:.0f} s)", always=job.kind in ("world", "score"))

    def heartbeat(self) -> None:
        running = sorted(self.jobs.values(), key=lambda item: item[1])[: self.workers]
        self._show("at work: " + "; ".join(job.title for job, _ in running), always=True)

    def left_s(self) -> float:
        """Seconds until the end, if nothing else slows the machine."""
        return sum(self.seconds.get(kind, 0) * count for kind, count in self.left.items()) / self.workers

    def _show(self, text: str, always: bool) -> None:
        now = time.monotonic()
        if self.quiet or not (always or self.terminal or now - self.shown > _HEARTBEAT_S / 2):
            return
        self.shown = now
        line = f"[{self.done}/{max(self.total, self.done)}] {text}; about {self.left_s() / 60:.0f} min left"
        line = one_line(line)
        click.echo(  # noqa: TID251  (a line that is written over)
            f"\r\033[K{line[:150]}" if self.terminal else line, err=True, nl=not self.terminal
        )
