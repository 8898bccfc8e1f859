"""What a grading is, which point of a grid it chooses, and how one is made: lm-eval through wp-eval's own functions.

Gradings on validation items and on test items are different types. `choose` takes the former only, so that nothing
can be chosen by what it is tested on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from experiments.miniature.lm_eval_tasks import SUITE, task_name
from mergekit_wp.eval.suite import Suite, read_suite

if TYPE_CHECKING:
    from mergekit_wp.eval.tasks import ReadyTask


@dataclass(frozen=True)
class Grade:
    """How one model did: the share of items answered right and how many items, for each capability graded."""

    right: Mapping[str, float]
    items: Mapping[str, int]

    def mean(self, capabilities: Sequence[str]) -> float:
        """The plain mean over these capabilities, a fraction."""
        return sum(self.right[name] for name in capabilities) / len(capabilities)


@dataclass(frozen=True)
class ValidationGrade(Grade):
    """On validation items."""


@dataclass(frozen=True)
class TestGrade(Grade):
    """On test items."""

    __test__ = False  # pytest takes a class of this name for a test


GRADE_OF_SPLIT: Mapping[str, type[Grade]] = {"validation": ValidationGrade, "test": TestGrade}


def choose(grades: Sequence[ValidationGrade], merged: Sequence[str]) -> int:
    """The place of the best point of a grid: highest mean over the capabilities that were merged.

    Of equals the first, which is nearest to the authors' setting. Raises `TypeError` for any other kind of grade.
    """
    if not all(isinstance(grade, ValidationGrade) for grade in grades):
        raise TypeError("points are chosen by their grades on validation items alone")
    means = [grade.mean(merged) for grade in grades]
    return means.index(max(means))


def choose_unlabelled(shares: Sequence[Mapping[str, float]]) -> int:
    """The place of the point of a grid with the least loss: the mean over what was merged of the unrecovered shares.

    Of equals the first, as in `choose`.
    """
    losses = [sum(of.values()) / len(of) for of in shares]
    return losses.index(min(losses))


def suite_of(split: str, world: Path) -> Suite:
    """The suite of a world on test items, or its twin on validation items: the one in its folder, else the demo's."""
    own = world / SUITE.name
    suite = read_suite(own if own.is_file() else SUITE)
    tasks = (replace(t, task=task_name(capability_of(t.task), split, prefix_of(t.task))) for t in suite.tasks)
    return replace(suite, tasks=tuple(tasks), baseline=None, include_path=None)


def capability_of(task: str) -> str:
    """`code` of `mini_code`."""
    return task.partition("_")[2]


def prefix_of(task: str) -> str:
    """`mini` of `mini_code`."""
    return task.partition("_")[0]


def grade_settings(world: Path, dtype: str | None = None) -> list[Any]:
    """What of the suite decides an answer, for keys. The batch size rounds, so here it counts.

    dtype: of products, in the place of the suite's.
    """
    suite = suite_of("test", world)
    tasks = [[task.task, task.metric, task.apply_chat_template] for task in suite.tasks]
    return [dtype or suite.dtype, suite.batch_size, tasks]


def grade(
    model: Path, world: Path, split: str, capabilities: Sequence[str], cache: Path, allow_code: bool,
    device: str = "cpu", dtype: str | None = None,
) -> Grade:  # fmt: skip
    """Grade a model folder, with products in `dtype` (default: the suite's). Call it in a process of one thread whose
    lm-eval may be quietened and patched.

    Raises `BadInput` as wp-eval does, also for `code` without `allow_code`.
    """
    from mergekit_wp.eval.models import open_model
    from mergekit_wp.eval.rows import Settings, evaluate_model
    from mergekit_wp.memory import pick_device

    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    suite, tasks = suite_of(split, world), [_ready(world, split, name, allow_code) for name in capabilities]
    settings = Settings(
        device=str(pick_device(device)), dtype=dtype or suite.dtype, batch_size=suite.batch_size, limit=None,
        allow_code=allow_code, trust_remote_code=False, progress_bars=False,
    )  # fmt: skip
    with _right_programs_remembered():
        row = evaluate_model(open_model(model.name, str(model), False), tasks, settings, cache, _silent)
    cells = {name: row.cells[task.spec.column] for name, task in zip(capabilities, tasks, strict=True)}
    right = {name: cell.value for name, cell in cells.items()}
    items = {name: cell.samples or 0 for name, cell in cells.items()}
    return GRADE_OF_SPLIT[split](right, items)


@lru_cache(maxsize=24)
def _ready(world: Path, split: str, capability: str, allow_code: bool) -> ReadyTask:
    """One task of a world, loaded once a process."""
    from mergekit_wp.eval.tasks import ready_tasks

    suite = suite_of("test", world)
    mine = tuple(
        replace(task, task=task_name(capability, split, prefix_of(task.task)))
        for task in suite.tasks
        if capability_of(task.task) == capability
    )
    (ready,) = ready_tasks(replace(suite, tasks=mine), world / "tasks", allow_code)
    return ready


def _silent(_text: str) -> None:
    """What wp-eval would say of each task."""


_RIGHT: set[str] = set()


@contextmanager
def _right_programs_remembered() -> Iterator[None]:
    """While this lasts, a program found right once is not run again: dozens of merges write the very same ones.

    Running them is half the time of a grading. Wrong ones are run again, since a busy machine can make a program
    late.
    """
    from experiments.miniature import sandbox

    run = sandbox.passes

    def passes(code: str, function: str, cases: list[list[Any]]) -> bool:
        known = repr((code, function, cases))
        if known not in _RIGHT and run(code, function, cases):
            _RIGHT.add(known)
        return known in _RIGHT

    with mock.patch.object(sandbox, "passes", passes):
        yield
