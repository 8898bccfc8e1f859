"""How many prompts does a ranking need? Rankings by N prompts against the ranking by 100 others of the same kind.

    python -m experiments.benchmarks.prompts_needed --pairs maths --out pairs.jsonl    # 200 of the real world's kind
    wp-score --base BASE --expert EXPERT --pairs pairs.jsonl --per-prompt --out scores.safetensors
    python -m experiments.benchmarks.prompts_needed scores.safetensors

One scoring of all prompts with what each gives (`--per-prompt`) holds the scores by any of them. Each of --draws times
100 prompts are drawn to judge by, and N of the rest to rank by: overlap of the top heads and neurons, and Spearman's
correlation over all. Printed are the means of the draws, and the lowest and highest. What chance gives: k of n.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from mergekit_wp.geometry import Kind
from mergekit_wp.intervals import rescored
from mergekit_wp.ranking import spearman
from mergekit_wp.scores import Scores, read_scores
from mergekit_wp.study.sets import Shared, top_set

JUDGES = 100
SIZES = (5, 10, 25, 50, 100)
TOP = {Kind.HEAD: 10, Kind.NEURON: 50}


def write_pairs(capability: str, count: int, seed: int, out: Path) -> None:
    """Prompts of the split that the real world scores with."""
    from experiments.miniature.lm_eval_tasks import write_jsonl
    from experiments.real.real_items import graded_items, pairs_row

    items = graded_items(capability, "pairs", count, seed)
    write_jsonl(out, [{**pairs_row(item), "task": capability} for item in items])


def compare(scores: Scores, task: str, size: int, draws: int, seed: int) -> list[torch.Tensor]:
    """[draws] of each column: overlap and Spearman of heads, of neurons."""
    count, generator = len((scores.meta.prompt_ids or {})[task]), torch.Generator().manual_seed(seed)
    order_DP = torch.stack([torch.randperm(count, generator=generator) for _ in range(draws)])
    parts = order_DP[:, JUDGES : JUDGES + size], order_DP[:, :JUDGES]
    counts = [torch.zeros(draws, count).scatter_(1, chosen, 1.0) for chosen in parts]
    columns: list[torch.Tensor] = []
    for kind in Kind:
        layers = range(scores.meta.geometry.layers)
        few_DN, judges_DN = (torch.cat([rescored(scores, task, kind, x, c) for x in layers], 1) for c in counts)
        pairs = list(zip(few_DN, judges_DN, strict=True))
        shared = [Shared.of(*(top_set(x, TOP[kind]) for x in pair)).share or 0.0 for pair in pairs]
        columns += [torch.tensor(shared), torch.tensor([spearman(*pair) or 0.0 for pair in pairs])]
    return columns


@click.command()
@click.argument("scores", type=click.Path(path_type=Path), required=False)
@click.option("--draws", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--pairs", type=click.Choice(["instruction", "maths", "code"]), help="Write prompts to --out instead.")
@click.option("--count", default=200, show_default=True, help="Of --pairs.")
@click.option("--out", type=click.Path(path_type=Path))
def main(scores: Path | None, draws: int, seed: int, pairs: str | None, count: int, out: Path | None) -> None:
    """Print the table of one score file, a task after the other."""
    if pairs is not None:
        if out is None:
            raise click.UsageError("--pairs needs --out")
        write_pairs(pairs, count, seed, out)
        return
    if scores is None:
        raise click.UsageError("give a score file that was made with --per-prompt, or --pairs")
    file = read_scores(scores)
    for task, found in file.tasks.items():
        if found.prompts is None:
            raise click.UsageError(f"{scores}: {task} has nothing by prompt; score with --per-prompt")
        sizes = [size for size in SIZES if JUDGES + size <= len(found.prompts.heads)]
        click.echo(f"{task}, {len(found.prompts.heads)} prompts, {draws} draws; mean (lowest to highest)\n")
        click.echo(
            "| prompts | top 10 heads | Spearman, heads | top 50 neurons | Spearman, neurons |\n|---|---|---|---|---|"
        )
        for size in sizes:
            columns = compare(file, task, size, draws, seed)
            cells = [f"{x.mean():.2f} ({x.min():.2f} to {x.max():.2f})" for x in columns]
            click.echo(f"| {size} | {' | '.join(cells)} |")
        click.echo(f"| by chance | {10 / found.heads.numel():.2f} | 0 | {50 / found.neurons.numel():.3f} | 0 |\n")


if __name__ == "__main__":
    main()
