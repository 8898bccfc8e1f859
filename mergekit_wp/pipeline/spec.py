"""A pipeline file: a base, its experts with their scoring jobs, merges of them, a suite, and where to push.

    out: runs/13b                       # default: runs/NAME-OF-THIS-FILE
    base: meta-llama/Llama-2-13b-hf
    experts:
      instruction: {scoring: scoring/wizardlm-13b.yaml}        # its `expert` is the model
      maths: {model: ./wizardmath-13b, scoring: {pairs: builtin:maths, layer: 27}}
      code: {model: user/code-13b, scores: scores/code-13b.safetensors}
    merges:
      linear: {merge_method: linear, expert_parameters: {weight: 1.0}}
      wp: {parameters: {scale: 1.5}}                           # merge_method: wp; `scale: auto` is found by wp-fit
      fitted: {fit: {family: component}}                       # weights by wp-fit, from the experts' own answers
      mine: {recipe: my-recipe.yaml}                           # a mergekit recipe as it is
    evaluate: {suite: eval/paper.yaml, baseline: linear}
    push: {merge: wp, to: user/name, private: true, parents: {maths: WizardLMTeam/WizardMath-13B-V1.0}}

A path is looked for in the working directory, then beside the pipeline file. `flags` under `score`, `fit`,
`merge`, `evaluate` and `push` go to that stage's command as they are.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.choices import COMPONENTS
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.fields import (
    Form,
    ValueKind,
    about,
    described,
    first_wrong,
    json_schema,
    mapping,
    rows,
    switch,
    text,
    texts,
)
from mergekit_wp.files import read_yaml_mapping
from mergekit_wp.fit.job import FitJob
from mergekit_wp.foreign import file_part
from mergekit_wp.scoring.config import ScoringJob

STAGES = ("score", "fit", "merge", "evaluate", "report", "push")
BASE = "base"
"""The base's name among the rows of the table."""


_WORD = text("a non-empty text")
_NAMES = texts("a list of names")
_FIT = ValueKind(
    "a mapping of fields of a fit job, such as {family: component}",
    lambda value: isinstance(value, dict),
    {
        "type": "object",
        "properties": {k: v for k, v in json_schema(FitJob)["properties"].items() if k not in ("base", "experts")},
        "additionalProperties": False,
    },
)
_PARAMETERS = mapping("a mapping, such as {weight: 1.0}")
_FLAGS = ValueKind(
    "a list, such as [--device, cuda:1]",
    lambda value: isinstance(value, list),
    {"type": "array", "items": {"type": ["string", "number", "boolean"]}},
)
_SCORING = ValueKind(
    "a scoring job's file or its fields",
    lambda value: isinstance(value, str | dict),
    {"anyOf": [{"type": "string"}, json_schema(ScoringJob) | {"required": ["pairs"]}]},
)
_WORDS_AS_THEY_ARE = {"flags": {"description": "Words for the command of this stage, as they are.", **_FLAGS.schema}}


@dataclass(frozen=True)
class Expert:
    """One expert. `scoring` is a job of wp-score without base and expert; None where `scores` is there, or no need."""

    model: str = described(_WORD, "The model.", "", unset="`expert` of its job")
    scoring: Mapping[str, Any] | None = described(
        _SCORING, "A scoring job's file, or its fields; `base` and `expert` come from here.", None
    )
    scores: Path | None = described(_WORD, "A score file that is there already, instead of `scoring`.", None)


@dataclass(frozen=True)
class Merge:
    """One merge: a mergekit recipe of the user's own, or the fields of one over `experts` (all of them if empty).

    Without `out_dtype` it is written in what its experts are stored in.
    """

    recipe: Path | None = described(_WORD, "A recipe of your own, as it is; no other field then.", None)
    merge_method: str = described(_WORD, "Any of mergekit's or ours.", "wp")
    experts: tuple[str, ...] = described(_NAMES, "Names of those that are merged.", (), unset="all")
    parameters: Mapping[str, Any] = described(
        _PARAMETERS,
        "Of the merge, such as `{scale: 1.5}` or `{fit: FILE}`. `scale: auto` is the scale that `wp-fit` finds for the "
        "shares of the scores.",
        {},
    )
    fit: Mapping[str, Any] | None = described(
        _FIT,
        "By wp with weights that `wp-fit` learns first: fields of a fit job, such as `{family: component}`; experts "
        "and their prompts come from here.",
        None,
    )
    expert_parameters: Mapping[str, Any] = described(_PARAMETERS, "Of each expert, such as `{weight: 1.0}`.", {})
    base_parameters: Mapping[str, Any] | None = described(
        _PARAMETERS,
        "Of the base among the merged models, where the method averages what it is given.",
        None,
        unset="base not listed",
    )
    out_dtype: str | None = described(_WORD, "Dtype of the result.", None, unset="as experts are stored")

    @property
    def fitted(self) -> bool:
        """By wp, with the weights of a fit file, which has no use for scores."""
        return self.merge_method == "wp" and (self.fit is not None or "fit" in self.parameters)


@dataclass(frozen=True)
class Evaluate:
    """How everything is graded; `models` are names of the base, experts and merges (all of them if empty)."""

    suite: Path = described(_WORD, "A suite, as `wp-eval` takes it.")
    baseline: str | None = described(_WORD, "Row that differences are taken from.", None, unset="the suite's")
    models: tuple[str, ...] = described(_NAMES, "Names among `base`, experts and merges.", (), unset="all")
    include_path: Path | None = described(_WORD, "Folder of lm-eval tasks.", None, unset="the suite's")
    data: Path | None = described(
        _WORD, "Folder of data sets that stands in for the Hub.", None, unset="the suite's, else the Hub"
    )


@dataclass(frozen=True)
class Push:
    """Which merge goes where on the Hub; `parents` are the Hub names of base and experts that are folders here."""

    merge: str = described(_WORD, "Which merge.")
    to: str = described(_WORD, "`USER/NAME` on the Hub.")
    parents: Mapping[str, str] = described(
        mapping("a mapping from `base` and experts to their names on the Hub", {"type": "string"}),
        "Hub names of `base` and experts that are folders here.",
        {},
    )
    private: bool = described(switch(), "Make a new repository private.", False)
    license: str | None = described(_WORD, "Licence of the merge, if you answer for it.", None, unset="the parents'")
    license_name: str | None = described(_WORD, "Name of its terms, with `license: other`.", None)
    license_link: str | None = described(
        _WORD, "Where those terms are, with `license: other`.", None, unset="as a parent has it"
    )
    dry_run: bool = described(switch(), "Write the card, send nothing.", False)


def _part(kind: type) -> ValueKind:
    return ValueKind("a mapping", lambda value: isinstance(value, dict), json_schema(kind, _WORDS_AS_THEY_ARE), None)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline file that was checked. `flags` maps a stage to what its command is given as it is."""

    file: Path
    flags: Mapping[str, tuple[str, ...]]
    base: str = described(_WORD, "Base model.")
    experts: Mapping[str, Expert] = described(
        mapping(of=json_schema(Expert)), "By name. The name is a row of the table and a file's name."
    )
    merges: Mapping[str, Merge] = described(mapping(of={"anyOf": [json_schema(Merge), {"type": "null"}]}), "By name.")
    evaluate: Evaluate | None = described(_part(Evaluate), "How everything is graded.", None, unset="not graded")
    push: Push | None = described(_part(Push), "Which merge is published.", None, unset="not pushed")
    out: Path = described(_WORD, "Folder of all that is written.", Path("runs"), unset="`runs/` and this file's name")

    @property
    def names(self) -> list[str]:
        """Every row that can be graded."""
        return [BASE, *self.experts, *self.merges]


_STAGE_FLAGS = {"type": "object", "properties": _WORDS_AS_THEY_ARE, "additionalProperties": False}
_OTHER_FIELDS = {name: {"description": f"For wp-{name}.", **_STAGE_FLAGS} for name in ("score", "fit", "merge")}
_FIELDS = ("out", "base", "experts", "merges", "evaluate", "push", *_OTHER_FIELDS)


def read_pipeline(path: str | os.PathLike[str]) -> Pipeline:
    """The pipeline in a YAML file. Raises `BadInput`, naming file and field, for what cannot be carried out."""
    content, file = read_yaml_mapping(path, "pipeline"), Path(path)
    try:
        if unknown := [name for name in content if name not in _FIELDS]:
            raise BadInput(f"unknown field `{unknown[0]}`; a pipeline has {', '.join(_FIELDS)}.")
        flags = {name: _flags(name, content.get(name)) for name in STAGES if name != "report"}
        pipeline = Pipeline(
            file=file,
            out=Path(_text("out", content.get("out", f"runs/{file.stem}"))).expanduser(),
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
    scoring = dict(scoring) if scoring is not None else None
    model = values.get("model") or (scoring or {}).get("expert")
    if model is None:
        raise BadInput(f"`{where}.model` is missing, and its scoring job names no `expert`.")
    scores = _found(values["scores"], file, f"{where}.scores") if "scores" in values else None
    if scoring is not None and scores is not None:
        raise BadInput(f"`{where}` has both `scoring` and `scores`; keep the one that is to be used.")
    if scoring is not None:
        scoring = {key: value for key, value in scoring.items() if key not in ("base", "expert")}
        for name, path in job_files(scoring).items():
            found = str(_found(path, file, f"{where}.scoring.{name}", must_exist=False))
            scoring[name] = [scoring[name][0], found] if name == "top" else found
        if isinstance(scoring.get("at"), str):
            scoring["at"] = str(_found(scoring["at"], file, f"{where}.scoring.at"))
    return Expert(_model(_text(f"{where}.model", model), file), scoring, scores)


def job_files(job: Mapping[str, Any]) -> dict[str, str]:
    """The files beside models and recipes that a scoring or fit job reads itself, by field: of prompts and answers, a
    list of components, the scores that rank for `top`. A built-in set is none, nor is what lies on the Hub."""
    named = {name: job.get(name) for name in ("pairs", "answers", "keep", "components")}
    if isinstance(top := job.get("top"), list) and len(top) == 2:
        named["top"] = top[1]
    return {
        name: path
        for name, path in named.items()
        if isinstance(path, str) and ":" not in path and not (name == "components" and path in COMPONENTS)
    }


def _merge(name: str, raw: Any, file: Path) -> Merge:
    where = f"merges.{name}"
    values = _known(Merge, where, raw if raw is not None else {})
    if "recipe" in values:
        if others := sorted(set(values) - {"recipe"}):
            raise BadInput(f"`{where}` has a recipe of its own; write `{others[0]}` there.")
        return Merge(recipe=_found(values["recipe"], file, f"{where}.recipe"))
    merge = Merge(**{**values, "experts": tuple(values.get("experts", ()))})
    if merge.fit is not None:
        _check_fit(f"{where}.fit", merge.fit)
        named = job_files(merge.fit).items()
        files = {name: str(_found(path, file, f"{where}.fit.{name}", must_exist=False)) for name, path in named}
        merge = replace(merge, fit={**merge.fit, **files})
    if merge.merge_method == "wp" and merge.parameters.get("scale") == "auto":
        if merge.fit is not None:
            raise BadInput(f"`{where}` has both `fit` and `scale: auto`, which is a fit of its own; keep one.")
        rest = {key: value for key, value in merge.parameters.items() if key != "scale"}
        merge = replace(merge, parameters=rest, fit={"family": "scale", "start": "scores"})
    if merge.fit is not None and (merge.merge_method != "wp" or "fit" in merge.parameters):
        raise BadInput(f"`{where}.fit` is for merge_method wp without a fit file of its own; leave one of them out.")
    from mergekit_wp.merge.plan import names_file

    paths = {name: value for name, value in merge.parameters.items() if names_file(name, value)}
    found = {name: str(_found(path, file, f"{where}.parameters.{name}")) for name, path in paths.items()}
    merge = replace(merge, parameters={**merge.parameters, **found})
    return merge


def _check_fit(where: str, fit: Mapping[str, Any]) -> None:
    known = [item.name for item in fields(FitJob) if item.name not in ("base", "experts")]
    if unknown := [name for name in fit if name not in known]:
        raise BadInput(f"`{where}`: unknown field `{unknown[0]}`; it has {', '.join(known)}.")
    if wrong := first_wrong(FitJob, fit):
        raise BadInput(f"`{where}.{wrong[0]}`: found {shown(fit[wrong[0]])}, expected {wrong[1].expected}.")


def _evaluate(raw: Any, file: Path) -> Evaluate | None:
    if raw is None:
        return None
    values = _known(Evaluate, "evaluate", raw, {"flags"})
    if "suite" not in values:
        raise BadInput("`evaluate.suite` is missing; name a suite, such as eval/paper.yaml.")
    include, data = values.get("include_path"), values.get("data")
    return Evaluate(
        suite=_found(values["suite"], file, "evaluate.suite"),
        baseline=values.get("baseline"),
        models=tuple(values.get("models", ())),
        # It may be something that an earlier step makes.
        include_path=_found(include, file, "evaluate.include_path", must_exist=False) if include else None,
        data=_found(data, file, "evaluate.data") if data else None,
    )


def _push(raw: Any) -> Push | None:
    if raw is None:
        return None
    values = _known(Push, "push", raw, {"flags"})
    for name in ("merge", "to"):
        if name not in values:
            raise BadInput(f"`push.{name}` is missing.")
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
            if merge.fit is not None and not (known.scoring or {}).get("pairs"):
                raise BadInput(
                    f"`merges.{name}.fit` needs prompts of `experts.{expert}`; give it `scoring: {{pairs: FILE}}`."
                )
            needs = merge.fit is not None and merge.fit.get("start") == "scores"
            scored = (merge.fitted and not needs) or known.scoring or known.scores
            if merge.recipe is None and merge.merge_method == "wp" and not scored:
                raise BadInput(
                    f"`merges.{name}` is by wp, and `experts.{expert}` has no scores; give it `scoring: JOB.yaml` "
                    "or `scores: FILE.safetensors`, or the merge `parameters: {fit: FILE.safetensors}`."
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


def _known(kind: type, where: str, raw: Any, beside: Collection[str] = ()) -> dict[str, Any]:
    """The fields of one part, each of its kind; `beside` are names that something else reads."""
    known = {item.name: item for item in fields(kind)}
    if not isinstance(raw, dict):
        raise BadInput(f"`{where}`: found {shown(raw)}, expected a mapping with {', '.join(known)}.")
    if unknown := [name for name in raw if name not in known and name not in beside]:
        raise BadInput(f"`{where}`: unknown field `{unknown[0]}`; it has {', '.join(known)}.")
    if wrong := first_wrong(kind, raw):
        name, expected = wrong[0], wrong[1].expected
        raise BadInput(f"`{where}.{name}`: found {shown(raw[name])}, expected {expected}.")
    values = {name: value for name, value in raw.items() if name in known and value is not None}
    for name, value in values.items():
        if about(known[name]).kind is _WORD:
            _text(f"{where}.{name}", value)
    return values


def _flags(stage: str, raw: Any) -> tuple[str, ...]:
    """The list under `STAGE.flags`; of `score`, `fit` and `merge` it is all there is."""
    if stage in ("score", "fit", "merge") and raw is not None and (not isinstance(raw, dict) or set(raw) - {"flags"}):
        raise BadInput(f"`{stage}`: found {shown(raw)}, expected {{flags: [...]}}.")
    flags = raw.get("flags", []) if isinstance(raw, dict) else []
    if not _FLAGS.fits(flags):
        raise BadInput(f"`{stage}.flags`: found {shown(flags)}, expected {_FLAGS.expected}.")
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


_STAGE_ROW = {"flags": (_FLAGS.expected, "Words for the command of this stage, as they are.")}
FORM = Form(
    "pipeline",
    "All stages from one file. A path is looked for in the working directory, then beside the file.",
    lambda: json_schema(Pipeline, _OTHER_FIELDS),
    {
        "Pipeline": rows(Pipeline),
        "Each of its experts": rows(Expert),
        "Each of its merges": rows(Merge),
        "evaluate": rows(Evaluate) | _STAGE_ROW,
        "push": rows(Push) | _STAGE_ROW,
        "score, fit, merge": _STAGE_ROW,
    },
)
