"""What must be done for one seed: its world, its score files, all merges on validation items, the chosen on test items.

Every result lies under a key (see `recipe`), so a plan that is run again does what is missing or has changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from experiments.miniature.items import CAPABILITIES
from experiments.table3.frozen import KINDS, MODELS, Disjoint, TrainedWorld, check_frozen
from experiments.table3.grade import Grade, ValidationGrade, choose, grade_settings
from experiments.table3.keys import grade_key, merge_key, recipe, score_key
from experiments.table3.schedule import Plan, TableJob
from experiments.table3.variants import COMBINATIONS, Point, Variant, slug
from experiments.table3.work import Grading, MergeJob, grade_model, read_grade, train_world, write_score

SECONDS = {"world": 230.0, "score": 3.0, "validation": 3.5, "test": 6.0}
"""What a job of each kind takes on one quiet thread of the machine of experiments/benchmarks/RESULTS.md."""
AUTHORS, CHOSEN, ONLY = "authors", "chosen", "only"
"""Roles of a graded point: the authors' setting, the best of the grid on validation items, the only one there is."""


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


@dataclass(frozen=True)
class SeedResult:
    """All that was measured on one world; `world` identifies it."""

    seed: int
    world: Mapping[str, str]
    validation: tuple[Entry, ...]
    test: tuple[Entry, ...]


def seed_plan(seed: int, setup: Setup, disjoint: Disjoint) -> Plan:
    """The plan of one seed; its outcome is a `SeedResult`.

    Raises `BadInput` when the world is not the frozen one, or when its splits overlap.
    """
    (folder,) = yield [_world_job(seed, setup)]
    world = TrainedWorld(seed, folder)
    disjoint.add(world)
    yield _score_jobs(setup, world)
    cells = [(c, v, p) for c in setup.combinations for v in setup.variants for p in v.points]
    grades = yield [_merge_job(setup, world, c, p, "validation") for c, _, p in cells]
    validation = tuple(_entry(seed, c, v, p, ONLY, g) for (c, v, p), g in zip(cells, grades, strict=True))
    if setup.validation_only:
        return SeedResult(seed, _identity(world), validation, ())
    # Everything is chosen here, before the first job on test items of this seed exists.
    chosen = [cell for c in setup.combinations for v in setup.variants for cell in _tested(c, v, validation)]
    jobs = [_merge_job(setup, world, c, p, "test") for c, _, p, _ in chosen]
    models = [_model_job(setup, world, name) for name in MODELS]
    grades = yield [*models, *jobs]
    tests = [Entry(seed, "", name, "models", "", ONLY, g) for name, g in zip(MODELS, grades, strict=False)]
    tests += [_entry(seed, c, v, p, role, g) for (c, v, p, role), g in zip(chosen, grades[len(MODELS) :], strict=True)]
    return SeedResult(seed, _identity(world), validation, tuple(tests))


def expected(setup: Setup, seeds: Sequence[int]) -> Counter[str]:
    """How many jobs of each kind are still to be run; those on test items at most, as long as nothing is chosen."""
    found: Counter[str] = Counter()
    for seed in seeds:
        found += _left(setup, seed)
    return found


def _left(setup: Setup, seed: int) -> Counter[str]:
    """Walks through the plan as far as results are kept, and estimates the rest."""
    wanted = {name for combination in setup.combinations for name in COMBINATIONS[combination]}
    points = len({(c, str(p)) for c in setup.combinations for v in setup.variants for p in v.points})
    tests = len(setup.combinations) * sum(1 + (len(v.points) > 1) for v in setup.variants) + len(MODELS)
    later = {"score": len(_settings(setup)) * len(wanted), "validation": points}
    later["test"] = 0 if setup.validation_only else tests
    plan = seed_plan(seed, setup, Disjoint())
    left, jobs = Counter[str](), next(plan)
    while True:
        kept = [job.kept() for job in jobs]
        missing = {job.name: job.kind for job, result in zip(jobs, kept, strict=True) if result is None}
        left.update(missing.values())
        for kind in {job.kind for job in jobs}:
            later.pop(kind, None)
        if set(missing.values()) & {"world", "validation"}:  # what comes then depends on it
            return left + Counter(later)
        try:
            jobs = plan.send(kept)
        except StopIteration:
            return left


def _tested(combination: str, variant: Variant, validation: Sequence[Entry]) -> list[tuple[str, Variant, Point, str]]:
    """What of a variant is graded on test items: the best of its grid, and the authors' setting."""
    if len(variant.points) == 1:
        return [(combination, variant, variant.points[0], ONLY)]
    mine = [e.grade for e in validation if (e.combination, e.variant) == (combination, variant.name)]
    best = choose(cast("list[ValidationGrade]", mine), COMBINATIONS[combination])
    return [(combination, variant, variant.points[best], CHOSEN), (combination, variant, variant.points[0], AUTHORS)]


def _entry(seed: int, combination: str, variant: Variant, point: Point, role: str, grade: Grade) -> Entry:
    return Entry(seed, combination, variant.name, variant.group, variant.text(point), role, grade)


def _identity(world: TrainedWorld) -> dict[str, str]:
    return {"hash": world.hash12, "content": world.digest}


def _world_job(seed: int, setup: Setup) -> TableJob:
    config = KINDS[setup.kind](seed)
    check_frozen(setup.kind, seed, config.hash12)
    folder = setup.worlds.absolute() / config.hash12
    return TableJob(f"world {seed}", "world", f"seed {seed}: training the world", train_world,
               (config, setup.worlds),
               lambda: folder if (folder / "world.json").is_file() else None)  # fmt: skip


def _settings(setup: Setup) -> list[dict[str, Any]]:
    """The different ways in which the variants want experts scored."""
    found: list[dict[str, Any]] = []
    for point in (p for v in setup.variants for p in v.points if p.scores is not None):
        if dict(point.scores or {}) not in found:
            found.append(dict(point.scores or {}))
    return found


def _score_jobs(setup: Setup, world: TrainedWorld) -> list[TableJob]:
    wanted = {name for combination in setup.combinations for name in COMBINATIONS[combination]}
    return [
        _score_job(setup, world, settings, expert)
        for settings in _settings(setup)
        for expert in CAPABILITIES
        if expert in wanted
    ]


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


def _merge_job(setup: Setup, world: TrainedWorld, combination: str, point: Point, split: str) -> TableJob:
    """MergeJob and grade. On validation items only what was merged is graded, on test items everything."""
    experts = COMBINATIONS[combination]
    scores = {}
    if point.scores is not None:
        scores = {name: _score_file(setup, world, point.scores, name) for name in experts}
    key, place = merge_key(point, experts, world), f"{slug(combination)}-{slug(point.method)}"
    task = MergeJob(
        recipe(point, experts, world, scores),
        setup.out / "recipes" / f"seed{world.seed}" / f"{place}-{key}.yaml",
        setup.out / "merged" / f"seed{world.seed}" / f"{place}-{key}",
        world.seed,
        setup.keep,
    )
    capabilities = experts if split == "validation" else CAPABILITIES
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
    full = grade_key(key, split, capabilities, world, grade_settings())
    result = setup.out / "grades" / f"seed{world.seed}" / split / f"{prefix}{full}.json"
    about = {**about, "seed": world.seed, "world": world.hash12, "world_content": world.digest}
    task = Grading(result, model, world.folder, split, capabilities, setup.out / "cache", setup.allow_code, about)
    return TableJob(str(result), split, title, grade_model, (task,), lambda: read_grade(result, split))
