"""A pair of Llama-2-13B's shape, 26 GB each in bfloat16, scored with layers streamed from disk: time and memory.

    python experiments/benchmarks/stream_13b.py --folder /data/13b --keep  # writes 52 GB, then scores
    python experiments/benchmarks/stream_13b.py --folder /tmp/trial --layers 2

The models are random and sharded at 9.9 GB as the original is; the expert has one vocabulary row more. For speed, their
weights are pieces of one pool of 67 million normal numbers (std 0.02) at places drawn by the seed; the expert's are the
same pieces of the pool plus noise (a tenth of it). What is computed is as large as with a trained pair; the scores mean
nothing. The score runs in a process of its own, through `wp-score`: writeback, anchor utility, 8 prompts of 64 tokens,
shared between extraction and scoring. Reported: seconds, the process's peak of resident memory, and bytes read.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

SHAPE: dict[str, Any] = {
    "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 40,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROWS = {"base": 32000, "expert": 32001}
POOL, SHARD = 1 << 26, 9.9e9  # elements; bytes
WORDS = 1000


@dataclass(frozen=True)
class Pools:
    """Normal numbers for the base, and the same with noise for the expert: bfloat16 [POOL]."""

    base: torch.Tensor
    expert: torch.Tensor

    @classmethod
    def drawn(cls, seed: int) -> Pools:
        generator = torch.Generator().manual_seed(seed)
        base = torch.empty(POOL, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        noise = torch.empty(POOL, dtype=torch.bfloat16).normal_(0, 0.002, generator=generator)
        return cls(base, noise.add_(base))

    def pieces(self, role: str, name: str, count: int, seed: int) -> Iterator[memoryview]:
        """The bytes of a tensor of `count` elements; both roles start at the same place of their pools."""
        if "norm" in name:
            yield torch.ones(count, dtype=torch.bfloat16).view(torch.uint8).numpy().data
            return
        pool: torch.Tensor = getattr(self, role)
        place = random.Random(f"{seed} {name}").randrange(POOL)
        while count:
            piece = pool[place : place + count]
            yield piece.view(torch.uint8).numpy().data
            count -= len(piece)
            place = 0


def write_model(folder: Path, role: str, layers: int, pools: Pools, seed: int) -> None:
    """A sharded folder with a config and a tokenizer; nothing larger than a pool is held."""
    config = transformers.LlamaConfig(
        **SHAPE, vocab_size=ROWS[role], num_hidden_layers=layers, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    shapes = tensor_shapes(config)
    shards: list[dict[str, torch.Size]] = [{}]
    room = SHARD
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        if size > room:
            shards.append({})
            room = SHARD
        shards[-1][name] = shape
        room -= size
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / file, role, shard, pools, seed)
        index.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_shard(path: Path, role: str, shapes: dict[str, torch.Size], pools: Pools, seed: int) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for piece in pools.pieces(role, name, shape.numel(), seed):
                file.write(piece)


def tensor_shapes(config: transformers.PretrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words w0, w1, ... split at spaces."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_pairs(path: Path, prompts: int, tokens: int, seed: int) -> None:
    draw = random.Random(seed)
    rows = [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(tokens)) for _ in range(prompts)]
    path.write_text("".join(json.dumps({"task": "random", "prompt": row}) + "\n" for row in rows))


def make_pair(folder: Path, layers: int, seed: int) -> None:
    """folder/base and folder/expert, unless a pair of this shape and seed is there. Exits where the disk is full."""
    made, wanted = folder / "made.json", {"layers": layers, "seed": seed}
    if made.is_file() and json.loads(made.read_text()) == wanted:
        click.echo(f"Reusing the pair in {folder}.")
        return
    config = transformers.LlamaConfig(**SHAPE, vocab_size=ROWS["expert"], num_hidden_layers=layers)
    need = 2 * 2 * sum(shape.numel() for shape in tensor_shapes(config).values())
    remove_pair(folder)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if need + 1e9 > free:
        click.echo(f"Skipped: the pair takes {need / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free.")
        sys.exit(0)
    begun = time.perf_counter()
    pools = Pools.drawn(seed)
    for role in ROWS:
        write_model(folder / role, role, layers, pools, seed)
    made.write_text(json.dumps(wanted))
    seconds = time.perf_counter() - begun
    click.echo(f"Wrote {need / 1e9:.1f} GB in {seconds:.0f} s, {need / 1e9 / seconds:.2f} GB/s.")


def remove_pair(folder: Path) -> None:
    (folder / "made.json").unlink(missing_ok=True)
    for role in ROWS:
        shutil.rmtree(folder / role, ignore_errors=True)


@dataclass(frozen=True)
class Usage:
    """Of a finished process: seconds, peak resident bytes, bytes from read() and from the disk."""

    seconds: float
    peak: float
    read: float
    from_disk: float


def run(command: list[str]) -> Usage:
    """Run it to its end; exits with its code if that is not 0. What it reads is sampled, so Linux only."""
    begun = time.perf_counter()
    process = subprocess.Popen(command)
    io: dict[str, int] = {}
    done = 0
    while not done:
        try:
            lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
            io = {key: int(value) for key, value in (line.split(":") for line in lines)} or io
        except OSError:
            pass  # it has just ended
        time.sleep(0.1)
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(code)
    return Usage(time.perf_counter() - begun, usage.ru_maxrss * 1024.0, io.get("rchar", 0), io.get("read_bytes", 0))


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where the pair lies or is written.")
@click.option("--layers", default=40, show_default=True, help="Layers of the models; 13B has 40.")
@click.option("--layer", type=int, help="Anchor layer (default: 27, or the topmost of fewer).")
@click.option("--prompts", default=8, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--offload", default="stream", show_default=True, help="Handed on to wp-score.")
@click.option("--seed", default=0, show_default=True)
@click.option("--keep", is_flag=True, help="Leave the pair there for another run.")
def main(
    folder: Path, layers: int, layer: int | None, prompts: int, tokens: int, device: str, dtype: str, offload: str,
    seed: int, keep: bool,
) -> None:  # fmt: skip
    """Write the pair, score it, print what that took."""
    make_pair(folder, layers, seed)
    write_pairs(folder / "pairs.jsonl", prompts, tokens, seed)
    anchor = min(27, layers - 1) if layer is None else layer
    options = {
        "base": folder / "base", "expert": folder / "expert", "pairs": folder / "pairs.jsonl",
        "out": folder / "scores.safetensors", "method": "writeback", "utility": "anchor", "split": "shared",
        "gap-floor": 0, "layer": anchor, "device": device, "dtype": dtype, "offload": offload,
    }  # fmt: skip
    try:
        usage = run([str(Path(sys.executable).with_name("wp-score")), *(f"--{k}={v}" for k, v in options.items())])
    finally:
        if not keep:
            remove_pair(folder)
    click.echo("\n| layers | anchor layer | seconds | peak resident GB | GB read | of it from disk | GB/s |")
    click.echo("|---|---|---|---|---|---|---|")
    click.echo(
        f"| {layers} | {anchor} | {usage.seconds:.0f} | {usage.peak / 1e9:.2f} | {usage.read / 1e9:.1f} | "
        f"{usage.from_disk / 1e9:.1f} | {usage.read / 1e9 / usage.seconds:.2f} |"
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else platform.processor()
    click.echo(
        f"\n{where or platform.machine()}, {os.cpu_count()} CPUs; --offload {offload}, {dtype}; {prompts} prompts x "
        f"{tokens} tokens; {versions}; {datetime.date.today()}."
    )


if __name__ == "__main__":
    main()
