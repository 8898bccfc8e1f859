"""Exact patching, many components stacked, against replacing the weights in place, on one pair, in one run.

    python experiments/benchmarks/exact.py                              # 16 layers x 1024, anchor at layer 10
    python experiments/benchmarks/exact.py --world runs/worlds/<hash>   # the miniature's pair: overhead rules
    python experiments/benchmarks/exact.py --size 3b --dtype bfloat16 --device cuda --prompts 50 --tokens 64

In place: copy the component's slices from the expert, run all layers of the base, restore. Both score the same sample
of heads and neurons in every layer; rates are components a second, the projection is for all heads and neurons of the
model. The share of the matmul rate counts the operations that the restarts do.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import click
import torch
from common import SIZES, fine_print, layer_flops, matmul_rate, random_batch, random_pair, synchronize

from mergekit_wp.checkpoint.vocabulary import load_tokenizer
from mergekit_wp.geometry import Kind
from mergekit_wp.scoring.accumulator import TaskAccumulator
from mergekit_wp.scoring.batching import Batch, batches, tokenize_tasks
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.metrics import CosineMetric, anchor_utility
from mergekit_wp.scoring.models.load import ModelPair, check_pair, load_pair
from mergekit_wp.scoring.pairs import load_pairs, split_pairs
from mergekit_wp.scoring.passes import BatchState, Passes, patch_layer
from mergekit_wp.scoring.prompt_format import PromptFormat
from mergekit_wp.scoring.score import MOST_TOKENS, anchor_layer, patch_plan
from mergekit_wp.scoring.sweep import forward_sweep
from mergekit_wp.subset import Subset


def in_place(
    pair: ModelPair, batch: Batch, anchor: int, direction_D: torch.Tensor, kind: Kind, components: list[tuple[int, int]]
) -> torch.Tensor:
    """F(patched) [C, B] by the definition: the whole base runs, nothing is shared between components."""
    base, expert = dict(pair.base.model.named_parameters()), dict(pair.expert.model.named_parameters())
    seen: list[torch.Tensor] = []
    handle = pair.base.model.model.layers[anchor].register_forward_hook(lambda _m, _a, out: seen.append(out))
    rows = []
    with torch.no_grad():
        for layer, index in components:
            owned = [(t, at) for t, at in pair.geometry.owned_slices(kind, layer, index) if t in base]
            saved = [base[name][at].clone() for name, at in owned]
            for name, at in owned:
                base[name][at] = expert[name][at]
            with pair.base.autocast():
                pair.base.model.model(input_ids=batch.ids_BT, use_cache=False)
            for (name, at), old in zip(owned, saved, strict=True):
                base[name][at] = old
            rows.append(anchor_utility(batch.at_anchor(seen.pop()), direction_D))
    handle.remove()
    return torch.stack(rows)


def sample(pair: ModelPair, anchor: int, heads: int, neurons: int) -> Subset:
    """That many heads and neurons of every layer up to the anchor, drawn with seed 0."""
    masks, generator = {}, torch.Generator().manual_seed(0)
    for kind, count in ((Kind.HEAD, heads), (Kind.NEURON, neurons)):
        mask = torch.zeros(pair.geometry.layers, getattr(pair.geometry, kind), dtype=torch.bool)
        for layer in range(anchor + 1):
            mask[layer, torch.randperm(mask.shape[1], generator=generator)[:count]] = True
        masks[kind] = mask
    return Subset(masks[Kind.HEAD], masks[Kind.NEURON])


def restarts(
    pair: ModelPair, batch: Batch, anchor: int, direction_D: torch.Tensor, subset: Subset, tokens: int | None
) -> tuple[TaskAccumulator, float]:
    """(scores, seconds) of the sample by stacked restarts, both sweeps up included."""
    run = TaskAccumulator(
        "benchmark", "exact", pair.geometry, (CosineMetric("anchor", anchor, direction_D),), "mean", 0.0, pair.device
    )
    synchronize(pair.device)
    started = time.perf_counter()
    passes = Passes(pair, "exact", [BatchState(run, batch)], keep_graphs=False)
    plan = patch_plan(pair, subset, ProcessGroup(), lambda _done: None)
    plan = replace(plan, most_tokens=tokens or plan.most_tokens)
    for layer in range(anchor, -1, -1):
        patch_layer(passes, plan, layer, pair.base.model.model.layers[layer], pair.expert.model.model.layers[layer])
    synchronize(pair.device)
    return run, time.perf_counter() - started


def patched_forward_flops(
    shape: tuple[int, int, int, int, int], size: str, anchor: int, prompts: int, tokens: int
) -> dict[str, float]:
    """Mean operations of one patched component over layers 0 to `anchor`, by kind."""
    hidden, mlp = shape[:2]
    total = {"heads": 0.0, "neurons": 0.0}
    full, top = (
        layer_flops(SIZES[size], prompts * tokens, tokens),
        layer_flops(SIZES[size], prompts * tokens, tokens, prompts),
    )
    for layer in range(anchor + 1):
        above = max(0, anchor - layer - 1) * full + (top if layer < anchor else 0.0)
        own_mlp = 6 * hidden * mlp * prompts * (tokens if layer < anchor else 1)
        total["heads"] += (above + own_mlp) / (anchor + 1)
        total["neurons"] += above / (anchor + 1)
    return total


def world_pair(world: Path, prompts: int) -> tuple[ModelPair, Batch]:
    """The miniature's instruction pair and some scoring prompts of its first task as one batch."""
    job = ScoringJob(
        str(world / "base"), str(world / "instruction"), str(world / "pairs/instruction.jsonl"), device="cpu"
    )
    checked = check_pair(job)
    pair = load_pair(job, checked)
    pairs = split_pairs(load_pairs(job.pairs, None, 0), "half", 0)
    tokenizer = load_tokenizer(checked.base.name, checked.base.folder, False)
    task = tokenize_tasks(PromptFormat(tokenizer), pairs, checked.context_limit)[0]
    return pair, next(batches(task.scoring, prompts, pair.base, pair.expert))


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="200m", show_default=True)
@click.option("--world", type=click.Path(path_type=Path, exists=True), help="A trained miniature instead.")
@click.option("--prompts", default=16, show_default=True)
@click.option("--tokens", default=48, show_default=True)
@click.option("--layer", default=10, show_default=True, help="Anchor layer; the default for a world.")
@click.option("--heads", default=8, show_default=True, help="Sampled a layer.")
@click.option("--neurons", default=32, show_default=True, help="Sampled a layer.")
@click.option("--reference", default=12, show_default=True, help="Components of each kind replaced in place.")
@click.option("--width", type=int, help="Tokens a stacked step (default: as wp-score chooses).")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", default="auto", show_default=True)
def main(
    size: str, world: Path | None, prompts: int, tokens: int, layer: int, heads: int, neurons: int, reference: int,
    width: int | None, dtype: str, device: str,
) -> None:  # fmt: skip
    """Print components a second, the ratio, the largest disagreement and the share of the matmul rate."""
    if world is not None:
        pair, batch = world_pair(world, prompts)
        layer = anchor_layer(None, pair.geometry.layers)
        heads, neurons = pair.geometry.heads, pair.geometry.neurons
    else:
        with random_pair(size, dtype, device) as pair:
            batch = random_batch(pair, prompts, tokens)
    *_, (_layer, streams) = forward_sweep(pair.expert, [pair.expert.start(batch)], layer + 1)
    direction_D = batch.at_anchor(streams[0]).mean(0)
    masks = sample(pair, layer, heads, neurons)
    restarts(pair, batch, layer, direction_D, sample(pair, layer, 2, 2), width)  # warm up
    seconds: dict[Kind, float] = {}
    slow: dict[Kind, float] = {}
    worst = 0.0
    for kind in Kind:
        alone = Subset(*(mask if k == kind else torch.zeros_like(mask) for k, mask in masks.masks.items()))
        run, took = restarts(pair, batch, layer, direction_D, alone, width)
        seconds[kind] = took / alone.count
        chosen = alone.masks[kind].nonzero()[torch.randperm(alone.count, generator=torch.Generator().manual_seed(1))]
        some = [(int(at[0]), int(at[1])) for at in chosen[:reference]]
        started = time.perf_counter()
        patched_CB = in_place(pair, batch, layer, direction_D, kind, some)
        synchronize(pair.device)
        slow[kind] = (time.perf_counter() - started) / len(some)
        wanted = (patched_CB - unpatched(pair, batch, layer, direction_D)).double().sum(1)
        got = torch.stack([run.sums[kind]["whole"][at] for at in some])
        worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
    report(
        pair,
        size if world is None else None,
        layer,
        batch,
        seconds,
        slow,
        worst,
        width or MOST_TOKENS[pair.device.type],
    )


def unpatched(pair: ModelPair, batch: Batch, anchor: int, direction_D: torch.Tensor) -> torch.Tensor:
    """F [B] of the base as it is, by the same plain run."""
    seen: list[torch.Tensor] = []
    handle = pair.base.model.model.layers[anchor].register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad(), pair.base.autocast():
        pair.base.model.model(input_ids=batch.ids_BT, use_cache=False)
    handle.remove()
    return anchor_utility(batch.at_anchor(seen[0]), direction_D)


def report(
    pair: ModelPair, size: str | None, anchor: int, batch: Batch, seconds: dict[Kind, float], slow: dict[Kind, float],
    worst: float, width: int,
) -> None:  # fmt: skip
    prompts, tokens = batch.ids_BT.shape
    counts = {kind: (anchor + 1) * getattr(pair.geometry, kind) for kind in Kind}
    click.echo("| | restarts, components/s | in place, components/s | ratio |\n|---|---|---|---|")
    for kind in Kind:
        click.echo(f"| {kind} | {1 / seconds[kind]:.2f} | {1 / slow[kind]:.2f} | {slow[kind] / seconds[kind]:.1f} |")
    whole, in_place_whole = (sum(counts[kind] * t[kind] for kind in Kind) for t in (seconds, slow))
    click.echo(
        f"\n{counts[Kind.HEAD]:,} heads and {counts[Kind.NEURON]:,} neurons to layer {anchor}: {whole:,.0f} s "
        f"against {in_place_whole:,.0f} s, {in_place_whole / whole:.1f} x. Largest disagreement with in-place "
        f"replacement: {worst:.1e} of the largest effect."
    )
    if size is not None:
        shape = SIZES[size]
        rate = matmul_rate(pair.dtype, pair.device, width, shape[0], shape[1])
        needed = patched_forward_flops(shape, size, anchor, prompts, tokens)
        operations = sum(counts[kind] * needed[kind] for kind in Kind)
        click.echo(f"{operations / whole / rate:.0%} of the matmul rate, {rate / 1e9:,.0f} GFLOP/s.")
    click.echo(f"{fine_print(pair)}; {prompts} prompts x {tokens} tokens, {width} tokens a step.")


if __name__ == "__main__":
    main()
