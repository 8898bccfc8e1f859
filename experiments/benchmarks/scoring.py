"""Time and memory of first-order scoring against plain autograd, on one random pair, in one run.

    python experiments/benchmarks/scoring.py  # 16 layers x 1024, 16 prompts x 48 tokens, about 3 minutes
    python experiments/benchmarks/scoring.py --size small  # seconds
    python experiments/benchmarks/scoring.py --size 1.2b --dtype bfloat16 --methods batched,attr,writeback
    python experiments/benchmarks/scoring.py --growth growth.png  # seconds against tokens and layers, as a picture
    python experiments/benchmarks/scoring.py --model BASE --expert EXPERT --utility kl --alike 40  # a pair of one's own

Anchor utility, or KL of the next token over the whole depth and vocabulary; two scores a component:

    per-sample   one backward pass a prompt with weight gradients, then sum(dtheta * gradient)
    batched      the same with one backward pass for all prompts
    attr, writeback   this package, --batch prompts a pass
    packed   writeback with the prompts of a pass in one row, so that what they begin with (--alike) is run once

in turn, --repeat times; medians, ratios, the peak of memory above the weights, and the share of the floor: the time
that the floating-point operations alone would take at the matmul rate measured here (expert and base forward passes
to the anchor, backward to the activations, expert weights on base activations: four times the forward pass's; with KL,
the head thrice at the last tokens).
Since the anchor layer is computed at the last token only, a share can exceed 1.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from common import (
    SIZES,
    fine_print,
    layer_flops,
    matmul_rate,
    pair_of,
    random_batch,
    random_pair,
    shape_of,
    synchronize,
)

from mergekit_wp.scoring.accumulator import TaskAccumulator
from mergekit_wp.scoring.batching import Batch
from mergekit_wp.scoring.metrics import CosineMetric, KLMetric, Metric
from mergekit_wp.scoring.models.load import ModelPair
from mergekit_wp.scoring.packing import pack
from mergekit_wp.scoring.passes import BatchState, Passes, first_order
from mergekit_wp.scoring.score import anchor_layer
from mergekit_wp.scoring.sweep import forward_sweep
from mergekit_wp.subset import Subset

METHODS = ("per-sample", "batched", "attr", "writeback", "packed")


def residual_at(stack, batch: Batch, layer: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """z [B, D] of a plain run up to `layer`."""
    *_, (_layer, streams) = forward_sweep(stack, [stack.start(batch)], layer + 1)
    return batch.at_anchor(streams[0])


def by_autograd(pair: ModelPair, batch: Batch, metric: Metric, per_sample: bool) -> None:
    """Every head's and neuron's share of sum(dtheta * dF/dtheta), by autograd on the weights of layers <= `layer`."""
    model, expert, layer = pair.base.model, pair.expert.model, metric.layer
    layers = model.model.layers
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    owned = [(n, i) for i in range(layer + 1) for n in names]
    weights = [layers[i].get_submodule(n).weight for n, i in owned]
    for weight in weights:
        weight.requires_grad_(True)
    rows = [slice(i, i + 1) for i in range(len(batch.last_B))] if per_sample else [slice(None)]
    for row in rows:
        part = Batch(batch.ids_BT[row], batch.last_B[row], batch.answer_B[row])
        found: list[torch.Tensor] = []
        handle = layers[layer].register_forward_hook(lambda _m, _a, output, found=found: found.append(output))
        whole, model.model.layers = layers, layers[: layer + 1]
        model.model(input_ids=part.ids_BT, use_cache=False)
        model.model.layers = whole
        handle.remove()
        with torch.no_grad():
            target = metric.target(pair.expert, residual_at(pair.expert, part, layer))
        metric.values(pair.base, part.at_anchor(found[0]), target).sum().backward()
        for (name, i), weight in zip(owned, weights, strict=True):
            assert weight.grad is not None
            delta = expert.model.layers[i].get_submodule(name).weight - weight.detach()
            (delta * weight.grad).sum(0 if name.endswith(("o_proj", "down_proj")) else 1)
            weight.grad = None
    for weight in weights:
        weight.requires_grad_(False)


def by_groups(method: str, pair: ModelPair, batch: Batch, metric: Metric, size: int) -> None:
    packed, method = method == "packed", "writeback" if method == "packed" else method
    run = TaskAccumulator("benchmark", method, pair.geometry, (metric,), "mean", 0.0, pair.device)
    for start in range(0, len(batch.last_B), size):
        rows = slice(start, start + size)
        part = Batch(batch.ids_BT[rows], batch.last_B[rows], batch.answer_B[rows])
        part = pack(part, pair.base, pair.expert) if packed else part
        passes = Passes(pair, method, [BatchState(run, part)], keep_graphs=True)
        first_order(passes, Subset.choose(pair.geometry))
    run.finish()


def measure(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """(seconds, bytes of the peak above what was held before)."""
    gc.collect()
    before = _reset_peak(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started, _peak(device) - before


def _reset_peak(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024.0 * int(lines[key].split()[0])


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="200m", show_default=True)
@click.option("--methods", default=",".join(METHODS[:4]), show_default=True)
@click.option("--prompts", default=16, show_default=True)
@click.option("--tokens", default=48, show_default=True)
@click.option("--batch", "batch_size", default=8, show_default=True, help="Prompts a pass of attr and writeback.")
@click.option("--layer", type=int, help="Anchor layer (default: two thirds of the depth).")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--repeat", default=3, show_default=True)
@click.option("--model", help="Base of a pair that is there, in the place of --size; with --expert.")
@click.option("--expert")
@click.option("--utility", type=click.Choice(["anchor", "kl"]), default="anchor", show_default=True)
@click.option("--alike", default=0, show_default=True, help="Of --tokens, so many that all prompts begin with.")
@click.option("--growth", type=click.Path(path_type=Path), help="Draw seconds against tokens and layers instead.")
def main(
    size: str, methods: str, prompts: int, tokens: int, batch_size: int, layer: int | None, dtype: str, device: str,
    repeat: int, model: str | None, expert: str | None, utility: str, alike: int, growth: Path | None,
) -> None:  # fmt: skip
    """Print seconds, ratios, memory and the share of the floor as a Markdown table."""
    chosen = methods.split(",")
    if unknown := set(chosen) - set(METHODS):
        raise click.BadParameter(f"unknown methods {sorted(unknown)}; known are {', '.join(METHODS)}")
    if (model is None) != (expert is None):
        raise click.UsageError("--model and --expert go together")
    opened = pair_of(model, expert, dtype, device) if model and expert else random_pair(size, dtype, device)
    with opened as pair:
        anchor = pair.geometry.layers - 1 if utility == "kl" else anchor_layer(layer, pair.geometry.layers)
        if growth is not None:
            draw_growth(pair, prompts, tokens, batch_size, anchor, growth)
            return
        batch = random_batch(pair, prompts, tokens, alike)
        results = compare(pair, chosen, batch, batch_size, anchor, repeat, utility)
        shape = shape_of(pair)
        hidden, mlp = shape[:2]
        rate = matmul_rate(pair.dtype, pair.device, batch_size * tokens, hidden, mlp)
        head = 3 * 2 * prompts * hidden * pair.vocabulary if utility == "kl" else 0
        floor = (4 * (anchor + 1) * layer_flops(shape, prompts * tokens, tokens) + head) / rate
        report(results, floor)
        click.echo(
            f"\n{fine_print(pair)}; {utility}, layer {anchor} of {pair.geometry.layers}, {pair.vocabulary:,} rows, "
            f"{prompts} prompts x {tokens} tokens ({alike} of them alike), {batch_size} a pass; medians of {repeat}; "
            f"matmul {rate / 1e9:,.0f} GFLOP/s."
        )


def works(
    pair: ModelPair, batch: Batch, batch_size: int, anchor: int, utility: str = "anchor"
) -> dict[str, Callable[[], None]]:
    metric: Metric = KLMetric("kl", anchor, pair.vocabulary)
    if utility == "anchor":
        metric = CosineMetric("anchor", anchor, residual_at(pair.expert, batch, anchor).mean(0))
    found: dict[str, Callable[[], None]] = {
        "per-sample": lambda: by_autograd(pair, batch, metric, per_sample=True),
        "batched": lambda: by_autograd(pair, batch, metric, per_sample=False),
    }
    for method in ("attr", "writeback", "packed"):
        found[method] = lambda method=method: by_groups(method, pair, batch, metric, batch_size)  # type: ignore[misc]
    return found


def compare(
    pair: ModelPair, chosen: list[str], batch: Batch, batch_size: int, anchor: int, repeat: int, utility: str = "anchor"
) -> dict[str, tuple[float, float]]:
    """{method: (median seconds, median bytes above the weights)}, the methods in turn."""
    work = works(pair, batch, batch_size, anchor, utility)
    work[chosen[-1]]()  # warm up
    found: dict[str, list[tuple[float, float]]] = {method: [] for method in chosen}
    for _ in range(repeat):
        for method in chosen:
            found[method].append(measure(work[method], pair.device))
    return {
        method: (statistics.median(s for s, _b in runs), statistics.median(b for _s, b in runs))
        for method, runs in found.items()
    }


def report(results: dict[str, tuple[float, float]], floor: float) -> None:
    last = list(results.values())[-1]
    click.echo("| method | seconds | times the last row | GB above the weights | share of the floor |")
    click.echo("|---|---|---|---|---|")
    for method, (seconds, peak) in results.items():
        ratio, share = seconds / last[0], floor / seconds
        click.echo(f"| {method} | {seconds:.2f} | {ratio:.2f} | {peak / 1e9:.2f} | {share:.0%} |")


def draw_growth(pair: ModelPair, prompts: int, tokens: int, batch_size: int, anchor: int, path: Path) -> None:
    """writeback and batched autograd against tokens a prompt (at the anchor layer) and against the anchor layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    lengths = [tokens // 2, tokens, 2 * tokens, 4 * tokens]
    depths = sorted({pair.geometry.layers * part // 4 - 1 for part in (1, 2, 3, 4)})
    for axis, label, points in (
        (axes[0], "tokens a prompt", [(n, n, anchor) for n in lengths]),
        (axes[1], "anchor layer", [(layer, tokens, layer) for layer in depths]),
    ):
        for method in ("batched", "writeback"):
            seconds = [
                compare(pair, [method], random_batch(pair, prompts, n), batch_size, at, 3)[method][0]
                for _x, n, at in points
            ]
            axis.plot([x for x, _n, _at in points], seconds, marker="o", label=method)
            click.echo(
                f"{label}, {method}: " + ", ".join(f"{p[0]}: {s:.2f} s" for p, s in zip(points, seconds, strict=True))
            )
        axis.set(xlabel=label, ylabel="seconds", ylim=(0, None))
        axis.legend(frameon=False)
    figure.suptitle(fine_print(pair), fontsize=7)
    figure.savefig(path, dpi=110)
    click.echo(f"Written: {path}")


if __name__ == "__main__":
    main()
