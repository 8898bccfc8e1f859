"""The loss of merged models on unlabelled prompts: what a fit makes small (METHOD.md 6), of a model by any method.

The mean over the experts that were merged of the share of their gap that the merge leaves open, on all prompts of their
pairs files. What the experts say, and how far the base is from it, is read once for a combination, in each process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from experiments.table3.work import fit_job
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.console import no_progress
from mergekit_wp.fit.fit import _lessons, _vocabulary, check, load, unrecovered
from mergekit_wp.fit.objective import batch_lessons, losses
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.models.load import load_stack


class Measure:
    """Base and experts of one combination in memory, with the experts' answers to their prompts."""

    def __init__(self, world: Path, experts: Sequence[str], answers: Sequence[Path]):
        self.experts = experts
        self.job = fit_job(world, experts, {}, dict(zip(experts, answers, strict=True)))
        ready = check(self.job)
        self.models = load(self.job, ready, ProcessGroup())
        self.lessons = _lessons(self.job, ready, self.models, ProcessGroup(), no_progress, None)
        self.vocabulary = _vocabulary(ready)

    def unrecovered(self, folder: Path) -> dict[str, float]:
        """R of each expert for the model in a folder."""
        stack = load_stack(
            str(folder), Checkpoint.open(str(folder)), self.models.dtype, self.models.device, "none", False
        )
        teachers = self.models.experts
        batches = batch_lessons(self.lessons, self.job.batch_size, (stack, *teachers))
        kl_N = losses(stack, teachers, batches, self.vocabulary, ProcessGroup(), lambda _done: None)
        return dict(zip(self.experts, unrecovered(self.lessons, kl_N).tolist(), strict=True))


@lru_cache(maxsize=1)
def measure_of(world: Path, experts: tuple[str, ...], answers: tuple[Path, ...]) -> Measure:
    """The measure of one combination, made once a process as long as no other comes between."""
    return Measure(world, experts, answers)
