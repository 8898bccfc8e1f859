"""The parts of a study: which there are, what each gives, and whether what is there is still right.

A part's outputs lie in OUT/NAME, a folder that appears whole: NAME.json (all numbers), tables as CSV, pictures as SVG,
tensors where a table would be too long, section.html, and a stamp. The stamp says of what it was made: the content of
score files, the models' fingerprints, the study's settings that it reads, and the source of its code. As long as these
are what they were, and the files what was written, the part is not done again.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from mergekit_wp.console import StartProgress
from mergekit_wp.documents import MOST_JSON_BYTES, parse_json
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import atomic_path, beside, read_text, write_text
from mergekit_wp.foreign import csv_cell, one_line
from mergekit_wp.hashing import digest, digest_of
from mergekit_wp.outputs import clear_partials
from mergekit_wp.page import frame, render, section

if TYPE_CHECKING:
    import torch

    from mergekit_wp.study.inputs import Inputs
    from mergekit_wp.study.study_spec import Study

PARTS = {
    "maps": "mergekit_wp.study.maps",
    "certainty": "mergekit_wp.study.certainty",
    "drift": "mergekit_wp.study.drift",
    "words": "mergekit_wp.study.words",
    "attention": "mergekit_wp.study.attention",
    "links": "mergekit_wp.study.links",
    "sets": "mergekit_wp.study.set_curves",
    "answers": "mergekit_wp.study.set_answers",
    "cases": "mergekit_wp.study.cases",
}
"""Name -> the module that has it as `PART`, in the order of the page. A new part is a line here."""

PAGE = "study.html"
_STAMP, _SECTION, _NOTES = "stamp.json", "section.html", "notes.json"
_CELLS = "study/cells.py"  # which every part may use
QUESTIONS = {
    "behaviour": ("What changed", "needs the part maps"),
    "where": ("Where it sits", "needs the part maps"),
    "carried": ("How much of it how few carry", "needs prompts in the study, and the part sets"),
    "path": (
        "Which way it takes",
        "needs prompts in the study, and the part links, or sets on a score file with an anchor",
    ),
    "sure": ("How sure that is", "needs score files made with --per-prompt, and the part certainty"),
}
"""What the page says first, each by one sentence of a part: the question, and what it takes to be answered."""
_PACKAGE = Path(__file__).resolve().parents[1]


class Answer(NamedTuple):
    """A sentence made from the numbers that answers one of `QUESTIONS`; picture: the part's that shows it, if any;
    fallback: it stands only where no other part answers."""

    text: str
    picture: str = ""
    fallback: bool = False


class Note(NamedTuple):
    """What a part says of one component by one score file on one task, for whoever points at it."""

    component: str
    scores: str
    task: str
    text: str


@dataclass(frozen=True)
class PartResult:
    """What a part found. Names of tables, pictures and tensors become those of files, without ending.

    data      all of it, for programs: what JSON can hold
    tables    lists of lines, the first one the head; None is an empty cell
    pictures  each an `<svg>`
    section   its body on the page, without heading
    headline  a sentence of it for the top of the page, where it answers none of the questions there
    answers   by question; where several parts answer one, the later part does, unless its answer is a `fallback`
    notes     what the page says of components that are pointed at
    finished  called once all is written: what was kept of the work may go
    documents more JSON, each a file of its own
    """

    data: Mapping[str, Any]
    tables: Mapping[str, Sequence[Sequence[object]]]
    pictures: Mapping[str, Markup]
    section: Markup
    tensors: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    headline: str = ""
    finished: Callable[[], object] = lambda: None
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    answers: Mapping[str, Answer] = field(default_factory=dict)
    notes: Sequence[Note] = ()


@dataclass(frozen=True)
class Part:
    """One part. `work` is given what the study says, score files and models, and a progress bar.

    settings: the fields of the study that its result depends on, beside score files. models: it reads both models.
    code: the source files of this package that its result depends on. prompts: it cannot do without the study's.
    grades: it grades answers, of code only where that may be run. cost: what doing it takes, in words, for the plan.
    """

    name: str
    title: str
    work: Callable[[Study, Inputs, StartProgress], PartResult]
    settings: tuple[str, ...]
    models: bool
    code: tuple[str, ...]
    prompts: bool = False
    grades: bool = False
    cost: Callable[[Study, Inputs], str] | None = None


def chosen_parts(only: str | None, study: Study) -> list[Part]:
    """Parts by their names, parted by commas, in the order of the page; None: those that the study allows.

    Raises `BadInput` for others.
    """
    names = [name.strip() for name in only.split(",")] if only is not None else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise BadInput(f"--only: there is no part {shown(unknown[0])}; there are {', '.join(PARTS)}.")
    found: list[Part] = [import_module(module).PART for name, module in PARTS.items() if name in names]
    lacking = [part for part in found if part.prompts and not study.prompts]
    if only is not None and lacking:
        raise BadInput(f"`prompts`: the part {lacking[0].name} needs them; give the study `prompts: {{pairs: FILE}}`.")
    return [part for part in found if part not in lacking]


def made_of(part: Part, study: Study, inputs: Inputs) -> dict[str, str]:
    """What decides the part's result: what it is, in words -> its digest."""
    found = {f"the score file {name}": digest(path) for name, path in inputs.files.items()}
    if part.models:
        found |= {f"the {role}": digest_of([str(print_), print_.files]) for role, print_ in inputs.fingerprints.items()}
    if "prompts" in part.settings and (pairs := study.prompts.get("pairs")) and Path(pairs).is_file():
        found["the file of prompts"] = digest(Path(pairs))
    if part.grades and inputs.code_is_graded:
        found["`--allow-code-execution`"] = str(inputs.allow_code)
    found |= {f"`{name}`": digest_of([json.dumps(getattr(study, name), sort_keys=True)]) for name in part.settings}
    return found | {"the code behind it": digest_of(digest(_PACKAGE / file) for file in (*part.code, _CELLS))}


def why_due(part: Part, out: Path, key: Mapping[str, str]) -> str | None:
    """What makes a part due, for a person; None when it is done."""
    folder = out / part.name
    try:
        stamp = parse_json(read_text(folder / _STAMP, MOST_JSON_BYTES))
        before, written = dict(stamp["made_of"]), dict(stamp["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return "not done yet"
    if changed := next((what for what in {**before, **key} if before.get(what) != key.get(what)), None):
        return f"{changed} is {'new' if changed not in before else 'gone' if changed not in key else 'another one'}"
    if odd := next((name for name, content in written.items() if digest(folder / name) != content), None):
        return f"{folder / odd} is not what was written"
    return None


def write_part(part: Part, out: Path, key: Mapping[str, str], result: PartResult) -> None:
    """The folder of a part, in the place of the one that is there. Raises `BadInput` when it cannot be written."""
    from safetensors.torch import save_file

    target = out / part.name
    clear_partials(target)
    with atomic_path(target) as partial:
        partial.mkdir()
        for name, content in {part.name: result.data, **result.documents}.items():
            write_text(partial / f"{name}.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
        for name, lines in result.tables.items():
            write_text(partial / f"{name}.csv", _csv(lines))
        for name, picture in result.pictures.items():
            write_text(partial / f"{name}.svg", f"{picture}\n")
        for name, tensors in result.tensors.items():
            with atomic_path(partial / f"{name}.safetensors") as file:
                save_file({each: tensor.contiguous() for each, tensor in tensors.items()}, file)
        write_text(partial / _SECTION, str(result.section))
        write_text(partial / _NOTES, json.dumps([[one_line(text) for text in note] for note in result.notes]) + "\n")
        files = {path.name: digest(path) for path in sorted(partial.iterdir())}
        assert result.answers.keys() <= QUESTIONS.keys()
        top = {"headline": result.headline, "answers": dict(result.answers)}
        stamp = {"made_of": dict(key), "files": files, **top}
        write_text(partial / _STAMP, json.dumps(stamp, indent=1) + "\n")
        if target.exists():  # a folder cannot be written over
            os.replace(target, beside(target, ".partial-old"))
    clear_partials(target)
    result.finished()


def write_page(out: Path, study: Study, inputs: Inputs) -> None:
    """OUT/study.html of the parts that are there and still right, whichever run did them."""
    there = [part for part in chosen_parts(None, study) if (out / part.name / _STAMP).exists()]
    parts, sections = [part for part in there if _is_right(part, out, study, inputs)], []
    for part in parts:
        body = (out / part.name / _SECTION).read_text(encoding="utf-8")
        sections.append(section(part.title, Markup(body), part.name))  # ours, by the part's stamp
    meta = next(iter(inputs.scores.values())).meta
    foot = ", ".join(f"{name} {version}" for name, version in meta.versions.items())
    title = f"What the fine-tune {_last_of(study.expert)} changed"
    lead = f"In its base {study.base}, read off {', '.join(inputs.scores)} and the models' weights."
    body = Markup("").join([_in_short(parts, out), *sections])
    data = _for_script(parts, out, inputs)
    write_text(out / PAGE, frame(title, lead, body, f"Scored {meta.date[:10]} with {foot}.", data))


def _in_short(parts: Sequence[Part], out: Path) -> Markup:
    """The five answers, what else parts say in a sentence, and where on the page they are."""
    answers: dict[str, tuple[str, str]] = {}
    also = {}
    for part in parts:
        stamp = parse_json(read_text(out / part.name / _STAMP, MOST_JSON_BYTES))
        for question, (text, picture, *fallback) in stamp["answers"].items():
            if any(fallback) and question in answers:
                continue
            answers[question] = (text, f"{part.name}-{picture}" if picture else part.name)
        if stamp["headline"]:
            also[part.name] = stamp["headline"]
    return section("In short", render(
        "study_short.html", questions=QUESTIONS, answers=answers, also=also,
        parts={part.name: part.title for part in parts},
    ))  # fmt: skip


def _for_script(parts: Sequence[Part], out: Path, inputs: Inputs) -> dict[str, Any]:
    """What `page.js` reads: names of files and tasks, and of every component what is known, by their numbers."""
    files = [one_line(name) for name in inputs.scores]
    tasks = [one_line(task) for task in dict.fromkeys(task for scores in inputs.scores.values() for task in scores)]
    notes: dict[str, list[list[object]]] = {}
    for part in parts:
        for component, file, task, text in json.loads(read_text(out / part.name / _NOTES, MOST_JSON_BYTES)):
            notes.setdefault(component, []).append([files.index(file), tasks.index(task), text])
    return {"files": files, "tasks": tasks, "notes": notes}


def _last_of(name: str) -> str:
    """A model's name; of a folder, its last part."""
    return Path(name).name if name.startswith((".", "/", "~")) else name


def _is_right(part: Part, out: Path, study: Study, inputs: Inputs) -> bool:
    try:
        return why_due(part, out, made_of(part, study, inputs)) is None
    except BadInput:  # its models are not at hand any more
        return False


def _csv(lines: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for line in lines:
        writer.writerow([csv_cell(cell) if isinstance(cell, str) else _number(cell) for cell in line])
    return buffer.getvalue()


def _number(cell: object) -> object:
    return f"{cell:.9g}" if isinstance(cell, float) else "" if cell is None else cell
