"""The places where our methods take a seat in mergekit's task graph; other methods pass by untouched.

`FinalizeModel.arguments` is called once a merge, while the executor builds the graph, on every route
(mergekit-yaml, -multi, -pytorch, multi-GPU), after all planning and before any tensor is read. It is the only
task that sees the whole merge: every output tensor, the output folder and the output dtype. There the checks
run.

`ExecuteMergeMethodTask.execute` adapts one tensor: mergekit validates shapes before the method runs, tells
a method the name of the output only, and promotes mixed dtypes. There expert embeddings get the
base's rows, the source's name, the output dtype, the score files that were found in experts' folders, the experts'
places in a fit file and the slices of a set patch are handed on, and a tied LM head is not written.

`_copy_tagalong_files` is the last thing that `run_merge` calls (mergekit-yaml, -multi, wp-merge), when config and
tokenizer are written. There what the base's config says otherwise than the merged tensors is set right (`outcome`).

`install` is called by a method itself when mergekit first asks it to validate a recipe.

`download_alike` is for wp-merge alone: `ModelReference.local_path` gets from the Hub what scoring gets.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_wp.checkpoint.vocabulary import align_rows
from mergekit_wp.errors import NotFinite, enough_memory
from mergekit_wp.geometry import is_vocabulary
from mergekit_wp.merge.checks import check_inputs, check_plan
from mergekit_wp.merge.chosen import places_of
from mergekit_wp.merge.outcome import settle, why_not_finite
from mergekit_wp.merge.plan import OURS, PATCH, MergePlan, PlannedTensor, merge_tasks, read_plan, read_task
from mergekit_wp.merge.recipe import check_stock_recipe

if TYPE_CHECKING:
    import torch
    from mergekit.common import ModelReference
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

_lock = threading.Lock()
_installed = False


@dataclass(frozen=True)
class _Seat:
    """What one task must know at its execution. `aligned`: the experts' rows are to be those of the base."""

    source: str
    out_dtype: str
    aligned: bool
    written: bool
    scores: Mapping[Any, str]
    order: tuple[int, ...]
    """The experts' places in the merge's fit file, if there is one."""
    places_n: torch.Tensor | None
    """What of the tensor a set patch takes from its donor."""
    plan: MergePlan
    tensor: PlannedTensor


_seats: weakref.WeakKeyDictionary[Any, _Seat] = weakref.WeakKeyDictionary()
_plans: dict[str, MergePlan] = {}
"""Of merges at work, by the absolute path of their output."""


def install() -> None:
    """Wrap the two methods and the function of mergekit; idempotent."""
    global _installed
    from mergekit import merge
    from mergekit.io.tasks import FinalizeModel
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    with _lock:
        if not _installed:
            FinalizeModel.arguments = _checking(FinalizeModel.arguments)
            ExecuteMergeMethodTask.execute = _adapting(ExecuteMergeMethodTask.execute)
            merge._copy_tagalong_files = _settling(merge._copy_tagalong_files)
            _installed = True


def _checking(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def arguments(self: Any) -> Any:
        plan = read_plan(self)
        if plan is not None:
            check_stock_recipe()
            check_plan(plan)
            _plans[os.path.abspath(self.writer_task.out_path)] = plan
            for (task, _), tensor in zip(merge_tasks(self), plan.tensors, strict=True):
                _seats[task] = _seat(plan, tensor)
        return original(self)

    return arguments


def _adapting(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def execute(self: Any, tensors: dict[ModelReference, torch.Tensor], **rest: Any) -> Any:
        if self.method_name not in OURS:
            return original(self, tensors, **rest)
        seat = _seats.get(self) or _seat_in_memory(self)
        if not seat.written:
            return None
        if seat.aligned:
            tensors = {model: align_rows(tensor, tensors[self.base_model]) for model, tensor in tensors.items()}
        parameters = {**dict(self.parameters.items()), "source_name": seat.source}
        if seat.order:
            parameters["order"] = seat.order
        if seat.tensor.method == PATCH:
            parameters["places_n"] = seat.places_n
        changed: dict[str, Any] = {"out_dtype": seat.out_dtype, "parameters": parameters}
        if seat.scores:
            own = self.input_parameters
            changed["input_parameters"] = {m: {**dict(own[m].items()), "scores": s} for m, s in seat.scores.items()}
        task = self.model_copy(update=changed)
        room = f"{seat.source}: no memory left to merge it; merge on a device with more, such as the CPU."
        try:
            with enough_memory(room):
                return original(task, tensors, **rest)
        except NotFinite as error:
            # Inputs may have been finite before they were converted to the recipe's dtype.
            raise why_not_finite(seat.plan, seat.tensor) from error

    return execute


def _settling(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def copy(merge_config: Any, out_path: str, *rest: Any, **more: Any) -> Any:
        copied = original(merge_config, out_path, *rest, **more)
        if (plan := _plans.pop(os.path.abspath(out_path), None)) is not None:
            settle(Path(out_path), plan)
        return copied

    return copy


def _seat(plan: MergePlan, tensor: PlannedTensor) -> _Seat:
    return _Seat(
        source=tensor.source,
        out_dtype=plan.out_dtype(tensor),
        aligned=is_vocabulary(tensor.output) and not tensor.realigned,
        written=tensor.written,
        scores=dict(zip(tensor.experts, tensor.scores, strict=False)),
        order=plan.order(tensor) if tensor.fit else (),
        places_n=places_of(plan, tensor) if tensor.method == PATCH else None,
        plan=plan,
        tensor=tensor,
    )


def _seat_in_memory(task: ExecuteMergeMethodTask) -> _Seat:
    """A merge that is not written to disk has no last task to check it; each tensor is checked as it comes."""
    plan = read_task(task)
    check_inputs(plan)
    return _seats.setdefault(task, _seat(plan, plan.tensors[0]))
