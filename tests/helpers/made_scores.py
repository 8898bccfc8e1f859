"""Score files and results made up for tests of what is said and drawn of them."""

from __future__ import annotations

from pathlib import Path

import torch

from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.rows import Cell, Row
from mergekit_wp.eval.suite import Suite, SuiteTask
from mergekit_wp.eval.tables import Table
from mergekit_wp.geometry import Geometry
from mergekit_wp.scores import ModelId, ScoreMeta, Scores, TaskMeta, TaskScores, UtilityStats

EXPERTS = ("instruction", "maths", "code")
MERGES = ("linear", "wp")
LAYERS, HEADS, NEURONS, WIDTH = 6, 8, 384, 128


def synthetic_scores(seed: int) -> Scores:
    """Sparse heavy-tailed scores with a few negative ones, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(LAYERS, HEADS, generator=generator).abs() ** 3 * 0.05 - 0.01
    neurons = torch.randn(LAYERS, NEURONS, generator=generator).abs() ** 5 * 0.002 - 0.0003
    model = ModelId("runs/demo/world/base", None, "c" * 64, "a" * 64)
    used = UtilityStats(used=32, dropped=1, mean_gap=0.4)
    meta = ScoreMeta(
        base=model, expert=model,
        geometry=Geometry(
            architecture="LlamaForCausalLM", layers=LAYERS, heads=HEADS, kv_heads=4, head_dim=16,
            neurons=NEURONS, d_model=WIDTH, vocabulary=110,
        ),
        tasks={"one": TaskMeta(extraction=32, scoring=33, utilities={"anchor": used})},
        method="writeback", utility="staged", gap="mean", split="half", anchor_layer=3, dtype="float32",
        device="cpu", seed=0, versions={"torch": "2"}, date="2026-11-21T00:00:00+00:00",
    )  # fmt: skip
    return Scores.from_tasks(meta, {"one": TaskScores(heads, neurons, torch.zeros(WIDTH))})


def synthetic_table() -> Table:
    tasks = tuple(SuiteTask(task=f"mini_{name}", column=name, metric="acc,none") for name in EXPERTS)
    values = {
        "base": (0.11, 0.12, 0.13), "instruction": (0.9, 0.1, 0.1), "maths": (0.1, 0.9, 0.1),
        "code": (0.1, 0.1, 0.9), "linear": (0.5, 0.4, 0.3), "wp": (0.6, 0.35, 0.3),
    }  # fmt: skip
    rows = []
    for name, row in values.items():
        cells = {column: Cell(value, 0.02, 200) for column, value in zip(EXPERTS, row, strict=True)}
        rows.append(Row(EvalModel(name, f"runs/{name}", Path(f"runs/{name}"), "f" * 64), cells, {}))
    return Table(Suite("miniature", tasks), rows, "linear", None)
