"""Maps: where scores lie, and how far rankings agree (Figs. 6, 7, 13, 18-21, 30, 31, 37, 38 of arXiv 2604.13694). Reads
score files alone.

Rankings are per task, kind (heads, neurons), side (all layers; up to the anchor layer; above it) and key (the signed
score; its size). Top sets and overlaps are those of `sets`.

    maps        of every file and task, the heads' scores by layer, coloured up to the largest |score| of that task and
                kind (B.5's "normalised", in pictures only), and in which layers the top neurons lie
    agreement   of every two files of the pair, on every task of both, over the components that both scored: overlap of
                top sets, what chance gives, Spearman, and by layer what is in one set alone and in both. What the two
                differ in says what is compared: weight and activation side (AP and WP), method, utility, settings, or
                nothing but prompts and seed, which is how stable the ranking is (B.3)
    tasks       of every file, among its tasks and those of `others` that were scored in the same way: how many
                components two tasks' top sets share, and how many are in exactly m of the sets; what chance gives

Legend: L layers, n components of a kind, T tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from mergekit_wp.choices import ACTIVATION_SIDE
from mergekit_wp.console import StartProgress
from mergekit_wp.geometry import Component, Kind
from mergekit_wp.ranking import spearman, table_of
from mergekit_wp.scores import ScoreMeta, Scores
from mergekit_wp.study.inputs import HOW, Inputs, alike_scored
from mergekit_wp.study.maps_page import result_of
from mergekit_wp.study.parts import Part, PartResult
from mergekit_wp.study.sets import KEYS, Shared, in_exactly, in_exactly_by_chance, keyed, top_among, top_set
from mergekit_wp.study.study_spec import Study

_SETTINGS = ("gap", "split", "anchor_layer", "prompts", "at")


def work(study: Study, inputs: Inputs, _progress: StartProgress) -> PartResult:
    """The part."""
    groups = [group for name in inputs.scores for group in task_groups(inputs, name)]
    data: dict[str, Any] = {
        "top": dict(study.top),
        "sides": {side: layers_L.nonzero()[:, 0].tolist() for side, layers_L in inputs.sides.items()},
        "files": {name: _file_data(study, inputs, scores) for name, scores in inputs.scores.items()},
        "agreement": list(agreements(study, inputs)),
        "tasks": [row for group in groups for row in across_tasks(study, inputs, group)],
    }
    return result_of(inputs, data)


# What there is to say of one file


def _file_data(study: Study, inputs: Inputs, scores: Scores) -> dict[str, Any]:
    meta = scores.meta
    return {
        "method": meta.method,
        "utility": meta.utility,
        "weights_or_activations": "activations" if meta.method in ACTIVATION_SIDE else "weights",
        "anchor_layer": meta.read_at,
        "seed": meta.seed,
        "gaps": _gaps(meta),
        "tasks": {
            task: {str(kind): _ranking_data(study, inputs, scores, kind, task) for kind in Kind} for task in scores
        },
    }


def _gaps(meta: ScoreMeta) -> dict[str, dict[str, Any]]:
    """Metric -> task -> the mean gap of base and expert, and of how many prompts."""
    found: dict[str, dict[str, Any]] = {}
    for task, about in meta.tasks.items():
        for metric, stats in about.utilities.items():
            found.setdefault(metric, {})[task] = {"mean": stats.mean_gap, "prompts": stats.used}
    return found


def _ranking_data(study: Study, inputs: Inputs, scores: Scores, kind: Kind, task: str) -> dict[str, Any]:
    table_Ln = table_of(scores, kind, task)
    found: dict[str, Any] = {"largest": float(table_Ln.abs().max()), "top": {}, "layers": {}}
    for side, layers_L in inputs.sides.items():
        among_Ln = scores.seen(kind) & layers_L[:, None]
        for key in KEYS:
            set_Ln = top_among(keyed(table_Ln, key), among_Ln, study.top[kind])
            places = sorted(set_Ln.nonzero().tolist(), key=lambda at: -float(keyed(table_Ln, key)[tuple(at)]))
            named = [[Component(kind, *at).name, float(table_Ln[tuple(at)])] for at in places]
            found["top"].setdefault(side, {})[key] = named
            found["layers"].setdefault(side, {})[key] = set_Ln.sum(1).tolist()
    return found


# Two files of the pair


def differing(one: ScoreMeta, other: ScoreMeta) -> list[str]:
    """What two files of one pair were scored with differently, most important first; [] where nothing but prompts."""
    return [name for name in (*HOW, *_SETTINGS) if getattr(one, name) != getattr(other, name)]


def compared(one: ScoreMeta, other: ScoreMeta) -> str:
    """What the comparison of two files of one pair shows."""
    different = differing(one, other)
    if (one.method in ACTIVATION_SIDE) != (other.method in ACTIVATION_SIDE):
        return "AP and WP"
    if {"method", "object"} & set(different):
        return "methods"
    if {"utility", "answer_tokens"} & set(different):
        return "utilities"
    return "settings" if different else "samples"


def agreements(study: Study, inputs: Inputs) -> Iterator[dict[str, Any]]:
    """A row for every two files, task of both, kind, side and key; `overlap` and `by_chance` are shares."""
    for (one, a), (other, b) in combinations(inputs.scores.items(), 2):
        what = {"one": one, "other": other, "compared": compared(a.meta, b.meta), "differ": differing(a.meta, b.meta)}
        for task in (task for task in a if task in b):
            for kind in Kind:
                for side, layers_L in inputs.sides.items():
                    among_Ln = a.seen(kind) & b.seen(kind) & layers_L[:, None]
                    for key in KEYS:
                        where = {"task": task, "kind": str(kind), "side": side, "key": key, "k": study.top[kind]}
                        tables = [keyed(table_of(scores, kind, task), key) for scores in (a, b)]
                        yield what | where | _agreement(tables[0], tables[1], among_Ln, study.top[kind])


def _agreement(a_Ln: torch.Tensor, b_Ln: torch.Tensor, among_Ln: torch.Tensor, k: int) -> dict[str, Any]:
    one_Ln, other_Ln = top_among(a_Ln, among_Ln, k), top_among(b_Ln, among_Ln, k)
    shared = Shared.of(one_Ln[among_Ln], other_Ln[among_Ln])
    return {
        "components": shared.components,
        "in_one": shared.one,
        "in_other": shared.other,
        "in_both": shared.both,
        "overlap": shared.share,
        "by_chance": shared.by_chance,
        "spearman": spearman(a_Ln[among_Ln], b_Ln[among_Ln]),
        "layers": {
            "one": (one_Ln & ~other_Ln).sum(1).tolist(),
            "both": (one_Ln & other_Ln).sum(1).tolist(),
            "other": (other_Ln & ~one_Ln).sum(1).tolist(),
        },
    }


# Across tasks


@dataclass(frozen=True)
class TaskGroup:
    """Tasks whose scores were made in the same way, of one expert or several: name -> (file, task)."""

    file: str
    tasks: Mapping[str, tuple[Scores, str]]


def task_groups(inputs: Inputs, name: str) -> list[TaskGroup]:
    """The tasks of one file and of those `others` that were scored in the same way; none where it is one task."""
    meta = inputs.scores[name].meta
    alike = {other: s for other, s in inputs.others.items() if alike_scored(meta, s.meta)}
    listed = [(file, task, s) for file, s in {name: inputs.scores[name], **alike}.items() for task in s]
    count = Counter(task for _, task, _ in listed)
    tasks = {task if count[task] == 1 else f"{file}: {task}": (s, task) for file, task, s in listed}
    return [TaskGroup(name, tasks)] if len(tasks) > 1 else []


def across_tasks(study: Study, inputs: Inputs, group: TaskGroup) -> Iterator[dict[str, Any]]:
    """A row for every kind, side and key: intersections of top sets [T, T], and how many are in exactly 0...T sets."""
    for kind in Kind:
        seen_Ln = torch.stack([scores.seen(kind) for scores, _ in group.tasks.values()]).all(0)
        for side, layers_L in inputs.sides.items():
            among_Ln = seen_Ln & layers_L[:, None]
            for key in KEYS:
                values = [table_of(scores, kind, task)[among_Ln] for scores, task in group.tasks.values()]
                set_Tn = torch.stack([top_set(keyed(value_n, key), study.top[kind]) for value_n in values])
                sizes, components = set_Tn.sum(1).tolist(), set_Tn.shape[1]
                pairs = [[Shared.of(one_n, other_n) for other_n in set_Tn] for one_n in set_Tn]
                yield {
                    "file": group.file, "kind": str(kind), "side": side, "key": key, "k": study.top[kind],
                    "tasks": list(group.tasks), "components": components, "sizes": sizes,
                    "shared": [[pair.both for pair in line] for line in pairs],
                    "shared_by_chance": [[pair.both_by_chance for pair in line] for line in pairs],
                    "in_exactly": in_exactly(set_Tn),
                    "in_exactly_by_chance": in_exactly_by_chance(sizes, components),
                }  # fmt: skip


PART = Part(
    name="maps",
    title="Where the scores lie, and how far rankings agree",
    work=work,
    settings=("top",),
    models=False,
    code=(
        "study/maps.py", "study/maps_page.py", "study/sets.py", "study/drawings.py", "study/inputs.py", "ranking.py",
        "pictures.py",
    ),
)  # fmt: skip
