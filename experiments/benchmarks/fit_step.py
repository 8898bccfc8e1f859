"""One step of the fit with three experts of Llama-2-13B's width, layers streamed from disk: time, memory, bytes, floor.

    python experiments/benchmarks/fit_step.py --folder /tmp/fit --layers 4
    python experiments/benchmarks/fit_step.py --folder /data/fit --layers 40 --keep    # writes 104 GB

The models are random, as in stream_13b.py. A step is a forward pass of the merge over all prompts and a backward one,
through activations and to the weights; the floor is what these three products take at the rate at which the machine
multiplies the MLP's own matrices, 6 operations a weight and token, reading not counted. The backward pass of streamed
layers computes each layer once more, which the floor does not count either. The step runs in a process of its own, so
that its peak of resident memory is what is reported.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import click
import torch
from common import matmul_rate, synchronize
from stream_13b import ROWS, SHAPE, Pools, run, write_model, write_pairs

from mergekit_wp.fit.fit import check, load
from mergekit_wp.fit.gradient import loss_and_gradient
from mergekit_wp.fit.job import FitJob
from mergekit_wp.fit.objective import Lesson, batch_lessons
from mergekit_wp.fit_file import FusionWeights
from mergekit_wp.scoring.distributed import ProcessGroup

EXPERTS = 3


def make_models(folder: Path, layers: int) -> None:
    """folder/base and folder/expert0 to 2, unless models of this depth are there."""
    made = folder / "made.json"
    if made.is_file() and json.loads(made.read_text()) == layers:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for k in range(EXPERTS):
        pools = Pools.drawn(k)
        if k == 0:
            write_model(folder / "base", "base", layers, pools, 0)
        write_model(folder / f"expert{k}", "expert", layers, pools, 0)
    made.write_text(json.dumps(layers))


def step(folder: Path, prompts: int, tokens: int, answer: int, dtype: str, device: str, offload: str) -> None:
    """Load, take one step, and leave in step.json its seconds, its tokens and the device's peak of memory."""
    experts = [{"expert": str(folder / f"expert{k}"), "pairs": str(folder / f"pairs{k}.jsonl")} for k in range(EXPERTS)]
    job = FitJob(
        base=str(folder / "base"), experts=experts, offload=offload, dtype=dtype, device=device, batch_size=prompts
    )
    ready = check(job)
    merged = load(job, ready, ProcessGroup())
    merged.set(FusionWeights.uniform(merged.geometry, [0.5] * EXPERTS))
    generator = torch.Generator().manual_seed(0)
    lessons = []
    for k, each in enumerate(ready):
        for ids in each.tasks[0].scoring:
            said = torch.randint(4, 1000, (answer,), generator=generator).tolist()
            # What the teacher says there decides no product's size: any stream will do.
            lessons.append(Lesson(k, ids, said, torch.randn(answer, merged.geometry.d_model, generator=generator)))
    batches = batch_lessons(lessons, prompts, (merged.base, *merged.experts))
    weights_N = torch.full((len(lessons),), 1 / len(lessons), dtype=torch.float64)
    begun = time.perf_counter()
    loss_and_gradient(merged, batches, weights_N, ROWS["base"], ProcessGroup(), lambda _done: None)
    synchronize(merged.device)
    seconds = time.perf_counter() - begun
    count = sum(each.batch.ids_BT.numel() for each in batches)
    peak = torch.cuda.max_memory_allocated(merged.device) if merged.device.type == "cuda" else 0
    rate = matmul_rate(merged.dtype, merged.device, count, SHAPE["hidden_size"], SHAPE["intermediate_size"])
    found = {"seconds": seconds, "tokens": count, "rate": rate, "device": str(merged.device), "on_device": peak}
    (folder / "step.json").write_text(json.dumps(found))


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where the models lie or are written.")
@click.option("--layers", default=4, show_default=True, help="Layers of the models; 13B has 40.")
@click.option("--prompts", default=4, show_default=True, help="Of each expert.")
@click.option("--tokens", default=48, show_default=True, help="Of a prompt.")
@click.option("--answer", default=16, show_default=True, help="Tokens of an answer.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--offload", default="stream", show_default=True)
@click.option("--keep", is_flag=True, help="Leave the models there.")
@click.option("--inside", is_flag=True, hidden=True)
def main(
    folder: Path, layers: int, prompts: int, tokens: int, answer: int, dtype: str, device: str, offload: str,
    keep: bool, inside: bool,
) -> None:  # fmt: skip
    """Write the models, take one step, print what that took."""
    if inside:
        step(folder, prompts, tokens, answer, dtype, device, offload)
        return
    make_models(folder, layers)
    for k in range(EXPERTS):
        write_pairs(folder / f"pairs{k}.jsonl", prompts, tokens, k)
    options = {
        "folder": folder, "prompts": prompts, "tokens": tokens, "answer": answer, "dtype": dtype, "device": device,
        "offload": offload,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    usage = run([sys.executable, __file__, "--inside", *flags])
    found = json.loads((folder / "step.json").read_text())
    hidden, mlp = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    rate = found["rate"]
    weights = layers * (4 * hidden * hidden + 3 * hidden * mlp)
    floor = 6 * weights * found["tokens"] / rate
    read = 2 * 2 * (1 + EXPERTS) * weights
    click.echo(
        f"{layers} layers, {EXPERTS} experts, {found['tokens']} tokens, {dtype}: a step takes {found['seconds']:.1f} s "
        f"({found['seconds'] / layers:.1f} a layer) and reads {read / 1e9:.1f} GB; floor {floor:.1f} s at "
        f"{rate / 1e9:.0f} GF/s ({floor / found['seconds']:.0%}); peak resident {usage.peak / 1e9:.2f} GB"
        + (f", {found['on_device'] / 1e9:.2f} GB on {found['device']}" if found["on_device"] else "")
    )
    if not keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
