"""Variants of one's own, read from a YAML file: what a search compares on validation items.

variants:
  - name: scaled                        # method wp, wp-score's defaults
    method: wp
    grid: {shared.scale: [1.0, 1.5, 2.0], scores.utility: [staged, kl]}
  - {name: weight 0.9, method: task_arithmetic, expert: {weight: 0.9}}
"""

from __future__ import annotations

import itertools
import os
from dataclasses import fields
from typing import Any

from experiments.table3.variants import COMBINATIONS, Point, Variant
from mergekit_wp.errors import BadInput
from mergekit_wp.files import read_yaml_mapping
from mergekit_wp.fit.job import FitJob
from mergekit_wp.scoring.config import ScoringJob

# What the table fills in for itself in a job of wp-score or wp-fit; a setting is about everything else.
_NOT_A_SETTING = {
    "base", "expert", "experts", "pairs", "answers", "device", "offload", "allow_code_execution", "trust_remote_code",
}  # fmt: skip

_COMMANDS = {"scores": "wp-score", "fit": "wp-fit"}


def read_variants(path: str | os.PathLike[str]) -> tuple[Variant, ...]:
    """Variants of a YAML file, for a search on validation items.

    variants: a list; each has `name` and `method`, and optionally `shared`, `expert`, `base`, `scores`, `fit` (as in
    `Point`) and `grid`, a mapping such as {shared.scale: [1, 2], scores.utility: [kl, staged]} whose product of values
    is laid over them, the first of each first. Raises `BadInput` naming the file and the field.
    """
    content = read_yaml_mapping(path, "list of variants")
    try:
        listed = content.get("variants")
        if not isinstance(listed, list) or not listed:
            raise BadInput("`variants` must be a list of variants, each with `name` and `method`.")
        variants = tuple(_variant(entry) for entry in listed)
        names = [variant.name for variant in variants]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise BadInput(f"two variants are named {double!r}; give each a name of its own.")
    except BadInput as error:
        raise BadInput(f"{path}: {error.message}") from error
    return variants


def _variant(entry: Any) -> Variant:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise BadInput(f"a variant must be a mapping with a `name`, found {entry!r}.")
    name, known = entry["name"], {f.name for f in fields(Point)}
    values = {k: v for k, v in entry.items() if k in known}
    if unknown := [key for key in entry if key not in {*known, "name", "why", "grid"}]:
        raise BadInput(f"variant {name!r}: unknown field {unknown[0]!r}; it has {', '.join(sorted(known))}, grid.")
    if not isinstance(values.get("method"), str):
        raise BadInput(f"variant {name!r}: `method` must be a merge method, found {values.get('method')!r}.")
    for key in known - {"method"}:
        if not isinstance(values.get(key, {}), dict):
            raise BadInput(f"variant {name!r}: `{key}` must be a mapping of parameters, found {values[key]!r}.")
    points = tuple(_point(name, laid) for laid in _laid_over(name, values, entry.get("grid") or {}))
    return Variant(name, points, str(entry.get("why", "")))


def _laid_over(name: str, values: dict[str, Any], grid: Any) -> list[dict[str, Any]]:
    axes = []
    for place, choices in grid.items() if isinstance(grid, dict) else [(str(grid), None)]:
        part, _, key = str(place).partition(".")
        if part not in ("shared", "expert", "base", "scores", "fit") or not key or not isinstance(choices, list):
            raise BadInput(f"variant {name!r}: `grid` needs entries like `shared.scale: [1, 2]`, found {place!r}.")
        axes.append([(part, key, choice) for choice in choices])
    found = []
    for chosen in itertools.product(*axes):
        laid = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
        for part, key, choice in chosen:
            laid.setdefault(part, {})[key] = choice
        found.append(laid)
    return found


def _point(name: str, values: dict[str, Any]) -> Point:
    for part, job in (("scores", ScoringJob), ("fit", FitJob)):
        settings = [f.name for f in fields(job) if f.name not in _NOT_A_SETTING]
        if unknown := [key for key in values.get(part) or {} if key not in settings]:
            raise BadInput(
                f"variant {name!r}: {part}.{unknown[0]} is no setting of {_COMMANDS[part]}; it has "
                f"{', '.join(settings)}."
            )
    # Both refuse bad values, naming the field.
    ScoringJob("base", "expert", "pairs", **(values.get("scores") or {}))
    at = (values.get("scores") or {}).get("at")
    if at is not None and at not in COMBINATIONS:
        raise BadInput(f"variant {name!r}: scores.at is {at!r}, expected one of {', '.join(COMBINATIONS)}.")
    expert = {"expert": "expert", "pairs": "pairs"} | ({"scores": "scores"} if values.get("scores") is not None else {})
    FitJob("base", [expert, expert], **(values.get("fit") or {}))
    if values["method"] == "wp" and values.get("scores") is None and values.get("fit") is None:
        values["scores"] = {}  # wp-score's defaults
    return Point(**values)
