"""What a study is of: a pair of models and its score files, from a YAML file.

base: ./base
expert: ./maths
scores: {kl: scores/kl.safetensors, anchor: anchor.yaml, ap: {pairs: maths.jsonl, method: ap, utility: anchor}}
others: {code: scores/code.safetensors}
prompts: {pairs: maths.jsonl, samples: 64}
answers: {tokens: 256, shares: [0.05, 0.2]}
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.fields import (
    Form,
    ValueKind,
    about,
    described,
    first_wrong,
    json_schema,
    rows,
    text,
    texts,
    whole,
)
from mergekit_wp.files import read_yaml_mapping
from mergekit_wp.scoring.config import ScoringJob

KINDS = ("heads", "neurons")
_PATH = {"type": "string", "pattern": r"\S"}
_JOB_SUFFIXES = (".yaml", ".yml")


def _are_files(value: Any, least: int) -> bool:
    named = isinstance(value, dict)
    entries = list(value.values()) if named else value
    return (
        isinstance(entries, list)
        and len(entries) >= least
        and all((isinstance(e, str) and e.strip()) or (named and isinstance(e, dict)) for e in entries)
        and (not named or all(isinstance(name, str) and name.strip() for name in value))
    )


def _files(least: int) -> ValueKind:
    job = {
        "type": "object",
        "properties": {item.name: about(item).kind.schema for item in fields(ScoringJob)},
        "additionalProperties": False,
    }
    several = [
        {"type": "object", "additionalProperties": {"anyOf": [_PATH, job]}, "minProperties": least},
        {"type": "array", "items": _PATH, "minItems": least},
    ]
    what = "a mapping from names to score files or scoring jobs, such as {kl: FILE}, or a list of files"
    return ValueKind(what, lambda value: _are_files(value, least), {"anyOf": several}, None)


_TOP = ValueKind(
    "a mapping such as {heads: 20, neurons: 200}, each a whole number of at least 1",
    lambda value: (
        isinstance(value, dict) and all(kind in KINDS and type(k) is int and k >= 1 for kind, k in value.items())
    ),
    {
        "type": "object",
        "properties": {kind: {"type": "integer", "minimum": 1} for kind in KINDS},
        "additionalProperties": False,
    },
    None,
)
_TOP_DEFAULT = {"heads": 20, "neurons": 200}
_JOB_FIELDS = (
    "pairs", "samples", "template", "chat_template", "system", "batch_size", "device", "dtype", "offload",
    "trust_remote_code",
)  # fmt: skip
_PROMPTS = ValueKind(
    "a mapping with `pairs`, such as {pairs: FILE.jsonl}",
    lambda value: isinstance(value, dict) and (not value or "pairs" in value),
    {
        "type": "object",
        "properties": {item.name: about(item).kind.schema for item in fields(ScoringJob) if item.name in _JOB_FIELDS},
        "additionalProperties": False,
    },
    None,
)


_SHARES = ValueKind(
    "a list of shares between 0 and 1, such as [0.05, 0.2]",
    lambda value: (
        isinstance(value, list)
        and bool(value)
        and all(type(share) in (int, float) and 0 < share < 1 for share in value)
    ),
    {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "minItems": 1},
    None,
)


@dataclass(frozen=True)
class Answering:
    """How models answer in the parts that grade what they say; `shares` ascend."""

    tokens: int = described(whole(1), "The longest answer; one that is cut there is graded as it is.", 256)
    prompts: int = described(whole(1), "Prompts a task that are answered, at most.", 32)
    shares: Sequence[float] = described(
        _SHARES, "Sizes of sets, as shares of what a ranking has.", (0.05, 0.2), unset="0.05 and 0.2"
    )
    draws: int = described(whole(1), "Random sets of each size.", 2)
    scores: Sequence[str] = described(
        texts("a list of names"),
        "The files of `scores` whose rankings are tried.",
        (),
        unset="the first of the weight side, and of the activation side",
    )


_ANSWERS = ValueKind(
    "a mapping such as {tokens: 256, prompts: 32}",
    lambda value: isinstance(value, dict),
    json_schema(Answering),
    None,
)


@dataclass(frozen=True)
class Study:
    """A study that was checked: `scores` and `others` are by name, `top` has both kinds."""

    base: str = described(text(), "Base model: a folder or a Hub name.")
    expert: str = described(text(), "Expert fine-tuned from it; may be `MODEL+LORA`.")
    scores: Mapping[str, Any] = described(
        _files(1),
        "Score files of this pair, by name or as a list: of any methods, utilities, prompts. In the place of one, a "
        "scoring job, a file (`.yaml`) or its fields: it is scored first; `base` and `expert` come from here.",
    )
    others: Mapping[str, Any] = described(
        _files(0),
        "Score files of other experts of the same base, to compare tasks across experts; jobs say `expert`.",
        {},
    )
    top: Mapping[str, int] = described(
        _TOP, "How many heads and neurons make up a top set.", _TOP_DEFAULT, unset="20 heads and 200 neurons"
    )
    prompts: Mapping[str, Any] = described(
        _PROMPTS,
        "Prompts of the parts that run the models, and how these run: `pairs`, `samples` and other fields of a scoring "
        "job.",
        {},
        unset="those parts are left out",
    )
    answers: Mapping[str, Any] = described(
        _ANSWERS,
        "How models answer in the parts that grade what they say, see below.",
        {},
        unset="see below",
    )
    seed: int = described(whole(0), "Seed of all draws.", 0)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Study:
        """Raises `BadInput` naming the field."""
        known = [item.name for item in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise BadInput(f"unknown field {shown(unknown[0])}; a study has {', '.join(known)}.")
        if missing := [name for name in ("base", "expert", "scores") if values.get(name) is None]:
            raise BadInput(f"{missing[0]}: a study needs this field.")
        if wrong := first_wrong(cls, values):
            name, kind = wrong
            raise BadInput(f"{name}: found {shown(values[name])}, expected {kind.expected}.")
        study = cls(**{
            **values,
            "scores": _named("scores", values["scores"]),
            "others": _named("others", values.get("others", {})),
            "top": {**_TOP_DEFAULT, **values.get("top", {})},
        })  # fmt: skip
        if study.prompts:
            study.job()
        study.answering()
        if both := [name for name in study.others if name in study.scores]:
            raise BadInput(f"others: the name {shown(both[0])} is one of `scores` too; give it another.")
        return study

    def job(self) -> ScoringJob:
        """The scoring job with the study's prompts, all of which serve for directions and for the rest.

        Raises `BadInput` where a field is wrong, or there are no prompts.
        """
        if unknown := [name for name in self.prompts if name not in _JOB_FIELDS]:
            raise BadInput(f"prompts: unknown field {shown(unknown[0])}; expected {', '.join(_JOB_FIELDS)}.")
        fixed = {"base": self.base, "expert": self.expert, "seed": self.seed, "utility": "anchor", "split": "shared"}
        return ScoringJob.from_mapping({**self.prompts, **fixed}, "prompts")

    def jobs(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(field, name) of the score files that are to be made -> the fields of their jobs. Raises `BadInput`."""
        found = {}
        for field, entries in (("scores", self.scores), ("others", self.others)):
            for name, entry in entries.items():
                if isinstance(entry, str) and not entry.endswith(_JOB_SUFFIXES):
                    continue
                where = f"`{field}.{name}`"
                try:
                    values = read_yaml_mapping(entry, "scoring job") if isinstance(entry, str) else entry
                except BadInput as error:
                    raise BadInput(f"{where}: {error.message}") from error
                expert = self.expert if field == "scores" else values.get("expert")
                if expert is None:
                    raise BadInput(f"{where}: the scoring job names no expert; an expert of `others` is its own.")
                found[field, name] = {**values, "base": self.base, "expert": expert}
        return found

    def answering(self) -> Answering:
        """How models answer. Raises `BadInput` naming the field."""
        known = [item.name for item in fields(Answering)]
        if unknown := [name for name in self.answers if name not in known]:
            raise BadInput(f"answers: unknown field {shown(unknown[0])}; expected {', '.join(known)}.")
        if wrong := first_wrong(Answering, self.answers):
            name, kind = wrong
            raise BadInput(f"answers: {name}: found {shown(self.answers[name])}, expected {kind.expected}.")
        found = Answering(**self.answers)
        if unknown := [name for name in found.scores if name not in self.scores]:
            raise BadInput(f"answers: scores: {shown(unknown[0])} is none of `scores`: {', '.join(self.scores)}.")
        return replace(found, shares=sorted(set(found.shares)))

    def reads(self) -> list[str]:
        """Everything that the study reads, models too, as it names them; what its jobs read is theirs to say."""
        models = [self.base, self.expert, *map(str, read_reference(self.expert).sources)]
        pairs = [self.job().pairs] if self.prompts else []
        files = [entry for entry in (*self.scores.values(), *self.others.values()) if isinstance(entry, str)]
        return [*models, *files, *pairs]

    def how_to_score(self, name: str, path: str) -> str:
        """The command that would make a score file of this pair; a name that is a method or a utility says which."""
        from mergekit_wp.choices import METHODS, UTILITIES

        flags = f" --method {name}" if name in METHODS else f" --utility {name}" if name in UTILITIES else ""
        return f"wp-score --base {self.base} --expert {self.expert} --pairs FILE.jsonl{flags} --out {path}"


def _named(field: str, files: Mapping[str, Any] | list[str]) -> dict[str, Any]:
    """Files of a list are named as they are, without folder and ending; `~` is the home directory. Raises `BadInput`
    for two of one name."""
    if isinstance(files, Mapping):
        return {name: os.path.expanduser(file) if isinstance(file, str) else file for name, file in files.items()}
    found: dict[str, str] = {}
    for path in map(os.path.expanduser, files):
        name = Path(path).stem
        if name in found:
            raise BadInput(f"{field}: {found[name]} and {path} have one name; write a mapping, with a name for each.")
        found[name] = path
    return found


def read_study(path: str) -> Study:
    """The study in a YAML file. Raises `BadInput`, naming file and field."""
    content = read_yaml_mapping(path, "study")
    try:
        return Study.from_mapping(content)
    except BadInput as error:
        raise BadInput(f"{path}: {error.message}") from error


FORM = Form(
    "study",
    "One pair of models and its score files. Paths are those of the working directory.",
    lambda: json_schema(Study),
    {"Study": rows(Study), "Answers": rows(Answering)},
)
