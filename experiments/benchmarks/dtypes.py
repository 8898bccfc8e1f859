"""What storage and products in 16 bits cost: first-order scores against exact patching in float64.

    python experiments/benchmarks/fidelity.py --precision                     # a minute on a quiet core

A random Llama and an expert whose every weight moved by 0.2, 0.5 or 2 % of the weights' size, both rounded to the dtype
that they are stored in. The reference patches one component after another into a float64 model of transformers that
holds the stored numbers; nothing of the engine is in it. `bfloat16 first` is what rounding the stored weights to
bfloat16 before their difference is formed would give.

Legend: L layers, H heads, F neurons.
"""

from __future__ import annotations

import copy
import datetime
import os
from typing import Any

import click
import torch
import transformers

from mergekit_wp.geometry import Geometry
from mergekit_wp.ranking import spearman
from mergekit_wp.scoring.anchor.directions import Directions
from mergekit_wp.scoring.batching import TaskTokens, batches
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.models.layerwise import ResidentStack
from mergekit_wp.scoring.models.load import ModelPair
from mergekit_wp.scoring.passes import BatchState, Passes, first_order
from mergekit_wp.scoring.score import task_run
from mergekit_wp.subset import Subset

LAYERS, HIDDEN, HEADS, NEURONS, VOCABULARY = 3, 96, 8, 200, 500
ANCHOR, TOP = 2, 50
SIZES = (0.002, 0.005, 0.02)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRODUCTS = (torch.float32, torch.bfloat16, torch.float16)
RUNS = (("writeback", "anchor"), ("attr", "anchor"), ("writeback", "kl"))
Tables = dict[str, torch.Tensor]


def pair_of(size: float, stored: torch.dtype) -> tuple[Any, Any]:
    """Base and expert in the dtype `stored`."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    expert = copy.deepcopy(base)
    for one, other in zip(base.parameters(), expert.parameters(), strict=True):
        scale = 0.1 if one.dim() == 1 else one.shape[-1] ** -0.5
        one.data = (one.dim() == 1) + scale * torch.randn(one.shape, generator=generator)
        other.data = one.data + size * scale * torch.randn(one.shape, generator=generator)
    return base.to(stored).requires_grad_(False), expert.to(stored).requires_grad_(False)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (8, 10), generator=generator).tolist()


@torch.no_grad()
def read(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(stream above the anchor layer, next-token log-probabilities) of each prompt, by transformers."""
    kept: list[torch.Tensor] = []
    hook = model.model.layers[ANCHOR].register_forward_hook(lambda _m, _i, out: kept.append(out))
    logits = model(ids, use_cache=False).logits[:, -1]
    hook.remove()
    return kept[0][:, -1], logits.log_softmax(-1)


def exact(base: Any, expert: Any, v_D: torch.Tensor) -> dict[str, Tables]:
    """{utility: {heads [L, H], neurons [L, F]}}: what each component changes when it alone is swapped, in float64."""
    base, expert, ids = copy.deepcopy(base).double(), expert.double(), torch.tensor(prompts())
    target = read(expert, ids)[1]

    def utilities() -> dict[str, float]:
        z, log_p = read(base, ids)
        cosine = torch.cosine_similarity(z, v_D.double(), dim=-1).sum()
        return {"anchor": float(cosine), "kl": float((target.exp() * (log_p - target)).sum())}

    before, width = utilities(), HIDDEN // HEADS
    found = {u: {"heads": torch.zeros(LAYERS, HEADS), "neurons": torch.zeros(LAYERS, NEURONS)} for u in before}
    for layer in range(LAYERS):
        ours, theirs = base.model.layers[layer], expert.model.layers[layer]
        for kind, count, wide, rows, column in (
            ("heads", HEADS, width, ["self_attn.q_proj"], "self_attn.o_proj"),
            ("neurons", NEURONS, 1, ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
        ):
            for index in range(count):
                cut = slice(index * wide, (index + 1) * wide)
                places = [(path, (cut,)) for path in rows] + [(column, (slice(None), cut))]
                own = [ours.get_submodule(path).weight.data[where].clone() for path, where in places]
                for path, where in places:
                    ours.get_submodule(path).weight.data[where] = theirs.get_submodule(path).weight.data[where]
                for utility, value in utilities().items():
                    found[utility][kind][layer, index] = value - before[utility]
                for (path, where), old in zip(places, own, strict=True):
                    ours.get_submodule(path).weight.data[where] = old
    return found


def linear(base: Any, expert: Any, products: torch.dtype, method: str, utility: str, v_D: torch.Tensor) -> Tables:
    """By the engine, products in `products`; not divided by gaps, which change no ranking."""
    held = [model.float() if products == torch.float32 else model for model in map(copy.deepcopy, (base, expert))]
    cpu = torch.device("cpu")
    one, other = (ResidentStack(model, cpu, products) for model in held)
    geometry = Geometry.from_config(base.config.to_dict(), where="benchmark")
    job = ScoringJob("base", "expert", "pairs", method=method, utility=utility, gap="mean", gap_floor=0.0)
    pair = ModelPair(one, other, geometry, cpu, products)
    v_LD = v_D.expand(LAYERS, -1)
    run = task_run(job, pair, TaskTokens("t", [], None, prompts()), ANCHOR, Directions(v_LD, v_LD))
    items = [BatchState(run, batch) for batch in batches(prompts(), 8, one, other)]
    first_order(Passes(pair, method, items, keep_graphs=True), Subset.choose(geometry, "all", None, None))
    return {kind: sum(parts.values(), start=torch.zeros(())) for kind, parts in run.sums.items()}


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    top_a, top_b = (set(x.flatten().topk(TOP).indices.tolist()) for x in (a, b))
    return len(top_a & top_b) / TOP


def row(size: float, stored: torch.dtype) -> dict[tuple[str, str], str]:
    """{(method, utility): cells}: for neurons, overlap of the top 50 and Spearman against exact."""
    v_D = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2))
    base, expert = pair_of(size, stored)
    truth = exact(copy.deepcopy(base), copy.deepcopy(expert), v_D)
    rounded = [copy.deepcopy(model).bfloat16() for model in (base, expert)]
    cells = {}
    for method, utility in RUNS:
        found = [linear(base, expert, dtype, method, utility, v_D)["neurons"] for dtype in PRODUCTS]
        found.append(linear(rounded[0], rounded[1], torch.bfloat16, method, utility, v_D)["neurons"])
        wanted = truth[utility]["neurons"]
        cells[method, utility] = " | ".join(f"{overlap(f, wanted):.2f} / {spearman(f, wanted):.3f}" for f in found)
    return cells


def main() -> None:
    click.echo(
        f"Random Llama, {LAYERS} layers x {HIDDEN}, {LAYERS * NEURONS} neurons, 8 prompts x 10 tokens; top {TOP} / "
        f"Spearman; CPU, {os.cpu_count()} cores, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{datetime.date.today()}"
    )
    rows = {(size, stored): row(size, stored) for size in SIZES for stored in DTYPES}
    for method, utility in RUNS:
        click.echo(f"\n| {method}, {utility}: update | stored | float32 | bfloat16 | float16 | bfloat16 first |")
        click.echo("|---|---|---|---|---|---|")
        for (size, stored), cells in rows.items():
            click.echo(f"| {size:.1%} | {str(stored)[6:]} | {cells[method, utility]} |")
