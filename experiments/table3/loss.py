"""The loss of merged models on unlabelled prompts: what a fit makes small (METHOD.md 6), of a model by any method.

The mean over the experts that were merged of the share of their gap that the merge leaves open, on all prompts of their
pairs files. What the experts say, and how far the base is from it, is read once for a combination, in each process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.console import no_progress
from mergekit_wp.fit.fit import check, load
from mergekit_wp.fit.job import FitJob
from mergekit_wp.fit.objective import batch_lessons, losses, read_teachers, shared_vocabulary, unrecovered
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.models.load import load_stack


class Measure:
    """Base and experts of one combination in memory, with the experts' answers to their prompts."""

    def __init__(self, job: FitJob, experts: Sequence[str]):
        self.job, self.experts = job, experts
        ready = check(job)
        self.models = load(job, ready, ProcessGroup())
        self.lessons = read_teachers(job, ready, self.models, ProcessGroup(), no_progress, None)
        self.vocabulary = shared_vocabulary(ready)

    def unrecovered(self, folder: Path) -> dict[str, float]:
        """R of each expert for the model in a folder."""
        stack = load_stack(
            str(folder), Checkpoint.open(str(folder)), self.models.dtype, self.models.device, "none", False
        )
        teachers = self.models.experts
        batches = batch_lessons(self.lessons, self.job.batch_size, (stack, *teachers))
        kl_N = losses(stack, teachers, batches, self.vocabulary, ProcessGroup(), lambda _done: None)
        return dict(zip(self.experts, unrecovered(self.lessons, kl_N).tolist(), strict=True))
