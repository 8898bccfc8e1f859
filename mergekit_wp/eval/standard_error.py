"""A standard error for the metrics that lm-eval gives none for, such as IFEval's share of instructions followed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

_GROUPS = 1000  # beyond so many items, as many groups of them are left out in turn


def jackknife(aggregate: Callable[[list[Any]], float], items: Sequence[Any]) -> float | None:
    """The delete-one jackknife standard error of `aggregate` over `items`; None for fewer than two.

    Items are independent draws (for IFEval a prompt with all its instructions). Of a plain mean it is the
    sample standard deviation over the root of n, exactly. Source: Efron and Tibshirani, An Introduction to the
    Bootstrap, chapter 11.
    """
    groups = min(len(items), _GROUPS)
    if groups < 2:
        return None
    without = [aggregate([item for i, item in enumerate(items) if i % groups != left]) for left in range(groups)]
    mean = sum(without) / groups
    return math.sqrt((groups - 1) / groups * sum((value - mean) ** 2 for value in without))


def lacking(task: Any) -> list[str]:
    """The metrics of a task that lm-eval has no standard error for."""
    from lm_eval.api.metrics import stderr_for_metric

    return [name for name, function in task.aggregation().items() if stderr_for_metric(function, 1) is None]


def add_missing(results: dict[str, dict[str, Any]], loaded: Any, samples: dict[str, list[dict[str, Any]]]) -> None:
    """Fill in, in lm-eval's `results`, the standard errors that it lacks, from the values of single items.

    `loaded` is the TaskDict that was evaluated, `samples` lm-eval's log of it by task. A group's follows from
    its tasks' as in lm-eval.
    """
    filled = False
    for name, task in loaded["tasks"].items():
        aggregations = task.aggregation()
        for metric in lacking(task):
            for filter_name in {sample["filter"] for sample in samples[name]}:
                values = [s[metric] for s in samples[name] if s["filter"] == filter_name and metric in s]
                error = jackknife(aggregations[metric], values)
                if error is not None:
                    results[name][f"{metric}_stderr,{filter_name}"] = error
                    filled = True
    if filled:
        _refresh_groups(results, loaded)


def _refresh_groups(results: dict[str, dict[str, Any]], loaded: Any) -> None:
    from lm_eval.api.group import Group

    for name, group in (loaded.get("groups") or {}).items():
        if isinstance(group, Group) and name in results:
            again = group.aggregate(results)
            results[name].update({key: value for key, value in again.items() if "_stderr," in key})
