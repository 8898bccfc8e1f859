"""The fit: weights of a merge, learnt from the experts' own answers, without a label (METHOD.md 6).

1. check      every expert against the base, its prompts, the tokenizer; nothing loaded yet
2. answers    every expert answers its own prompts greedily (`scoring.whole_answers`), or its answers are read; with
              `keep` the base, too, answers prompts, and is one more teacher
3. lessons    what each teacher says along its answers, and the gap that the loss divides by: how far the base is from
              it, and of the base how far the experts are
4. start      the plain average, or the shares of score files, times the scale with the least loss: all candidates go
              through the layers together
5. steps      Adam on the loss of `objective`; every few steps a look at the prompts held out, whose best is kept
6. file       the weights of the best look

All draws are made from the seed and the number of the step, and what a step leaves is kept beside the output: a run
that was killed goes on, to the same bytes. Several processes share the prompts.

Legend: K experts, J teachers (the experts, and the base with `keep`), L layers, H heads, F neurons, P numbers of the
family, N prompts.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from mergekit_wp.checkpoint.folder import content_of
from mergekit_wp.checkpoint.vocabulary import head_equals_embeddings, head_is_tied
from mergekit_wp.console import StartProgress, no_progress
from mergekit_wp.documents import now, versions
from mergekit_wp.errors import BadInput, enough_memory
from mergekit_wp.fit.cross import cross_weights
from mergekit_wp.fit.descent import Descent
from mergekit_wp.fit.families import WeightFamily
from mergekit_wp.fit.gradient import loss_and_gradient
from mergekit_wp.fit.job import FitExpert, FitJob
from mergekit_wp.fit.objective import (
    Lesson,
    LessonBatch,
    batch_lessons,
    branch_losses,
    hold_out,
    loss_weights,
    losses,
    mean_gaps,
    read_teachers,
    shared_vocabulary,
    teachers_of,
    unrecovered,
)
from mergekit_wp.fit_file import MOST, Fit, FitMeta, FittedPrompts, FusionWeights, Kept, LossAt, Unrecovered
from mergekit_wp.foreign import logger
from mergekit_wp.hashing import digest
from mergekit_wp.memory import pick_device
from mergekit_wp.merge.kernel import component_weights
from mergekit_wp.merge.made_for import check_fingerprint
from mergekit_wp.merge.shares import check_complete
from mergekit_wp.scores import ModelId, read_scores
from mergekit_wp.scoring.batching import check_rows
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.models.load import CheckedPair, load_stack
from mergekit_wp.scoring.models.merged import MergedStack
from mergekit_wp.scoring.models.offload import pick_offload
from mergekit_wp.scoring.models.precision import not_finite, pick_dtype, stored_dtype
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.score import Prepared, prepare

LOG = logger(__name__)
_FEW = 4  # prompts held out of a teacher: fewer are hardly a sample
SCALES = tuple(0.25 * i for i in range(2, 17))  # of the start; at 4, the average of four experts is their sum


def fit(
    job: FitJob,
    progress: StartProgress | None = None,
    processes: ProcessGroup | None = None,
    resume: Resume | None = None,
    out: Path | None = None,
) -> Fit:
    """Run a whole fit job.

    progress   called as (total, what, unit) at the start of each part; returns a function that is told what is done
    processes  those that share the work; alone by default
    resume     where finished steps are kept; nowhere by default. The caller calls its `forget` once the file is written
    out        the fit file, beside which answers are kept; None: nowhere
    Raises `BadInput` for everything the user can mend.
    """
    processes, resume, start = processes or ProcessGroup(), resume or Resume(), progress or no_progress
    ready = check(job)
    shares = _start_shares(job, ready)  # now, since a score file may be missing, and answers take long
    with enough_memory(f"batch_size: {job.batch_size} prompts do not fit on {pick_device(job.device)}; lower it."):
        merged = load(job, ready, processes)
        lessons = read_teachers(job, ready, merged, processes, start, out)
        run = FitRun(
            job, merged, shared_vocabulary(ready), *hold_out(lessons, job.hold_out, job.seed), processes, start
        )
        _warn_of_few(job, run)
        date = resume.begin(_inputs(job, ready, run), now())
        resume.spare_others()
        found = run.carry_out(shares, resume)
    return _fit_of(job, ready, run, found, date)


def _warn_of_few(job: FitJob, run: FitRun) -> None:
    for j, teacher in enumerate(job.teachers):
        few = sum(lesson.teacher == j for lesson in run.held)
        if run.family is not None and job.hold_out and few < _FEW:
            LOG.warning(
                "%s: %d of its prompts decide%s which weights are best, which so few can hardly tell; give it %d or "
                "more (from 64 on fits were at their best).",
                teacher.expert, few, "s" if few == 1 else "", int(_FEW / job.hold_out),
            )  # fmt: skip


def check(job: FitJob) -> list[Prepared]:
    """Every teacher with its prompts, experts checked against the base. Raises `BadInput` naming the teacher."""
    ready: list[Prepared] = []
    for expert in job.models:
        try:
            each = prepare(job.scoring(expert))
        except BadInput as error:
            raise BadInput(f"expert {expert.expert}: {error.message}") from error
        if any(_one_model(expert, each, *other) for other in zip(job.models, ready, strict=False)):
            raise BadInput(f"experts: {expert.expert} is listed twice; list each once.")
        if head_is_tied(each.checked.base) and not head_equals_embeddings(each.checked.expert):
            raise BadInput(
                f"expert {expert.expert}: it has an output head of its own, which no merge into the base {job.base} "
                "can hold, since that ties its to the embeddings; use an expert tuned from this base."
            )
        ready.append(each)
    if job.keep is not None:
        base, base_print = ready[0].checked.base, ready[0].checked.base_print
        try:
            ready.append(prepare(job.keeping(), checked=CheckedPair(base, base, base_print, base_print, base.folder)))
        except BadInput as error:
            raise BadInput(f"keep: {error.message}") from error
    for j, each in enumerate(ready):
        prompts = [tuple(ids) for task in each.tasks for ids in task.scoring]
        where = f"experts, entry {j + 1}" if j < len(job.experts) else "keep"
        if job.hold_out and len(set(prompts)) < 2:
            raise BadInput(f"{where}: has one prompt, which cannot be held out; give more, or hold_out: 0.")
        if more := len(prompts) - len(set(prompts)):
            LOG.warning("%s: %d of %d prompts are there before; each is held out, or fitted to, as one.", where, more,
                        len(prompts))  # fmt: skip
    return _reading_each_other(ready)


def _one_model(expert: FitExpert, each: Prepared, other: FitExpert, its: Prepared) -> bool:
    """Equal fingerprints only sample the weights."""
    same = each.checked.expert_print == its.checked.expert_print
    return same and content_of(expert.expert) == content_of(other.expert)


def _reading_each_other(ready: Sequence[Prepared]) -> list[Prepared]:
    """With answers of tokens that all models have, since each runs the others' prompts. Raises `BadInput` for prompts
    (and for answers that were given) of others."""
    models = [each.checked.expert for each in ready]
    together = [replace(each, checked=replace(each.checked, others=models)) for each in ready]
    for each in together:
        ids = [ids for task in each.tasks for ids in (*task.scoring, *task.answers)]
        check_rows(ids, each.tokenizer, each.checked.vocabulary)
    return together


def load(job: FitJob, ready: Sequence[Prepared], processes: ProcessGroup) -> MergedStack:
    """Base and experts in memory, or ready to be read layer by layer, and over them a merge that takes nothing yet."""
    base, experts = ready[0].checked.base, [each.checked.expert for each in ready[: len(job.experts)]]
    device = processes.local_device(pick_device(job.device))
    dtype = pick_dtype(job.dtype, device, [stored_dtype(model.tensors) for model in (base, *experts)])
    models = [base, *experts, base]  # once more for the merge
    offload, reason = pick_offload(job.offload, models, dtype, device, f"{len(models) - 1} models and their merge")
    LOG.info(reason)
    names = [job.base, *(expert.expert for expert in job.models)]
    own, *others = (
        load_stack(name, checkpoint, dtype, device, offload, job.trust_remote_code)
        for name, checkpoint in zip(names, (base, *experts), strict=True)
    )
    return MergedStack(own, others, base.geometry, FusionWeights.uniform(base.geometry, [0.0] * len(others)))


@dataclass(frozen=True)
class Found:
    """What came of a run: the weights, the curve, the step they are of, and R [J] at the start and at the end."""

    weights: FusionWeights
    start: str
    curve: tuple[LossAt, ...]
    best_step: int
    before_J: torch.Tensor
    after_J: torch.Tensor


@dataclass
class FitRun:
    """The search for weights: prompts to fit and prompts held out, through the merge."""

    job: FitJob
    merged: MergedStack
    vocabulary: int
    fitted: list[Lesson]
    held: list[Lesson]
    processes: ProcessGroup
    start: StartProgress

    @property
    def looked_at(self) -> list[Lesson]:
        """What decides which weights are best: the prompts held out, if there are any."""
        return self.held or self.fitted

    @cached_property
    def family(self) -> WeightFamily | None:
        """Of the numbers that steps move; None where nothing is done in steps."""
        if self.job.family in ("scale", "cross"):
            return None
        return WeightFamily.named(self.job.family, len(self.merged.experts), self.merged.geometry)

    def carry_out(self, shares: FusionWeights, resume: Resume) -> Found:
        """Phases 4 and 5."""
        if self.family is not None:  # what is measured before the first step is then what that step begins at
            shares = self.family.nearest(shares)
        first, scale, loss = self._scale(shares)
        name = "the plain average" if self.job.start == "average" else "the shares of score files"
        if self.job.family == "cross":
            shares, name = self._crossed(first), "cross effects"
            first, scale, loss = self._scale(shares)
        name = f"{name} times {scale:g}"
        if any(float(x.max()) > MOST for x in _parts(shares.scaled(scale))):
            name += f", no weight above {MOST:g}"
        before_J = self._look(first)
        point = LossAt(0, loss, float(before_J.mean()) if self.held else None)
        if self.family is None:
            return Found(first, name, (point,), 0, before_J, before_J)
        weights, curve, best_step = self._descend(self.family, first, point, resume)
        return Found(weights, name, curve, best_step, before_J, self._look(weights))

    def _scale(self, shares: FusionWeights) -> tuple[FusionWeights, float, float]:
        """(the shares times the scale with the least loss on some of the fitted prompts, the scale, that loss)."""
        candidates = [_bounded(shares.scaled(scale)) for scale in SCALES]
        lessons = self._drawn(0)
        tick = self.start(len(lessons), f"Trying {len(SCALES)} scales", "prompt")
        kl_CN = branch_losses(self.merged, candidates, self._batches(lessons), self.vocabulary, self.processes, tick)
        loss_C = torch.stack([unrecovered(lessons, kl_N).mean() for kl_N in kl_CN])
        loss_C[~loss_C.isfinite()] = torch.inf  # too large a merge, in float16: the others are to choose from
        if not loss_C.isfinite().any():
            raise not_finite("the loss, whatever the scale,", self.merged.dtype)
        best = int(loss_C.argmin())
        return candidates[best], SCALES[best], float(loss_C[best])

    def _crossed(self, average: FusionWeights) -> FusionWeights:
        """Weights from cross effects on all fitted prompts of experts. The base's would add nothing: to first order,
        and at the base, nothing moves what it says (KL(p_base || p) is least there)."""
        lessons = [lesson for lesson in self.fitted if lesson.teacher < len(self.merged.experts)]
        batches = batch_lessons(lessons, self.job.batch_size, teachers_of(self.merged), by_prompt=True)
        tick = self.start(len(lessons), "Reading cross effects", "prompt")
        # Squared, effects are to be the mean over each expert's prompts of shares of its gap: experts count alike.
        weights_N = (loss_weights(lessons) / mean_gaps(lessons)).sqrt()
        return cross_weights(self.merged, batches, weights_N, average, self.vocabulary, self.processes, tick)

    def _descend(
        self, family: WeightFamily, first: FusionWeights, point: LossAt, resume: Resume
    ) -> tuple[FusionWeights, tuple[LossAt, ...], int]:
        """Adam from the weights `first`, which the family has; (the best, the curve, the best's step)."""
        job, processes = self.job, self.processes
        state = Descent(family.mean(first), point, job.steps, job.rate)
        if (saved := processes.tell(resume.load(0, 0, state.tensors()))) is not None:
            state.restore(saved)
            LOG.info("Going on after %d finished steps.", state.step)
        prompts = len(self._drawn(1))
        tick = self.start(job.steps * prompts, "Fitting", "prompt")
        tick(state.step * prompts)
        while state.step < job.steps and not state.stalled(job.patience):
            lessons = self._drawn(state.step + 1)
            self.merged.set(family.spread(state.number_P.detach()))
            kl_N, gradient = loss_and_gradient(
                self.merged, self._batches(lessons), loss_weights(lessons), self.vocabulary, self.processes, tick
            )
            state.advance(float(unrecovered(lessons, kl_N).mean()), family.gather(gradient))
            if state.step % job.look_every == 0 or state.step == job.steps:
                state.look(float(self._look(family.spread(state.number_P.detach())).mean()))
                where = "held out" if self.held else "fitted"
                LOG.info("step %d: %.4f of the gaps left open on prompts %s", state.step, state.last, where)
            resume.save(0, 0, state.tensors())
        return family.spread(state.best_P), state.curve(bool(self.held)), state.best_step

    def _look(self, weights: FusionWeights) -> torch.Tensor:
        """R [J] of the prompts that decide."""
        self.merged.set(weights)
        batches = self._batches(self.looked_at)
        kl_N = losses(self.merged, teachers_of(self.merged), batches, self.vocabulary, self.processes, _untold)
        return unrecovered(self.looked_at, kl_N)

    def _batches(self, lessons: Sequence[Lesson]) -> list[LessonBatch]:
        return batch_lessons(lessons, self.job.batch_size, teachers_of(self.merged))

    def _drawn(self, step: int) -> list[Lesson]:
        """The prompts of one step: some of each teacher, all of them where there are few."""
        found: list[Lesson] = []
        for teacher in sorted({lesson.teacher for lesson in self.fitted}):
            own = [lesson for lesson in self.fitted if lesson.teacher == teacher]
            count = min(self.job.prompts_a_step, len(own))
            found += random.Random(f"{self.job.seed}/step {step}/{teacher}").sample(own, count)
        return found


def _untold(_done: float) -> None:
    """Of a look, which takes no time to speak of, nobody is told."""


def _bounded(weights: FusionWeights) -> FusionWeights:
    return FusionWeights(*(x.clamp(0, MOST) for x in _parts(weights)))


def _parts(weights: FusionWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return weights.heads_KLH, weights.neurons_KLF, weights.rest_K


def _start_shares(job: FitJob, ready: Sequence[Prepared]) -> FusionWeights:
    """1/K of everything, or what the score files of the experts give (Eq. 17)."""
    shape, count = ready[0].checked.base.geometry, len(job.experts)
    average = FusionWeights.uniform(shape, [1 / count] * count)
    if job.start == "average":
        return average
    files = []
    for expert, each in zip(job.models, ready, strict=False):
        scores = read_scores(str(expert.scores))
        check_complete(scores, str(expert.scores))
        for role, name, found in (
            ("base", job.base, each.checked.base_print),
            ("expert", expert.expert, each.checked.expert_print),
        ):
            scored, remedy = getattr(scores.meta, role), "score this pair with wp-score"
            check_fingerprint(found, role, name, scored, str(expert.scores), False, remedy=remedy)
        files.append(scores)
    heads, neurons = (component_weights([getattr(x, kind) for x in files]) for kind in ("heads", "neurons"))
    return FusionWeights(heads, neurons, average.rest_K)


def _inputs(job: FitJob, ready: Sequence[Prepared], run: FitRun) -> dict[str, object]:
    """All that the numbers depend on, for `Resume`."""
    asked = {name: value for name, value in asdict(job).items() if name not in ("experts", "template")}
    return {
        "job": asked,
        "prints": [asdict(each.checked.expert_print) for each in ready] + [asdict(ready[0].checked.base_print)],
        "scores": [digest(Path(expert.scores)) if expert.scores else None for expert in job.models],
        "prompts": [[(x.teacher, x.prompt, x.answer) for x in part] for part in (run.fitted, run.held)],
        "ran": [str(run.merged.device.type), str(run.merged.dtype), run.merged.streamed, run.processes.size],
        "versions": versions(),
    }


def _contents(job: FitJob, ready: Sequence[Prepared]) -> tuple[str | None, ...]:
    """`FitMeta.contents`."""
    prints = [each.checked.expert_print for each in ready[: len(job.experts)]]
    shared = [[*prints, ready[0].checked.base_print].count(mark) > 1 for mark in prints]
    if not any(shared):
        return ()
    return tuple(content_of(expert.expert) if also else None for expert, also in zip(job.models, shared, strict=True))


def _fit_of(job: FitJob, ready: Sequence[Prepared], run: FitRun, found: Found, date: str) -> Fit:
    """What goes into the file."""
    prompts = []
    for j, each in enumerate(ready):
        fitted, held = (sum(lesson.teacher == j for lesson in part) for part in (run.fitted, run.held))
        prompts.append(FittedPrompts(fitted, held, each.style))
    before, after = found.before_J.tolist(), found.after_J.tolist()
    K, device = len(job.experts), run.merged.device
    meta = FitMeta(
        base=ModelId.of(job.base, ready[0].checked.base_print),
        experts=tuple(
            ModelId.of(expert.expert, each.checked.expert_print)
            for expert, each in zip(job.models, ready, strict=False)
        ),
        geometry=run.merged.geometry,
        family=job.family,
        start=found.start,
        answer_tokens=job.answer_tokens,
        seed=job.seed,
        prompts=tuple(prompts[:K]),
        curve=found.curve,
        unrecovered=tuple(Unrecovered(1.0, start, end) for start, end in zip(before[:K], after[:K], strict=True)),
        best_step=found.best_step,
        dtype=str(run.merged.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        versions=versions(),
        date=date,
        keep=None if job.keep is None else Kept(os.path.basename(job.keep), prompts[K], before[K], after[K]),
        contents=_contents(job, ready),
    )
    return Fit(meta, found.weights.heads_KLH, found.weights.neurons_KLF, found.weights.rest_K)
