"""Valid scores with random ones of single prompts, of a small model that there is not."""

from __future__ import annotations

from dataclasses import replace

import torch
from score_example import example

from mergekit_wp.geometry import Kind
from mergekit_wp.prompt_scores import PromptScores
from mergekit_wp.scores import PER_PROMPT, Scores, TaskMeta, TaskScores, UtilityStats


def made(seed=0, prompts=30, gap="sample", dropped=0, tasks=("a", "b"), shift=0.0) -> Scores:
    """Scores that follow from random ones of single prompts, of `kl` alone.

    shift: what these have in common, a number or a table [L, n] for each kind
    """
    plain, generator = example(), torch.Generator().manual_seed(seed)
    shape, found, metas = plain.meta.geometry, {}, {}
    for task in tasks:
        used_P = torch.ones(prompts)
        used_P[:dropped] = 0
        gaps_P = 0.5 + torch.rand(prompts, generator=generator)
        values = {
            kind: torch.randn(prompts, shape.layers, shape.count(kind), generator=generator)
            + (shift[kind] if isinstance(shift, dict) else shift)
            for kind in Kind
        }
        values = {kind: x * used_P[:, None, None] for kind, x in values.items()}
        tables = [x.sum(0) / used_P.sum() for x in values.values()]
        kept = PromptScores(values[Kind.HEAD], values[Kind.NEURON], {"kl": gaps_P}, {"kl": used_P})
        found[task] = TaskScores(*tables, prompts=kept)
        stats = UtilityStats(int(used_P.sum()), dropped, float((gaps_P * used_P).sum() / used_P.sum()))
        metas[task] = TaskMeta(0, prompts, {"kl": stats})
    ids = {task: tuple(f"{task}{i}" for i in range(prompts)) for task in tasks}
    about = replace(plain.meta, tasks=metas, utility="kl", split=None, anchor_layer=None, gap=gap, format=PER_PROMPT,
                    prompt_ids=ids)  # fmt: skip
    return Scores.from_tasks(about, found)
