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
from statistics import fmean
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from mergekit_wp.choices import ACTIVATION_SIDE
from mergekit_wp.console import StartProgress
from mergekit_wp.foreign import file_parts
from mergekit_wp.geometry import Component, Kind
from mergekit_wp.page import grid, render
from mergekit_wp.pictures import expert_colour, map_svg, scale_of, score_map
from mergekit_wp.ranking import spearman, table_of
from mergekit_wp.scores import ScoreMeta, Scores
from mergekit_wp.study import drawings
from mergekit_wp.study.drawings import Shown
from mergekit_wp.study.inputs import ALL, DOWN, HOW, UP, Inputs, alike_scored
from mergekit_wp.study.parts import Answer, Note, Part, PartResult
from mergekit_wp.study.sets import KEYS, SIGNED, Shared, in_exactly, in_exactly_by_chance, keyed, top_among, top_set
from mergekit_wp.study.study_spec import Study

_LISTED = 10
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
    pictures = _pictures(inputs, data)
    tables = {
        "top": list(_top_lines(data["files"])),
        "agreement": _agreement_lines(data["agreement"]),
        "layers": list(_layer_lines(data)),
        "tasks": list(_task_lines(data["tasks"])),
    }
    drawn = {each.file: each.picture for shown in pictures.values() for each in shown}
    return PartResult(
        data, tables, drawn, _section(data, pictures), answers=_answers(data, pictures), notes=list(_notes(data))
    )


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


def _answers(data: Mapping[str, Any], pictures: Mapping[str, list[Shown]]) -> dict[str, Answer]:
    """What of it stands at the top of the page: how far the models are apart, and where the first file's scores lie."""
    found = {}
    if pictures["gaps"]:
        found["behaviour"] = Answer(_apart(data["files"]), pictures["gaps"][0].file)
    if where := _where(data):
        found["where"] = Answer(where, pictures["neurons"][0].file)
    return found


_UNITS = {
    "kl": "KL of the next token from the expert, nats",
    "anchor": "cosine with the task's direction at the anchor, expert less base",
    "projection": "cosine with the task's direction after the last layer, expert less base",
}


def _apart(files: Mapping[str, Any]) -> str:
    """By the first metric of all files."""
    metric, gaps = next((metric, gaps) for file in files.values() for metric, gaps in file["gaps"].items())
    ordered = sorted(gaps, key=lambda task: -gaps[task]["mean"])
    most, least = ordered[0], ordered[-1]
    mean = fmean(gap["mean"] for gap in gaps.values())
    ends = f": most on {most} ({gaps[most]['mean']:.3g}), least on {least} ({gaps[least]['mean']:.3g})"
    on = f"on average over {len(gaps)} tasks" if len(gaps) > 1 else f"on {most}"
    return f"Expert and base are {mean:.3g} apart {on} ({_UNITS[metric]}){ends if len(gaps) > 1 else ''}."


def _notes(data: Mapping[str, Any]) -> Iterator[Note]:
    """The scores of the top sets."""
    for name, file in data["files"].items():
        for task, kinds in file["tasks"].items():
            for kind, found in kinds.items():
                for rank, (component, score) in enumerate(found["top"][ALL][SIGNED], start=1):
                    yield Note(component, name, task, f"score {score:.4g}, number {rank} of the {kind}")


def _where(data: Mapping[str, Any]) -> str:
    """In which layers the first file's top sets lie."""
    name, file = next(iter(data["files"].items()))
    found = []
    for kind in Kind:
        count_L = np.sum([of[kind]["layers"][ALL][SIGNED] for of in file["tasks"].values()], axis=0)
        if count_L.sum():
            first, last = half_in(count_L)
            share, chance = count_L[first : last + 1].sum() / count_L.sum(), (last + 1 - first) / len(count_L)
            where = f"layer {first}" if first == last else f"layers {first} to {last}"
            found.append(f"{share:.0%} of the top {kind} lie in {where} ({chance:.0%} of all layers)")
    return f"By {name}, {' and '.join(found)}." if found else ""


def half_in(count_L: np.ndarray) -> tuple[int, int]:
    """The first and the last of the fewest adjacent layers in which half of all lie; of equal ones, where most lie."""
    below = np.concatenate([[0], np.cumsum(count_L)])
    for width in range(1, len(count_L) + 1):
        inside = below[width:] - below[:-width]
        if 2 * inside.max() >= count_L.sum():
            return int(inside.argmax()), int(inside.argmax()) + width - 1
    raise AssertionError("all layers together have all")


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


# Pictures, tables, the page


def _pictures(inputs: Inputs, data: Mapping[str, Any]) -> dict[str, list[Shown]]:
    return {
        "gaps": list(_gap_bars(data["files"])),
        "maps": list(_head_maps(inputs)),
        "neurons": list(_neuron_layers(inputs, data["files"])),
        "agreement": list(_agreement_layers(inputs, data["agreement"])),
        "tasks": list(_task_pictures(data["tasks"])),
    }


def _gap_bars(files: Mapping[str, Any]) -> Iterator[Shown]:
    """A picture for each metric: how far the models are apart on each task, by the first file that has it."""
    found: dict[str, dict[str, Any]] = {}
    for file in files.values():
        for metric, gaps in file["gaps"].items():
            found.setdefault(metric, gaps)
    for metric, gaps in found.items():
        rows = [(task, gap["mean"]) for task, gap in sorted(gaps.items(), key=lambda item: -item[1]["mean"])]
        described = f"How far base and expert are apart on each task, by {metric}"
        yield Shown(f"gaps-{metric}", described, drawings.bars(rows, _UNITS[metric], described))


def _head_maps(inputs: Inputs) -> Iterator[Shown]:
    wanted = [(name, scores, task) for name, scores in inputs.scores.items() for task in scores]
    files = file_parts(f"heads-{name}-{task}" for name, _, task in wanted)
    for file, (name, scores, task) in zip(files, wanted, strict=True):
        own = scores[task]
        colour = expert_colour(list(inputs.scores).index(name))
        picture = map_svg(own, Kind.HEAD, scale_of([score_map(own, Kind.HEAD)]), colour, f"{name}, {task}")
        yield Shown(file, f"{name}: {task}", picture, task, name)


def _split(inputs: Inputs) -> list[str]:
    """The sides that together are the model, as far as an anchor layer parts it."""
    return [side for side in (UP, DOWN) if side in inputs.sides] or [ALL]


def _neuron_layers(inputs: Inputs, files: Mapping[str, Any]) -> Iterator[Shown]:
    for file, (name, found) in zip(file_parts(f"neurons-{name}" for name in files), files.items(), strict=True):
        panels = {
            task: {f"top of {side}": kinds["neurons"]["layers"][side][SIGNED] for side in _split(inputs)}
            for task, kinds in found["tasks"].items()
        }
        picture = drawings.layer_bars(panels, "top neurons", f"Layers of the top neurons of {name}", by_task=True)
        yield Shown(file, name, picture, scores=name)


def _agreement_layers(inputs: Inputs, rows: list[dict[str, Any]]) -> Iterator[Shown]:
    """Summed over tasks, and over the sides, whose top sets are each their own."""
    pairs = list(dict.fromkeys((row["one"], row["other"]) for row in rows))
    for file, (one, other) in zip(file_parts(f"layers-{a}-{b}" for a, b in pairs), pairs, strict=True):
        panels = {}
        for kind in Kind:
            own = [r for r in rows if (r["one"], r["other"], r["kind"], r["key"]) == (one, other, kind, SIGNED)]
            tables = [r["layers"] for r in own if r["side"] in _split(inputs)]
            stacks = {"one": f"{one} alone", "both": "both", "other": f"{other} alone"}
            panels[str(kind)] = {
                label: np.sum([table[part] for table in tables], axis=0).tolist() for part, label in stacks.items()
            }
        picture = drawings.layer_bars(panels, "in top sets", f"Top sets of {one} and {other}")
        yield Shown(file, f"{one}, {other}", picture)


def _task_pictures(rows: list[dict[str, Any]]) -> Iterator[Shown]:
    shown = [row for row in rows if (row["side"], row["key"]) == (ALL, SIGNED)]
    files = list(dict.fromkeys(row["file"] for row in shown))
    for part, name in zip(file_parts(files), files, strict=True):
        own = [row for row in shown if row["file"] == name]
        panels = {f"{row['kind']}, top {row['k']}": row for row in own}
        matrix = {title: np.array(row["shared"]) for title, row in panels.items()}
        counts = {title: (row["in_exactly"][1:], row["in_exactly_by_chance"][1:]) for title, row in panels.items()}
        names = own[0]["tasks"]
        shared = drawings.matrix_svg(matrix, names, f"Shared by the tasks of {name}")
        yield Shown(f"shared-{part}", name, shared, scores=name)
        exactly = drawings.against_chance(counts, f"How many tasks share a component, {name}")
        yield Shown(f"exactly-{part}", name, exactly, scores=name)


def _top_lines(files: Mapping[str, Any]) -> Iterator[list[object]]:
    yield ["scores", "task", "kind", "side", "key", "rank", "component", "score"]
    for name, file in files.items():
        for task, kinds in file["tasks"].items():
            for kind, found in kinds.items():
                for side, keys in found["top"].items():
                    for key, components in keys.items():
                        for rank, (component, score) in enumerate(components, start=1):
                            yield [name, task, kind, side, key, rank, component, score]


def _agreement_lines(rows: list[dict[str, Any]]) -> list[list[object]]:
    columns = (
        "one", "other", "compared", "differ", "task", "kind", "side", "key", "k", "components", "in_one", "in_other",
        "in_both", "overlap", "by_chance", "spearman",
    )  # fmt: skip
    lines = [[", ".join(row[c]) if c == "differ" else row[c] for c in columns] for row in rows]
    return [list(columns), *lines]


def _layer_lines(data: Mapping[str, Any]) -> Iterator[list[object]]:
    """Of agreements: how many of each layer are in one set alone, in both, in the other alone."""
    yield ["one", "other", "task", "kind", "side", "key", "layer", "only_one", "in_both", "only_other"]
    for row in data["agreement"]:
        counts = zip(row["layers"]["one"], row["layers"]["both"], row["layers"]["other"], strict=True)
        for layer, found in enumerate(counts):
            yield [*(row[c] for c in ("one", "other", "task", "kind", "side", "key")), layer, *found]


def _task_lines(rows: list[dict[str, Any]]) -> Iterator[list[object]]:
    yield ["scores", "kind", "side", "key", "k", "components", "what", "one", "other", "found", "by_chance"]
    for row in rows:
        where = [row[c] for c in ("file", "kind", "side", "key", "k", "components")]
        tasks = row["tasks"]
        for i, j in combinations(range(len(tasks)), 2):
            yield [*where, "shared", tasks[i], tasks[j], row["shared"][i][j], row["shared_by_chance"][i][j]]
        for m, found in enumerate(row["in_exactly"]):
            yield [*where, "in exactly", m, None, found, row["in_exactly_by_chance"][m]]


def _section(data: Mapping[str, Any], pictures: Mapping[str, list[Shown]]) -> Markup:
    return render(
        "study_maps.html", top=data["top"], sides=_sides_words(data["sides"]), pictures=pictures,
        agreement=grid(_agreement_grid(data["agreement"])) if data["agreement"] else None,
        top_table=grid(_top_grid(data["files"])),
    )  # fmt: skip


def _sides_words(sides: Mapping[str, list[int]]) -> str:
    """Which layers `up` and `down` are; empty where there is no anchor layer."""
    words = {UP: "up", DOWN: "down"}
    return "; ".join(f"{words[s]}: layers {at[0]} to {at[-1]}" for s, at in sides.items() if s in words)


def _agreement_grid(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Means over tasks of signed rankings; a line for every two files, kind and side that both scored."""
    lines = [["files", "compared", "kind", "side", "overlap (tasks' range)", "by chance", "Spearman"]]
    keys = ("one", "other", "compared", "kind", "side")
    shown = [row for row in rows if row["key"] == SIGNED and row["components"]]
    for place in dict.fromkeys(tuple(row[key] for key in keys) for row in shown):
        own = [row for row in shown if tuple(row[key] for key in keys) == place]
        shares = [row["overlap"] for row in own if row["overlap"] is not None]
        ranks = [row["spearman"] for row in own if row["spearman"] is not None]
        overlap = f"{fmean(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})" if shares else "-"
        chance = f"{fmean(row['by_chance'] for row in own):.3f}"
        one, other, *rest = place
        lines.append([f"{one}, {other}", *rest, overlap, chance, f"{fmean(ranks):.3f}" if ranks else "-"])
    return lines


def _top_grid(files: Mapping[str, Any]) -> list[list[str]]:
    columns = {
        f"{name}, {task}: {kind}": found["top"][ALL][SIGNED][:_LISTED]
        for name, file in files.items()
        for task, kinds in file["tasks"].items()
        for kind, found in kinds.items()
    }
    lines = [["ranking", *(str(rank) for rank in range(1, _LISTED + 1))]]
    for label, components in columns.items():
        cells = [f"{name} {score:.4f}" for name, score in components]
        lines.append([label, *cells, *[""] * (_LISTED - len(cells))])
    return lines


PART = Part(
    name="maps",
    title="Where the scores lie, and how far rankings agree",
    work=work,
    settings=("top",),
    models=False,
    code=("study/maps.py", "study/sets.py", "study/drawings.py", "study/inputs.py", "ranking.py", "pictures.py"),
)
