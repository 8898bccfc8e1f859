"""How well does each cheap method find what exact patching finds? On the miniature's three trained pairs.

    python -m experiments.miniature  # once, four minutes: prints the world's folder
    python experiments/benchmarks/fidelity.py runs/worlds/<hash>  # about 15 minutes, nearly all of it `exact`

Every pair is scored by every method with the same pairs and utility (`wp-score`'s own engine; score files are kept in
--out and used again). Against `exact`, over all heads and neurons of the mean over tasks: the overlap of the top K,
Spearman's rank correlation, and the error by layer |s - exact| / |exact|. `+2K exact` is the screen-then-validate
ranking: the method's top 2K, put in order by exact.

    python experiments/benchmarks/fidelity.py --precision  # storage and products in 16 bits: see precision.py
"""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import click
import torch
from precision import main as precision_tables

from mergekit_wp.checkpoint.vocabulary import load_tokenizer
from mergekit_wp.ranking import spearman
from mergekit_wp.scores import Scores, read_scores, write_scores
from mergekit_wp.scoring.anchor.directions import Directions, extract_all
from mergekit_wp.scoring.batching import batches, tokenize_tasks
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.models.load import check_pair, load_pair
from mergekit_wp.scoring.pairs import load_pairs, split_pairs
from mergekit_wp.scoring.passes import BatchState, Passes, patch_layer
from mergekit_wp.scoring.prompt_format import PromptFormat
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.score import anchor_layer, patch_plan, score, task_run
from mergekit_wp.subset import Subset

PAIRS = ("instruction", "maths", "code")
METHODS = ("attr", "writeback", "atp", "ap")
HEADS, NEURONS = (5, 10, 20), (27, 50, 200)  # 27 is 1 % of the miniature's neurons


def scores_of(world: Path, pair: str, method: str, utility: str, out: Path) -> Scores:
    """Scored now, or read from `out` if that was done before (score files check whose they are: by their names)."""
    file = out / f"{pair}-{method}-{utility}.safetensors"
    if file.is_file():
        return read_scores(file)
    out.mkdir(parents=True, exist_ok=True)
    click.echo(f"Scoring {pair} by {method} ({utility})", err=True)
    resume = Resume(file)
    found = score(job_of(world, pair, method, utility), resume=resume)
    write_scores(found, file)
    resume.forget()
    return found


def job_of(world: Path, pair: str, method: str, utility: str) -> ScoringJob:
    return ScoringJob(
        str(world / "base"), str(world / pair), str(world / f"pairs/{pair}.jsonl"), method=method, utility=utility,
        device="cpu", offload="none",
    )  # fmt: skip


def overlap(a: torch.Tensor, b: torch.Tensor, count: int) -> float:
    """Share of the `count` largest entries of b that are among those of a."""
    top_a, top_b = (set(x.flatten().topk(count).indices.tolist()) for x in (a, b))
    return len(top_a & top_b) / count


def reranked(screen: torch.Tensor, exact: torch.Tensor, count: int) -> torch.Tensor:
    """exact where `screen` is among its top 2*count, -inf elsewhere: what exact on the candidates alone would rank."""
    kept = torch.full_like(screen, -torch.inf).flatten()
    places = screen.flatten().topk(min(2 * count, screen.numel())).indices
    kept[places] = exact.flatten()[places]
    return kept.view_as(screen)


def error_by_layer(a: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """|a - exact| / |exact| of each layer's row [L]; NaN where no score is."""
    return (a - exact).norm(dim=1) / exact.norm(dim=1)


def row(kind: str, got: torch.Tensor, exact: torch.Tensor) -> list[float]:
    counts = HEADS if kind == "heads" else NEURONS
    plain = [overlap(got, exact, count) for count in counts]
    second = [overlap(reranked(got, exact, count), exact, count) for count in (counts[0], counts[-1])]
    return [*plain, *second, spearman(got, exact) or 0.0, float((got - exact).norm() / exact.norm())]


@click.command()
@click.argument("world", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--precision", is_flag=True, help="What storage and products in 16 bits cost, on a random pair instead.")
@click.option("--utility", default="staged", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/fidelity"), show_default=True)
@click.option("--why", default=5, show_default=True, help="Look into that many of the worst components of each kind.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the error by layer here (.png).")
def main(world: Path | None, precision: bool, utility: str, out: Path, why: int, picture: Path | None) -> None:
    """Print two Markdown tables, heads and neurons, and the errors by layer."""
    if precision:
        return precision_tables()
    if world is None:
        raise click.UsageError("give the folder of a trained world, or --precision")
    errors: dict[tuple[str, str, str], torch.Tensor] = {}
    folder = out / world.name
    for kind, counts in (("heads", HEADS), ("neurons", NEURONS)):
        tops = " | ".join(f"top {count}" for count in counts)
        second = f"top {counts[0]}, +2K exact | top {counts[-1]}, +2K exact"
        click.echo(f"\n| {kind} | method | {tops} | {second} | Spearman | error |")
        click.echo("|---|---" + "|---" * (len(counts) + 4) + "|")
        for pair in PAIRS:
            exact = getattr(scores_of(world, pair, "exact", utility, folder), kind)
            for method in METHODS:
                got = getattr(scores_of(world, pair, method, utility, folder), kind)
                errors[kind, pair, method] = error_by_layer(got, exact)
                numbers = " | ".join(f"{number:.3f}" for number in row(kind, got, exact))
                click.echo(f"| {pair} | {method} | {numbers} |")
    for (kind, pair, method), by_layer in errors.items():
        click.echo(f"error by layer, {pair} {kind}, {method}: " + " ".join(f"{e:.3f}" for e in by_layer.tolist()))
    click.echo(f"\n{world.name}, utility {utility}, float32, torch {torch.__version__}, {datetime.date.today()}")
    if picture is not None:
        draw(errors, picture)
    if why:
        click.echo("\n| pair | component | linear (writeback) | 1/8 of the write, x 8 | half, x 2 | whole (exact) |")
        click.echo("|---|---|---|---|---|---|")
        for pair in PAIRS:
            explain(world, pair, utility, folder, why)


def explain(world: Path, pair: str, utility: str, out: Path, count: int) -> None:
    """Of the components that writeback gets most wrong, the effect of a part of their write, over that part.

    A value that starts at the linear one and leaves it as the part grows shows curvature downstream of the write; one
    that differs from the start would be an error of ours.
    """
    linear, exact = (scores_of(world, pair, method, utility, out) for method in ("writeback", "exact"))
    masks = {}
    for kind in ("heads", "neurons"):
        wrong = (getattr(linear, kind) - getattr(exact, kind)).abs()
        masks[kind] = torch.zeros_like(wrong, dtype=torch.bool)
        masks[kind].view(-1)[wrong.flatten().topk(count).indices] = True
    subset = Subset(masks["heads"], masks["neurons"])
    parts = {fraction: partly(world, pair, utility, subset, fraction) for fraction in (0.125, 0.5, 1.0)}
    for kind, letter in (("heads", "H"), ("neurons", "N")):
        for layer, index in masks[kind].nonzero().tolist():
            values = [getattr(linear, kind)[layer, index], *(t[kind][layer, index] / f for f, t in parts.items())]
            click.echo(f"| {pair} | L{layer}{letter}{index} | " + " | ".join(f"{float(v):.4f}" for v in values) + " |")


def partly(world: Path, pair: str, utility: str, subset: Subset, fraction: float) -> dict[str, torch.Tensor]:
    """Exact effects, mean over tasks, of a fraction of each chosen component's write."""
    job = job_of(world, pair, "exact", utility)
    checked = check_pair(job)
    models = load_pair(job, checked)
    anchor = anchor_layer(None, checked.base.geometry.layers)
    texts = split_pairs(load_pairs(job.pairs, None, 0), job.split if job.directed else None, 0)
    tokenizer = load_tokenizer(checked.base.name, checked.base.folder, False)
    tasks = tokenize_tasks(PromptFormat(tokenizer), texts, checked.context_limit)
    directions: list[Directions | None] = [None] * len(tasks)
    if job.directed:
        directions = [*extract_all(models.base, models.expert, tasks, models.geometry.layers, job.batch_size)]
    plan = replace(patch_plan(models, subset, ProcessGroup(), lambda _done: None), fraction=fraction)
    total = {str(kind): torch.zeros(mask.shape, dtype=torch.float64) for kind, mask in subset.masks.items()}
    for task, found in zip(tasks, directions, strict=True):
        run = task_run(job, models, task, anchor, found)
        items = [BatchState(run, batch) for batch in batches(task.scoring, job.batch_size, models.base, models.expert)]
        passes = Passes(models, "exact", items, keep_graphs=False)
        for layer in range(models.geometry.layers):
            layers = (stack.model.model.layers[layer] for stack in (models.base, models.expert))
            patch_layer(passes, plan, layer, *layers)
        for kind, table in run.finish().items():
            total[kind] += table["whole"] / len(tasks)
    return total


def draw(errors: dict[tuple[str, str, str], torch.Tensor], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(PAIRS), figsize=(10, 5), sharex=True, sharey=True, constrained_layout=True)
    for (kind, pair, method), by_layer in errors.items():
        axis = axes[("heads", "neurons").index(kind)][PAIRS.index(pair)]
        axis.plot(range(len(by_layer)), by_layer.tolist(), marker="o", label=method)
        axis.set(title=f"{pair}, {kind}", yscale="log")
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    for axis in axes[:, 0]:
        axis.set_ylabel("error, |s - exact| / |exact|")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    click.echo(f"Written: {path}")


if __name__ == "__main__":
    main()
