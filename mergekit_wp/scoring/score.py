"""The scoring run: pairs -> anchor direction -> gaps and scores -> score file content.

Every method takes the same way (METHOD.md 2 and 3). Of every task the direction v comes from the extraction pairs,
unless the utility is `kl`, which reads along none. Then the scoring prompts go up through the expert and through the
base (`passes.Passes`), which gives each prompt's gap. First-order methods sweep back down and score all components of a
layer as they pass it; `exact` and `ap` run again from each layer with the components patched one by one. Nothing above
the topmost metric is run.

Legend: B prompts, T tokens, D residual width, L layers, H heads, F neurons.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mergekit_wp.checkpoint.in_memory import LiveModel
from mergekit_wp.checkpoint.vocabulary import load_tokenizer
from mergekit_wp.choices import ACTIVATION_SIDE
from mergekit_wp.console import StartProgress, Tick, no_progress
from mergekit_wp.documents import now, parse_yaml, versions
from mergekit_wp.errors import BadInput, enough_memory, shown
from mergekit_wp.foreign import logger
from mergekit_wp.geometry import Kind
from mergekit_wp.memory import free_memory
from mergekit_wp.missed import draw, plan
from mergekit_wp.prompt_scores import PromptScores
from mergekit_wp.recovery import RecoveryCurve
from mergekit_wp.scores import (
    ANCHORED,
    CONTROLLED,
    FORMAT,
    PER_PROMPT,
    ModelId,
    PromptStyle,
    ScoredAt,
    ScoreMeta,
    Scores,
    TaskMeta,
    TaskScores,
    read_scores,
)  # fmt: skip
from mergekit_wp.scoring.accumulator import TaskAccumulator
from mergekit_wp.scoring.anchor.directions import Directions
from mergekit_wp.scoring.anchor.search import Search, check_graders, locate, usual_layer
from mergekit_wp.scoring.batching import TaskTokens, check_rows, numbered_batches, tokenize_tasks
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.metrics import instruction_effect, make_metrics, metric_of
from mergekit_wp.scoring.models.load import CheckedPair, ModelPair, check_pair, load_pair, warn_of_other_ids
from mergekit_wp.scoring.packing import pack
from mergekit_wp.scoring.pairs import Pair, TaskPairs, draw_pairs, load_pairs, split_pairs, warn_of_repeats
from mergekit_wp.scoring.passes import PATCHING, BatchState, Passes, PatchPlan, first_order, patch_layer
from mergekit_wp.scoring.prompt_format import prompt_format_of
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.sweep import batch_groups
from mergekit_wp.scoring.whole_answers import answers_for, given_answers
from mergekit_wp.subset import Amount, Ranking, Subset, parse_layers

LOG = logger(__name__)
DOUBTED = 16  # prompts of a task whose contrasts are looked at
MOST_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 16}  # of patched prompts in a step; more are no faster


def score(
    job: ScoringJob,
    progress: StartProgress | None = None,
    processes: ProcessGroup | None = None,
    resume: Resume | None = None,
    held: InMemory | None = None,
    answers: Path | None = None,
) -> Scores:
    """Run a whole scoring job.

    progress   called as (total, what, unit) at the start of each part; returns a function that is told what is done
    processes  those that share the work; alone by default
    resume     where `exact` and `ap` keep their finished layers and go on from them (in the first process); nowhere
               by default. The caller calls its `forget` once the file is written
    held       what is in memory already, in the place of what the job names
    answers    the file where the expert's answers are kept, and found again; nowhere by default
    Raises `BadInput` for everything the user can mend (see the modules called).
    """
    processes, resume = processes or ProcessGroup(), resume or Resume()
    ready = prepare(job, held)
    checked, search, asked, subset = ready.checked, ready.search, ready.asked, ready.subset
    tokenizer, tasks = ready.tokenizer, ready.tasks
    pair = load_pair(job, checked, processes)  # only now, when nothing but the weights themselves can be wrong
    LOG.info(pair.reason)
    start = progress or no_progress
    with enough_memory(f"batch_size: {job.batch_size} prompts do not fit on {pair.device}; lower it."):
        tasks = answers_for(job, checked, pair.expert, tokenizer, tasks, answers, processes, start)
        layer, directions, curve = _anchors(job, pair, tokenizer, tasks, asked, search, processes, start)
        date = now()
        if job.method in PATCHING:
            date = resume.begin(_inputs(job, checked, pair, tasks, subset, layer), date)
        resume.spare_others()
        runs = [task_run(job, pair, task, layer, found) for task, found in zip(tasks, directions, strict=True)]
        if not any(metric_of(runs[0].metrics, each) for each in subset.layers):
            raise BadInput(
                f"components, layers: all that was chosen lies above the anchor layer {layer}, where {job.utility} "
                "sees nothing; choose others, or another utility."
            )
        if job.method in PATCHING:
            _patch(job, pair, tasks, runs, subset, processes, resume, start)
        else:
            sweep_down(job, pair, tasks, runs, subset, processes, start)
        # At a merge the expert may well be the one that is moved less.
        if not job.directed and job.at is None and pair.offload == "none":
            for task in tasks:
                _doubt_order(pair, task, job.batch_size)
    for run in runs:
        _doubt(run)
    finished = [_finish(job, task, run, found, layer) for task, run, found in zip(tasks, runs, directions, strict=True)]
    names = [task.task for task in tasks]
    metas = dict(zip(names, [m for m, _s in finished], strict=True))
    meta = replace(_meta(job, checked, pair, layer, metas, date), recovery=curve, prompts=ready.style)
    if job.per_prompt:
        meta = replace(
            meta, format=max(meta.format, PER_PROMPT), prompt_ids={task.task: ids_of_prompts(task) for task in tasks}
        )
    tables = dict(zip(names, [s for _m, s in finished], strict=True))
    if subset.whole:
        return Scores.from_tasks(meta, tables)
    masks, chance = ({str(kind): x for kind, x in found.items()} for found in (subset.masks, ready.chance))
    return Scores.from_tasks(replace(meta, format=CONTROLLED) if chance else meta, tables, masks, chance)


@dataclass(frozen=True)
class InMemory:
    """Models (`base`, `expert`) and prompts that a caller in Python has at hand; None: those that the job names."""

    models: Mapping[str, LiveModel] = field(default_factory=dict)
    prompts: Sequence[Pair] | None = None


@dataclass(frozen=True)
class Prepared:
    """A job of which nothing but the weights can be wrong any more.

    asked: the anchor layer, None where `search` says how it is looked for. chance: as `missed.draw` has it, where there
    is a sample.
    """

    checked: CheckedPair
    search: Search | None
    asked: int | None
    subset: Subset
    tokenizer: Any
    style: PromptStyle | None
    tasks: list[TaskTokens]
    chance: Mapping[Kind, torch.Tensor] = field(default_factory=dict)


def prepare(job: ScoringJob, held: InMemory | None = None, checked: CheckedPair | None = None) -> Prepared:
    """Everything that can be checked before weights load, and what comes of it; `checked`: the models, if they were.
    Raises `BadInput`."""
    held = held or InMemory()
    checked = checked or check_pair(job, held.models)
    shape = checked.base.geometry
    search = search_of(job, shape.layers) if job.layer == "auto" else None
    asked = None if search else anchor_layer(job.layer, shape.layers)
    if job.utility == "projection":
        asked = shape.layers - 1
    subset, chance = choose_subset(job, checked)
    pairs = pairs_of(job, held.prompts)
    warn_of_repeats(pairs)
    tokenizer = load_tokenizer(checked.base.name, checked.base.folder, job.trust_remote_code)
    prompt_format = prompt_format_of(job, checked.base, checked.expert, tokenizer, pairs)
    tasks = tokenize_tasks(prompt_format, pairs, checked.context_limit)
    check_rows((ids for each in tasks for ids in each.prompts), tokenizer, checked.vocabulary)
    warn_of_other_ids(checked, [prompt_format.text(pair.prompt, pair.chat) for each in pairs for pair in each.scoring])
    if search and job.directed:
        check_graders(tasks, search)
    if job.answers is not None:
        tasks = given_answers(job.answers, checked, job.answer_tokens, tasks)
    return Prepared(checked, search, asked, subset, tokenizer, prompt_format.style, tasks, chance)


def pairs_of(job: ScoringJob, prompts: Sequence[Pair] | None = None) -> list[TaskPairs]:
    """The prompts of every task, split as the job says; `prompts`: these. Raises `BadInput`."""
    if prompts is None:
        drawn = load_pairs(job.pairs, job.samples, job.seed)
    else:
        drawn = draw_pairs(prompts, job.samples, job.seed, "prompts")
    return split_pairs(drawn, job.split if job.directed else None, job.seed)


def _anchors(
    job: ScoringJob, pair: ModelPair, tokenizer: Any, tasks: Sequence[TaskTokens], asked: int | None,
    search: Search | None, processes: ProcessGroup, start: StartProgress,
) -> tuple[int | None, Sequence[Directions | None], RecoveryCurve | None]:  # fmt: skip
    """As `locate`; of a utility that reads along no direction, nothing."""
    if not job.directed:
        if search:
            LOG.info("layer: auto is left aside: kl is read off the output and needs no anchor.")
        return None, [None] * len(tasks), None
    also = [pair.geometry.layers - 1] if job.utility == "staged-projection" else []
    search = search or Search(batch_size=job.batch_size)
    return locate(pair.base, pair.expert, tokenizer, tasks, asked, search, processes, start, also)


def _doubt(run: TaskAccumulator) -> None:
    """Warn where the base has more of the capability than the expert, by a metric that can say so (kl cannot)."""
    for ledger in run.ledgers.values():
        if 2 * ledger.negative > ledger.used:
            LOG.warning(
                "task %s: on %d of %d prompts the base lies nearer to the expert's own direction than the expert does "
                "(%s); are base and expert swapped?", run.task, ledger.negative, ledger.used, ledger.utility,
            )  # fmt: skip


def _doubt_order(pair: ModelPair, task: TaskTokens, batch_size: int) -> None:
    """Warn where what the prompts ask for moves the base's next token more than the expert's (`instruction_effect`).

    Of some prompts only, and of models in memory only: a doubt must not cost what the scores do. A sign test decides,
    at 1 %, so that a pair in its right order whose prompts tell the models apart by nothing is seldom accused.
    """
    count = min(DOUBTED, len(task.scoring))
    if len(task.scoring_contrasts) != len(task.scoring):
        return  # no contrasts, or some are missing
    texts = task.scoring[:count], task.scoring_contrasts[:count]
    base_N, expert_N = (
        instruction_effect(stack, *texts, pair.vocabulary, batch_size) for stack in (pair.base, pair.expert)
    )
    more = int((base_N > expert_N).sum())
    if sum(math.comb(count, k) for k in range(more, count + 1)) <= 0.01 * 2**count:
        LOG.warning(
            "task %s: on %d of %d prompts what they ask for moves the base's next token more than the expert's; are "
            "base and expert swapped?", task.task, more, count,
        )  # fmt: skip


def anchor_layer(asked: int | str | None, layers: int) -> int:
    """l_a, counted from 0, of a job that names it (not auto); by default two thirds of the depth.

    Raises `BadInput` when the layer is not there.
    """
    layer = usual_layer(layers) if asked is None else int(asked)
    if not 0 <= layer < layers:
        raise BadInput(f"layer: anchor layer {layer} is out of range; this model has layers 0 to {layers - 1}.")
    return layer


def search_of(job: ScoringJob, layers: int) -> Search:
    """How `layer: auto` is to be carried out. Raises `BadInput` for candidates that are not there."""
    try:
        chosen = None if job.anchor_layers is None else tuple(parse_layers(str(job.anchor_layers), layers))
    except BadInput as error:
        raise BadInput(f"anchor_{error.message}") from error
    return Search(
        layers=chosen,
        prompts=job.anchor_prompts,
        max_tokens=job.anchor_tokens,
        batch_size=job.batch_size,
        allow_code_execution=job.allow_code_execution,
    )


def choose_subset(job: ScoringJob, checked: CheckedPair) -> tuple[Subset, dict[Kind, torch.Tensor]]:
    """The components that the job asks for, and with which chance each is among them, where some are drawn (`missed`).

    Raises `BadInput` for a ranking of other models or an empty choice.
    """
    ranking = None
    if job.top is not None:
        count, path = job.top
        scores = read_scores(path)
        for role, ours in (("base", checked.base_print), ("expert", checked.expert_print)):
            theirs: ModelId = getattr(scores.meta, role)
            if (theirs.config, theirs.tensors) != (ours.config, ours.tensors):
                raise BadInput(
                    f"top: {path} ranks components of another {role} ({theirs.name}); score this pair first."
                )
        ranking = Ranking(Amount.parse(count), scores, job.rank)
    layers = None if job.layers is None else str(job.layers)
    of = "" if layers is None else f" of layers {layers}"
    top = "" if ranking is None else " within the top of the ranking"
    chosen = Subset.choose(checked.base.geometry, job.components, layers, ranking)
    chosen.nonempty(f"{shown(job.components)}{of}{top}")
    if ranking is None or job.sample is None:
        return chosen, {}
    everything = Subset.choose(checked.base.geometry, job.components, layers)
    subset, chance = draw(chosen, everything, ranking, Amount.parse(job.sample, "sample"), job.seed)
    for sentence in plan(subset, chance):
        LOG.info(sentence)
    return subset, chance


def task_run(
    job: ScoringJob, pair: ModelPair, task: TaskTokens, layer: int | None, found: Directions | None
) -> TaskAccumulator:
    """Empty sums of a task whose metrics read the anchor at `layer`; of a utility with a direction, that is."""
    shape = pair.geometry
    metrics = make_metrics(job.utility, shape.layers, pair.vocabulary, layer, found.v_LD if found else None)
    kept = len(task.scoring) if job.per_prompt else 0
    seeds = [f"{job.seed}/shuffle/{number}" for number in range(job.shuffles or 0)]
    return TaskAccumulator(
        task.task, job.method, shape, metrics, job.gap, job.gap_floor, pair.device, pair.dtype, kept, seeds
    )


def sweep_down(
    job: ScoringJob, pair: ModelPair, tasks: Sequence[TaskTokens], runs: Sequence[TaskAccumulator], subset: Subset,
    processes: ProcessGroup, start: StartProgress,
) -> None:  # fmt: skip
    """First order, into the tasks' `runs`: each process takes its share of the batches."""
    items = [item for task, run in zip(tasks, runs, strict=True) for item in _items(job, pair, task, run)]
    tick = start(sum(len(task.scoring) for task in tasks), "Scoring", "prompt")
    logits = pair.vocabulary / (pair.base.width * pair.base.depth)  # kept of the expert's, in tokens' activations

    def tokens(item: BatchState) -> int:
        return item.batch.ids_BT.numel() + math.ceil(logits * int(item.batch.answer_B.sum()))

    for group in batch_groups(pair.base, processes.share(items), tokens):
        passes = Passes(
            pair, job.method, group, pair.offload == "none", processes.ticking(tick), job.object != "activation"
        )
        first_order(passes, subset)
    for run in runs:
        run.gather(processes)


def _items(job: ScoringJob, pair: ModelPair, task: TaskTokens, run: TaskAccumulator) -> list[BatchState]:
    """A task's prompts in batches, packed where that pays; by first order, what is kept by prompt needs each prompt's
    own gradients, also where it begins as the others do."""
    models, apart = (pair.base, pair.expert), job.per_prompt and job.method not in PATCHING
    return [
        BatchState(run, batch if apart else pack(batch, *models), numbers)
        for numbers, batch in numbered_batches(task.scoring, job.batch_size, *models, answers=task.answers)
    ]


def _patch(
    job: ScoringJob, pair: ModelPair, tasks: Sequence[TaskTokens], runs: Sequence[TaskAccumulator], subset: Subset,
    processes: ProcessGroup, resume: Resume, start: StartProgress,
) -> None:  # fmt: skip
    """One component at a time: each process takes its share of the components, all prompts of each."""
    seen = [layer for layer in range(pair.geometry.layers) if metric_of(runs[0].metrics, layer)]
    chosen = sum(len(subset.of(kind, layer)) for kind in subset.masks for layer in seen)
    if resume.found:
        LOG.info("Going on after %d finished layers.", resume.found)
    tick = start(chosen * sum(len(task.scoring) for task in tasks), f"Patching {chosen:,} components", "patch")
    plan = patch_plan(pair, subset, processes, tick)
    for number, (task, run) in enumerate(zip(tasks, runs, strict=True)):
        items = _items(job, pair, task, run)
        passes = Passes(pair, job.method, items, keep_graphs=False, write=job.object != "activation")
        done = processes.tell([resume.load(number, layer, run.of(layer)) for layer in range(pair.geometry.layers)])
        order = [layer for layer in reversed(seen) if any(len(subset.of(kind, layer)) for kind in subset.masks)]
        for layer in order:
            if done[layer]:
                run.put(layer, done[layer])
                tick(sum(len(subset.of(kind, layer)) for kind in subset.masks) * len(task.scoring))
        left = [layer for layer in order if not done[layer]]
        for layer, base, expert in zip(left, pair.base.layers(left), pair.expert.layers(left), strict=True):
            patch_layer(passes, plan, layer, base, expert)
            run.put(layer, {name: processes.add_up(table) for name, table in run.of(layer).items()})
            resume.save(number, layer, run.of(layer))


def patch_plan(pair: ModelPair, subset: Subset, processes: ProcessGroup, tick: Tick) -> PatchPlan:
    """Stacked activations may take a third of the free memory, shared with the processes that share it."""
    on_cpu = pair.device.type == "cpu"
    room = free_memory(pair.device) // (3 * (processes.size if on_cpu else 1))
    most = MOST_TOKENS["cpu" if on_cpu else "cuda"]
    return PatchPlan(subset, room, most, processes, lambda done: tick(processes.size * done))


def _finish(
    job: ScoringJob, task: TaskTokens, run: TaskAccumulator, found: Directions | None, layer: int | None
) -> tuple[TaskMeta, TaskScores]:
    tables = {kind: {part: t.float() for part, t in parts.items()} for kind, parts in run.finish().items()}
    heads, neurons = (sum(parts.values(), start=torch.zeros(())) for parts in tables.values())
    parts = {part: table for kind in tables.values() for part, table in kind.items()} if job.parts else {}
    stats = {name: ledger.stats() for name, ledger in run.ledgers.items()}
    alpha, v_D = (None, None) if found is None else (float(found.alpha_L[layer]), found.v_LD[layer].cpu())
    meta = TaskMeta(len(task.extraction), len(task.scoring), stats, alpha)
    prompts = _by_prompt(run) if job.per_prompt else None
    return meta, TaskScores(heads, neurons, v_D, parts, prompts, run.finish_shuffled())


def ids_of_prompts(task: TaskTokens) -> tuple[str, ...]:
    """What tells the scoring prompts apart: of each the beginning of the SHA-256 of its tokens."""
    return tuple(hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16] for ids in task.scoring)


def _by_prompt(run: TaskAccumulator) -> PromptScores:
    tables = run.finish_by_prompt()
    gaps, used = ({n: getattr(x, part).float() for n, x in run.ledgers.items()} for part in ("gaps_P", "used_P"))
    return PromptScores(tables[Kind.HEAD], tables[Kind.NEURON], gaps, used)


def _inputs(
    job: ScoringJob, checked: CheckedPair, pair: ModelPair, tasks: Sequence[TaskTokens], subset: Subset,
    layer: int | None,
) -> dict[str, object]:  # fmt: skip
    """All that the numbers depend on, for `Resume`: what files hold, and not how they are called."""
    asked = asdict(job)
    for name in ("at", "pairs", "template", "samples", "answers", "components", "layers", "top", "rank", "sample"):
        del asked[name]  # `at`, `prompts` and `subset` are what became of them
    merge = checked.merge
    at = {} if merge is None else {"at": [merge.weights.digest, *map(asdict, merge.prints)]}
    return at | {
        "job": asked,
        "prompts": [(task.task, task.extraction, task.contrasts, task.scoring, task.answers) for task in tasks],
        "subset": {kind: mask.nonzero().tolist() for kind, mask in subset.masks.items()},
        "anchor layer": layer,  # with `auto`, rounding may decide it
        "prints": [asdict(checked.base_print), asdict(checked.expert_print)],
        "ran": [str(pair.device.type), str(pair.dtype), pair.offload],
        "versions": versions(),
    }


def _meta(
    job: ScoringJob, checked: CheckedPair, pair: ModelPair, layer: int | None, tasks: dict[str, TaskMeta], date: str
) -> ScoreMeta:
    device = torch.cuda.get_device_name(pair.device) if pair.device.type == "cuda" else str(pair.device)
    asked = {name: getattr(job, name) for name in ("components", "layers", "top", "rank", "sample")}
    merge, at = checked.merge, None
    if merge is not None:
        experts = tuple(map(ModelId.of, merge.names, merge.prints))
        at = ScoredAt(parse_yaml(merge.recipe.text), merge.recipe.method, experts, merge.weights.digest)
    partial = job.components != "all" or job.layers is not None or job.top is not None
    return ScoreMeta(
        base=ModelId.of(job.base, checked.base_print),
        expert=ModelId.of(job.expert, checked.expert_print),
        geometry=pair.geometry,
        tasks=tasks,
        method=job.method,
        utility=job.utility,
        gap=job.gap,
        split=job.split if job.directed else None,
        anchor_layer=layer,
        dtype=str(pair.dtype).removeprefix("torch."),
        device=device,
        seed=job.seed,
        versions=versions(),
        date=date,
        format=CONTROLLED if job.shuffles else FORMAT if layer is None else ANCHORED,
        subset=asked if partial else None,
        object=(job.object or "write") if job.method in ACTIVATION_SIDE else None,
        answer_tokens=job.answer_tokens or None,
        at=at,
        shuffles=job.shuffles,
    )
