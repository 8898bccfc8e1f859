"""What the links of a study need of the models: directions, rankings that no score file has, and the descent.

Which components are targets decides a ranking of the activation side at the anchor (`ap`, Eq. 76): that of a score file
where there is one, else `atp`, computed here. Beside every head that is chosen stand its two controls: another head of
its layer, and the head itself with noise in the place of its need.

Legend: L layers up to the anchor, n components of a kind in a layer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_wp.console import StartProgress
from mergekit_wp.errors import enough_memory
from mergekit_wp.geometry import Component, Kind
from mergekit_wp.ranking import table_of
from mergekit_wp.scores import Scores
from mergekit_wp.scoring.anchor.directions import Directions, check_present, extract_all
from mergekit_wp.scoring.anchor.search import usual_layer
from mergekit_wp.scoring.batching import TaskTokens, numbered_batches
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.models.load import ModelPair, load_pair
from mergekit_wp.scoring.passes import BatchState, Passes
from mergekit_wp.scoring.score import sweep_down, task_run
from mergekit_wp.scoring.sweep import batch_groups
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.link_descent import LinkSums, LinkTables, Target, descend
from mergekit_wp.study.sets import top_among
from mergekit_wp.study.study_spec import Study
from mergekit_wp.subset import Subset

MOST_SHARE = 1 / 3
"""Of the components of a kind, at most so many are targets: where most are chosen, nothing is."""
ACTIVATION_FIRST, WEIGHT_SIDE = ("ap", "atp"), ("exact", "writeback", "attr")
"""Methods, the most exact first."""


@dataclass(frozen=True)
class Ranked:
    """Scores [L, n] of one task and kind, float64, of those `among` [L, n]; `source`: a score file, or a method."""

    source: str
    table_Ln: torch.Tensor
    among_Ln: torch.Tensor

    def top(self, k: int) -> torch.Tensor:
        """Its top set of K, of those that are positive: bool [L, n]."""
        return top_among(self.table_Ln, self.among_Ln, k) & (self.table_Ln > 0)


@dataclass(frozen=True)
class Chosen:
    """The targets of one task: heads and their controls in the same order (None: the layer has no other head), the
    attention of every layer as one, and the neurons of every layer that has some."""

    heads: list[Target]
    others: list[Target | None]
    noise: list[Target]
    attention: list[Target]
    neurons: list[Target]

    @property
    def all(self) -> list[Target]:
        others = [target for target in self.others if target is not None]
        return list(dict.fromkeys([*self.heads, *others, *self.noise, *self.attention, *self.neurons]))


@dataclass(frozen=True)
class TaskLinks:
    """What was found of one task: `ap` and `wp` by kind, that chose targets and that say which sources are written."""

    chosen: Chosen
    links: LinkTables
    ap: Mapping[Kind, Ranked]
    wp: Mapping[Kind, Ranked]


def anchor_of(inputs: Inputs) -> int:
    """The anchor layer of the score files, the lowest where they differ; two thirds of the depth where none has one."""
    known = [found.meta.read_at for found in inputs.scores.values() if found.meta.read_at is not None]
    return min(known, default=usual_layer(inputs.geometry.layers))


def run(study: Study, inputs: Inputs, progress: StartProgress) -> dict[str, TaskLinks]:
    """By task of the study's prompts. Raises `BadInput` where a task has no direction or no gap."""
    job, ready = inputs.ready
    anchor = anchor_of(inputs)
    gaps = {found.meta.gap for found in inputs.scores.values() if found.meta.read_at == anchor}
    job = replace(job, layer=anchor, method="attr", gap=gaps.pop() if len(gaps) == 1 else job.gap)
    tasks = ready.tasks
    with enough_memory(f"prompts: batch_size: {job.batch_size} prompts do not fit on the device; lower it."):
        pair = load_pair(job, ready.checked)
        directions = extract_all(pair.base, pair.expert, tasks, anchor + 1, job.batch_size)
        check_present(tasks, directions, [anchor])
        made = _made_rankings(job, pair, inputs, tasks, anchor, directions, progress)
        aps = [
            {kind: ranking_of(inputs, task.task, kind, ACTIVATION_FIRST, anchor) or found[kind] for kind in Kind}
            for task, found in zip(tasks, made, strict=True)
        ]
        chosen = [choose(study, task.task, ap) for task, ap in zip(tasks, aps, strict=True)]
        tables = link_tables(job, pair, tasks, anchor, directions, [each.all for each in chosen], progress)
    found = {}
    for task, ap, targets, links in zip(tasks, aps, chosen, tables, strict=True):
        wp = {}
        for kind in Kind:
            attr_Ln = links.attr(kind)
            own = Ranked("attr", attr_Ln, torch.ones_like(attr_Ln, dtype=torch.bool))
            wp[kind] = ranking_of(inputs, task.task, kind, WEIGHT_SIDE, anchor) or own
        found[task.task] = TaskLinks(targets, links, ap, wp)
    return found


def ranking_of(inputs: Inputs, task: str, kind: Kind, methods: Sequence[str], anchor: int) -> Ranked | None:
    """Of the score file by the first of these methods that read the task at this anchor and scored the kind."""
    for name, found in by_method(inputs, methods):
        among_Ln = found.seen(kind)[: anchor + 1]
        if task in found and found.meta.read_at == anchor and among_Ln.any():
            return Ranked(name, table_of(found, kind, task)[: anchor + 1], among_Ln)
    return None


def by_method(inputs: Inputs, methods: Sequence[str]) -> list[tuple[str, Scores]]:
    """The study's score files by one of these methods, in their order."""
    files = [(name, found) for name, found in inputs.scores.items() if found.meta.method in methods]
    return sorted(files, key=lambda each: methods.index(each[1].meta.method))


def _made_rankings(
    job: ScoringJob, pair: ModelPair, inputs: Inputs, tasks: Sequence[TaskTokens], anchor: int,
    directions: Sequence[Directions], progress: StartProgress,
) -> list[dict[Kind, Ranked]]:  # fmt: skip
    """`atp` of every task; of those that the score files rank already, nothing."""
    lacking = [
        any(ranking_of(inputs, task.task, kind, ACTIVATION_FIRST, anchor) is None for kind in Kind) for task in tasks
    ]
    job = replace(job, method="atp")
    wanted = [i for i, lacks in enumerate(lacking) if lacks]
    runs = {i: task_run(job, pair, tasks[i], anchor, directions[i]) for i in wanted}
    if runs:
        subset = Subset.choose(pair.geometry, "all")
        sweep_down(job, pair, [tasks[i] for i in wanted], [*runs.values()], subset, ProcessGroup(), progress)
    found: list[dict[Kind, Ranked]] = [{} for _ in tasks]
    for i, one in runs.items():
        for kind, parts in one.finish().items():
            table_Ln = parts["whole"][: anchor + 1]
            found[i][kind] = Ranked(job.method, table_Ln, torch.ones_like(table_Ln, dtype=torch.bool))
    return found


def choose(study: Study, task: str, ap: Mapping[Kind, Ranked]) -> Chosen:
    """The top heads of the activation side above layer 0, which has nothing below it, and the top neurons."""
    shape = ap[Kind.HEAD].table_Ln.shape
    above_Ln = (torch.arange(shape[0]) > 0)[:, None]
    of_heads = replace(ap[Kind.HEAD], among_Ln=ap[Kind.HEAD].among_Ln & above_Ln)
    heads_Ln = of_heads.top(_at_most(study.top[Kind.HEAD], of_heads.among_Ln))
    order = sorted(heads_Ln.nonzero().tolist(), key=lambda at: -float(of_heads.table_Ln[tuple(at)]))
    heads = [Component(Kind.HEAD, *at) for at in order]
    others = _others(f"{study.seed}/{task}", heads, shape[1])
    neurons_Ln = ap[Kind.NEURON].top(_at_most(study.top[Kind.NEURON], ap[Kind.NEURON].among_Ln))
    return Chosen(
        heads=[Target.of(each) for each in heads],
        others=[None if each is None else Target.of(each) for each in others],
        noise=[Target.of(each, f"{study.seed}/{task}/{each.name}") for each in heads],
        attention=[Target(Kind.HEAD, layer, tuple(range(shape[1]))) for layer in range(1, shape[0])],
        neurons=[
            Target(Kind.NEURON, layer, tuple(own_n.nonzero()[:, 0].tolist()))
            for layer, own_n in enumerate(neurons_Ln)
            if own_n.any()
        ],
    )


def _at_most(k: int, among_Ln: torch.Tensor) -> int:
    return min(k, max(1, math.floor(MOST_SHARE * int(among_Ln.sum()))))


def _others(seed: str, heads: Sequence[Component], width: int) -> list[Component | None]:
    """For every head another one of its layer that was not chosen, each once as long as there are some."""
    drawn: dict[int, list[int]] = {}
    found: list[Component | None] = []
    for head in heads:
        rest = [h for h in range(width) if Component(Kind.HEAD, head.layer, h) not in heads]
        if not drawn.get(head.layer):
            drawn[head.layer] = random.Random(f"{seed}/{head.layer}").sample(rest, len(rest))
        found.append(Component(Kind.HEAD, head.layer, drawn[head.layer].pop()) if rest else None)
    return found


def link_tables(
    job: ScoringJob, pair: ModelPair, tasks: Sequence[TaskTokens], anchor: int, directions: Sequence[Directions],
    targets: Sequence[Sequence[Target]], progress: StartProgress,
) -> list[LinkTables]:  # fmt: skip
    """The links of every task's targets, and `attr`, by the anchor's cosine. Raises `BadInput` without a gap."""
    runs = [task_run(job, pair, task, anchor, found) for task, found in zip(tasks, directions, strict=True)]
    sums = {
        task.task: LinkSums(own, anchor + 1, pair.geometry, pair.device)
        for task, own in zip(tasks, targets, strict=True)
    }
    items = [
        BatchState(one, batch, numbers)
        for task, one in zip(tasks, runs, strict=True)
        for numbers, batch in numbered_batches(task.scoring, job.batch_size, pair.base, pair.expert)
    ]
    tick = progress(sum(len(task.scoring) for task in tasks), "Following links", "prompt")
    kept = pair.base.depth + 3  # streams of a token that `batch_groups` counts with

    def tokens(item: BatchState) -> int:
        return math.ceil(item.batch.ids_BT.numel() * (kept + 1 + len(sums[item.run.task].targets)) / kept)

    for group in batch_groups(pair.base, items, tokens):
        descend(Passes(pair, job.method, group, pair.offload == "none", tick), sums)
    return [sums[one.task].finish(one.ledgers["anchor"].normalizer(one.task)) for one in runs]
