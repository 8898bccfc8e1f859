"""What must be done for one seed: its world, its score and fit files, what settings are chosen by, the test items.

A grid's setting is chosen twice, if one asks for both: by labels (grades on validation items) and without (the loss on
unlabelled prompts).

Every result lies under a key (see `recipe`), so a plan that is run again does what is missing or has changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from experiments.miniature.items import CAPABILITIES
from experiments.table3.frozen import MODELS, Disjoint, TrainedWorld, world_config
from experiments.table3.grade import Grade, ValidationGrade, choose, choose_unlabelled, grade_settings
from experiments.table3.keys import answers_key, fit_key, grade_key, loss_key, merge_key, recipe, score_key
from experiments.table3.schedule import Plan, TableJob
from experiments.table3.variants import (
    COMBINATIONS,
    SAW_LABELS,
    SAW_NOTHING,
    SAW_PROMPTS,
    Point,
    Variant,
    slug,
)
from experiments.table3.work import (
    Grading,
    LossJob,
    MergeJob,
    grade_model,
    measure_loss,
    read_grade,
    read_loss,
    train_world,
    write_answers,
    write_fit_file,
    write_score,
)
from mergekit_wp.fit.job import FitJob

SECONDS = {"world": 230.0, "score": 3.0, "answers": 7.0, "fit": 120.0, "loss": 4.5, "validation": 3.5, "test": 6.0}
"""What a job of each kind takes on one quiet thread of the machine of experiments/benchmarks/RESULTS.md; answers, fits
and losses in processor time of a busy one (a near world; of fits, between `scale` and two experts by `layer`)."""
_REAL_SECONDS = {
    "world": 3600.0,
    "score": 27.0,
    "answers": 26.0,
    "fit": 500.0,
    "loss": 40.0,
    "validation": 150.0,
    "test": 300.0,
}
"""The same of a pretrained model, on one thread with bfloat16 in hardware, beside another run (losses and validation
items by their numbers of tokens)."""
AUTHORS, LABELS, UNLABELLED, ONLY = "authors", "labels", "unlabelled", "only"
"""Roles of a graded point: the authors' setting, the best of the grid on validation items, the one with the least loss
on unlabelled prompts, the only one there is."""
CHOICES = (LABELS, UNLABELLED)


def seconds_of(kind: str) -> dict[str, float]:
    """What a job of each kind takes with worlds of this kind, until some have been measured."""
    return _REAL_SECONDS if kind in ("real", "real-far") else SECONDS


@dataclass(frozen=True)
class Setup:
    """What a run is about, and where its files go."""

    out: Path
    worlds: Path
    variants: tuple[Variant, ...]
    combinations: tuple[str, ...] = tuple(COMBINATIONS)
    kind: str = "near"
    allow_code: bool = False
    keep: bool = False
    validation_only: bool = False
    choose: tuple[str, ...] = CHOICES
    data: Path | None = None
    dtype: str | None = None


Cell = tuple[str, Variant, Point]
"""A combination, a variant, and a point of its grid."""


@dataclass(frozen=True)
class LossEntry:
    """The loss of one setting: of every expert that was merged, the share of its gap that the merge leaves open."""

    seed: int
    combination: str
    variant: str
    setting: str
    unrecovered: Mapping[str, float]


@dataclass(frozen=True)
class Entry:
    """One graded model: a point of a variant in a combination, or (combination "") a model of the world."""

    seed: int
    combination: str
    variant: str
    group: str
    setting: str
    role: str
    grade: Grade
    saw: str = SAW_NOTHING


@dataclass(frozen=True)
class SeedResult:
    """All that was measured on one world; `world` identifies it."""

    seed: int
    world: Mapping[str, str]
    validation: tuple[Entry, ...]
    losses: tuple[LossEntry, ...]
    test: tuple[Entry, ...]


def seed_plan(seed: int, setup: Setup, disjoint: Disjoint) -> Plan:
    """The plan of one seed; its outcome is a `SeedResult`.

    Raises `BadInput` when the world is not the frozen one, or when its splits overlap.
    """
    (folder,) = yield [_world_job(seed, setup)]
    world = TrainedWorld(seed, folder)
    disjoint.add(world)
    yield [*_score_jobs(setup, world), *_answer_jobs(setup, world)]
    yield _fit_jobs(setup, world)
    cells = [(c, v, p) for c in setup.combinations for v in setup.variants if v.can(COMBINATIONS[c]) for p in v.points]
    tried = [cell for cell in cells if len(cell[1].points) > 1]
    graded = cells if setup.validation_only else tried if LABELS in setup.choose else []
    weighed = tried if UNLABELLED in setup.choose and not setup.validation_only else []
    found = yield [
        *(_merge_job(setup, world, c, p, "validation") for c, _, p in graded),
        *(_loss_job(setup, world, c, p) for c, _, p in weighed),
    ]
    validation = tuple(_entry(seed, *cell, ONLY, g) for cell, g in zip(graded, found, strict=False))
    losses = tuple(
        LossEntry(seed, c, v.name, v.text(p), shares)
        for (c, v, p), shares in zip(weighed, found[len(graded) :], strict=True)
    )
    if setup.validation_only:
        return SeedResult(seed, _identity(world), validation, (), ())
    # Everything is chosen here, before the first job on test items of this seed exists.
    chosen = [cell for c in setup.combinations for v in setup.variants for cell in _tested(c, v, validation, losses)]
    models = [_model_job(setup, world, name) for name in MODELS]
    grades = yield [*models, *(_merge_job(setup, world, c, p, "test") for c, _, p, _ in chosen)]
    tests = [Entry(seed, "", name, "models", "", ONLY, g) for name, g in zip(MODELS, grades, strict=False)]
    tests += [_entry(seed, *cell, g) for cell, g in zip(chosen, grades[len(MODELS) :], strict=True)]
    return SeedResult(seed, _identity(world), validation, losses, tuple(tests))


def expected(setup: Setup, seeds: Sequence[int]) -> Counter[str]:
    """How many jobs of each kind are still to be run; those on test items at most, as long as nothing is chosen."""
    found: Counter[str] = Counter()
    for seed in seeds:
        found += _left(setup, seed)
    return found


def _left(setup: Setup, seed: int) -> Counter[str]:
    """Walks through the plan as far as results are kept, and estimates the rest."""
    wanted = {name for combination in setup.combinations for name in COMBINATIONS[combination]}
    able = [(c, v) for c in setup.combinations for v in setup.variants if v.can(COMBINATIONS[c])]
    points, tried = ({(c, str(p)) for c, v in able if len(v.points) >= n for p in v.points} for n in (1, 2))
    fits = {(c, str((p.fit, p.scores))) for c, v in able for p in v.points if p.fit is not None}
    later = {"score": len(_settings(setup)) * len(wanted), "answers": len(_lengths(setup)) * len(wanted)}
    later["fit"] = len(fits)
    if setup.validation_only:
        later["validation"] = len(points)
    else:
        later["validation"] = len(tried) * (LABELS in setup.choose)
        later["loss"] = len(tried) * (UNLABELLED in setup.choose)
        later["test"] = len(MODELS) + sum(1 + len(setup.choose) * (len(v.points) > 1) for _, v in able)
    plan = seed_plan(seed, setup, Disjoint())
    left, jobs = Counter[str](), next(plan)
    while True:
        kept = [job.kept() for job in jobs]
        missing = {job.name: job.kind for job, result in zip(jobs, kept, strict=True) if result is None}
        left.update(missing.values())
        for kind in {job.kind for job in jobs}:
            later.pop(kind, None)
        if set(missing.values()) & {"world", "validation", "loss"}:  # what comes then depends on it
            return left + Counter(later)
        try:
            jobs = plan.send(kept)
        except StopIteration:
            return left


def _tested(
    combination: str, variant: Variant, validation: Sequence[Entry], losses: Sequence[LossEntry]
) -> list[tuple[str, Variant, Point, str]]:
    """What of a variant is graded on test items: the authors' setting, and what was chosen of its grid."""
    points, experts = variant.points, COMBINATIONS[combination]
    if not variant.can(experts):
        return []
    if len(points) == 1:
        return [(combination, variant, points[0], ONLY)]
    found = [(combination, variant, points[0], AUTHORS)]
    place = (combination, variant.name)
    if shares := [e.unrecovered for e in losses if (e.combination, e.variant) == place]:
        found.append((combination, variant, points[choose_unlabelled(shares)], UNLABELLED))
    if grades := [e.grade for e in validation if (e.combination, e.variant) == place]:
        best = choose(cast("list[ValidationGrade]", grades), experts)
        found.append((combination, variant, points[best], LABELS))
    return found


def _entry(seed: int, combination: str, variant: Variant, point: Point, role: str, grade: Grade) -> Entry:
    saw = {LABELS: SAW_LABELS, UNLABELLED: SAW_PROMPTS}.get(role, variant.sees)
    return Entry(seed, combination, variant.name, variant.group, variant.text(point), role, grade, saw)


def _identity(world: TrainedWorld) -> dict[str, str]:
    return {"hash": world.hash12, "content": world.digest}


def _world_job(seed: int, setup: Setup) -> TableJob:
    config = world_config(setup.kind, seed, setup.data)
    folder = setup.worlds.absolute() / config.hash12
    return TableJob(f"world {seed}", "world", f"seed {seed}: training the world", train_world,
               (config, setup.worlds, setup.data),
               lambda: folder if (folder / "world.json").is_file() else None)  # fmt: skip


def _settings(setup: Setup) -> list[dict[str, Any]]:
    """The different ways in which the variants want experts scored."""
    found: list[dict[str, Any]] = []
    for point in (p for v in setup.variants for p in v.points if p.scores is not None):
        if dict(point.scores or {}) not in found:
            found.append(dict(point.scores or {}))
    return found


def _experts(setup: Setup) -> list[str]:
    """Those of all combinations."""
    wanted = {name for combination in setup.combinations for name in COMBINATIONS[combination]}
    return [name for name in CAPABILITIES if name in wanted]


def _score_jobs(setup: Setup, world: TrainedWorld) -> list[TableJob]:
    return [_score_job(setup, world, how, expert) for how in _settings(setup) for expert in _experts(setup)]


def _score_job(setup: Setup, world: TrainedWorld, settings: Mapping[str, Any], expert: str) -> TableJob:
    file = _score_file(setup, world, settings, expert)
    how = ", ".join(f"{k} {v}" for k, v in settings.items()) or "defaults"
    return TableJob(str(file), "score", f"seed {world.seed}: scored {expert} ({how})", write_score,
               (world.folder, expert, dict(settings), file, setup.allow_code),
               lambda: file if file.is_file() else None)  # fmt: skip


def _score_file(setup: Setup, world: TrainedWorld, settings: Mapping[str, Any], expert: str) -> Path:
    how = slug("-".join(str(value) for value in settings.values()))[:40]
    name = "-".join(filter(None, (expert, how, score_key(settings, expert, world))))
    return setup.out / "scores" / f"seed{world.seed}" / f"{name}.safetensors"


def _tokens(point: Point) -> int:
    """How long the answers are that a fit reads."""
    return int((point.fit or {}).get("answer_tokens", FitJob.answer_tokens))


def _lengths(setup: Setup) -> list[int]:
    """The different lengths of answers that fits read; losses read those of a fit's default."""
    fits = {_tokens(p) for v in setup.variants for p in v.points if p.fit is not None}
    weighed = (
        UNLABELLED in setup.choose and not setup.validation_only and any(len(v.points) > 1 for v in setup.variants)
    )
    return sorted((fits | ({FitJob.answer_tokens} if weighed else set())) - {0})


def _answer_jobs(setup: Setup, world: TrainedWorld) -> list[TableJob]:
    return [_answer_job(setup, world, expert, tokens) for tokens in _lengths(setup) for expert in _experts(setup)]


def _answer_job(setup: Setup, world: TrainedWorld, expert: str, tokens: int) -> TableJob:
    file = _answer_file(setup, world, expert, tokens)
    title = f"seed {world.seed}: answers of {expert} (at most {tokens} tokens)"
    return TableJob(str(file), "answers", title, write_answers, (world.folder, expert, tokens, file),
               lambda: file if file.is_file() else None)  # fmt: skip


def _answer_file(setup: Setup, world: TrainedWorld, expert: str, tokens: int) -> Path:
    name = f"{expert}-{tokens}-{answers_key(expert, tokens, world)}.jsonl"
    return setup.out / "answers" / f"seed{world.seed}" / name


def _fit_jobs(setup: Setup, world: TrainedWorld) -> list[TableJob]:
    return [
        _fit_job(setup, world, combination, point)
        for combination in setup.combinations
        for variant in setup.variants
        for point in variant.points
        if point.fit is not None
    ]


def _fit_job(setup: Setup, world: TrainedWorld, combination: str, point: Point) -> TableJob:
    experts, settings = COMBINATIONS[combination], dict(point.fit or {})
    file = _fit_file(setup, world, combination, point)
    scores, tokens = _scores_of(setup, world, point, experts), _tokens(point)
    answers = {name: _answer_file(setup, world, name, tokens) for name in experts} if tokens else {}
    title = f"seed {world.seed}: fitted {combination} ({point.text()})"
    return TableJob(str(file), "fit", title, write_fit_file,
               (world.folder, experts, settings, answers, scores, file),
               lambda: file if file.is_file() else None)  # fmt: skip


def _fit_file(setup: Setup, world: TrainedWorld, combination: str, point: Point) -> Path:
    key = fit_key(point, COMBINATIONS[combination], world)
    how = slug("-".join(str(value) for value in (point.fit or {}).values()))[:40]
    return setup.out / "fits" / f"seed{world.seed}" / f"{slug(combination)}-{how}-{key}.safetensors"


def _scores_of(setup: Setup, world: TrainedWorld, point: Point, experts: Sequence[str]) -> dict[str, Path]:
    """The score file of each expert, if the point takes any."""
    if point.scores is None:
        return {}
    return {name: _score_file(setup, world, point.scores, name) for name in experts}


def _the_merge(setup: Setup, world: TrainedWorld, combination: str, point: Point) -> tuple[str, str, MergeJob]:
    """(its key, a name for its files, the merge)."""
    experts = COMBINATIONS[combination]
    files = _scores_of(setup, world, point, experts)
    fit = None if point.fit is None else _fit_file(setup, world, combination, point)
    key, place = merge_key(point, experts, world), f"{slug(combination)}-{slug(point.method)}"
    return key, place, MergeJob(
        recipe(point, experts, world, files, fit),
        setup.out / "recipes" / f"seed{world.seed}" / f"{place}-{key}.yaml",
        setup.out / "merged" / f"seed{world.seed}" / f"{place}-{key}",
        world.seed,
        setup.keep,
    )  # fmt: skip


def _loss_job(setup: Setup, world: TrainedWorld, combination: str, point: Point) -> TableJob:
    """MergeJob and its loss on the prompts of what was merged."""
    experts = COMBINATIONS[combination]
    key, place, merge = _the_merge(setup, world, combination, point)
    merge = replace(merge, folder=merge.folder.with_name(f"{merge.folder.name}-loss"))  # graded at the same time
    result = setup.out / "losses" / f"seed{world.seed}" / f"{place}-{loss_key(key, experts, world)}.json"
    title = f"seed {world.seed}: loss, {combination}, {point.method} ({point.text()})"
    answers = tuple(_answer_file(setup, world, name, FitJob.answer_tokens) for name in experts)
    task = LossJob(result, merge, world.folder, experts, answers)
    return TableJob(str(result), "loss", title, measure_loss, (task,), lambda: read_loss(result, experts))


def _merge_job(setup: Setup, world: TrainedWorld, combination: str, point: Point, split: str) -> TableJob:
    """MergeJob and grade. On validation items only what was merged is graded, on test items everything."""
    key, place, task = _the_merge(setup, world, combination, point)
    capabilities = COMBINATIONS[combination] if split == "validation" else CAPABILITIES
    title = f"seed {world.seed}: {split}, {combination}, {point.method} ({point.text()})"
    about = {"combination": combination, "setting": point.text(), "random_seed": world.seed, "recipe": task.recipe}
    return _grading(setup, world, task, split, capabilities, f"{place}-", key, title, about)


def _model_job(setup: Setup, world: TrainedWorld, name: str) -> TableJob:
    title = f"seed {world.seed}: test, {name} itself"
    return _grading(
        setup, world, world.folder / name, "test", CAPABILITIES, f"{name}-", world.digests[name], title, {"model": name}
    )


def _grading(
    setup: Setup,
    world: TrainedWorld,
    model: MergeJob | Path,
    split: str,
    capabilities: tuple[str, ...],
    prefix: str,
    key: str,
    title: str,
    about: Mapping[str, Any],
) -> TableJob:
    full = grade_key(key, split, capabilities, world, grade_settings(world.folder, setup.dtype))
    result = setup.out / "grades" / f"seed{world.seed}" / split / f"{prefix}{full}.json"
    about = {**about, "seed": world.seed, "world": world.hash12, "world_content": world.digest}
    cache = setup.out / "cache"
    task = Grading(result, model, world.folder, split, capabilities, cache, setup.allow_code, about, setup.dtype)
    return TableJob(str(result), split, title, grade_model, (task,), lambda: read_grade(result, split))
