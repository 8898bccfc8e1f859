"""Valid scores with random numbers, of a small model that there is not."""

from __future__ import annotations

import torch

from mergekit_wp.geometry import Geometry
from mergekit_wp.scores import ModelId, ScoreMeta, Scores, TaskMeta, TaskScores, UtilityStats

GEOMETRY = Geometry("LlamaForCausalLM", 3, 4, 2, 8, 10, 24, 97)


def example(tasks=("a", "b")) -> Scores:
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    scores = {task: TaskScores(random(3, 4), random(3, 10), random(24)) for task in tasks}
    about = TaskMeta(8, 8, {"anchor": UtilityStats(7, 1, 0.25), "kl": UtilityStats(8, 0, 1.5)})
    meta = ScoreMeta(
        base=ModelId("base", None, "c" * 64, "a" * 64),
        expert=ModelId("user/expert", "main", "c" * 64, "b" * 64),
        geometry=GEOMETRY,
        tasks=dict.fromkeys(tasks, about),
        method="writeback",
        utility="staged",
        gap="sample",
        split="half",
        anchor_layer=2,
        dtype="float32",
        device="cpu",
        seed=0,
        versions={"torch": "2"},
        date="2026-01-01T00:00:00+00:00",
    )
    return Scores.from_tasks(meta, scores)
