"""Links: do heads gather what neurons below them wrote, and is that more than any head would show? (Tables 1 and 8, the
circuit of Eq. 87; arXiv 2604.13694.)

The paper's chain is source neurons (weight side), heads that gather them (activation side), neurons that carry the
answer out. `link_descent` measures how much of what each component does runs through each of the heads; `link_run`
chooses these and their controls; `link_tables` says what comes of it. Thresholds are none in the paper: top sets here,
of the study's `top`, at most a third of a kind.

What is to be believed is the flow, which adds up: the shares of all heads of a layer and of what passes them by are 1.
Table 1 is given as the paper has it, with what chance, other heads and noise give.

Needs prompts. One descent of the base, which carries a gradient for every target; where no score file ranks the
activation side at the anchor, `atp` is computed first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup
from scipy.stats import binomtest

from mergekit_wp.console import StartProgress, percent
from mergekit_wp.foreign import file_parts
from mergekit_wp.geometry import Kind
from mergekit_wp.page import grid, render
from mergekit_wp.study.cells import cell, lines_of
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.link_picture import circuit_svg
from mergekit_wp.study.link_run import anchor_of, run
from mergekit_wp.study.link_tables import (
    ATTENTION,
    HEADS,
    NOISE,
    OTHERS,
    SHOWN,
    beats,
    circuit,
    flow,
    name_of,
    overlaps,
    sources,
    table_1,
)
from mergekit_wp.study.parts import Answer, Part, PartResult
from mergekit_wp.study.study_spec import Study

_SURE = 0.05


def work(study: Study, inputs: Inputs, progress: StartProgress) -> PartResult:
    """The part: up through both models and down through the base, over the study's prompts."""
    assert inputs.fingerprints  # the models are those that were scored
    found, anchor = run(study, inputs, progress), anchor_of(inputs)
    k = study.top[Kind.NEURON]
    overlap_rows, flow_rows, source_rows = (
        [row for task, each in found.items() for row in rows(task, each)]
        for rows in (
            lambda task, each: overlaps(task, each, k),
            lambda task, each: flow(task, each, k),
            lambda task, each: sources(study, task, each),
        )
    )
    circuits = {task: circuit(study, inputs, task, each, anchor) for task, each in found.items()}
    data: dict[str, Any] = {
        "anchor_layer": anchor,
        "k": k,
        "targets": {task: [name_of(target) for target in _real(each)] for task, each in found.items()},
        "table_1": list(table_1(overlap_rows)),
        "overlaps": overlap_rows,
        "flow": flow_rows,
        "sources": source_rows,
    }
    tables = {name: lines_of(rows) for name in ("table_1", "overlaps", "flow", "sources") if (rows := data[name])}
    tensors = {
        "links": {
            f"{task}/{kind}": each.links.tables[kind][[1 + each.links.targets.index(t) for t in _real(each)]].float()
            for task, each in found.items()
            for kind in Kind
        }
        | {f"{task}/attr/{kind}": each.links.attr(kind).float() for task, each in found.items() for kind in Kind}
    }
    layers = inputs.geometry.layers
    files = file_parts(f"circuit-{task}" for task in circuits)
    pictures = {file: circuit_svg(own, layers, task) for file, (task, own) in zip(files, circuits.items(), strict=True)}
    said = findings(data)
    section = _section(data, list(zip(circuits, pictures, pictures.values(), strict=True)), said)
    answers = {"path": Answer(said[0], next(iter(pictures), ""))}
    return PartResult(data, tables, pictures, section, tensors, answers=answers, documents={"circuit": circuits})


def _real(each: Any) -> list[Any]:
    """The targets whose needs are their own."""
    return [target for target in each.chosen.all if target.noise is None and target not in each.chosen.attention]


def findings(data: Mapping[str, Any]) -> list[str]:
    """What is seen, and whether it is more than the controls give, in sentences made from the numbers."""
    if not any(row["role"] == HEADS for row in data["flow"]):
        return ["No head gathers anything here: none has a positive score and below it what the expert changed for it."]
    shares = [row["share"] for row in data["flow"] if row["role"] == ATTENTION]
    mean, least, most = (percent(of(shares), 1) for of in (fmean, min, max))
    found = [
        f"Of what the top {data['k']} neurons below a layer do for the anchor, all heads of the layer together pass on "
        f"{mean} on average ({least} to {most} over layers and tasks); the rest passes by them, on the stream of its "
        "own position.",
        _compared(data["flow"], "share", "One head passes on", ".2%"),
    ]
    rows = [row for row in data["overlaps"] if row["k"] == data["k"] and _is_shown(row)]
    neurons = [row for row in data["sources"] if row["kind"] == Kind.NEURON]
    near = f"Of the {data['k']} neurons that a head needs most, the share among the {data['k']} of largest attr is"
    for own, measure, what, form in (
        (rows, "overlap", near, ".2f"),
        (neurons, "sources", "The number of source neurons of a head is", ".1f"),
    ):
        if chance := [row["by_chance"] for row in own if row["role"] == HEADS]:
            found.append(f"{_compared(own, measure, what, form)} Chance gives {fmean(chance):{form}}.")
    return found


def _compared(rows: Sequence[Mapping[str, Any]], measure: str, what: str, form: str) -> str:
    """The mean of AP heads and of both controls, and whether the first is surely higher."""
    means = {
        role: fmean(own) for role in (HEADS, OTHERS, NOISE) if (own := [r[measure] for r in rows if r["role"] == role])
    }
    verdicts = []
    for role in (OTHERS, NOISE):
        more, pairs = beats(rows, measure, role)
        if pairs:
            sure = binomtest(more, pairs, alternative="greater").pvalue < _SURE
            verdicts.append(f"{'more' if sure else 'not surely more'} than {role} ({more} of {pairs} pairs)")
    words = ", ".join(f"{cell(mean, form)} ({role})" for role, mean in means.items())
    return f"{what} {words}: {' and '.join(verdicts) or 'no control'}."


def _is_shown(row: Mapping[str, Any]) -> bool:
    return all(row[key] == value for key, value in SHOWN.items())


def _section(data: Mapping[str, Any], pictures: Sequence[tuple[str, str, Markup]], said: Sequence[str]) -> Markup:
    head = ["task", "heads", "K", "largest", "mean of five", "mean", "by chance"]
    lines = [
        [row["task"], row["role"], str(row["k"]), *(f"{row[m]:.3f}" for m in ("most", "five", "mean", "by_chance"))]
        for row in data["table_1"]
        if _is_shown(row)
    ]
    layers = sorted({row["layer"] for row in data["flow"]})
    shares = [["task", *(f"layer {layer}" for layer in layers)]]
    for task in dict.fromkeys(row["task"] for row in data["flow"]):
        own = {row["layer"]: row["share"] for row in data["flow"] if (row["task"], row["role"]) == (task, ATTENTION)}
        shares.append([task, *(cell(own.get(layer), ".1%") for layer in layers)])
    return render(
        "study_links.html", findings=said, pictures=pictures, table=grid([head, *lines]) if lines else None,
        shares=grid(shares) if len(shares) > 1 else None, anchor=data["anchor_layer"], k=data["k"],
    )  # fmt: skip


PART = Part(
    name="links",
    title="What runs through which heads",
    work=work,
    settings=("top", "seed", "prompts"),
    models=True,
    prompts=True,
    code=(
        "study/links.py", "study/link_run.py", "study/link_descent.py", "study/link_tables.py", "study/link_picture.py",
        "study/sets.py", "scoring/passes.py", "scoring/first_order.py", "scoring/hooks.py", "scoring/sweep.py",
    ),
)  # fmt: skip
