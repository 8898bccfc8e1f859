"""What the scoring benchmarks share: random pairs of several shapes, the device's own speed, and the fine print."""

from __future__ import annotations

import datetime
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from mergekit_wp.memory import pick_device
from mergekit_wp.scoring.batching import Batch
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.models.load import ModelPair, check_pair, load_pair

Shape = tuple[int, int, int, int, int]
"""(hidden, MLP, layers, heads, KV heads)"""
SIZES: dict[str, Shape] = {
    "small": (256, 688, 6, 8, 4),
    "200m": (1024, 2816, 16, 16, 4),
    "1.2b": (2048, 5632, 22, 32, 8),
    "3b": (3072, 8192, 28, 24, 8),  # Llama-3.2-3B's shape
    "13b": (5120, 13824, 40, 40, 40),  # Llama-2-13B's
}


def write_pair(size: str, folder: Path, device: torch.device) -> None:
    """folder/base and folder/expert, drawn on the device; the expert's weights are the base's, moved by 2 % of their
    size."""
    hidden, mlp, layers, heads, kv_heads = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="500MB")
    for parameter in model.parameters():
        parameter.data += 0.02 * parameter.data.float().std().to(parameter.dtype) * torch.randn_like(parameter)
    model.resize_token_embeddings(32001, mean_resizing=False)
    model.save_pretrained(folder / "expert", max_shard_size="500MB")


@contextmanager
def random_pair(size: str, dtype: str, device: str) -> Iterator[ModelPair]:
    """A random bfloat16 Llama with GQA and an expert with a row more, saved as sharded safetensors and loaded the way
    wp-score loads them."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="wp-bench-") as name:
        write_pair(size, Path(name), pick_device(device))
        job = ScoringJob(f"{name}/base", f"{name}/expert", "-", dtype=dtype, device=device, offload="none")
        pair = load_pair(job, check_pair(job))
    yield pair


@contextmanager
def pair_of(base: str, expert: str, dtype: str, device: str) -> Iterator[ModelPair]:
    """Two models that are there, likewise."""
    transformers.utils.logging.disable_progress_bar()
    job = ScoringJob(base, expert, "-", dtype=dtype, device=device, offload="none")
    yield load_pair(job, check_pair(job))


def shape_of(pair: ModelPair) -> Shape:
    own = pair.geometry
    return own.d_model, own.neurons, own.layers, own.heads, own.kv_heads


def random_batch(pair: ModelPair, prompts: int, tokens: int, alike: int = 0) -> Batch:
    """`alike`: so many tokens that all prompts begin with."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, min(32000, pair.vocabulary), (prompts, tokens), generator=generator)
    ids_BT[:, :alike] = ids_BT[0, :alike]
    last_B = torch.full((prompts,), tokens - 1, device=pair.device)
    return Batch(ids_BT.to(pair.device), last_B, torch.ones_like(last_B))


def matmul_rate(dtype: torch.dtype, device: torch.device, tokens: int, hidden: int, mlp: int) -> float:
    """Floating-point operations a second of the MLP's own product at this batch."""
    x_TD, w_FD = (torch.randn(*shape).to(dtype).to(device) for shape in ((tokens, hidden), (mlp, hidden)))
    for _ in range(3):
        torch.nn.functional.linear(x_TD, w_FD)
    synchronize(device)
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < 1.0:
        for _ in range(10 if device.type == "cuda" else 1):
            torch.nn.functional.linear(x_TD, w_FD)
            runs += 1
        synchronize(device)
    return 2 * tokens * hidden * mlp * runs / (time.perf_counter() - started)


def layer_flops(shape: Shape, tokens: int, context: int, anchors: int | None = None) -> float:
    """Operations of one layer of such a shape (see `SIZES`) on `tokens` tokens of prompts `context` long: projections,
    and attention counted as the dense product it is run as. With `anchors`, o_proj and the MLP run on that many
    positions only."""
    hidden, mlp, _, heads, kv_heads = shape
    wide = tokens if anchors is None else anchors
    projections = 2 * hidden * (tokens * (hidden + 2 * hidden * kv_heads // heads) + wide * (hidden + 3 * mlp))
    return float(projections + tokens * 4 * context * hidden)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fine_print(pair: ModelPair) -> str:
    """Parameters, device, versions and date, for RESULTS.md."""
    parameters = sum(p.numel() for p in pair.base.model.parameters())
    device = f"{os.cpu_count()} cores ({platform.machine()})"
    if pair.device.type == "cuda":
        device = torch.cuda.get_device_name(pair.device)
    return (
        f"{parameters / 1e6:,.0f} M parameters, {str(pair.dtype).removeprefix('torch.')}, {device}, torch "
        f"{torch.__version__}, transformers {version('transformers')}, {datetime.date.today()}"
    )
