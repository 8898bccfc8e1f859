"""Drift: how far each part of the expert moved from the base, and whether that alone predicts scores (Figs. 15, 32, 33
of arXiv 2604.13694).

By layer and module, of every head and of every neuron: the mean size of a weight's change, mean |delta|, which is
likely the paper's "average change", and the change relative to the weights, ||delta||_F / ||W||_F, without which
matrices of different scale cannot be compared (`drift_sums`). No forward pass; both models are read once.

Then, for every score file, task, kind and side: Spearman's rank correlation of drift with scores, signed and absolute.
Its control permutes the drift within layers: what lies in the interval of 200 such permutations is explained by the
layer, not by which component moved (`sets.with_control`).

Legend: L layers, n components of a kind, S tasks and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from mergekit_wp.checkpoint.folder import content_of
from mergekit_wp.console import StartProgress, percent
from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import PROJECTIONS, Component, Kind
from mergekit_wp.page import grid, render
from mergekit_wp.ranking import table_of
from mergekit_wp.scores import Scores
from mergekit_wp.study import drawings
from mergekit_wp.study.cells import cell, finite, lines_of
from mergekit_wp.study.drift_sums import (
    END_MODULES,
    LAYER_MODULES,
    DriftSums,
    StoredModel,
    drift_sums,
    mean_size,
    opened_expert,
    relative,
)
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.parts import Part, PartResult
from mergekit_wp.study.sets import KEYS, keyed, with_control
from mergekit_wp.study.study_spec import Study

MEASURES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"mean_size": mean_size, "relative": relative}
MEASURE_WORDS = {"mean_size": "mean size of a weight's change", "relative": "change relative to the weights"}
_LISTED = 10


def work(study: Study, inputs: Inputs, progress: StartProgress) -> PartResult:
    """The part: reads both models."""
    sampled = {print_.tensors for print_ in inputs.fingerprints.values()}
    if len(sampled) == 1 and content_of(study.base) == content_of(study.expert):
        raise BadInput(f"{study.expert}: the weights equal those of the base {study.base}; nothing has drifted.")
    with opened_expert(study.expert) as expert:
        sums = drift_sums(StoredModel(inputs.base), expert, inputs.geometry, progress)
    modules, ends = by_module(sums, inputs.geometry.layers), at_ends(sums)
    of_components = {kind: {name: measure(sums.of(kind)) for name, measure in MEASURES.items()} for kind in Kind}
    rows = list(correlations(study, inputs, sums, progress))
    data = {
        "measures": MEASURE_WORDS,
        "modules": modules,
        "ends": ends,
        "strongest": {str(kind): _strongest(kind, of_components[kind], study.top[kind]) for kind in Kind},
        "correlations": rows,
    }
    pictures = {"modules": drawings.module_lines({n: modules[n] for n in MEASURES}, MEASURE_WORDS)}
    heads = of_components[Kind.HEAD]["relative"]
    pictures["heads"] = drawings.heads_svg(
        heads.numpy(), "change relative to the weights", "Change of each head relative to its weights"
    )
    for kind in Kind:
        pictures[f"correlations-{kind}"] = drawings.intervals(
            _shown(rows, kind), "Spearman's rank correlation; grey: drift permuted within layers",
            f"Drift and scores of {kind}",
        )  # fmt: skip
    tables = {
        "modules": _module_lines(modules, ends),
        "correlations": lines_of(rows),
        "heads": _component_lines(Kind.HEAD, of_components[Kind.HEAD]),
    }
    tensors = {"drift": {f"{kind}/{name}": t.float() for kind in Kind for name, t in of_components[kind].items()}}
    section = _section(data, pictures, inputs.geometry.layers)
    return PartResult(data, tables, pictures, section, tensors, findings(data)[0])


def by_module(sums: DriftSums, layers: int) -> dict[str, dict[str, list[float | None]]]:
    """Measure -> module -> its value by layer."""
    return {
        name: {
            module: [
                finite(measure(sums.modules[layer, module])) if (layer, module) in sums.modules else None
                for layer in range(layers)
            ]
            for module in LAYER_MODULES
        }
        for name, measure in MEASURES.items()
    }


def at_ends(sums: DriftSums) -> dict[str, dict[str, float | None]]:
    """Measure -> embeddings, final norm, head (where it is a tensor of its own) -> its value."""
    return {
        name: {end: finite(measure(sums.modules[None, end])) for end in END_MODULES if (None, end) in sums.modules}
        for name, measure in MEASURES.items()
    }


def correlations(study: Study, inputs: Inputs, sums: DriftSums, progress: StartProgress) -> Iterator[dict[str, Any]]:
    """A row for every score file, task, kind, side, key and measure, over the components that were scored."""
    tick = progress(len(inputs.scores) * 2 * len(inputs.sides) * 2, "comparing drift with scores", "rankings")
    for name, scores in inputs.scores.items():
        for kind in Kind:
            for side, layers_L in inputs.sides.items():
                seen_Ln = scores.seen(kind) & layers_L[:, None]
                for measure, function in MEASURES.items():
                    yield from _of_ranking(name, scores, kind, side, seen_Ln, measure, function(sums.of(kind)), study)
                    tick(1)


def _of_ranking(
    name: str,
    scores: Scores,
    kind: Kind,
    side: str,
    seen_Ln: torch.Tensor,
    measure: str,
    drift_Ln: torch.Tensor,
    study: Study,
) -> Iterator[dict[str, Any]]:
    """All tasks and keys of one file at once: they share the permutations."""
    seen_Ln = seen_Ln & torch.isfinite(drift_Ln)
    if not seen_Ln.any():
        return
    rows = [(task, key) for task in scores.tasks for key in KEYS]
    score_Sn = np.stack([keyed(table_of(scores, kind, task)[seen_Ln], key).numpy() for task, key in rows])
    layer_n = seen_Ln.nonzero()[:, 0].numpy()
    found = with_control(drift_Ln[seen_Ln].numpy(), score_Sn, layer_n, study.seed)
    for (task, key), correlation in zip(rows, found, strict=True):
        yield {
            "scores": name, "task": task, "kind": str(kind), "side": side, "key": key, "measure": measure,
            "components": len(layer_n), "spearman": correlation.spearman, "control_low": correlation.low,
            "control_high": correlation.high,
        }  # fmt: skip


def _strongest(kind: Kind, tables: Mapping[str, torch.Tensor], count: int) -> dict[str, list[list[Any]]]:
    """Measure -> [name, value] of the components that moved most."""
    found = {}
    for name, table_Ln in tables.items():
        ranked = table_Ln.nan_to_num(-1.0, posinf=-1.0).flatten().sort(descending=True, stable=True)
        width = table_Ln.shape[1]
        places = zip(ranked.indices[:count].tolist(), ranked.values[:count].tolist(), strict=True)
        found[name] = [[Component(kind, at // width, at % width).name, value] for at, value in places if value >= 0]
    return found


def _module_lines(
    modules: Mapping[str, Mapping[str, list[float | None]]], ends: Mapping[str, Mapping[str, float | None]]
) -> list[list[object]]:
    lines: list[list[object]] = [["layer", "module", *MEASURES]]
    for module in LAYER_MODULES:
        by_layer = zip(*(modules[name][module] for name in MEASURES), strict=True)
        lines += [[layer, module, *values] for layer, values in enumerate(by_layer)]
    return lines + [[None, end, *(ends[name][end] for name in MEASURES)] for end in ends["relative"]]


def _component_lines(kind: Kind, tables: Mapping[str, torch.Tensor]) -> list[list[object]]:
    layers, width = tables["relative"].shape
    places = [(layer, index) for layer in range(layers) for index in range(width)]
    named: list[list[object]] = [
        [Component(kind, *at).name, *at, *(finite(tables[name][at]) for name in MEASURES)] for at in places
    ]
    return [["component", "layer", "index", *MEASURES], *named]


def _shown(rows: list[dict[str, Any]], kind: Kind) -> list[tuple[str, float, float, float]]:
    """(label, correlation, low, high) of absolute scores and relative drift over all layers."""
    chosen = [r for r in rows if r["kind"] == kind and (r["side"], r["key"], r["measure"]) == _SHOWN]
    return [
        (f"{r['scores']}: {r['task']}", r["spearman"], r["control_low"], r["control_high"])
        for r in chosen
        if r["spearman"] is not None
    ]


_SHOWN = ("all", "absolute", "relative")


def findings(data: Mapping[str, Any]) -> list[str]:
    """What stands out, in sentences made from the numbers."""
    moved = data["modules"]["relative"]
    means = {module: float(np.mean([v for v in moved[module] if v is not None])) for module in PROJECTIONS}
    most, *_, least = sorted(means, key=lambda module: -means[module])
    found = [
        f"Relative to its weights, {most}_proj moved most ({percent(means[most], 3)} on average over layers) and "
        f"{least}_proj least ({percent(means[least], 3)})."
    ]
    for kind in Kind:
        rows = [r for r in data["correlations"] if r["kind"] == kind and r["spearman"] is not None]
        rows = [r for r in rows if (r["side"], r["key"], r["measure"]) == _SHOWN]
        if rows:
            low, high = min(r["spearman"] for r in rows), max(r["spearman"] for r in rows)
            beyond = sum(r["spearman"] > r["control_high"] for r in rows)
            found.append(
                f"Drift and the size of scores of {kind} correlate by {low:.2f} to {high:.2f}; in {beyond} of "
                f"{len(rows)} rankings that is more than the layer alone explains."
            )
    return found


def _section(data: Mapping[str, Any], pictures: Mapping[str, Any], layers: int) -> Any:
    ends = [["", *MEASURE_WORDS.values()]]
    for end in data["ends"]["relative"]:
        ends.append([end, *(cell(data["ends"][name][end], ".4g") for name in MEASURES)])
    head = ["scores", "task", "kind", "side", "key", "measure", "Spearman", "control"]
    rows = [head] + [
        [r["scores"], r["task"], r["kind"], r["side"], r["key"], r["measure"], cell(r["spearman"], ".3f"),
         f"{cell(r['control_low'], '.3f')} to {cell(r['control_high'], '.3f')}"]
        for r in data["correlations"]
    ]  # fmt: skip
    strongest = [["rank", *(f"{kind}: {m}" for kind in Kind for m in MEASURES)]]
    columns = [data["strongest"][kind][m][:_LISTED] for kind in Kind for m in MEASURES]
    for rank in range(max(map(len, columns))):
        strongest.append([str(rank + 1), *(f"{c[rank][0]} {c[rank][1]:.4g}" if rank < len(c) else "" for c in columns)])
    return render(
        "study_drift.html", findings=findings(data), pictures=pictures, ends=grid(ends), rows=grid(rows),
        strongest=grid(strongest), kinds=list(map(str, Kind)),
    )  # fmt: skip


PART = Part(
    name="drift",
    title="What moved",
    work=work,
    settings=("top", "seed"),
    models=True,
    code=("study/drift.py", "study/drift_sums.py", "study/sets.py", "study/drawings.py", "geometry.py"),
)
