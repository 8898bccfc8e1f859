"""What the part `maps` says and draws: tables, score maps, layer histograms, sentences, and its section of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup

from mergekit_wp.console import percent
from mergekit_wp.foreign import file_parts
from mergekit_wp.geometry import Kind
from mergekit_wp.page import grid, render
from mergekit_wp.pictures import expert_colour, map_svg, scale_of, score_map
from mergekit_wp.study import drawings
from mergekit_wp.study.cells import cell, draws
from mergekit_wp.study.drawings import Shown
from mergekit_wp.study.inputs import ALL, DOWN, UP, Inputs
from mergekit_wp.study.parts import Answer, Note, PartResult
from mergekit_wp.study.sets import SIGNED

_LISTED = 10


def result_of(inputs: Inputs, data: Mapping[str, Any]) -> PartResult:
    """All that is written of the part."""
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


# The top of the page


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
            found.append(f"{percent(share)} of the top {kind} lie in {where} ({percent(chance)} of all layers)")
    return f"By {name}, {' and '.join(found)}." if found else ""


def half_in(count_L: np.ndarray) -> tuple[int, int]:
    """The first and the last of the fewest adjacent layers in which half of all lie; of equal ones, where most lie."""
    below = np.concatenate([[0], np.cumsum(count_L)])
    for width in range(1, len(count_L) + 1):
        inside = below[width:] - below[:-width]
        if 2 * inside.max() >= count_L.sum():
            return int(inside.argmax()), int(inside.argmax()) + width - 1
    raise AssertionError("all layers together have all")


# Pictures and tables


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
        chance, rank = fmean(row["by_chance"] for row in own), fmean(ranks) if ranks else None
        one, other, *rest = place
        lines.append([f"{one}, {other}", *rest, draws(shares or None), cell(chance, ".3f"), cell(rank, ".3f")])
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
