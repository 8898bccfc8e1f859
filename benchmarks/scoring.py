"""Time and memory of scoring against plain autograd, on one random pair, in one run.

    python benchmarks/scoring.py                   # 16 layers x 1024, 16 prompts x 48 tokens, about 3 minutes
    python benchmarks/scoring.py --size small      # seconds
    python benchmarks/scoring.py --size 1.2b --dtype bfloat16 --methods attr,writeback

A random bfloat16 Llama with GQA and 32,000 rows, and an expert with one row more, are written as sharded
safetensors to a temporary folder and loaded the way wp-score loads them. Then, anchor utility at two thirds of the
depth:

    per-sample   one backward pass a prompt with weight gradients, then sum(dtheta * gradient)
    batched      the same with one backward pass for all prompts
    attr, writeback   this package

in turn, --repeat times; medians, ratios to writeback, and the share of the floor: the time that the floating-point
operations alone would take at the matmul rate measured here (expert and base forward passes to the anchor, backward
to the activations, expert weights on base activations: four times the forward pass's).
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import click
import torch
import transformers

from mergekit_wp.scoring.batches import Batch
from mergekit_wp.scoring.engine import TaskRun, anchor_layer
from mergekit_wp.scoring.job import ScoringJob
from mergekit_wp.scoring.models import ModelPair, check_pair, load_pair, residual_at_anchor
from mergekit_wp.scoring.utilities import anchor_utility

# (hidden, MLP, layers, heads, KV heads)
SIZES = {
    "small": (256, 688, 6, 8, 4),
    "200m": (1024, 2816, 16, 16, 4),
    "1.2b": (2048, 5632, 22, 32, 8),
}
METHODS = ("per-sample", "batched", "attr", "writeback")


def write_pair(size: str, folder: Path) -> None:
    """folder/base and folder/expert; the expert's weights are the base's, moved by 2 % of their size."""
    hidden, mlp, layers, heads, kv_heads = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="500MB")
    for parameter in model.parameters():
        parameter.data += 0.02 * parameter.data.float().std().to(parameter.dtype) * torch.randn_like(parameter)
    model.resize_token_embeddings(32001, mean_resizing=False)
    model.save_pretrained(folder / "expert", max_shard_size="500MB")


def by_autograd(pair: ModelPair, batch: Batch, layer: int, direction_D: torch.Tensor, per_sample: bool) -> None:
    """Every head's and neuron's share of sum(dtheta * dF/dtheta), by autograd on the weights of layers <= `layer`."""
    layers = pair.base.model.layers
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    owned = [(n, i) for i in range(layer + 1) for n in names]
    weights = [layers[i].get_submodule(n).weight for n, i in owned]
    for weight in weights:
        weight.requires_grad_(True)
    rows = [slice(i, i + 1) for i in range(len(batch.last_B))] if per_sample else [slice(None)]
    for row in rows:
        part = Batch(batch.ids_BT[row], batch.last_B[row])
        found: list[torch.Tensor] = []
        handle = layers[layer].register_forward_hook(lambda _m, _a, output, found=found: found.append(output))
        whole, pair.base.model.layers = layers, layers[: layer + 1]
        pair.base.model(input_ids=part.ids_BT, use_cache=False)
        pair.base.model.layers = whole
        handle.remove()
        residual_at_anchor(pair.expert, part, layer)  # the gap needs it, in every method
        anchor_utility(part.at_anchor(found[0]), direction_D).sum().backward()
        for (name, i), weight in zip(owned, weights, strict=True):
            assert weight.grad is not None
            delta = pair.expert.model.layers[i].get_submodule(name).weight - weight.detach()
            (delta * weight.grad).sum(0 if name.endswith(("o_proj", "down_proj")) else 1)
            weight.grad = None
    for weight in weights:
        weight.requires_grad_(False)


def by_hooks(job: ScoringJob, pair: ModelPair, batch: Batch, layer: int, direction_D: torch.Tensor) -> None:
    run = TaskRun(job, pair, layer, direction_D)
    run.add(batch)
    run.finish("benchmark")


def matmul_rate(dtype: torch.dtype, tokens: int, hidden: int, mlp: int) -> float:
    """Floating-point operations a second of the MLP's own product at this batch."""
    x_TD, w_FD = torch.randn(tokens, hidden).to(dtype), torch.randn(mlp, hidden).to(dtype)
    for _ in range(3):
        torch.nn.functional.linear(x_TD, w_FD)
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < 1.0:
        torch.nn.functional.linear(x_TD, w_FD)
        runs += 1
    return 2 * tokens * hidden * mlp * runs / (time.perf_counter() - started)


def forward_flops(size: str, layers: int, prompts: int, tokens: int) -> float:
    """Of the projections and of attention (causal, counted as the dense product it is run as)."""
    hidden, mlp, _, heads, kv_heads = SIZES[size]
    projections = 2 * hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 3 * mlp)
    return float(layers * prompts * tokens * (projections + 4 * tokens * hidden))


def measure(work: Callable[[], None]) -> float:
    gc.collect()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="200m", show_default=True)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--prompts", default=16, show_default=True)
@click.option("--tokens", default=48, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--repeat", default=3, show_default=True)
def main(size: str, methods: str, prompts: int, tokens: int, dtype: str, repeat: int) -> None:
    """Print seconds, ratios and the share of the floor as a Markdown table."""
    transformers.utils.logging.disable_progress_bar()
    chosen = methods.split(",")
    if unknown := set(chosen) - set(METHODS):
        raise click.BadParameter(f"unknown methods {sorted(unknown)}; known are {', '.join(METHODS)}")
    with tempfile.TemporaryDirectory(prefix="wp-bench-") as name:
        write_pair(size, Path(name))
        jobs = {
            method: ScoringJob(
                f"{name}/base", f"{name}/expert", "-", utility="anchor", gap="mean", gap_floor=0.0, dtype=dtype,
                device="cpu", method=method,
            )
            for method in ("attr", "writeback")
        }  # fmt: skip
        pair = load_pair(jobs["attr"], check_pair(jobs["attr"]))
    layer = anchor_layer(None, pair.geometry.layers)
    ids_BT = torch.randint(3, 32000, (prompts, tokens), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids_BT, torch.full((prompts,), tokens - 1))
    direction_D = residual_at_anchor(pair.expert, batch, layer).mean(0)
    work = {
        "per-sample": lambda: by_autograd(pair, batch, layer, direction_D, per_sample=True),
        "batched": lambda: by_autograd(pair, batch, layer, direction_D, per_sample=False),
        "attr": lambda: by_hooks(jobs["attr"], pair, batch, layer, direction_D),
        "writeback": lambda: by_hooks(jobs["writeback"], pair, batch, layer, direction_D),
    }
    seconds: dict[str, list[float]] = {method: [] for method in chosen}
    work[chosen[-1]]()  # warm up
    for _ in range(repeat):
        for method in chosen:
            seconds[method].append(measure(work[method]))
    hidden, mlp = SIZES[size][:2]
    floor = 4 * forward_flops(size, layer + 1, prompts, tokens) / matmul_rate(pair.dtype, prompts * tokens, hidden, mlp)
    report(seconds, floor)
    parameters = sum(p.numel() for p in pair.base.parameters())
    click.echo(
        f"\n{parameters / 1e6:,.0f} M parameters, anchor layer {layer} of {pair.geometry.layers}, {prompts} prompts x "
        f"{tokens} tokens, {dtype}, {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, "
        f"transformers {version('transformers')}, {datetime.date.today()}; medians of {repeat}; peak RSS of the whole "
        f"run {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB."
    )


def report(seconds: dict[str, list[float]], floor: float) -> None:
    medians = {method: statistics.median(times) for method, times in seconds.items()}
    last = list(medians.values())[-1]
    click.echo("| method | seconds | times the last row | share of the floor |\n|---|---|---|---|")
    for method, median in medians.items():
        click.echo(f"| {method} | {median:.2f} | {median / last:.2f} | {floor / median:.0%} |")


if __name__ == "__main__":
    main()
