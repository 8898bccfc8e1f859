"""Time and memory of this package's merge methods against mergekit's own, on the same random models.

    python experiments/benchmarks/merge.py  # 1.2 B parameters, wp against linear, about 3 minutes
    python experiments/benchmarks/merge.py --size small  # seconds; says little beyond "it runs"
    python experiments/benchmarks/merge.py --methods wp,wp-scaled,widen,aim,linear  # all of ours against linear
    python experiments/benchmarks/merge.py --methods all  # with ties and dare_ties, about 10 minutes more

A random bfloat16 Llama, three experts and their score files are made in --folder (and reused if they are
there: about 10 GB for 1.2b). Each method then runs as the stock `mergekit-yaml` in a process of its own, the
methods interleaved so that a busy machine hits all alike. Wall time is the child's whole life, import
included; CPU and peak resident memory are what the kernel accounts to it (wait4). Mapped pages of the inputs
count as resident. wp-scaled is wp with scale 1.5, which reads the base as well. aim is a step after a merge: it reads
two models, the base and the first expert in the place of a merge.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import torch
import yaml
from safetensors.torch import save_file

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.merge.activations import Activations, Calibration, write_activations
from mergekit_wp.scores import (
    ModelId,
    ScoreMeta,
    Scores,
    TaskMeta,
    TaskScores,
    UtilityStats,
    write_scores,
)

# (hidden, MLP, layers, heads, vocabulary)
SIZES = {"small": (256, 704, 4, 8, 2000), "1.2b": (2048, 5632, 21, 32, 32000)}
METHODS = ("wp", "wp-scaled", "widen", "aim", "linear", "task_arithmetic", "dare_ties", "ties")
EXPERTS = 3


@dataclass(frozen=True)
class Run:
    """One child process: seconds of wall clock, seconds of CPU (user and system), bytes of peak memory."""

    wall: float
    cpu: float
    rss: int


def tensor_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama without GQA."""
    hidden, mlp, layers, _, vocabulary = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (hidden, hidden)
        for name, shape in (("gate_proj", (mlp, hidden)), ("up_proj", (mlp, hidden)), ("down_proj", (hidden, mlp))):
            shapes[f"{prefix}mlp.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_models(root: Path, size: str) -> None:
    """Base, experts and score files under `root`, unless they are there."""
    done = root / "done.json"
    if done.is_file() and json.loads(done.read_text()) == size:
        return
    shutil.rmtree(root, ignore_errors=True)
    shapes = tensor_shapes(size)
    for k, name in enumerate(["base", *(f"expert{k}" for k in range(EXPERTS))]):
        click.echo(f"making {root / name}")
        weights = {}
        for i, (tensor, shape) in enumerate(shapes.items()):
            base = torch.empty(shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(i))
            if k:
                base += torch.empty(shape).normal_(0, 0.002, generator=torch.Generator().manual_seed(1000 * k + i))
            weights[tensor] = base.to(torch.bfloat16)
        _write_folder(root / name, size, weights)
    for k in range(EXPERTS):
        _write_scores(root, k)
    _write_activations(root)
    done.write_text(json.dumps(size))


def _write_folder(folder: Path, size: str, weights: dict[str, torch.Tensor]) -> None:
    import transformers
    from tokenizers import Tokenizer, models

    hidden, mlp, layers, heads, vocabulary = SIZES[size]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def _write_scores(root: Path, k: int) -> None:
    base, expert = (Checkpoint.open(str(root / name)) for name in ("base", f"expert{k}"))
    geometry = base.geometry
    generator = torch.Generator().manual_seed(k)
    task = TaskScores(
        torch.randn(geometry.layers, geometry.heads, generator=generator),
        torch.randn(geometry.layers, geometry.neurons, generator=generator),
        torch.zeros(geometry.d_model),
    )
    ids = [ModelId(c.name, None, c.fingerprint.config, c.fingerprint.tensors) for c in (base, expert)]
    meta = ScoreMeta(
        base=ids[0],
        expert=ids[1],
        geometry=geometry,
        tasks={"random": TaskMeta(0, 1, {"kl": UtilityStats(1, 0, 1.0)})},
        method="writeback",
        utility="kl",
        gap="mean",
        split="half",
        anchor_layer=0,
        dtype="float32",
        device="cpu",
        seed=k,
        versions={},
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    write_scores(Scores.from_tasks(meta, {"random": task}), root / f"expert{k}.scores.safetensors")


def _write_activations(root: Path) -> None:
    base = Checkpoint.open(str(root / "base"))
    generator = torch.Generator().manual_seed(0)
    means = {
        name: torch.rand(header.shape[-1], generator=generator)
        for name, header in base.tensors.items()
        if "embed" not in name
    }
    identity = ModelId(base.name, None, base.fingerprint.config, base.fingerprint.tensors)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = Calibration(identity, "random", 1, 1, 1, "float32", "cpu", {}, now)
    write_activations(Activations(about, means), root / "activations.safetensors")


def write_recipe(root: Path, method: str) -> Path:
    """The plainest recipe of each method on the three experts, all with weight 1/3 where weights are asked."""
    models = []
    for k in range(1 if method == "aim" else EXPERTS):
        weight: dict[str, object] = {"weight": 1 / EXPERTS}
        if method in ("ties", "dare_ties"):
            weight["density"] = 0.5
        if method in ("wp", "wp-scaled"):
            weight = {"scores": str(root / f"expert{k}.scores.safetensors")}
        own = {} if method in ("widen", "aim") else {"parameters": weight}  # they weigh by themselves
        models.append({"model": str(root / f"expert{k}"), **own})
    recipe: dict[str, object] = {"merge_method": method.removesuffix("-scaled"), "models": models}
    if method == "wp-scaled":
        recipe["parameters"] = {"scale": 1.5}
    if method == "aim":
        recipe["parameters"] = {"activations": str(root / "activations.safetensors")}
    if method != "linear":
        recipe["base_model"] = str(root / "base")
    path = root / f"{method}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_once(recipe: Path, out: Path) -> Run:
    """One stock mergekit-yaml; its output is deleted."""
    shutil.rmtree(out, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(recipe), str(out), "--quiet"]
    log = recipe.with_suffix(".log")
    files = [(os.POSIX_SPAWN_OPEN, fd, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) for fd in (1, 2)]
    start = time.perf_counter()
    pid = os.posix_spawn(command[0], command, dict(os.environ), file_actions=files)
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise click.ClickException(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    shutil.rmtree(out)
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def warm(root: Path) -> None:
    """Read every input once, so that no method pays for the disk."""
    for path in root.glob("*/model.safetensors"):
        with open(path, "rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def table(runs: dict[str, list[Run]]) -> str:
    """Medians, and ratios to linear when it ran."""

    def middle(method: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in runs[method])

    lines = [
        "| method | runs | wall s | CPU s | peak RSS GB | wall / linear | RSS / linear |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, measured in runs.items():
        wall, cpu, rss = (middle(method, field) for field in ("wall", "cpu", "rss"))
        ratios = [wall / middle("linear", "wall"), rss / middle("linear", "rss")] if "linear" in runs else []
        shown = [f"{ratio:.2f}" for ratio in ratios] or ["-", "-"]
        lines.append(f"| {method} | {len(measured)} | {wall:.1f} | {cpu:.1f} | {rss / 1e9:.2f} | {' | '.join(shown)} |")
    return "\n".join(lines)


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="1.2b", show_default=True)
@click.option(
    "--methods", default="wp,linear", show_default=True, help=f"Comma-separated, or all: {', '.join(METHODS)}"
)
@click.option("--repeat", default=3, show_default=True)
@click.option("--folder", default="/tmp/bench-merge", show_default=True, type=click.Path(path_type=Path))
@click.option("--keep/--delete", default=False, show_default=True, help="Keep the models for the next run")
def main(size: str, methods: str, repeat: int, folder: Path, keep: bool) -> None:
    """Generate, run, and print one table."""
    chosen = METHODS if methods == "all" else tuple(methods.split(","))
    if unknown := set(chosen) - set(METHODS):
        raise click.BadParameter(f"unknown methods {sorted(unknown)}; known are {', '.join(METHODS)}")
    root = folder.absolute() / size
    make_models(root, size)
    parameters = sum(torch.Size(shape).numel() for shape in tensor_shapes(size).values())
    runs: dict[str, list[Run]] = {method: [] for method in chosen}
    for turn in range(repeat):
        # Another method first each time, and the inputs in the page cache for all: whoever comes first after a
        # pause would otherwise pay for what the machine has evicted meanwhile.
        first = turn % len(chosen)
        for method in chosen[first:] + chosen[:first]:
            warm(root)
            run = run_once(write_recipe(root, method), root / "out")
            runs[method].append(run)
            click.echo(f"run {turn + 1} {method}: wall {run.wall:.1f} s, CPU {run.cpu:.1f} s, {run.rss / 1e9:.2f} GB")
    packages = ", ".join(f"{name} {version(name)}" for name in ("mergekit-wp", "mergekit", "torch", "safetensors"))
    click.echo(
        f"\n{parameters / 1e6:,.0f} M parameters, bfloat16, {EXPERTS} experts, {os.cpu_count()} cores "
        f"({platform.machine()}), Python {platform.python_version()}, {packages}, "
        f"{datetime.date.today().isoformat()}; medians of {repeat}, interleaved.\n\n{table(runs)}"
    )
    if not keep:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
