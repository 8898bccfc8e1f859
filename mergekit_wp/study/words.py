"""Words: what directions, neurons and heads say through the unembedding (Tables 5-7, Fig. 28 of arXiv 2604.13694).

Every vector goes through the final norm and the head (`readout`); its words are the tokens at the upper end, its peak
is by how many standard deviations the first stands above the mean of all tokens. In a table of random numbers something
is always first, so each peak stands beside those of a control.

    directions   of the score files that have some, at their anchor layer; with the study's prompts, after every layer.
                 Controls: 200 random vectors; the direction's own numbers in random channels, 20 times; the words of
                 two random halves of the prompts, and their difference, which no instruction made; the base's head
    neurons      of every ranking the top 50, signed, above the anchor layer where that is scored (else in all layers):
                 the expert's column of W_down, and its change W' - W. With prompts, times the sign of the neuron's mean
                 activation at the anchor; without, under the sign that peaks higher, in the control too
    heads        with prompts, the top 10: what W_o writes of the head's mean activation at the anchor

The control of neurons and heads are twice as many others of the same layers (or as many as there are), drawn at random,
which are read in the same way; and the same components of the base, with the same activations, through the base's head.
A word's size is the mean of its probability over the top neurons, each counted by its score.

Legend: N vectors, L layers, n components of a kind, D residual width, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from markupsafe import Markup

from mergekit_wp.checkpoint.folder import local_folder
from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.checkpoint.vocabulary import load_tokenizer, tokenizer_in
from mergekit_wp.console import StartProgress, percent
from mergekit_wp.errors import enough_memory
from mergekit_wp.foreign import file_parts
from mergekit_wp.geometry import Kind
from mergekit_wp.page import grid, render, render_text
from mergekit_wp.scoring.models.load import load_pair
from mergekit_wp.study import drawings
from mergekit_wp.study.at_anchor import Activity, HalvedDirections, anchor_activity, halved_directions
from mergekit_wp.study.cells import cell
from mergekit_wp.study.drift_sums import StoredModel, opened_expert
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.parts import Note, Part, PartResult
from mergekit_wp.study.readings import (
    FROM_PROMPTS,
    HALVES,
    SIZED,
    Direction,
    Readouts,
    of_files,
    rankings,
    read_directions,
    read_rankings,
)
from mergekit_wp.study.readout import Readout, TokenNames
from mergekit_wp.study.study_spec import Study

_DRAWN = 12
_LISTED, _NOTED = 8, 5


def work(study: Study, inputs: Inputs, progress: StartProgress) -> PartResult:
    """The part: reads final norms, heads and what the components write through; with prompts, runs the models."""
    assert inputs.fingerprints  # the models are those that were scored
    names = TokenNames(_tokenizer(study, inputs))
    directions = list(of_files(inputs))
    activity: dict[str, Activity] = {}
    if study.prompts:
        halved, activity = _run(inputs, progress)
        directions += [Direction(FROM_PROMPTS, task, layer, found) for task, found in halved.items() for layer in
                       range(inputs.geometry.layers)]  # fmt: skip
    chosen = list(rankings(study, inputs, activity))
    with opened_expert(study.expert) as stored:
        both = Readouts(Readout(StoredModel(inputs.base), names.ids), Readout(stored, names.ids), names, study.seed)
        tick = progress(2, "reading words", "steps")
        direction_rows, chance = read_directions(both, directions)
        tick(1)
        ranking_rows = read_rankings(both, inputs, chosen, activity)
        tick(1)
    data = {
        "tokens": {"named": len(both.expert.ids_n), "rows": stored.shape("lm_head.weight")[0]},
        "random_directions": chance,
        "directions": direction_rows,
        "rankings": ranking_rows,
        "across_tasks": list(across_tasks(ranking_rows)),
    }
    pictures = _pictures(data, inputs)
    tables = {
        "directions": list(_direction_lines(direction_rows)),
        "components": list(_component_lines(ranking_rows)),
        "sizes": list(_size_lines(ranking_rows)),
    }
    return PartResult(
        data, tables, pictures, _section(data, pictures), headline=next(iter(findings(data)), ""),
        notes=list(_notes(ranking_rows)),
    )  # fmt: skip


def _tokenizer(study: Study, inputs: Inputs) -> Any:
    """The expert's own (of a LoRA, the adapter's), else the base's."""
    lora = read_reference(study.expert).lora
    folders = [*([local_folder(lora)] if lora else []), inputs.expert.folder]
    own = next((each for each in map(tokenizer_in, folders) if each is not None), None)
    return own or load_tokenizer(inputs.base.name, inputs.base.folder, remote_code=False)


def _run(inputs: Inputs, progress: StartProgress) -> tuple[dict[str, HalvedDirections], dict[str, Activity]]:
    """Of every task of the prompts: directions after every layer, activations at the anchor."""
    job, ready = inputs.ready
    tasks = ready.tasks
    total = sum(2 * len(task.extraction) + len(task.scoring) for task in tasks)
    with enough_memory(f"prompts: batch_size: {job.batch_size} prompts do not fit on the device; lower it."):
        pair = load_pair(job, ready.checked)
        tick = progress(total, "reading activations", "prompts")
        found = halved_directions(pair, tasks, job.batch_size, job.seed, tick)
        active = anchor_activity(pair.expert, tasks, job.batch_size, tick)
    names = [task.task for task in tasks]
    return dict(zip(names, found, strict=True)), dict(zip(names, active, strict=True))


def across_tasks(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of every file and kind with several tasks: the mean share of the largest words that two tasks have in common, of
    the top components and of the others."""
    for file, kind in dict.fromkeys((row["file"], row["kind"]) for row in rows):
        own = [row for row in rows if (row["file"], row["kind"]) == (file, kind)]
        if len(own) < 2:
            continue
        found = {"file": file, "kind": kind, "tasks": len(own), "words": SIZED}
        for key in ("largest", "largest_of_others"):
            pairs = combinations([set(row[key]) for row in own], 2)
            found[key] = fmean(len(one & other) / max(1, len(one)) for one, other in pairs)
        yield found


# What is said of it: pictures, tables, the page


def findings(data: Mapping[str, Any]) -> list[str]:
    """What stands out, in sentences made from the numbers."""
    found = []
    rows, chance = [row for row in data["directions"] if row["peak"] is not None], data["random_directions"]
    if rows:
        beyond = [row for row in rows if row["peak"] > max(chance["high"], row["shuffled_peak"])]
        best = max(rows, key=lambda row: row["peak"])
        found.append(
            f"{len(beyond)} of {len(rows)} directions peak above random ones (95 % of these: {chance['low']:.1f} to "
            f"{chance['high']:.1f} standard deviations) and above their own numbers in random channels; the highest "
            f"is {best['task']} after layer {best['layer']} at {best['peak']:.1f}."
        )
        halved = [row for row in rows if row["noise_peak"] is not None]
        if halved:
            above = sum(row["peak"] > row["noise_peak"] for row in halved)
            found.append(
                f"Two random halves of the prompts share {percent(fmean(r['shared_by_halves'] for r in halved))} of a "
                f"direction's words; {above} of {len(halved)} directions peak above the difference of the halves, "
                "which no instruction made."
            )
    for file, kind in dict.fromkeys((row["file"], row["kind"]) for row in data["rankings"]):
        rows = [row for row in data["rankings"] if (row["file"], row["kind"]) == (file, kind)]
        found += [_of_rankings(file, kind, rows)] if all(row["peak"]["p"] is not None for row in rows) else []
    return found


def _of_rankings(file: str, kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """All tasks of a file together."""

    def compared(key: str) -> str:
        own = [row[key] for row in rows if row[key]["p"] is not None]
        if not own:
            return "does not move"
        higher, beyond = fmean(each["higher"] for each in own), sum(each["p"] < 0.05 for each in own)
        sure = f"surely so, p < 0.05, in {beyond} of {len(own)} tasks"
        return f"peaks higher than another's in {percent(higher)} of cases ({sure})"

    shared, others = (fmean(row[key] for row in rows) for key in ("shared_with_base", "shared_with_base_others"))
    return (
        f"{file}: what one of the top {kind} writes {compared('peak')}; its change {compared('change_peak')}; half is "
        f"chance. In the base they write {percent(shared)} of these words already, others {percent(others)}."
    )


def _pictures(data: Mapping[str, Any], inputs: Inputs) -> dict[str, Markup]:
    found = {}
    by_layer: dict[str, list[float | None]] = {}
    noise: dict[str, list[float | None]] = {}
    for row in data["directions"]:
        if row["source"] == FROM_PROMPTS:
            by_layer.setdefault(row["task"], []).append(row["peak"])
            noise.setdefault(row["task"], []).append(row["noise_peak"])
    if by_layer:
        chance = data["random_directions"]
        found["directions"] = drawings.layer_lines(
            by_layer, noise, (chance["low"], chance["high"]), "peak, standard deviations",
            "How far the first word of each task's direction stands out, by layer",
        )  # fmt: skip
    files = [name for name in inputs.scores if any(row["file"] == name for row in data["rankings"])]
    for part, name in zip(file_parts(f"neurons-{name}" for name in files), files, strict=True):
        panels = {
            row["task"]: [(word, size, base, other) for word, _id, size, base, other in row["sizes"][:_DRAWN]]
            for row in data["rankings"]
            if (row["file"], row["kind"]) == (name, Kind.NEURON)
        }
        found[part] = drawings.word_bars(panels, f"Words of the top neurons of {name} by size")
    return found


def _direction_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[object]]:
    columns = ("source", "task", "layer", "peak", "shuffled_peak", "shared_with_base", *HALVES)
    yield [*columns, "words", "ids", "lowest"]
    for row in rows:
        yield [*(row[c] for c in columns), _joined(row["words"]), _joined(row["ids"]), _joined(row["lowest"])]


def _component_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[object]]:
    columns = ("name", "score", "sign", "peak", "shared_with_base", "change_peak")
    texts = ("words", "ids", "lowest", "base_words", "change_words")
    yield ["scores", "task", "kind", "side", *columns, *texts]
    for row in rows:
        for each in row["components"]:
            where = [row[c] for c in ("file", "task", "kind", "side")]
            yield [*where, *(each[c] for c in columns), *(_joined(each[c]) for c in texts)]


def _size_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[object]]:
    yield ["scores", "task", "kind", "word", "id", "size", "in_base", "of_others"]
    for row in rows:
        for size in row["sizes"]:
            yield [row["file"], row["task"], row["kind"], *size]


def _joined(words: Sequence[object]) -> str:
    return " ".join(map(str, words))


def _notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[Note]:
    """The first words of every component that was read."""
    for row in rows:
        for each in row["components"]:
            yield Note(each["name"], row["file"], row["task"], f"writes {_joined(each['words'][:_NOTED])}")


def _coded(words: Sequence[str]) -> Markup:
    return render_text("{% for word in words %}<code>{{ word }}</code> {% endfor %}", words=words)


def _section(data: Mapping[str, Any], pictures: Mapping[str, Markup]) -> Markup:
    head = ["task", "layer", "words", "peak", "random channels", "halves share", "base shares"]
    shown = [
        [row["task"], str(row["layer"]), _coded(row["words"]),
         *(cell(row[x], ".1f") for x in ("peak", "shuffled_peak")),
         *(cell(row[x], ".0%") for x in ("shared_by_halves", "shared_with_base"))]
        for row in data["directions"]
    ]  # fmt: skip
    tops = []
    for row in data["rankings"]:
        lines = [
            [each["name"], f"{each['score']:.4f}", _coded(each["words"]), cell(each["peak"], ".1f"),
             cell(each["shared_with_base"], ".0%"), _coded(each["change_words"]), cell(each["change_peak"], ".1f")]
            for each in row["components"][:_LISTED]
        ]  # fmt: skip
        title = f"{row['file']}, {row['task']}: {row['kind']}, {row['side']} layers"
        columns = [row["kind"][:-1], "score", "words", "peak", "base shares", "words of the change", "its peak"]
        tops.append((row, title, grid([columns, *lines])))
    return render(
        "study_words.html", findings=findings(data), pictures=pictures, tokens=data["tokens"],
        directions=grid([head, *shown]) if shown else None, tops=tops, across=data["across_tasks"],
    )  # fmt: skip


PART = Part(
    name="words",
    title="What it says in words",
    work=work,
    settings=("top", "seed", "prompts"),
    models=True,
    code=(
        "study/words.py", "study/readings.py", "study/readout.py", "study/at_anchor.py", "study/sets.py",
        "study/drawings.py",
        "study/drift_sums.py", "scoring/sweep.py", "scoring/anchor/directions.py", "geometry.py",
    ),
)  # fmt: skip
