"""From a pipeline to its steps: every expert is scored, every merge made, all graded, a report written, one pushed.

What a step needs beside models is written under OUT first: OUT/scoring/EXPERT.yaml, OUT/recipes/MERGE.yaml. The
commands are those a person would type with these files. `build_recipe` also serves the table of `make table3`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_wp.autoload import METHODS
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.hub import folder_of
from mergekit_wp.checkpoint.references import Reference, Source, read_reference, recipe_models
from mergekit_wp.checkpoint.weights import TensorHeader
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.suite import read_suite
from mergekit_wp.execute import Step
from mergekit_wp.files import read_yaml_mapping, write_text
from mergekit_wp.merge.certificate import CERTIFICATE
from mergekit_wp.merge.plan import WP
from mergekit_wp.merge.recipe import files_of
from mergekit_wp.pipeline.spec import BASE, Evaluate, Merge, Pipeline, job_files
from mergekit_wp.scoring.models.precision import stored_dtype


def build_recipe(
    method: str,
    base: str,
    experts: Mapping[str, Mapping[str, Any]],
    *,
    shared: Mapping[str, Any],
    base_parameters: Mapping[str, Any] | None = None,
    out_dtype: str | None,
) -> dict[str, Any]:
    """A mergekit recipe of `experts` (model -> its own parameters) on `base`.

    `shared` are the recipe's parameters; `base_parameters` puts the base among the merged models (linear averages
    what it is given, and takes config and tokenizer from the base only if it is there). Without `out_dtype` the methods
    of this package write the base's dtype, others float32.
    """
    listed = [{"model": m} | ({"parameters": dict(own)} if own else {}) for m, own in experts.items()]
    if base_parameters is not None:
        listed.append({"model": base, "parameters": dict(base_parameters)})
    content: dict[str, Any] = {"merge_method": method, "base_model": base, "models": listed}
    if shared:
        content["parameters"] = dict(shared)
    if method not in METHODS:
        # An expert may have rows for added tokens; and without a dtype differences would be rounded to 16 bits.
        # The methods of this package see to both themselves.
        content |= {"tokenizer": {"source": "base"}, "dtype": "float32"}
    return content | ({"out_dtype": out_dtype} if out_dtype else {})


def pipeline_steps(pipeline: Pipeline, allow_code: bool = False) -> list[Step]:
    """Every step, in order. Raises `BadInput` for a suite that runs model-written code without consent."""
    steps = [_score_step(pipeline, name, allow_code) for name, e in pipeline.experts.items() if e.scoring is not None]
    steps += [_fit_step(pipeline, name) for name, merge in pipeline.merges.items() if merge.fit is not None]
    steps += [_merge_step(pipeline, name) for name in pipeline.merges]
    if pipeline.evaluate is not None:
        steps.append(_eval_step(pipeline, allow_code))
    steps.append(_report_step(pipeline))
    if pipeline.push is not None:
        steps.append(_push_step(pipeline))
    return steps


def derived_files(pipeline: Pipeline) -> dict[Path, str]:
    """The files that steps read and that only repeat what the pipeline says: path -> content."""
    files = {}
    for name, expert in pipeline.experts.items():
        if expert.scoring is not None:
            job = {"base": pipeline.base, "expert": expert.model, **expert.scoring}
            files[_job_file(pipeline, name)] = yaml.safe_dump(job, sort_keys=False, width=110)
    for name, merge in pipeline.merges.items():
        if merge.fit is not None:
            files[_fit_job_file(pipeline, name)] = yaml.safe_dump(_fit_job(pipeline, merge), sort_keys=False, width=110)
        if merge.recipe is None:
            files[recipe_file(pipeline, name)] = yaml.safe_dump(_recipe(pipeline, name), sort_keys=False)
    return files


def write_derived(pipeline: Pipeline) -> None:
    """Write what has another content than on the disk."""
    for path, text in derived_files(pipeline).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def hub_models(pipeline: Pipeline) -> list[Source]:
    """The models that are on the Hub rather than in folders."""
    named = [read_reference(name) for name in (pipeline.base, *(e.model for e in pipeline.experts.values()))]
    for merge in pipeline.merges.values():
        named += recipe_models(_read_recipe(merge.recipe)) if merge.recipe else ()
    return [source for source in dict.fromkeys(s for model in named for s in model.sources) if source.kind == "hub"]


def absent_models(pipeline: Pipeline) -> list[Source]:
    """Those of them whose weights are not, or not all, on this machine."""
    return [source for source in hub_models(pipeline) if not _here(folder_of(source))]


def _here(folder: Path) -> bool:
    try:
        return os.path.isdir(folder) and bool(Checkpoint(str(folder), folder).tensors)
    except BadInput:
        return False


def score_file(pipeline: Pipeline, expert: str) -> Path:
    """Where an expert's scores lie: what the pipeline names, or what its step writes."""
    return pipeline.experts[expert].scores or pipeline.out / "scores" / f"{expert}.safetensors"


def score_files(pipeline: Pipeline) -> dict[str, Path]:
    """The score files that are there or will be, by expert."""
    named = (name for name, expert in pipeline.experts.items() if expert.scoring is not None or expert.scores)
    return {name: score_file(pipeline, name) for name in named}


def recipe_file(pipeline: Pipeline, merge: str) -> Path:
    """A merge's recipe: the user's own, or the one written for it."""
    return pipeline.merges[merge].recipe or pipeline.out / "recipes" / f"{merge}.yaml"


def model_of(pipeline: Pipeline, name: str) -> str:
    """The model behind the name of a row."""
    if name == BASE:
        return pipeline.base
    return pipeline.experts[name].model if name in pipeline.experts else str(merged_folder(pipeline, name))


def merged_folder(pipeline: Pipeline, merge: str) -> Path:
    return pipeline.out / "merges" / merge


def results_folder(pipeline: Pipeline) -> Path:
    return pipeline.out / "eval"


def report_file(pipeline: Pipeline) -> Path:
    return pipeline.out / "report.html"


def _job_file(pipeline: Pipeline, expert: str) -> Path:
    return pipeline.out / "scoring" / f"{expert}.yaml"


def fit_file(pipeline: Pipeline, merge: str) -> Path:
    """Where the weights of a merge lie that its step writes."""
    return pipeline.out / "fits" / f"{merge}.safetensors"


def _fit_job_file(pipeline: Pipeline, merge: str) -> Path:
    return pipeline.out / "fits" / f"{merge}.yaml"


def _fit_job(pipeline: Pipeline, merge: Merge) -> dict[str, Any]:
    """The job of wp-fit: prompts are those that the experts are scored on, put in the same way. Raises `BadInput` where
    experts put theirs in different ways and the merge does not say how."""
    assert merge.fit is not None
    names = merge.experts or tuple(pipeline.experts)
    jobs = [pipeline.experts[name].scoring or {} for name in names]
    shared: dict[str, Any] = {}
    for field in ("template", "chat_template", "system", "samples", "seed"):
        said = [job.get(field) for job in jobs]
        if field not in merge.fit and any(value != said[0] for value in said):
            raise BadInput(f"`fit`: its experts have different `{field}`; say there which one holds for all.")
        shared |= {} if said[0] is None else {field: said[0]}
    experts = []
    for name, job in zip(names, jobs, strict=True):
        entry = {"expert": pipeline.experts[name].model, "pairs": job["pairs"]}
        experts.append(
            entry | ({"scores": str(score_file(pipeline, name))} if merge.fit.get("start") == "scores" else {})
        )
    return {"base": pipeline.base, "experts": experts, **shared, **merge.fit}


def _recipe(pipeline: Pipeline, name: str) -> dict[str, Any]:
    experts, merge = {}, pipeline.merges[name]
    shared = dict(merge.parameters) | ({} if merge.fit is None else {"fit": str(fit_file(pipeline, name))})
    for expert in merge.experts or pipeline.experts:
        own = dict(merge.expert_parameters)
        if merge.merge_method == WP and not merge.fitted:
            own["scores"] = str(score_file(pipeline, expert))
        experts[pipeline.experts[expert].model] = own
    return build_recipe(
        merge.merge_method, pipeline.base, experts, shared=shared,
        base_parameters=merge.base_parameters, out_dtype=merge.out_dtype or _stored_dtype(experts),
    )  # fmt: skip


def _stored_dtype(models: Iterable[str]) -> str | None:
    """The dtype that holds every one of these models without rounding; None while one is not here."""
    tensors: dict[str, TensorHeader] = {}
    for model in models:
        folder = folder_of(read_reference(model).model)
        if not _here(folder):
            return None
        tensors |= {f"{model} {name}": header for name, header in Checkpoint(str(folder), folder).tensors.items()}
    return str(stored_dtype(tensors)).removeprefix("torch.")


def _score_step(pipeline: Pipeline, name: str, allow_code: bool) -> Step:
    expert, job, scores = pipeline.experts[name], _job_file(pipeline, name), score_file(pipeline, name)
    command = ["wp-score", str(job), "--out", str(scores), *pipeline.flags["score"]]
    if allow_code and (expert.scoring or {}).get("layer") == "auto":
        command.append("--allow-code-execution")
    inputs = [job, *_folders(map(read_reference, (pipeline.base, expert.model)))]
    inputs += map(Path, job_files(expert.scoring or {}).values())
    if (at := (expert.scoring or {}).get("at")) is not None:
        try:
            inputs += _of_recipe(Path(at), _read_recipe(Path(at)))
        except BadInput as error:
            raise BadInput(f"{pipeline.file}: `experts.{name}.scoring.at`: {error.message}") from error
    return _step(f"score-{name}", "score", f"Score the {name} expert", command, inputs, (scores,), ("scoring",))


def _fit_step(pipeline: Pipeline, name: str) -> Step:
    job_file, weights = _fit_job_file(pipeline, name), fit_file(pipeline, name)
    try:
        job = _fit_job(pipeline, pipeline.merges[name])
    except BadInput as error:
        raise BadInput(f"{pipeline.file}: `merges.{name}`: {error.message}") from error
    command = ["wp-fit", str(job_file), "--out", str(weights), *pipeline.flags["fit"]]
    inputs = [job_file, *_folders(read_reference(m) for m in (pipeline.base, *(e["expert"] for e in job["experts"])))]
    for entry in job["experts"]:
        inputs += [Path(entry["pairs"])] if ":" not in entry["pairs"] else []
        inputs += [Path(entry[kind]) for kind in ("answers", "scores") if kind in entry]
    inputs += map(Path, job_files(job).values())
    return _step(f"fit-{name}", "fit", f"Fit the weights of {name}", command, inputs, (weights,), ("scoring", "fit"))


def _merge_step(pipeline: Pipeline, name: str) -> Step:
    recipe, merged = recipe_file(pipeline, name), merged_folder(pipeline, name)
    merge = pipeline.merges[name]
    try:
        content: Mapping[str, Any] = _read_recipe(merge.recipe) if merge.recipe else _recipe(pipeline, name)
    except BadInput as error:
        raise BadInput(f"{pipeline.file}: `merges.{name}`: {error.message}") from error
    command = ["wp-merge", str(recipe), str(merged), "--overwrite", "--quiet", *pipeline.flags["merge"]]
    title = f"Merge {name} by {content.get('merge_method')}"
    return _step(f"merge-{name}", "merge", title, command, _of_recipe(recipe, content), (merged,), ("merge",))


def _of_recipe(recipe: Path, content: Mapping[str, Any]) -> list[Path]:
    """A recipe, and the files and models that it names."""
    return [recipe, *(_beside(path, recipe) for path in files_of(content)), *_folders(recipe_models(content))]


def _eval_step(pipeline: Pipeline, allow_code: bool) -> Step:
    assert pipeline.evaluate is not None
    how, out = pipeline.evaluate, results_folder(pipeline)
    rows = {name: model_of(pipeline, name) for name in how.models or pipeline.names}
    command = ["wp-eval", str(how.suite), *(f"{name}={model}" for name, model in rows.items())]
    command += ["--baseline", how.baseline] if how.baseline else []
    command += ["--include-path", str(how.include_path)] if how.include_path else []
    command += ["--data", str(how.data)] if how.data else []
    prompts = _prompts_used(pipeline)
    command += [word for file in prompts for word in ("--prompts", file)]
    command += ["--allow-code-execution"] if allow_code else []
    command += ["--out", str(out), *pipeline.flags["evaluate"]]
    inputs = [how.suite, *(path for folder in _read_by(how) for path in _all_but(pipeline.out, folder))]
    inputs += [*map(Path, prompts), *_folders(map(read_reference, rows.values()))]
    outputs = tuple(out / f"results.{kind}" for kind in ("json", "csv", "md", "html"))
    return _step("evaluate", "evaluate", "Grade every model", command, inputs, outputs, ("eval", "sandbox"))


def _read_by(how: Evaluate) -> list[Path]:
    """The folders of tasks and of data that are read: the pipeline's, else the suite's own."""
    try:
        suite = read_suite(how.suite)
    except BadInput:  # said when the step is looked at, which an edited suite is
        return [folder for folder in (how.include_path, how.data) if folder]
    return [folder for folder in (how.include_path or suite.include_path, how.data or suite.data) if folder]


def _all_but(out: Path, folder: Path) -> list[Path]:
    """A folder that is read; where `out` lies in it (tasks beside the pipeline), what else is there, since every run
    writes to `out`."""
    if folder.resolve() not in out.resolve().parents:
        return [folder]
    beside = [path for path in sorted(folder.iterdir()) if path.resolve() != out.resolve()]
    return [found for path in beside for found in _all_but(out, path)]


def _prompts_used(pipeline: Pipeline) -> list[str]:
    """Files of prompts that something is made from before it is evaluated."""
    jobs = [expert.scoring or {} for expert in pipeline.experts.values()]
    jobs += [merge.fit or {} for merge in pipeline.merges.values()]
    named = [file for job in jobs for file in job_files(job).items()]
    return list(dict.fromkeys(path for name, path in named if name in ("pairs", "keep")))


def _report_step(pipeline: Pipeline) -> Step:
    command = ["python", "-m", "mergekit_wp.pipeline.report", str(pipeline.file)]
    inputs = [
        pipeline.file,
        *score_files(pipeline).values(),
        *(recipe_file(pipeline, name) for name in pipeline.merges),
    ]
    inputs += [merged_folder(pipeline, name) / CERTIFICATE for name in pipeline.merges]
    inputs += [results_folder(pipeline) / "results.json"] if pipeline.evaluate is not None else []
    return _step("report", "report", "Write the report", command, inputs, (report_file(pipeline),), ("pipeline",))


def _push_step(pipeline: Pipeline) -> Step:
    assert pipeline.push is not None
    push, merged = pipeline.push, merged_folder(pipeline, pipeline.push.merge)
    command = ["wp-push", str(merged), push.to]
    inputs = [merged, recipe_file(pipeline, push.merge)]
    if pipeline.evaluate is not None:
        command += ["--results", str(results_folder(pipeline))]
        inputs.append(results_folder(pipeline) / "results.json")
    for name, hub_name in push.parents.items():
        command += ["--parent", f"{model_of(pipeline, name)}={hub_name}"]
    command += ["--private"] if push.private else []
    for flag in ("license", "license_name", "license_link"):
        if (value := getattr(push, flag)) is not None:
            command += [f"--{flag.replace('_', '-')}", value]
    command += ["--dry-run"] if push.dry_run else []
    title = f"{'Show what would be pushed' if push.dry_run else 'Push'} to {push.to}"
    staged = merged.with_name(f"{merged.name}.push")  # where the card is; the rest of a push is on the Hub
    outputs = (staged,) if push.dry_run else ()
    return _step("push", "push", title, [*command, *pipeline.flags["push"]], inputs, outputs, ("push",))


def _step(
    name: str,
    stage: str,
    title: str,
    command: list[str],
    inputs: Iterable[Path],
    outputs: tuple[Path, ...],
    code: tuple[str, ...],
) -> Step:
    return Step(name, stage, title, tuple(command), tuple(dict.fromkeys(inputs)), outputs, code)


def _folders(models: Iterable[Reference]) -> list[Path]:
    """Where the files of models lie."""
    return [folder_of(source) for model in models for source in model.sources]


def _beside(name: str, recipe: Path) -> Path:
    """A file of a recipe as wp-merge finds it: in the working directory, else beside the recipe."""
    beside = recipe.parent / name
    return beside if not os.path.exists(name) and os.path.exists(beside) else Path(name)


def _read_recipe(path: Path) -> dict[str, Any]:
    content = read_yaml_mapping(path, "recipe")
    if "merge_method" not in content:
        raise BadInput(f"{path}: the recipe has no merge_method; write `merge_method: {WP}`.")
    return content
