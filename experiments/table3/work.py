"""What a worker process does: train a world, score an expert, fit, merge and grade. Each result lies under its key.

Workers live long, so that the libraries' imports (seconds each) are paid once. A merge is mergekit's own command,
called in the process: the function behind `mergekit-yaml`, with the recipe on disk and its options as typed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from experiments.miniature.items import CAPABILITIES
from experiments.miniature.training import WorldConfig
from experiments.real.real_config import RealConfig
from experiments.table3.grade import GRADE_OF_SPLIT, Grade, grade
from experiments.table3.variants import COMBINATIONS
from mergekit_wp.errors import BadInput
from mergekit_wp.files import write_text

if TYPE_CHECKING:
    from experiments.table3.loss import Measure
    from mergekit_wp.fit.job import FitJob


_device = "cpu"
"""Where this worker's models run, as `prepare` was told."""
_DTYPE = "float32"
"""Of products in scores and fits; their default on a GPU is that of the weights, so a table would depend on where."""


@dataclass(frozen=True)
class MergeJob:
    """A merge to be made: its recipe, where the recipe is to be written, where the model goes for a while."""

    recipe: Mapping[str, Any]
    recipe_file: Path
    folder: Path
    random_seed: int
    keep: bool


@dataclass(frozen=True)
class Grading:
    """One model on one split. `about` is kept with the result; `model` is a merge, or a folder that is there; `dtype`:
    of products, else the suite's."""

    result: Path
    model: MergeJob | Path
    world: Path
    split: str
    capabilities: tuple[str, ...]
    cache: Path
    allow_code: bool
    about: Mapping[str, Any]
    dtype: str | None = None


@dataclass(frozen=True)
class LossJob:
    """A merge whose loss is to be measured, on the prompts of its experts; `answers`: of each expert, in order."""

    result: Path
    model: MergeJob
    world: Path
    experts: tuple[str, ...]
    answers: tuple[Path, ...]


def train_world(config: WorldConfig | RealConfig, root: Path, data: Path | None = None) -> Path:
    """The folder of this world, trained first if it is not there yet; `data`: official files, for a real one."""
    if isinstance(config, RealConfig):
        from experiments.real.real_world import build_real_world

        return build_real_world(config, root, data)
    from experiments.miniature.world import build_world

    return build_world(config, root, quiet=True)


def write_score(world: Path, expert: str, settings: Mapping[str, Any], file: Path, allow_code: bool) -> Path:
    """Score one expert of a world by wp-score's engine, with its defaults where `settings` say nothing.

    settings  fields of a job; `at` names a combination of experts, at whose plain average is scored
    """
    from mergekit_wp.scores import write_scores
    from mergekit_wp.scoring.config import ScoringJob
    from mergekit_wp.scoring.score import score

    file.parent.mkdir(parents=True, exist_ok=True)
    if "at" in settings:
        from mergekit_wp.pipeline.steps import build_recipe

        average, merged = file.with_suffix(".at.yaml"), COMBINATIONS[settings["at"]]
        listed = {str(world / name): {"weight": 1.0} for name in merged}
        base = str(world / "base")
        content = build_recipe("linear", base, listed, shared={}, base_parameters={"weight": 0.0}, out_dtype=None)
        write_text(average, yaml.safe_dump(content))
        settings = {**settings, "at": str(average)}
    job = ScoringJob(
        str(world / "base"), str(world / expert), str(world / "pairs" / f"{expert}.jsonl"), device=_device,
        dtype=_DTYPE, offload="none", allow_code_execution=allow_code, **settings,
    )  # fmt: skip
    write_scores(score(job), file)
    return file


def write_answers(world: Path, expert: str, tokens: int, file: Path) -> Path:
    """One expert's answers of at most so many tokens to its prompts, as a fit would ask for them."""
    from mergekit_wp.scoring.models.load import load_pair
    from mergekit_wp.scoring.score import prepare
    from mergekit_wp.scoring.whole_answers import answers_for

    fit = fit_job(world, (expert, *(name for name in CAPABILITIES if name != expert)), {"answer_tokens": tokens})
    job = fit.scoring(fit.models[0])
    ready = prepare(job)
    stack = load_pair(job, ready.checked).expert
    file.parent.mkdir(parents=True, exist_ok=True)
    growing = file.with_suffix(".part")  # a run that was killed goes on
    answers_for(job, ready.checked, stack, ready.tokenizer, ready.tasks, growing)
    return growing.replace(file)


def write_fit_file(
    world: Path,
    experts: tuple[str, ...],
    settings: Mapping[str, Any],
    answers: Mapping[str, Path],
    scores: Mapping[str, Path],
    file: Path,
) -> Path:
    """Fit the merge of these experts of a world by wp-fit's engine, with its defaults where `settings` say nothing.

    answers  each expert's answers, if they were made
    scores   each expert's score file, for `start: scores`
    A run that was killed goes on.
    """
    from mergekit_wp.fit.fit import fit
    from mergekit_wp.fit_file import write_fit
    from mergekit_wp.scoring.resume import Resume

    file.parent.mkdir(parents=True, exist_ok=True)
    resume = Resume(file)
    write_fit(fit(fit_job(world, experts, settings, answers, scores), resume=resume, out=file), file)
    resume.forget()
    return file


def fit_job(
    world: Path,
    experts: Sequence[str],
    settings: Mapping[str, Any],
    answers: Mapping[str, Path] | None = None,
    scores: Mapping[str, Path] | None = None,
) -> FitJob:
    """The fit of these experts on the prompts that they are scored by."""
    from mergekit_wp.fit.job import FitJob

    files = {"answers": answers or {}, "scores": scores or {}}
    listed = [
        {"expert": str(world / name), "pairs": str(world / "pairs" / f"{name}.jsonl")}
        | {kind: str(of[name]) for kind, of in files.items() if name in of}
        for name in experts
    ]
    return FitJob(str(world / "base"), listed, device=_device, dtype=_DTYPE, offload="none", **settings)


@lru_cache(maxsize=1)
def measure_of(world: Path, experts: tuple[str, ...], answers: tuple[Path, ...]) -> Measure:
    """The measure of one combination, made once a process as long as no other comes between."""
    from experiments.table3.loss import Measure

    return Measure(fit_job(world, experts, {}, dict(zip(experts, answers, strict=True))), experts)


def measure_loss(task: LossJob) -> dict[str, float]:
    """Merge, measure the share of each expert's gap that is left open, keep it, and remove the merged model."""
    folder = merge(task.model)
    found = measure_of(task.world, task.experts, task.answers).unrecovered(folder)
    content = {"unrecovered": found, "recipe": task.model.recipe}
    write_text(task.result, json.dumps(content, indent=2) + "\n")
    shutil.rmtree(folder)
    return found


def read_loss(file: Path, experts: tuple[str, ...]) -> dict[str, float] | None:
    """A loss that was kept, or None where there is none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["unrecovered"]
        return {name: float(found[name]) for name in experts}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def merge(task: MergeJob) -> Path:
    """Run mergekit's command on the recipe. Raises what mergekit raises, `BadInput` from our own methods."""
    command = _mergekit_yaml()
    _check_parameters(task.recipe)
    write_text(task.recipe_file, yaml.safe_dump(dict(task.recipe), sort_keys=False))
    shutil.rmtree(task.folder, ignore_errors=True)  # what a killed run left
    arguments = [str(task.recipe_file), str(task.folder), "--quiet", "--random-seed", str(task.random_seed)]
    command.main(arguments, standalone_mode=False)
    if "base_model" not in task.recipe:
        _take_ids(task.folder, Path(task.recipe["tokenizer"]["source"]))
    return task.folder


def _take_ids(merged: Path, source: Path) -> None:
    """Let the config name the special tokens of the tokenizer that was asked for.

    Without a base, mergekit 0.1.5 takes the config of one of the models by chance (the first of a set); an expert's
    may name a row that the merge does not have, and transformers then does not load it.
    """
    own, right = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (merged, source))
    ids = {key: right.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_text(merged / "config.json", json.dumps({**own, **ids}, indent=2) + "\n")


def grade_model(task: Grading) -> Grade:
    """MergeJob if need be, grade, keep the result, and remove the merged model unless it is to be kept."""
    started = time.monotonic()
    folder = merge(task.model) if isinstance(task.model, MergeJob) else task.model
    merged = time.monotonic()
    found = grade(folder, task.world, task.split, task.capabilities, task.cache, task.allow_code, _device, task.dtype)
    content = {
        **task.about,
        "split": task.split,
        "right": dict(found.right),
        "items": dict(found.items),
        "merge_seconds": round(merged - started, 1),
        "grade_seconds": round(time.monotonic() - merged, 1),
    }
    write_text(task.result, json.dumps(content, indent=2) + "\n")
    if isinstance(task.model, MergeJob) and not task.model.keep:
        shutil.rmtree(folder)
    return found


def read_grade(file: Path, split: str) -> Grade | None:
    """A result that was kept, or None where there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return GRADE_OF_SPLIT[split](content["right"], content["items"]) if content["split"] == split else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_parameters(recipe: Mapping[str, Any]) -> None:
    """mergekit ignores a parameter that it does not know, and a search would compare nothing with nothing."""
    from mergekit.merge_methods import registry

    try:
        known = {parameter.name for parameter in registry.get(recipe["merge_method"]).spec.parameters}
    except RuntimeError as error:
        raise BadInput(f"method: mergekit has no merge method {recipe['merge_method']!r} here.") from error
    given = [recipe.get("parameters", {}), *(model.get("parameters", {}) for model in recipe["models"])]
    if unknown := sorted({name for parameters in given for name in parameters} - known):
        raise BadInput(
            f"{recipe['merge_method']}: unknown parameter `{unknown[0]}`; it has {', '.join(sorted(known)) or 'none'}."
        )


@lru_cache(maxsize=1)
def _mergekit_yaml() -> Any:
    from mergekit.scripts.run_yaml import main

    from mergekit_wp.merge import register

    register()  # for where .pth files are not read; the command itself needs no help
    return main


def prepare(device: str = "cpu") -> None:
    """The beginning of a worker: one thread, no bars and no advice from the libraries; its models run on `device`.

    Must run before torch and tqdm are first imported, so nothing that a worker loads by itself may import them.
    """
    global _device
    _device = device
    os.environ.update({"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"})
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    from mergekit_wp.console import quieten

    quieten(False)
