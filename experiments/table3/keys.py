"""From a point of a grid to a recipe, and to the keys under which what came of it is kept.

A key is a hash of everything that decides a result: settings, the content of models, items and score files, the
versions of the packages, and the source of this package where its own code is at work. What has the key it had
before is not done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mergekit_wp
from experiments.table3.frozen import TrainedWorld
from experiments.table3.variants import COMBINATIONS, Point
from mergekit_wp.autoload import METHODS
from mergekit_wp.hashing import digest, readable

_PACKAGE, _EXPERIMENTS = Path(mergekit_wp.__file__).parent, Path(__file__).parents[1]
_MERGE_VERSIONS = ("mergekit", "torch")
_BASELESS = ("karcher",)  # would take a base for one more model to average
_GRADE_VERSIONS = ("lm-eval", "transformers", "torch")


def recipe(
    point: Point, experts: tuple[str, ...], world: TrainedWorld, scores: Mapping[str, Path], fit: Path | None = None
) -> dict[str, Any]:
    """A mergekit recipe; paths as a person in this folder would type them.

    scores  each expert's score file, for a point that merges by them
    fit     the fit file, for a point that has one; the scores were then for the fit
    """
    from mergekit_wp.pipeline.steps import build_recipe  # which imports torch, and a worker must not yet

    listed = {}
    for name in experts:
        by_scores = point.scores is not None and fit is None
        own = dict(point.expert) | ({"scores": str(readable(scores[name]))} if by_scores else {})
        listed[str(readable(world.folder / name))] = own
    base = str(readable(world.folder / "base"))
    shared = dict(point.shared) | ({} if fit is None else {"fit": str(readable(fit))})
    content = build_recipe(point.method, base, listed, shared=shared, base_parameters=point.base, out_dtype=world.dtype)
    if point.method in _BASELESS:
        content["tokenizer"] = {"source": content.pop("base_model")}
    return content


def score_key(settings: Mapping[str, Any], expert: str, world: TrainedWorld) -> str:
    """Twelve hex digits that name a score file."""
    merged = COMBINATIONS[settings["at"]] if "at" in settings else ()
    inputs = [world.digests[name] for name in ("base", expert, f"pairs/{expert}", *merged)]
    own = [source(part) for part in ("scoring", *(["merge"] if merged else []))]
    return _key("scores", dict(settings), inputs, *own, _versions(("torch", "transformers")))


def answers_key(expert: str, tokens: int, world: TrainedWorld) -> str:
    """Twelve hex digits that name a file of an expert's answers."""
    inputs = [world.digests[name] for name in ("base", expert, f"pairs/{expert}")]
    return _key("answers", tokens, inputs, source("scoring"), _versions(("torch", "transformers")))


def fit_key(point: Point, experts: tuple[str, ...], world: TrainedWorld) -> str:
    """Twelve hex digits that name a fit file."""
    settings, read = dict(point.fit or {}), [f"pairs/{name}" for name in experts]
    scores = None if point.scores is None else [score_key(point.scores, name, world) for name in experts]
    inputs = [world.digests[name] for name in ("base", *experts, *read)]
    return _key("fit", settings, experts, inputs, scores, *map(source, ("fit", "scoring", "merge")),
                _versions(("torch", "transformers")))  # fmt: skip


def loss_key(merge: str, experts: tuple[str, ...], world: TrainedWorld) -> str:
    """Twelve hex digits that name the loss of a merge, whose key is given."""
    inputs = [world.digests[name] for name in ("base", *experts, *(f"pairs/{name}" for name in experts))]
    own = digest(Path(__file__).with_name("loss.py"))
    return _key("loss", merge, experts, inputs, own, *map(source, ("fit", "scoring")),
                _versions(("torch", "transformers")))  # fmt: skip


def merge_key(point: Point, experts: tuple[str, ...], world: TrainedWorld) -> str:
    """Twelve hex digits that name a merged model (random methods draw with the world's seed)."""
    scores: Any = None
    if point.fit is not None:
        scores = fit_key(point, experts, world)
    elif point.scores is not None:
        scores = [score_key(point.scores, name, world) for name in experts]
    own = source("merge") if point.method in METHODS else ""
    parameters = [point.method, dict(point.shared), dict(point.expert), point.base and dict(point.base)]
    models = [world.digests[name] for name in ("base", *experts)]
    return _key("merge", parameters, experts, models, scores, own, world.seed, _versions(_MERGE_VERSIONS))


def grade_key(model: str, split: str, capabilities: tuple[str, ...], world: TrainedWorld, settings: list[Any]) -> str:
    """Twelve hex digits that name one grading: `model` is a merge's key or the digest of a model of the world."""
    graders = [source("miniature"), source("real"), source("sandbox")]
    return _key("grade", model, split, capabilities, world.digests["tasks"], settings, graders,
                _versions(_GRADE_VERSIONS))  # fmt: skip


@cache
def source(part: str) -> str:
    """SHA-256 of the package's shared modules and of one part of it or of experiments, as first asked for."""
    own = _PACKAGE / part if (_PACKAGE / part).is_dir() else _EXPERIMENTS / part
    files = sorted([*_PACKAGE.glob("*.py"), *(_PACKAGE / "checkpoint").glob("*.py"), *own.rglob("*.py")])
    return _key(*(f"{file.name}={digest(file)}" for file in files))


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    return {name: version(name) for name in names}


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
