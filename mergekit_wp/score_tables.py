"""What `ranking` finds in score files, as grids of text and as data; a grid's first line is its head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations, zip_longest
from typing import Any

from mergekit_wp.console import percent
from mergekit_wp.floor import floors
from mergekit_wp.foreign import one_line
from mergekit_wp.geometry import Component, Kind
from mergekit_wp.intervals import LEAST, Bootstrap, Interval, used_of
from mergekit_wp.missed import TopKept, audits, cost, every
from mergekit_wp.page import aligned
from mergekit_wp.ranking import about, compare, findings, layer_shares_of, strongest, tasks_and_mean, totals
from mergekit_wp.scores import Scores

Grid = list[list[str]]
ALL_TASKS = "all tasks"


def as_text(found: Mapping[str, Scores], top: int) -> str:
    """All of it, for a terminal."""
    parts = []
    for name, scores in found.items():
        facts = about(scores)
        width = max(map(len, facts))
        lines = [one_line(name), *(f"  {label.ljust(width)}  {one_line(value)}" for label, value in facts.items())]
        parts.append("\n".join([*lines, "", *map(one_line, findings(scores))]))
        parts += [aligned(grid) for grid in (of_tasks(scores), of_layers(scores), of_components(scores, top))]
        parts += [aligned(grid) for grid in (of_floors(scores), of_missed(scores)) if grid]
    if len(found) > 1:
        parts.append(aligned(comparison(found)))
    parts += [aligned(grid) for grid in (of_audits(found),) if grid]
    return "\n\n".join(parts)


def of_tasks(scores: Scores) -> Grid:
    """A line a task and what is read off: prompts, gap, and what the scores add up to, in percent of the gap."""
    lines = [["task", "read off", "prompts", "dropped", "mean gap", "heads", "neurons", "sum", "negative"]]
    for task in tasks_and_mean(scores):
        each = [totals(scores, kind, task) for kind in Kind]
        sums = [*(t.total for t in each), sum(t.total for t in each), sum(t.negative for t in each)]
        shown = [percent(value, 1) for value in sums]
        if task is None:
            lines.append([ALL_TASKS, "", "", "", "", *shown])
            continue
        for place, (utility, stats) in enumerate(scores.meta.tasks[task].utilities.items()):
            numbers = [str(stats.used), str(stats.dropped), f"{stats.mean_gap:.4g}"]
            lines.append([task, utility, *numbers, *(shown if place == 0 else [""] * 4)])
    return lines


def of_layers(scores: Scores) -> Grid:
    """A line a layer: its share of all positive score (mean over tasks) in heads, in neurons, and in both."""
    shares = layer_shares_of(scores)
    rows = zip(*(share_L.tolist() for share_L in shares.values()), strict=True)
    lines = [["layer", *shares, "both"]]
    for layer, row in enumerate(rows):
        lines.append([str(layer), *(percent(value, 1) for value in (*row, sum(row)))])
    return lines


def of_components(scores: Scores, top: int) -> Grid:
    """A line a rank; of every task, its heads and neurons, with intervals where single prompts were kept."""
    columns = {
        f"{ALL_TASKS if task is None else task}: {kind}": [_sure(x) for x in _leaders(scores, kind, top, task)]
        for task in tasks_and_mean(scores)
        for kind in Kind
    }
    rows = enumerate(zip_longest(*columns.values(), fillvalue=""), start=1)
    return [["rank", *columns], *([str(n), *row] for n, row in rows)]


def _leaders(scores: Scores, kind: Kind, top: int, task: str | None) -> list[Component | Interval]:
    """The strongest components, each in its interval where single prompts were kept, and enough of them."""
    found = strongest(scores, kind, top, task)
    few = any(used_of(scores, name) < LEAST for name in ([task] if task is not None else scores))
    if scores.meta.prompt_ids is None or few or not found:
        return list(found)
    return list(Bootstrap(scores, task).intervals(found))


def _sure(found: Component | Interval) -> str:
    if isinstance(found, Component):
        return f"{found.name} {found.score:.4f}"
    return f"{found.component.name} {found.score:.4f} [{found.low:.4f}, {found.high:.4f}]"


def of_floors(scores: Scores) -> Grid:
    """A line for each task, kind and percentile of a file with shuffled updates (`floor`); nothing for another."""
    lines = [["task", "kind", "floor", "score there", "above it", "of other shuffles"]]
    for each in floors(scores):
        task = ALL_TASKS if each.task is None else each.task
        where = [task, str(each.kind), f"{percent(each.share)} of the shuffled"]
        above = f"{each.above} of {each.components} ({percent(each.above / each.components)})"
        null = "-" if each.by_shuffles is None else percent(each.by_shuffles, 1)
        lines.append([*where, f"{each.threshold:.4f}", above, null])
    return lines if len(lines) > 1 else []


def of_missed(scores: Scores) -> Grid:
    """A line for each task, kind and k of a file with a sample (`missed`); nothing for another."""
    lines = [["task", "kind", "leaders", "sample", "above the k-th leader", "estimate", "at most (95 %)"]]
    for each in every(scores):
        where = [ALL_TASKS if each.task is None else each.task, str(each.kind), str(each.leaders)]
        says = [f"{each.found} of the sample", f"{each.estimate:.1f}", f"{each.at_most} of the top {each.k}"]
        lines.append([*where, f"{each.drawn} of {each.rest}", *says])
    return lines if len(lines) > 1 else []


def of_audits(found: Mapping[str, Scores]) -> Grid:
    """A line for each file and each audit of it by leaders and a sample: what of its top k is of the top k by that."""
    lines = [["file", "audit", "task", "kind", "top k", "in the audit's top k of all (95 %)"]]
    for name, audit, each in audits(found):
        of = each.missed
        where = [name, audit, ALL_TASKS if of.task is None else of.task, str(of.kind), str(of.k)]
        lines.append([*where, f"{each.low:.2f} to {each.high:.2f}"])
    return lines if len(lines) > 1 else []


def comparison(found: Mapping[str, Scores]) -> Grid:
    """A line for each two files, task and kind."""
    lines = [["files", "task", "kind", "overlap", "by chance", "Spearman"]]
    for one, other in combinations(found, 2):
        for a in compare(found[one], found[other]):
            overlap = [f"top {k}: {'-' if share is None else f'{share:.2f}'}" for k, share in a.overlap.items()]
            chance = ["-" if share is None else f"{share:.2f}" for share in a.by_chance.values()]
            rank = "-" if a.spearman is None else f"{a.spearman:.3f}"
            task = _mean_of(found[one], found[other]) if a.task is None else a.task
            lines.append([f"{one}, {other}", task, a.kind, ", ".join(overlap), ", ".join(chance), rank])
    return lines


def _mean_of(one: Scores, other: Scores) -> str:
    """Which tasks the mean over tasks of two files is over (`ranking.compare`)."""
    if set(one) == set(other):
        return ALL_TASKS
    return "tasks of both" if set(one) & set(other) else "all tasks of each"


def as_data(found: Mapping[str, Scores], top: int) -> dict[str, Any]:
    """The same as numbers. Scores and their sums are shares of the gap; `layers` are shares of all positive score."""
    return {
        "files": {name: _data(scores, top) for name, scores in found.items()},
        "comparison": [
            {"files": [one, other], **asdict(agreement)}
            for one, other in combinations(found, 2)
            for agreement in compare(found[one], found[other])
        ],
        "audits": [_audit_data(*each) for each in audits(found)],
    }


def _data(scores: Scores, top: int) -> dict[str, Any]:
    tasks = {task: _task_data(scores, top, task) for task in scores.tasks}
    return {
        "meta": json.loads(scores.meta.to_json()),
        "findings": findings(scores),
        "all_tasks": _task_data(scores, top, None),
        "tasks": tasks,
        "floors": [asdict(each) for each in floors(scores)],
        "missed": [asdict(each) for each in every(scores)],
        "cost": cost(scores) if scores.chance else None,
    }


def _audit_data(name: str, audit: str, kept: TopKept) -> dict[str, Any]:
    of = kept.missed
    return {"file": name, "audit": audit, "task": of.task, "kind": of.kind, "k": of.k, "overlap": [kept.low, kept.high]}


def _task_data(scores: Scores, top: int, task: str | None) -> dict[str, Any]:
    return {
        "top": {kind: [_leader_data(x) for x in _leaders(scores, kind, top, task)] for kind in Kind},
        "sums": {kind: asdict(totals(scores, kind, task)) for kind in Kind},
        "layers": {kind: share_L.tolist() for kind, share_L in layer_shares_of(scores, task).items()},
    }


def _leader_data(found: Component | Interval) -> dict[str, Any]:
    if isinstance(found, Component):
        return {"name": found.name, "score": found.score}
    ranks = [found.best_rank, found.worst_rank]
    return {"name": found.component.name, "score": found.score, "interval": [found.low, found.high], "ranks": ranks}
