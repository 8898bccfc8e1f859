"""How many prompts does a ranking need? Rankings by N prompts against the ranking by 100 others of the same kind.

    python -m experiments.benchmarks.prompts_needed --pairs maths --out pairs.jsonl    # 200 of the real world's kind
    wp-score --base BASE --expert EXPERT --pairs pairs.jsonl --per-prompt --out scores.safetensors
    python -m experiments.benchmarks.prompts_needed scores.safetensors

One scoring of all prompts with what each gives (`--per-prompt`) holds the scores by any of them. Each of --draws times
100 prompts are drawn to judge by, and N of the rest to rank by: overlap of the top heads and neurons, and Spearman's
correlation over all. Printed are the means of the draws, and the lowest and highest. What chance gives: k of n.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from mergekit_wp.geometry import Kind
from mergekit_wp.prompt_scores import PromptScores
from mergekit_wp.ranking import spearman
from mergekit_wp.scores import read_scores

JUDGES = 100
SIZES = (5, 10, 25, 50, 100)
TOP = {Kind.HEAD: 10, Kind.NEURON: 50}


def write_pairs(capability: str, count: int, seed: int, out: Path) -> None:
    """Prompts of the split that the real world scores with."""
    from experiments.real.real_items import graded_items, pairs_row

    rows = [pairs_row(item) for item in graded_items(capability, "pairs", count, seed)]
    out.write_text("".join(json.dumps({**row, "task": capability}) + "\n" for row in rows), encoding="utf-8")


def by(prompts: PromptScores, kind: Kind, chosen: torch.Tensor) -> torch.Tensor:
    """Scores [L * n] by some of the prompts, numbered from 0."""
    (used_P,) = prompts.used.values()
    table_PLn = getattr(prompts, kind)
    return (table_PLn[chosen].sum(0) / used_P[chosen].sum().clamp(min=1)).flatten()


def overlap(one_n: torch.Tensor, other_n: torch.Tensor, k: int) -> float:
    tops = [set(scores.topk(k).indices.tolist()) for scores in (one_n, other_n)]
    return len(tops[0] & tops[1]) / k


def compare(prompts: PromptScores, size: int, draws: int, seed: int) -> list[torch.Tensor]:
    """[draws] of each column: overlap and Spearman of heads, of neurons."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        drawn = torch.randperm(len(prompts.heads), generator=generator)
        row = []
        for kind in Kind:
            few, judges = (by(prompts, kind, part) for part in (drawn[JUDGES : JUDGES + size], drawn[:JUDGES]))
            row += [overlap(few, judges, TOP[kind]), spearman(few, judges) or 0.0]
        found.append(row)
    return list(torch.tensor(found, dtype=torch.float64).T)


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
    for task, found in read_scores(scores).tasks.items():
        if found.prompts is None:
            raise click.UsageError(f"{scores}: {task} has nothing by prompt; score with --per-prompt")
        sizes = [size for size in SIZES if JUDGES + size <= len(found.prompts.heads)]
        click.echo(f"{task}, {len(found.prompts.heads)} prompts, {draws} draws; mean (lowest to highest)\n")
        click.echo(
            "| prompts | top 10 heads | Spearman, heads | top 50 neurons | Spearman, neurons |\n|---|---|---|---|---|"
        )
        for size in sizes:
            columns = compare(found.prompts, size, draws, seed)
            cells = [f"{x.mean():.2f} ({x.min():.2f} to {x.max():.2f})" for x in columns]
            click.echo(f"| {size} | {' | '.join(cells)} |")
        click.echo(f"| by chance | {10 / found.heads.numel():.2f} | 0 | {50 / found.neurons.numel():.3f} | 0 |\n")


if __name__ == "__main__":
    main()
