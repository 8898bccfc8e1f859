"""The scoring run: pairs -> anchor direction -> gaps and scores -> score file content.

For each task: the direction v from the extraction pairs (Eq. 3, or the contrast between models); then, batch by
batch over the scoring prompts, one expert forward pass for the gap, one base forward and backward pass, and the
first-order scores of every layer as the backward pass reaches it. Under `anchor` nothing above the anchor layer
is run. Under `staged` the residual stream is cut after the anchor layer: the anchor utility's gradient flows
below the cut and the kl utility's above it, so one backward pass serves both.

Legend: B prompts, T tokens, D residual width, L layers, H heads, F neurons, V vocabulary rows.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch

from mergekit_wp import __version__
from mergekit_wp.checkpoint import Fingerprint
from mergekit_wp.errors import BadInput
from mergekit_wp.scorefile import ModelId, ScoreMeta, Scores, TaskMeta, TaskScores
from mergekit_wp.scoring.batches import Batch, TaskTokens, batches, tokenize_tasks
from mergekit_wp.scoring.capture import LayerRecord, capture_layers, differentiable_embeddings
from mergekit_wp.scoring.firstorder import SCORE_LAYER
from mergekit_wp.scoring.job import ScoringJob
from mergekit_wp.scoring.models import (
    CheckedPair,
    ModelPair,
    check_pair,
    layer_hook,
    load_pair,
    load_tokenizer,
    next_token_logits,
    only_layers,
    residual_at_anchor,
)
from mergekit_wp.scoring.pairs import load_pairs, split_pairs
from mergekit_wp.scoring.utilities import GapLedger, anchor_utility, kl_utility

Tick = Callable[[int], object]


def score(job: ScoringJob, progress: Callable[[int, str], Tick] | None = None) -> Scores:
    """Run a whole scoring job.

    `progress(total prompts, what)` may return a function that is told of every prompt done.
    Raises `BadInput` for everything the user can mend (see the modules called).
    """
    checked = check_pair(job)
    layer = anchor_layer(job.layer, checked.base.geometry.layers)
    pairs = split_pairs(load_pairs(job.pairs, job.samples, job.seed), job.split, job.seed)
    tokenizer = load_tokenizer(checked.base, job.trust_remote_code)
    tasks = tokenize_tasks(tokenizer, pairs, job.template, checked.context_limit)
    pair = load_pair(job, checked)  # only now, when nothing but the weights themselves can be wrong
    prompts = sum(2 * len(task.extraction) + len(task.scoring) for task in tasks)
    tick = progress(prompts, "Scoring prompts") if progress else (lambda _n: None)
    metas, scores = {}, {}
    for task in tasks:
        try:
            metas[task.task], scores[task.task] = score_task(job, pair, task, layer, tick)
        except torch.OutOfMemoryError as error:
            raise BadInput(f"batch_size: {job.batch_size} prompts do not fit on {pair.device}; lower it.") from error
    return Scores.from_tasks(_meta(job, checked, pair, layer, metas), scores)


def anchor_layer(asked: int | None, layers: int) -> int:
    """l_a, counted from 0; by default two thirds of the depth (27 of 40, as the paper's 13B).

    Raises `BadInput` when the layer is not there.
    """
    layer = min(round(2 * layers / 3), layers - 1) if asked is None else asked
    if not 0 <= layer < layers:
        raise BadInput(f"layer: anchor layer {layer} is out of range; this model has layers 0 to {layers - 1}.")
    return layer


def score_task(
    job: ScoringJob, pair: ModelPair, task: TaskTokens, layer: int, tick: Tick = lambda _n: None
) -> tuple[TaskMeta, TaskScores]:
    """Direction and scores of one task. Raises `BadInput` when no prompt shows a gap."""
    direction_D = extract_direction(job, pair, task, layer, tick)
    run = TaskRun(job, pair, layer, direction_D)
    for batch in batches(task.scoring, job.batch_size, pair.device):
        run.add(batch)
        tick(len(batch.last_B))
    heads_LH, neurons_LF = run.finish(task.task)
    stats = {name: ledger.stats() for name, ledger in run.ledgers.items()}
    meta = TaskMeta(len(task.extraction), len(task.scoring), stats)
    return meta, TaskScores(heads_LH, neurons_LF, direction_D.cpu())


def extract_direction(
    job: ScoringJob, pair: ModelPair, task: TaskTokens, layer: int, tick: Tick = lambda _n: None
) -> torch.Tensor:
    """v [D], float32: the mean over extraction pairs of z(x+|expert) - z(x-|expert) (Eq. 3).

    Without contrasts, of z(x|expert) - z(x|base). Raises `BadInput` when it vanishes.
    """
    runs = [(1, pair.expert, task.extraction)]
    runs += [(-1, pair.expert, task.contrasts)] if task.contrasts else [(-1, pair.base, task.extraction)]
    total_D = torch.zeros(pair.geometry.d_model, dtype=torch.float64, device=pair.device)
    for sign, model, prompts in runs:
        for batch in batches(prompts, job.batch_size, pair.device):
            total_D += sign * residual_at_anchor(model, batch, layer).double().sum(0)
            tick(len(batch.last_B))
    direction_D = (total_D / len(task.extraction)).float()
    if not torch.isfinite(direction_D).all() or not direction_D.any():
        raise BadInput(
            f"task {task.task}: prompts and contrasts leave the same residual at layer {layer}, so there is no "
            "anchor direction; check the pairs and the expert."
        )
    return direction_D


@dataclass
class TaskRun:
    """Accumulates the weighted scores of one task over batches; `heads_LH` and `neurons_LF` are float64 sums."""

    job: ScoringJob
    pair: ModelPair
    layer: int
    direction_D: torch.Tensor
    ledgers: dict[str, GapLedger] = field(init=False)

    def __post_init__(self) -> None:
        shape = self.pair.geometry
        needed = sorted({self.utility_of(layer) for layer in range(shape.layers)})
        self.ledgers = {name: GapLedger(name, self.job.gap, self.job.gap_floor) for name in needed}
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.pair.device)
        self.heads_LH, self.neurons_LF = zeros(shape.layers, shape.heads), zeros(shape.layers, shape.neurons)

    @property
    def depth(self) -> int:
        """Layers that are run."""
        return self.pair.geometry.layers if "kl" in self.ledgers else self.layer + 1

    def utility_of(self, layer: int) -> str:
        """The utility that scores the components of a layer."""
        return ("anchor" if layer <= self.layer else "kl") if self.job.utility == "staged" else self.job.utility

    def add(self, batch: Batch) -> None:
        """Score one batch of prompts and add it to the sums."""
        with torch.no_grad():
            expert = self._utilities(self.pair.expert, batch, cut=False)
        if "kl" in expert:
            target_BV, expert["kl"] = expert["kl"], torch.zeros(len(batch.last_B), device=self.pair.device)
        else:
            target_BV = None
        layers = list(self.pair.base.model.layers)[: self.depth]
        with (
            torch.enable_grad(),
            differentiable_embeddings(self.pair.base),
            capture_layers(layers, self._add_layer),
        ):
            base = self._utilities(self.pair.base, batch, cut=len(self.ledgers) > 1)
            if target_BV is not None:
                base["kl"] = kl_utility(base["kl"], target_BV)
            weights = {name: self.ledgers[name].weights(base[name], expert[name]) for name in base}
            torch.stack([(weights[name] * base[name]).sum() for name in base]).sum().backward()

    def finish(self, task: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(heads [L, H], neurons [L, F]) float32 on the CPU; layers that no utility sees are 0."""
        divisor = {name: ledger.normalizer(task) for name, ledger in self.ledgers.items()}
        for layer in range(self.depth):
            self.heads_LH[layer] /= divisor[self.utility_of(layer)]
            self.neurons_LF[layer] /= divisor[self.utility_of(layer)]
        return self.heads_LH.float().cpu(), self.neurons_LF.float().cpu()

    def _utilities(self, model: object, batch: Batch, cut: bool) -> dict[str, torch.Tensor]:
        """One forward pass: anchor -> cosines [B], kl -> logits [B, V] (their KL needs both models)."""
        stream: list[torch.Tensor] = []

        def on_anchor(z_BTD: torch.Tensor) -> torch.Tensor | None:
            stream.append(z_BTD)
            return z_BTD.detach().requires_grad_(True) if cut else None

        with ExitStack() as stack:
            stack.enter_context(only_layers(model, self.depth))
            if "anchor" in self.ledgers:
                stack.enter_context(layer_hook(model, self.layer, on_anchor))
            output = model.model(input_ids=batch.ids_BT, use_cache=False)  # type: ignore[attr-defined]
        values = {}
        if "anchor" in self.ledgers:
            values["anchor"] = anchor_utility(batch.at_anchor(stream[0]), self.direction_D)
        if "kl" in self.ledgers:
            vocabulary = self.pair.geometry.vocabulary
            values["kl"] = next_token_logits(model, output.last_hidden_state, batch, vocabulary)
        return values

    def _add_layer(self, layer: int, record: LayerRecord) -> None:
        base, expert = (model.model.layers[layer] for model in (self.pair.base, self.pair.expert))
        heads_H, neurons_F = SCORE_LAYER[self.job.method](base, expert, record, self.pair.geometry)
        self.heads_LH[layer] += heads_H
        self.neurons_LF[layer] += neurons_F


def _meta(job: ScoringJob, checked: CheckedPair, pair: ModelPair, layer: int, tasks: dict[str, TaskMeta]) -> ScoreMeta:
    packages = ("torch", "transformers", "safetensors")
    device = torch.cuda.get_device_name(pair.device) if pair.device.type == "cuda" else str(pair.device)
    return ScoreMeta(
        base=_model_id(job.base, checked.base_print),
        expert=_model_id(job.expert, checked.expert_print),
        geometry=pair.geometry,
        tasks=tasks,
        method=job.method,
        utility=job.utility,
        gap=job.gap,
        split=job.split,
        anchor_layer=layer,
        dtype=str(pair.dtype).removeprefix("torch."),
        device=device,
        seed=job.seed,
        versions={"mergekit-wp": __version__} | {name: importlib.metadata.version(name) for name in packages},
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _model_id(name: str, fingerprint: Fingerprint) -> ModelId:
    # A LoRA's name holds two models, each perhaps with a revision: it stays whole.
    path, _, revision = (name, "", "") if "+" in name else name.partition("@")
    return ModelId(path, revision or None, fingerprint.config, fingerprint.tensors)
