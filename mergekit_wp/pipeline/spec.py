"""A pipeline file: a base, its experts with their scoring jobs, merges of them, a suite, and where to push.

    out: runs/13b                       # default: runs/NAME-OF-THIS-FILE
    base: meta-llama/Llama-2-13b-hf
    experts:
      instruction: {scoring: scoring/wizardlm-13b.yaml}        # its `expert` is the model
      maths: {model: ./wizardmath-13b, scoring: {pairs: builtin:maths, layer: 27}}
      code: {model: user/code-13b, scores: scores/code-13b.safetensors}
    merges:
      linear: {merge_method: linear, expert_parameters: {weight: 1.0}}
      wp: {parameters: {scale: 1.5}}                           # merge_method: wp
      mine: {recipe: my-recipe.yaml}                           # a mergekit recipe as it is
    evaluate: {suite: eval/paper.yaml, baseline: linear}
    push: {merge: wp, to: user/name, private: true, parents: {maths: WizardLMTeam/WizardMath-13B-V1.0}}

A path is looked for in the working directory, then beside the pipeline file. `flags` under `score`, `merge`,
`evaluate` and `push` go to that stage's command as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import read_yaml_mapping
from mergekit_wp.foreign import file_part

STAGES = ("score", "merge", "evaluate", "push")
BASE = "base"
"""The base's name among the rows of the table."""


@dataclass(frozen=True)
class Expert:
    """One expert. `scoring` is a job of wp-score without base and expert; None where `scores` is there, or no need."""

    model: str
    scoring: Mapping[str, Any] | None = None
    scores: Path | None = None


@dataclass(frozen=True)
class Merge:
    """One merge: a mergekit recipe of the user's own, or the fields of one over `experts` (all of them if empty).

    Without `out_dtype` it is written in what its experts are stored in.
    """

    recipe: Path | None = None
    merge_method: str = "wp"
    experts: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    expert_parameters: Mapping[str, Any] = field(default_factory=dict)
    base_parameters: Mapping[str, Any] | None = None
    out_dtype: str | None = None


@dataclass(frozen=True)
class Evaluate:
    """How everything is graded; `models` are names of the base, experts and merges (all of them if empty)."""

    suite: Path
    baseline: str | None = None
    models: tuple[str, ...] = ()
    include_path: Path | None = None


@dataclass(frozen=True)
class Push:
    """Which merge goes where on the Hub; `parents` are the Hub names of base and experts that are folders here."""

    merge: str
    to: str
    parents: Mapping[str, str] = field(default_factory=dict)
    private: bool = False
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Pipeline:
    """A pipeline file that was checked. `flags` maps a stage to what its command is given as it is."""

    file: Path
    out: Path
    base: str
    experts: Mapping[str, Expert]
    merges: Mapping[str, Merge]
    evaluate: Evaluate | None
    push: Push | None
    flags: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        """Every row that can be graded."""
        return [BASE, *self.experts, *self.merges]


_PUSH_KINDS: dict[str, tuple[type, str]] = {
    "private": (bool, "true or false"),
    "dry_run": (bool, "true or false"),
    "parents": (dict, "a mapping from `base` and experts to their names on the Hub"),
}
_FIELDS = ("out", "base", "experts", "merges", "evaluate", "push", "score", "merge")


def read_pipeline(path: str | os.PathLike[str]) -> Pipeline:
    """The pipeline in a YAML file. Raises `BadInput`, naming file and field, for what cannot be carried out."""
    content, file = read_yaml_mapping(path, "pipeline"), Path(path)
    try:
        if unknown := [name for name in content if name not in _FIELDS]:
            raise BadInput(f"unknown field `{unknown[0]}`; a pipeline has {', '.join(_FIELDS)}.")
        flags = {name: _flags(name, content.get(name)) for name in STAGES}
        pipeline = Pipeline(
            file=file,
            out=Path(_text("out", content.get("out", f"runs/{file.stem}"))),
            base=_model(_text("base", content.get("base")), file),
            experts={name: _expert(name, raw, file) for name, raw in _mapping("experts", content).items()},
            merges={name: _merge(name, raw, file) for name, raw in _mapping("merges", content).items()},
            evaluate=_evaluate(content.get("evaluate"), file),
            push=_push(content.get("push")),
            flags=flags,
        )
        _check(pipeline)
        return pipeline
    except BadInput as error:
        raise BadInput(f"{path}: {error.message}") from error


def _expert(name: str, raw: Any, file: Path) -> Expert:
    where = f"experts.{name}"
    values = _known(Expert, where, raw)
    scoring = values.get("scoring")
    if isinstance(scoring, str):
        scoring = read_yaml_mapping(_found(scoring, file, f"{where}.scoring"), "scoring job")
    elif scoring is not None and not isinstance(scoring, dict):
        raise BadInput(f"`{where}.scoring`: found {shown(scoring)}, expected a scoring job's file or its fields.")
    scoring = dict(scoring) if scoring is not None else None
    model = values.get("model") or (scoring or {}).get("expert")
    if model is None:
        raise BadInput(f"`{where}.model` is missing, and its scoring job names no `expert`.")
    scores = _found(values["scores"], file, f"{where}.scores") if "scores" in values else None
    if scoring is not None and scores is not None:
        raise BadInput(f"`{where}` has both `scoring` and `scores`; keep the one that is to be used.")
    if scoring is not None:
        scoring = {key: value for key, value in scoring.items() if key not in ("base", "expert")}
        pairs = scoring.get("pairs")
        if isinstance(pairs, str) and ":" not in pairs:
            scoring["pairs"] = str(_found(pairs, file, f"{where}.scoring.pairs", must_exist=False))
    return Expert(_model(_text(f"{where}.model", model), file), scoring, scores)


def _merge(name: str, raw: Any, file: Path) -> Merge:
    where = f"merges.{name}"
    values = _known(Merge, where, raw if raw is not None else {})
    if "recipe" in values:
        if others := sorted(set(values) - {"recipe"}):
            raise BadInput(f"`{where}` has a recipe of its own; write `{others[0]}` there.")
        return Merge(recipe=_found(values["recipe"], file, f"{where}.recipe"))
    for key in ("parameters", "expert_parameters", "base_parameters"):
        if not isinstance(values.get(key, {}), dict):
            raise BadInput(f"`{where}.{key}`: found {shown(values[key])}, expected a mapping, such as {{weight: 1.0}}.")
    for key in ("merge_method", "out_dtype"):
        if key in values:
            _text(f"{where}.{key}", values[key])
    if not isinstance(experts := values.get("experts", []), list):
        raise BadInput(f"`{where}.experts`: found {shown(experts)}, expected a list of names.")
    return Merge(**{**values, "experts": tuple(experts)})


def _evaluate(raw: Any, file: Path) -> Evaluate | None:
    if raw is None:
        return None
    values = _known(Evaluate, "evaluate", raw, {"flags"})
    if "suite" not in values:
        raise BadInput("`evaluate.suite` is missing; name a suite, such as eval/paper.yaml.")
    if not isinstance(models := values.get("models", []), list):
        raise BadInput(f"`evaluate.models`: found {shown(models)}, expected a list of names.")
    include = values.get("include_path")
    return Evaluate(
        suite=_found(values["suite"], file, "evaluate.suite"),
        baseline=values.get("baseline"),
        models=tuple(models),
        # It may be something that an earlier step makes.
        include_path=_found(include, file, "evaluate.include_path", must_exist=False) if include else None,
    )


def _push(raw: Any) -> Push | None:
    if raw is None:
        return None
    values = _known(Push, "push", raw, {"flags"})
    for name in ("merge", "to"):
        if name not in values:
            raise BadInput(f"`push.{name}` is missing.")
    for name, value in values.items():
        kind, expected = _PUSH_KINDS.get(name, (str, "a text"))
        if not isinstance(value, kind):
            raise BadInput(f"`push.{name}`: found {shown(value)}, expected {expected}.")
        if kind is str:
            _text(f"push.{name}", value)
    return Push(**values)


def _check(pipeline: Pipeline) -> None:
    """What only shows when the parts are seen together."""
    if not pipeline.experts:
        raise BadInput("`experts` is empty; a pipeline needs at least one expert.")
    for name in pipeline.names:
        if [other.lower() for other in pipeline.names].count(name.lower()) > 1:
            raise BadInput(
                f"two models are named {shown(name)}, capitals aside; `{BASE}`, experts and merges need names of their "
                "own."
            )
        if file_part(name) != name:
            raise BadInput(
                f"the name {shown(name)} will be a file's name; choose one of at most 80 ASCII letters, digits, `_`, "
                "`-` and `.` that begins with a letter, ends in no dot and is no device of Windows (CON, NUL, ...)."
            )
    for name, merge in pipeline.merges.items():
        for expert in merge.experts:
            _one_of(f"merges.{name}.experts", expert, list(pipeline.experts))
        for expert in merge.experts or pipeline.experts:
            known = pipeline.experts[expert]
            if merge.recipe is None and merge.merge_method == "wp" and not (known.scoring or known.scores):
                raise BadInput(
                    f"`merges.{name}` is by wp, and `experts.{expert}` has no scores; give it `scoring: JOB.yaml` "
                    "or `scores: FILE.safetensors`."
                )
    if pipeline.evaluate:
        for name in pipeline.evaluate.models:
            _one_of("evaluate.models", name, pipeline.names)
        if pipeline.evaluate.baseline is not None:
            _one_of("evaluate.baseline", pipeline.evaluate.baseline, list(pipeline.evaluate.models) or pipeline.names)
    if pipeline.push:
        _one_of("push.merge", pipeline.push.merge, list(pipeline.merges))
        for name in pipeline.push.parents:
            _one_of("push.parents", name, [BASE, *pipeline.experts])


def _one_of(where: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise BadInput(f"`{where}`: there is no {shown(name)} here; there are {', '.join(known) or 'none'}.")


def _known(kind: type, where: str, raw: Any, beside: set[str] | None = None) -> dict[str, Any]:
    """The fields of one part; `beside` are names that something else reads."""
    names = [item.name for item in fields(kind)]
    if not isinstance(raw, dict):
        raise BadInput(f"`{where}`: found {shown(raw)}, expected a mapping with {', '.join(names)}.")
    if unknown := [name for name in raw if name not in names and name not in (beside or set())]:
        raise BadInput(f"`{where}`: unknown field `{unknown[0]}`; it has {', '.join(names)}.")
    return {name: value for name, value in raw.items() if name in names}


def _flags(stage: str, raw: Any) -> tuple[str, ...]:
    """The list under `STAGE.flags`; of `score` and `merge` it is all there is."""
    if stage in ("score", "merge") and raw is not None and (not isinstance(raw, dict) or set(raw) - {"flags"}):
        raise BadInput(f"`{stage}`: found {shown(raw)}, expected {{flags: [...]}}.")
    flags = raw.get("flags", []) if isinstance(raw, dict) else []
    if not isinstance(flags, list):
        raise BadInput(f"`{stage}.flags`: found {shown(flags)}, expected a list, such as [--device, cuda:1].")
    return tuple(str(flag) for flag in flags)


def _mapping(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    found = content.get(name)
    if not isinstance(found, dict):
        raise BadInput(f"`{name}`: found {shown(found)}, expected a mapping from names to their settings.")
    return {str(key): value for key, value in found.items()}


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"`{where}`: found {shown(value)}, expected a non-empty text.")
    if value.startswith("-"):  # it becomes a word of a stage's command
        raise BadInput(f"`{where}`: found {shown(value)}, which a command takes for a flag; choose another name.")
    return value


def _model(name: str, file: Path) -> str:
    """A model reference; folders beside the pipeline file are named from the working directory."""
    reference = read_reference(name)
    whole = reference.lora is None or os.path.isdir(file.parent / name)
    parts = [name] if whole else [str(source) for source in reference.sources]
    found = ((part, file.parent / part) for part in parts)
    return "+".join(
        str(beside) if not os.path.exists(part) and os.path.isdir(beside) else part for part, beside in found
    )


def _found(name: Any, file: Path, where: str, must_exist: bool = True) -> Path:
    path = Path(_text(where, name)).expanduser()
    beside = file.parent / path
    there = os.path.exists(beside)  # unlike Path's, it takes names that no file can have
    if os.path.exists(path) or not (there or must_exist):
        return path
    if not there:
        raise BadInput(f"`{where}`: {path} is neither in the working directory ({Path.cwd()}) nor beside this file.")
    return beside
