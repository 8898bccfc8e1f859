"""`--layer auto`: the anchor layer is where steering the base recovers most of what the expert can do (Eq. 4).

Each task is judged by behaviour where its pairs carry checks: base, expert and the base steered at every candidate
layer answer held-out prompts, and R is the share of the gap in right answers that steering closes. Where there is
no grader, no gap in behaviour, or no way to generate in sensible time (weights that stream), by the next token:
R = (F(steered) - F(base)) / (0 - F(base)), F = -KL(expert || model), for all candidate layers in one sweep.

All tasks and layers are tried in the rows of large batches, which rows leave as their answers end (`SteeredRows`).

The next token of the base steered at many layers, in one sweep: above each candidate layer a steered copy of the base's
stream branches off, and all branches go up together. So every layer is read once, and it works with weights that
stream.

Legend: L layers, B prompts, T tokens, D residual width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_wp.console import StartProgress, Tick, no_progress, percent
from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import logger
from mergekit_wp.memory import free_memory
from mergekit_wp.recovery import RecoveryCurve, TaskRecovery
from mergekit_wp.scoring.anchor.directions import Directions, check_present, extract_all
from mergekit_wp.scoring.anchor.graders import Check, parse_check, preflight
from mergekit_wp.scoring.anchor.steering import SteeredRows, Steering, check_positions
from mergekit_wp.scoring.batching import Batch, TaskTokens, Tokens, batches
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.greedy import Greedy, generate_answers, rows_worth
from mergekit_wp.scoring.hooks import at_reads
from mergekit_wp.scoring.metrics import kl_utility
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.sweep import forward_sweep, portions

LOG = logger(__name__)
Graded = list[tuple[list[int], Check]]  # prompts and how their answers are graded

_STREAMED = "judged by the next token: with weights that stream, generating takes too long"
_NO_CHECK = "judged by the next token: its pairs carry no check"
_NO_CONSENT = (
    "judged by the next token: grading would run code that the model wrote (--allow-code-execution permits it)"
)


@dataclass(frozen=True)
class Search:
    """How the anchor layer is looked for.

    layers      candidates, all of which are tried; None: `candidate_layers`, coarsely first
    prompts     scoring prompts a task, at most
    max_tokens  longest answer; one that is cut there is graded as it is
    batch_size  prompts a forward pass
    positions   what is steered: prompt, all, answer or anchor (see `steering`)
    allow_code_execution   whether a grader may run programs that the model wrote
    least_gap   the smallest difference in right answers between expert and base that R is taken of
    least_kl    likewise, nats
    """

    layers: tuple[int, ...] | None = None
    prompts: int = 32
    max_tokens: int = 256
    batch_size: int = 16
    positions: str = "prompt"
    allow_code_execution: bool = False
    least_gap: float = 0.1
    least_kl: float = 1e-3

    def __post_init__(self) -> None:
        check_positions(self.positions)

    def layers_of(self, depth: int) -> tuple[int, ...]:
        """The candidates in a model of `depth` layers. Raises `BadInput` for one that is not there."""
        chosen = tuple(sorted(set(candidate_layers(depth) if self.layers is None else self.layers)))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < depth:
            raise BadInput(f"layers: candidates {chosen} are not all in this model, which has layers 0 to {depth - 1}.")
        return chosen

    def first_of(self, depth: int) -> tuple[int, ...]:
        """The candidates to begin with: all that were asked for, else `coarse_layers`."""
        return coarse_layers(self.layers_of(depth)) if self.layers is None else self.layers_of(depth)

    def next_to(self, curve: RecoveryCurve, depth: int) -> tuple[int, ...]:
        """The candidates not yet tried around the best of `curve`, up to the next ones that were; maybe none."""
        if self.layers is not None or max(curve.mean) <= 0:
            return ()
        best = curve.chosen
        low = max((layer for layer in curve.layers if layer < best), default=-1)
        high = min((layer for layer in curve.layers if layer > best), default=depth)
        return tuple(layer for layer in self.layers_of(depth) if low < layer < high and layer != best)


def candidate_layers(depth: int) -> tuple[int, ...]:
    """All layers but the last, above which nothing is left that could read the direction."""
    return tuple(range(max(depth - 1, 1)))


def coarse_layers(candidates: tuple[int, ...]) -> tuple[int, ...]:
    """All up to 16; of more, evenly spaced ones, to be followed by those around the best.

    In deep models every layer costs minutes, and neighbours differ little. A step of the root of half the depth makes
    the two scans together cheapest: 13 layers of 28, 14 of 32, 16 of 40, 24 of 80.
    """
    if len(candidates) <= 16:
        return candidates
    step = round((len(candidates) / 2) ** 0.5)
    return candidates[step // 2 :: step]


def usual_layer(depth: int) -> int:
    """Two thirds of the depth (27 of 40, as the paper's 13B): the anchor layer where none is looked for."""
    return min(round(2 * depth / 3), depth - 1)


def check_graders(tasks: Sequence[TaskTokens], search: Search) -> None:
    """Make sure that `find_anchor` can grade, before models are loaded.

    Raises `BadInput` for checks that are malformed or that their grader cannot run, and for missing NLTK data.
    """
    for task in tasks:
        preflight([check for _ids, check in _graded(task, search, streamed=False)[0]], task.task)


def locate(
    base: Stack,
    expert: Stack,
    tokenizer: Any,
    tasks: Sequence[TaskTokens],
    layer: int | None,
    search: Search,
    processes: ProcessGroup | None = None,
    start: StartProgress = no_progress,
    also: Sequence[int] = (),
) -> tuple[int, list[Directions], RecoveryCurve | None]:
    """The anchor layer, every task's directions up to it at least, and the curve if it was looked for.

    layer   the anchor layer; None: the best by recovery
    also    other layers whose directions are needed
    start   called as (total, what, unit) at the start of each part; returns a function that is told what is done
    Raises `BadInput` as `extract_all`, `find_anchor` and `check_present` do.
    """
    top = max(layer if layer is not None else max(*search.layers_of(base.depth), usual_layer(base.depth)), *also, 0)
    tick = start(sum(2 * len(task.extraction) for task in tasks), "Directions", "prompt")
    directions = extract_all(base, expert, tasks, top + 1, search.batch_size, tick, processes)
    curve = None
    if layer is None:
        curve = find_anchor(base, expert, tokenizer, tasks, directions, search, processes, start)
        layer = curve.chosen
    check_present(tasks, directions, [layer, *also])
    return layer, directions, curve


def find_anchor(
    base: Stack,
    expert: Stack,
    tokenizer: Any,
    tasks: Sequence[TaskTokens],
    directions: Sequence[Directions],
    search: Search,
    processes: ProcessGroup | None = None,
    start: StartProgress = no_progress,
) -> RecoveryCurve:
    """Steer the base at the candidate layers and choose the best; `directions` reach at least up to the highest.

    Of many candidates some are tried, and then those around the best of them. Several processes share the layers. The
    checks are taken to be sound (`check_graders`). Raises `BadInput` when no task tells the expert from the base.
    """
    processes, layers = processes or ProcessGroup(), search.first_of(base.depth)
    run = _Behaviour(base, expert, tokenizer, search, processes)
    found = _try(run, tasks, directions, layers, {}, start)
    curve: RecoveryCurve = processes.tell(choose(layers, found, base.depth, search))
    if more := search.next_to(curve, base.depth):
        again = _try(run, tasks, directions, more, found, start)
        found = {name: found[name].joined(layers, again[name], more) for name in found}
        curve = processes.tell(choose(tuple(sorted(layers + more)), found, base.depth, search))
    return curve


def _try(
    run: _Behaviour, tasks: Sequence[TaskTokens], directions: Sequence[Directions], layers: tuple[int, ...],
    known: Mapping[str, TaskRecovery], start: StartProgress,
) -> dict[str, TaskRecovery]:  # fmt: skip
    """Recovery of every task, in order, at `layers`; `known`: what other layers gave, whose way of grading is kept."""
    search, base, expert = run.search, run.base, run.expert
    found: dict[str, TaskRecovery] = {}
    notes: dict[str, str] = {}
    graded: dict[str, Graded] = {}
    for task in tasks:
        checked, notes[task.task] = _graded(task, search, base.streamed or expert.streamed)
        if task.task in known and known[task.task].grading != "behaviour":
            notes[task.task] = known[task.task].note
        elif checked:
            graded[task.task] = checked
    answers = sum(map(len, graded.values())) * (len(layers) + (0 if known else 2))
    tick = start(answers, f"Steering at {len(layers)} layers", "answer") if answers else lambda _n: None
    along = {task.task: each for task, each in zip(tasks, directions, strict=True)}
    for name, got in (run.tasks(graded, along, layers, known, tick) if graded else {}).items():
        notes[name] = got.note
        if got.grading == "behaviour":
            found[name] = got
    left = [i for i, task in enumerate(tasks) if task.task not in found]
    prompts = [tasks[i].scoring[: search.prompts] for i in left]
    along_left = [directions[i] for i in left]
    tick = start(sum(map(len, prompts)), f"Next token, {len(layers)} layers", "prompt") if left else tick
    levels = kl_levels(base, expert, prompts, along_left, layers, search.positions, search.batch_size, tick)
    for i, level in zip(left, levels, strict=True):
        name = tasks[i].task
        found[name] = _kl_recovery(level, min(search.prompts, len(tasks[i].scoring)), search, notes[name])
    return {task.task: found[task.task] for task in tasks}


def choose(layers: tuple[int, ...], tasks: dict[str, TaskRecovery], depth: int, search: Search) -> RecoveryCurve:
    """The curve and its best layer; of equals, the one nearest to `usual_layer`.

    Raises `BadInput` when R is undefined for every task.
    """
    defined = [task for task in tasks.values() if task.grading != "none"]
    if not defined:
        raise BadInput(
            f"layer: auto: base and expert cannot be told apart on any task ({', '.join(tasks)}), so no layer can be "
            "chosen by recovery; check pairs and expert, or give the layer as a number."
        )
    clipped = torch.tensor([task.recovery for task in defined], dtype=torch.float64).clamp(-1, 1)
    mean = [round(value, 6) for value in clipped.mean(0).tolist()]
    best = max(mean)
    # Where nothing recovers anything, the least bad layer would be noise.
    open_to = range(depth) if best <= 0 else [layer for layer, value in zip(layers, mean, strict=True) if value == best]
    chosen = min(open_to, key=lambda layer: (abs(layer - usual_layer(depth)), layer))
    note = "Steering recovers nothing at any layer; the anchor layer is the default." if best <= 0 else ""
    return RecoveryCurve(layers, tasks, tuple(mean), chosen, search.positions, search.max_tokens, note)


def _graded(task: TaskTokens, search: Search, streamed: bool) -> tuple[Graded, str]:
    """The prompts to be answered with their checks; or none, and why."""
    checks = [parse_check(raw, f"task {task.task}") if raw else None for raw in task.checks]
    rows = [(ids, check) for ids, check in zip(task.scoring, checks, strict=False) if check is not None]
    if not rows:
        return [], _NO_CHECK
    if streamed:
        return [], _STREAMED
    if not search.allow_code_execution and any(check.runs_code for _ids, check in rows):
        return [], _NO_CONSENT
    return rows[: search.prompts], ""


@dataclass(frozen=True)
class _Behaviour:
    """Levels and recovery of tasks by their checks."""

    base: Stack
    expert: Stack
    tokenizer: Any
    search: Search
    processes: ProcessGroup

    def tasks(
        self, graded: Mapping[str, Graded], along: Mapping[str, Directions], layers: tuple[int, ...],
        known: Mapping[str, TaskRecovery], tick: Tick,
    ) -> dict[str, TaskRecovery]:  # fmt: skip
        """`behaviour` of each, or `none` where the expert answers no better than the base. known: of an earlier scan,
        which has the levels of both."""
        ends = {name: (known[name].base, known[name].expert) for name in graded} if known else self.ends(graded, tick)
        found = {
            name: self._no_gap(name, len(graded[name]), base, expert)
            for name, (base, expert) in ends.items()
            if expert - base < self.search.least_gap
        }
        left = [name for name in graded if name not in found]
        asked = [(graded[name], way) for name in left for way in self._ways(along[name], layers)]
        steered = iter(self.levels(self.base, asked, tick))
        for name in left:
            base, expert = ends[name]
            levels = tuple(next(steered) for _layer in layers)
            recovery = tuple((level - base) / (expert - base) for level in levels)
            found[name] = TaskRecovery("behaviour", len(graded[name]), base, expert, levels, recovery)
        return found

    def ends(self, graded: Mapping[str, Graded], tick: Tick) -> dict[str, tuple[float, float]]:
        """Levels of base and expert as they are."""
        plain = [(rows, None) for rows in graded.values()]
        levels = [self.levels(stack, plain, tick) for stack in (self.base, self.expert)]
        return dict(zip(graded, zip(*levels, strict=True), strict=True))

    def _ways(self, along: Directions, layers: Sequence[int]) -> list[Steering]:
        v_LD, alpha_L = along.v_LD, along.alpha_L
        return [Steering(layer, v_LD[layer], float(alpha_L[layer]), self.search.positions) for layer in layers]

    def _no_gap(self, name: str, prompts: int, base: float, expert: float) -> TaskRecovery:
        if base - expert >= self.search.least_gap:
            LOG.warning(
                "task %s: the base passes %.0f %% of %d checks, the expert %.0f %%; are base and expert swapped?",
                name, 100 * base, prompts, 100 * expert,
            )  # fmt: skip
        note = (
            f"judged by the next token: the expert passes {percent(expert)} of {prompts} checks, the base "
            f"{percent(base)}, which is no gap to recover"
        )
        return TaskRecovery("none", prompts, base, expert, note=note)

    def levels(self, stack: Stack, asked: Sequence[tuple[Graded, Steering | None]], tick: Tick) -> list[float]:
        """The share of right answers to each set of prompts, steered in its way; several processes share the
        answers."""
        search, passed = self.search, torch.zeros(len(asked), dtype=torch.float64, device=self.base.device)
        every = [(number, ids, check) for number, (rows, _way) in enumerate(asked) for ids, check in rows]
        mine = self.processes.share(every)
        numbers, prompts = [number for number, _ids, _check in mine], [ids for _number, ids, _check in mine]
        rules = Greedy.of((self.base.model, self.expert.model), self.tokenizer, search.max_tokens, search.batch_size)
        answers = generate_answers(
            stack, rules, prompts,
            self.processes.ticking(lambda n: tick(n / rules.max_tokens)),
            ended=lambda row, answer: rules.holds(answer, mine[row][2].until),
            change=SteeredRows([way for _rows, way in asked], numbers),
            rows=rows_worth(stack, rules, max(map(len, prompts), default=0)),
        )  # fmt: skip
        for (number, prompt, check), answer in zip(mine, answers, strict=True):
            passed[number] += check.passes(rules.text(prompt, answer))
        shares = zip(self.processes.add_up(passed), asked, strict=True)
        return [float(count) / len(rows) for count, (rows, _way) in shares]


def _kl_recovery(level: tuple[float, tuple[float, ...]], prompts: int, search: Search, note: str) -> TaskRecovery:
    base, steered = level
    if -base < search.least_kl:
        said = f"left out: expert and base predict the same next token (KL {-base:.2g} nats)"
        return TaskRecovery("none", prompts, base, 0.0, note=said)
    return TaskRecovery("kl", prompts, base, 0.0, steered, tuple((f - base) / -base for f in steered), note)


Part = tuple[int, Batch]  # a batch, and the number of the set that it is from


@torch.no_grad()
def kl_levels(
    base: Stack,
    expert: Stack,
    sets: Sequence[Tokens],
    directions: Sequence[Directions],
    layers: Sequence[int],
    positions: str,
    batch_size: int,
    tick: Tick = lambda _n: None,
) -> list[tuple[float, tuple[float, ...]]]:
    """For every set of prompts, the mean F = -KL(expert || model) of the base, and of it steered at each layer.

    In nats. Each set has its own `directions`; `layers` in rising order. Memory: (len(layers) + 1) float32 streams [B,
    T, D] of a batch on the device, or, where weights stream, in host memory of as many batches as that holds.
    """
    if not sets:
        return []
    parts = [(i, batch) for i, prompts in enumerate(sets) for batch in batches(prompts, batch_size, base, expert)]
    vocabulary = min(base.vocabulary, expert.vocabulary)
    totals = torch.zeros(len(sets), len(layers) + 1, dtype=torch.float64, device=base.device)
    token_bytes = 4 * base.width * (len(layers) + 1)
    room = free_memory(torch.device("cpu")) // 2 if base.streamed else 0  # nothing is read of what is in memory
    for group in portions(parts, lambda part: token_bytes * part[1].ids_BT.numel(), room):
        targets = _expert_logits(expert, group, vocabulary)
        branched = _branches(base, group, directions, layers, positions)
        for (i, batch), branches, target_BV in zip(group, branched, targets, strict=True):
            for column, stream_BTD in enumerate(branches):
                logits_BV = base.logits(batch.at_anchor(stream_BTD.to(base.device)), vocabulary)
                totals[i, column] += kl_utility(logits_BV, target_BV).double().sum()
            tick(len(batch.last_B))
    means = [(total / len(prompts)).tolist() for total, prompts in zip(totals, sets, strict=True)]
    return [(mean[0], tuple(mean[1:])) for mean in means]


def _expert_logits(expert: Stack, parts: Sequence[Part], vocabulary: int) -> list[torch.Tensor]:
    """Of every batch [B, V]; rows past `vocabulary` are cut."""
    starts = [expert.start(batch) for _i, batch in parts]
    tops = [start.stream_BTD for start in starts]
    for _layer, tops in forward_sweep(expert, starts, expert.depth, at=[batch.reads_BA for _i, batch in parts]):  # noqa: B007
        pass
    return [expert.logits(batch.at_anchor(top), vocabulary) for (_i, batch), top in zip(parts, tops, strict=True)]


def _branches(
    base: Stack, parts: Sequence[Part], directions: Sequence[Directions], layers: Sequence[int], positions: str
) -> list[list[torch.Tensor]]:
    """Of every batch the final stream [B, T, D] of the base, then of the base steered at each of `layers`."""
    # Weights stream where the device is small: then it holds one branch of one batch at a time.
    home, device = torch.device("cpu") if base.streamed else base.device, base.device
    starts = [base.start(batch) for _i, batch in parts]
    branches = [[start.stream_BTD.to(home)] for start in starts]
    alphas = [along.alpha_L for along in directions]
    order = range(base.depth)
    for index, layer in zip(order, base.layers(order), strict=True):
        for k, (i, batch) in enumerate(parts):
            with at_reads(layer, batch.reads_BA if index == base.depth - 1 else None):
                called = [base.call(layer, x_BTD.to(device), starts[k].calls[index]).to(home) for x_BTD in branches[k]]
            if index in layers:
                way = Steering(index, directions[i].v_LD[index], float(alphas[i][index]), positions)
                called.append(way.at(called[0], batch.last_B.to(home)))
            branches[k] = called
    return branches
