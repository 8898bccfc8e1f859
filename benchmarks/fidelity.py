"""How well does each cheap method find what exact patching finds? On the miniature's three trained pairs.

    python -m mergekit_wp.miniature                               # once, four minutes: prints the world's folder
    python benchmarks/fidelity.py runs/worlds/<hash>              # about 15 minutes, nearly all of it `exact`

Every pair is scored by every method with the same pairs and utility (`wp-score`'s own engine; score files are kept in
--out and used again). Against `exact`, over all heads and neurons of the mean over tasks: the overlap of the top K,
Spearman's rank correlation, and the error by layer |s - exact| / |exact|. `+2K exact` is the screen-then-validate
ranking: the method's top 2K, put in order by exact.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import click
import torch

from mergekit_wp.scorefile import Scores, read_scores, write_scores
from mergekit_wp.scoring.engine import score
from mergekit_wp.scoring.job import ScoringJob

PAIRS = ("instruction", "maths", "code")
METHODS = ("attr", "writeback", "atp", "ap")
HEADS, NEURONS = (5, 10, 20), (27, 50, 200)  # 27 is 1 % of the miniature's neurons


def scores_of(world: Path, pair: str, method: str, utility: str, out: Path) -> Scores:
    """Scored now, or read from `out` if that was done before (score files check whose they are: by their names)."""
    file = out / f"{pair}-{method}-{utility}.safetensors"
    if file.is_file():
        return read_scores(file)
    out.mkdir(parents=True, exist_ok=True)
    job = ScoringJob(
        str(world / "base"), str(world / pair), str(world / f"pairs/{pair}.jsonl"), method=method, utility=utility,
        device="cpu", offload="none",
    )  # fmt: skip
    click.echo(f"Scoring {pair} by {method} ({utility})", err=True)
    found = score(job, out=file)
    write_scores(found, file)
    return found


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


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([x.flatten().argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def error_by_layer(a: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """|a - exact| / |exact| of each layer's row [L]; NaN where no score is."""
    return (a - exact).norm(dim=1) / exact.norm(dim=1)


def row(kind: str, got: torch.Tensor, exact: torch.Tensor) -> list[float]:
    counts = HEADS if kind == "heads" else NEURONS
    plain = [overlap(got, exact, count) for count in counts]
    second = overlap(reranked(got, exact, counts[-1]), exact, counts[-1])
    return [*plain, second, spearman(got, exact), float((got - exact).norm() / exact.norm())]


@click.command()
@click.argument("world", type=click.Path(exists=True, path_type=Path))
@click.option("--utility", default="staged", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/fidelity"), show_default=True)
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the error by layer here (.png).")
def main(world: Path, utility: str, out: Path, picture: Path | None) -> None:
    """Print two Markdown tables, heads and neurons, and the errors by layer."""
    errors: dict[tuple[str, str, str], torch.Tensor] = {}
    folder = out / world.name
    for kind, counts in (("heads", HEADS), ("neurons", NEURONS)):
        tops = " | ".join(f"top {count}" for count in counts)
        click.echo(f"\n| {kind} | method | {tops} | top {counts[-1]}, +2K exact | Spearman | error |")
        click.echo("|---|---" + "|---" * (len(counts) + 3) + "|")
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
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    click.echo(f"Written: {path}")


if __name__ == "__main__":
    main()
