"""Evaluate one model on the tasks of a suite, keeping each task's result on disk as soon as it is known."""

from __future__ import annotations

import gc
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit_wp.errors import BadInput
from mergekit_wp.eval.datafiles import first_line
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.tasks import ReadyTask
from mergekit_wp.files import write_text

_VERSIONS = ("lm-eval", "transformers", "torch")


@dataclass(frozen=True)
class Settings:
    """How models are run. `dtype`, `limit` and the versions enter the cache's key: they change answers.

    Device and batch size are recorded with each result but not part of the key: they change the rounding,
    which moves an answer now and then, and a cached result should outlive a move to a GPU.
    """

    device: str
    dtype: str
    batch_size: int | str
    limit: int | None
    allow_code: bool
    trust_remote_code: bool
    progress_bars: bool

    def key(self, model: EvalModel) -> str:
        parts = [model.fingerprint, self.dtype, self.limit, self.trust_remote_code, versions()]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The packages whose version can change an answer."""
    return {name: version(name) for name in _VERSIONS}


@dataclass(frozen=True)
class Cell:
    """A metric of one model on one task, as lm-eval gives it (a fraction); `stderr` None if unknown."""

    value: float
    stderr: float | None
    samples: int | None


@dataclass(frozen=True)
class Row:
    """The results of one model, by column, and how they came about."""

    model: EvalModel
    cells: dict[str, Cell]
    measured: dict[str, dict[str, Any]]


def evaluate_model(
    model: EvalModel, tasks: list[ReadyTask], settings: Settings, cache: Path, say: Callable[[str], None]
) -> Row:
    """The row of one model; only tasks that the cache lacks are run, and the model loads only for those.

    Raises `BadInput` when the model cannot be loaded, holds a NaN, or a metric is missing from the results.
    """
    path = _cache_file(cache, model, settings.key(model))
    done = _read_cache(path)
    # By key: two columns may show two metrics of one task.
    missing = {task.key: task for task in tasks if task.key not in done}
    for task in tasks:
        if task.key in done:
            say(f"{model.name}: {task.spec.task} {_show(model, task, done)} (from {path.name})")
    if missing:
        with _loaded(model, settings) as lm:
            for task in missing.values():
                say(f"{model.name}: {task.spec.task} ...")
                done[task.key] = _evaluate(lm, task, settings)
                # Kept now: a run that is killed goes on from here.
                content = {"model": model.reference, "fingerprint": model.fingerprint, "tasks": done}
                write_text(path, json.dumps(plain(content), indent=2) + "\n")
                seconds = done[task.key]["seconds"]
                say(f"{model.name}: {task.spec.task} {_show(model, task, done)} ({seconds} s)")
    cells = {task.spec.column: cell_of(model, task, done[task.key]) for task in tasks}
    measured = {
        task.spec.column: {k: v for k, v in done[task.key].items() if k not in ("results", "key")} for task in tasks
    }
    return Row(model, cells, measured)


def cell_of(model: EvalModel, task: ReadyTask, entry: dict[str, Any]) -> Cell:
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


def plain(value: Any) -> Any:
    """The same content in JSON's own types: numpy scalars become numbers, what JSON lacks becomes text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _evaluate(lm: Any, task: ReadyTask, settings: Settings) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    started = time.monotonic()
    _seed(task)
    # Not `simple_evaluate`: at every call it looks over the machine's hardware (3 s) and asks git for a hash.
    output: Any = evaluate(
        lm,
        task.loaded,
        limit=settings.limit,
        log_samples=False,
        apply_chat_template=task.spec.apply_chat_template,
        fewshot_as_multiturn=task.spec.apply_chat_template,
        confirm_run_unsafe_code=settings.allow_code,
    )
    counts = [n["effective"] for n in output["n-samples"].values()]
    return {
        "task": task.spec.task,
        "results": plain(output["results"][task.spec.task]),
        "samples": sum(counts) if counts else None,
        "limit": settings.limit,
        "num_fewshot": plain(output["n-shot"].get(task.spec.task)),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "batch_size": settings.batch_size,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _seed(task: ReadyTask) -> None:
    """The seeds that lm-eval's own command sets, for each task anew: the order of tasks changes nothing."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for leaf in task.loaded["tasks"].values():
        leaf.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextmanager
def _loaded(model: EvalModel, settings: Settings) -> Iterator[Any]:
    """The model in lm-eval's HF backend; its memory is given back before the next one loads."""
    import torch
    from lm_eval.models.huggingface import HFLM

    try:
        lm = HFLM(
            pretrained=str(model.folder),
            device=settings.device,
            dtype=settings.dtype,
            batch_size=settings.batch_size,
            trust_remote_code=settings.trust_remote_code,
        )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{model.reference}: cannot load this model ({first_line(error)}).") from error
    if not settings.progress_bars:
        for request in ("generate_until", "loglikelihood", "loglikelihood_rolling"):
            setattr(lm, request, partial(getattr(lm, request), disable_tqdm=True))
    try:
        for name, parameter in lm.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise BadInput(f"{model.reference}: the weight {name} holds a NaN or an infinity; make it again.")
        yield lm
    finally:
        lm._model = None  # not `del lm`: the caller still holds lm while this runs
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _cache_file(cache: Path, model: EvalModel, key: str) -> Path:
    """The file of this model under this key, under whatever row name it was first evaluated."""
    found = sorted(cache.glob(f"*-{key[:20]}.json"))
    readable = re.sub(r"[^\w.-]+", "_", model.name)[:80]
    return found[0] if found else cache / f"{readable}-{key[:20]}.json"


def _read_cache(path: Path) -> dict[str, dict[str, Any]]:
    """Finished tasks by key; a file that is not ours or was damaged counts as nothing done."""
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        return {key: entry for key, entry in tasks.items() if isinstance(entry.get("results"), dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _show(model: EvalModel, task: ReadyTask, done: dict[str, dict[str, Any]]) -> str:
    return f"{task.spec.column} {100 * cell_of(model, task, done[task.key]).value:.1f}"
