"""Valid fits with random weights, of small models that there are or are not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from score_example import GEOMETRY

from mergekit_wp.fit_file import MOST, Fit, FitMeta, FittedPrompts, LossAt, Unrecovered
from mergekit_wp.geometry import Geometry
from mergekit_wp.scores import ModelId

BASE = ModelId("base", None, "c" * 64, "a" * 64)
EXPERTS = (ModelId("user/one", "main", "c" * 64, "1" * 64), ModelId("two", None, "c" * 64, "2" * 64))


def meta(base: ModelId = BASE, experts: Sequence[ModelId] = EXPERTS, geometry: Geometry = GEOMETRY) -> FitMeta:
    return FitMeta(
        base=base,
        experts=tuple(experts),
        geometry=geometry,
        family="component",
        start="average",
        answer_tokens=8,
        seed=0,
        prompts=tuple(FittedPrompts(12, 4) for _ in experts),
        curve=(LossAt(0, 0.5, 0.55), LossAt(10, 0.25, 0.3), LossAt(20, 0.2, 0.35)),
        unrecovered=tuple(Unrecovered(1.0, 0.55, 0.3) for _ in experts),
        best_step=10,
        dtype="float32",
        device="cpu",
        versions={"torch": "2"},
        date="2026-01-01T00:00:00+00:00",
    )


def example(about: FitMeta | None = None, seed: int = 0) -> Fit:
    """Random weights from 0 to `MOST`."""
    about, generator = about or meta(), torch.Generator().manual_seed(seed)
    K, shape = len(about.experts), about.geometry

    def random(*sizes: int) -> torch.Tensor:
        return MOST * torch.rand(*sizes, generator=generator)

    return Fit(about, random(K, shape.layers, shape.heads), random(K, shape.layers, shape.neurons), random(K))
