"""Evaluate one model on the tasks of a suite, keeping each task's result on disk as soon as it is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_wp.errors import BadInput
from mergekit_wp.eval.measure import (
    Entry,
    OnDone,
    Say,
    Settings,
    cache_file,
    measure,
    plain,
    read_cache,
    samples_file,
    versions,
    write_cache,
)
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.tasks import ReadyTask, about_metric

__all__ = ["Cell", "Row", "Settings", "cell_of", "evaluate_model", "missing_tasks", "plain", "versions"]

Measure = Callable[[EvalModel, list[ReadyTask], Settings, Say, OnDone], None]


@dataclass(frozen=True)
class Cell:
    """A metric of one model on one task, as lm-eval gives it (a fraction); `stderr` None if unknown."""

    value: float
    stderr: float | None
    samples: int | None


@dataclass(frozen=True)
class Row:
    """The results of one model, by column, and how they came about; `suite` is the hash of what was asked."""

    model: EvalModel
    cells: dict[str, Cell]
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    suite: str | None = None


def missing_tasks(model: EvalModel, tasks: list[ReadyTask], settings: Settings, cache: Path) -> list[ReadyTask]:
    """The tasks that still have to be run, each once: two columns may show two metrics of one task."""
    done = read_cache(cache_file(cache, model, settings.key(model)))
    return list({task.key: task for task in tasks if not _is_done(model, task, settings, done)}.values())


def evaluate_model(
    model: EvalModel, tasks: list[ReadyTask], settings: Settings, cache: Path, say: Say, run: Measure = measure
) -> Row:
    """The row of one model; only tasks that the cache lacks are run, and the model loads only for those.

    `run` is where that happens: in this process, or in one of its own (`process.measure_in_child`). Raises
    `BadInput` when the model cannot be loaded, holds a NaN, or a metric is missing from the results.
    """
    path = cache_file(cache, model, settings.key(model))
    done, missing = read_cache(path), missing_tasks(model, tasks, settings, cache)
    for task in tasks:
        if task.key not in {other.key for other in missing}:
            say(f"{model.name}: {task.spec.task} {_show(model, task, done)} (from {path.name})")

    def keep(task: ReadyTask, entry: Entry) -> None:
        done[task.key] = entry
        write_cache(path, model, done)  # now: a run that is killed goes on from here
        say(f"{model.name}: {task.spec.task} {_show(model, task, done)} ({entry['seconds']} s)")
        if cut := entry.get("cut_prompts"):
            say(f"{model.name}: {task.spec.task}: {cut} prompts were cut on the left to fit the context")

    if missing:
        run(model, missing, settings, say, keep)
    cells = {task.spec.column: cell_of(model, task, done[task.key]) for task in tasks}
    measured = {task.spec.column: _about(model, task, settings, done[task.key]) for task in tasks}
    return Row(model, cells, measured)


def cell_of(model: EvalModel, task: ReadyTask, entry: Entry) -> Cell:
    """The suite's metric out of lm-eval's results; a metric that is absent or no number is an error."""
    results, spec = entry["results"], task.spec
    value = results.get(spec.metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        numbers = [key for key, found in results.items() if "," in key and isinstance(found, int | float)]
        raise BadInput(
            f"{model.name}: lm-eval gave {value!r} for the metric `{spec.metric}` of {spec.task}; "
            f"it has numbers for {', '.join(numbers) or 'nothing'}."
        )
    metric, _, filters = spec.metric.partition(",")
    stderr = results.get(f"{metric}_stderr,{filters}")
    stderr = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
    return Cell(float(value), stderr, entry["samples"])


def _is_done(model: EvalModel, task: ReadyTask, settings: Settings, done: dict[str, Entry]) -> bool:
    """Whether a task has its results and, where answers are to be logged, its log."""
    log = samples_file(model, task, settings)
    return task.key in done and (log is None or log.is_file())


def _about(model: EvalModel, task: ReadyTask, settings: Settings, entry: Entry) -> Entry:
    log = samples_file(model, task, settings)
    logged = {"samples_file": "/".join(log.parts[-3:])} if log else {}
    about = {name: value for name, value in entry.items() if name != "results"}
    about |= {"metric": task.spec.metric, **about_metric(task)}
    return {**about, "fingerprint": model.fingerprint, **logged}


def _show(model: EvalModel, task: ReadyTask, done: dict[str, Entry]) -> str:
    value = cell_of(model, task, done[task.key]).value
    percent = about_metric(task)["share"] and abs(value) <= 1
    return f"{task.spec.column} {100 * value:.1f}" if percent else f"{task.spec.column} {value:.4g}"
