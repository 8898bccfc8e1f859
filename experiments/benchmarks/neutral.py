"""Does a merge hurt elsewhere? Perplexity of base, experts and merges on answers as the base was trained on.

    python -m experiments.benchmarks.neutral runs/worlds/544898c68613 runs/table3-far/recipes/seed0/all-three-*.yaml

No expert was taught these texts as they are: most of their answers are the careless ones that the base gives, so a
perplexity above the base's is what fine-tuning and merging took away. Texts are drawn anew, from the requests that
training draws from; only answers are read, as in training. A recipe is merged by the stock mergekit into a folder that
is removed again. Errors are standard errors over the texts, of the mean negative log-likelihood a token, carried to the
perplexity.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import torch
import transformers
import yaml

from experiments.miniature.corpus import CAPABILITIES, Text, stream, training_texts
from experiments.miniature.train import encode
from experiments.table3.work import MergeJob, merge, prepare

MODELS = ("base", *CAPABILITIES)


def neutral_texts(world: Path, count: int) -> list[Text]:
    """As the base of this world was trained on."""
    config = json.loads((world / "world.json").read_text())["config"]
    shares, latent = (dict(zip(CAPABILITIES, config[key], strict=True)) for key in ("shares", "latent"))
    return training_texts(shares, latent, config["plain_share"], count, stream("neutral", config["seed"]))


@torch.no_grad()
def perplexity(folder: Path, texts: Sequence[Text]) -> tuple[float, float]:
    """(perplexity a token of the answers, end token included; its standard error by texts), in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    sums, counts = [], []
    for text in texts:
        (row,) = encode([text], tokenizer)
        ids, first = row.ids, row.prompt_length
        log_TV = model(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1)
        sums.append(-float(log_TV.gather(1, torch.tensor(ids[first:])[:, None]).sum(dtype=torch.float64)))
        counts.append(len(ids) - first)
    mean = sum(sums) / sum(counts)
    # Of a ratio of sums: residuals of the texts (the delta method).
    rest = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    error = math.sqrt(rest * len(sums) / (len(sums) - 1)) / sum(counts)
    return math.exp(mean), math.exp(mean) * error


@click.command()
@click.argument("world", type=click.Path(exists=True, path_type=Path))
@click.argument("recipes", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--texts", default=512, show_default=True, type=click.IntRange(2))
def main(world: Path, recipes: tuple[Path, ...], texts: int) -> None:
    """Print a Markdown table."""
    prepare()
    drawn = neutral_texts(world, texts)
    click.echo(f"| {world.name}, {texts} texts | perplexity |\n|---|---:|")
    for name in MODELS:
        found, error = perplexity(world / name, drawn)
        click.echo(f"| {name} | {found:.3f} ± {error:.3f} |")
    for file in recipes:
        recipe = yaml.safe_load(file.read_text())
        with tempfile.TemporaryDirectory(prefix="wp-neutral-") as place:
            folder = Path(place) / "merged"
            found, error = perplexity(merge(MergeJob(recipe, Path(place) / "recipe.yaml", folder, 0, False)), drawn)
        click.echo(f"| {file.stem} | {found:.3f} ± {error:.3f} |", color=False)


if __name__ == "__main__":
    main()
