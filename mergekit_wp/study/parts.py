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
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mergekit_wp.console import StartProgress
from mergekit_wp.documents import MOST_JSON_BYTES, parse_json
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import atomic_path, beside, read_text, write_text
from mergekit_wp.foreign import csv_cell
from mergekit_wp.hashing import digest, digest_of
from mergekit_wp.outputs import clear_partials
from mergekit_wp.page import frame, render_text, section

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
}
"""Name -> the module that has it as `PART`, in the order of the page. A new part is a line here."""

PAGE = "study.html"
_STAMP, _SECTION = "stamp.json", "section.html"
_CELLS = "study/cells.py"  # which every part may use
_HEADLINES = """<ul>
{% for name, text in headlines.items() if text %}<li>{{ text }} <a href="#{{ name }}">{{ name }}</a></li>
{% endfor %}
</ul>
"""
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class PartResult:
    """What a part found. Names of tables, pictures and tensors become those of files, without ending.

    data      all of it, for programs: what JSON can hold
    tables    lists of lines, the first one the head; None is an empty cell
    pictures  each an `<svg>`
    section   its body on the page, without heading
    headline  the one sentence of it that stands at the top of the page
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


@dataclass(frozen=True)
class Part:
    """One part. `work` is given what the study says, score files and models, and a progress bar.

    settings: the fields of the study that its result depends on, beside score files. models: it reads both models.
    code: the source files of this package that its result depends on. prompts: it cannot do without the study's.
    """

    name: str
    title: str
    work: Callable[[Study, Inputs, StartProgress], PartResult]
    settings: tuple[str, ...]
    models: bool
    code: tuple[str, ...]
    prompts: bool = False


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
        found |= {f"the {role}": str(print_) for role, print_ in inputs.fingerprints.items()}
    if "prompts" in part.settings and (pairs := study.prompts.get("pairs")) and Path(pairs).is_file():
        found["the file of prompts"] = digest(Path(pairs))
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
        files = {path.name: digest(path) for path in sorted(partial.iterdir())}
        stamp = {"made_of": dict(key), "files": files, "headline": result.headline}
        write_text(partial / _STAMP, json.dumps(stamp, indent=1) + "\n")
        if target.exists():  # a folder cannot be written over
            os.replace(target, beside(target, ".partial-old"))
    clear_partials(target)
    result.finished()


def write_page(out: Path, study: Study, inputs: Inputs) -> None:
    """OUT/study.html of the parts that are there and still right, whichever run did them."""
    sections, headlines = [], {}
    for part in chosen_parts(None, study):
        if (out / part.name / _STAMP).exists() and _is_right(part, out, study, inputs):
            body = (out / part.name / _SECTION).read_text(encoding="utf-8")
            sections.append(section(part.title, Markup(body), part.name))  # ours, by the part's stamp
            headlines[part.name] = parse_json(read_text(out / part.name / _STAMP, MOST_JSON_BYTES)).get("headline", "")
    if any(headlines.values()):
        sections.insert(0, section("In short", render_text(_HEADLINES, headlines=headlines)))
    meta = next(iter(inputs.scores.values())).meta
    foot = ", ".join(f"{name} {version}" for name, version in meta.versions.items())
    title = f"What the fine-tune {meta.expert.called} changed"
    lead = f"In its base {meta.base.called}, read off {', '.join(inputs.scores)} and the models' weights."
    write_text(out / PAGE, frame(title, lead, Markup("").join(sections), f"Scored {meta.date[:10]} with {foot}."))


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
