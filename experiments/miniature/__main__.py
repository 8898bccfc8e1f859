"""`python -m experiments.miniature`: train the miniature world, or find the one trained before."""

from __future__ import annotations

import json
from pathlib import Path

import click

from experiments.miniature.items import CAPABILITIES
from experiments.miniature.world import MODELS, WorldConfig, build_world
from mergekit_wp.foreign import echo


@click.command()
@click.option("--root", type=click.Path(path_type=Path), default=Path("runs/worlds"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, another world.")
@click.option("--smoke", is_flag=True, help="A world that trains in seconds and knows nothing, for tests.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def main(root: Path, seed: int, smoke: bool, quiet: bool) -> None:
    """Train a base and three experts (instruction, maths, code) of two million parameters, and their tasks.

    Prints the folder and what each model can do on the validation items.
    """
    config = WorldConfig.smoke(seed) if smoke else WorldConfig(seed=seed)
    folder = build_world(config, root, quiet)
    world = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    echo(f"{'':12s}" + "".join(f"{name:>13s}" for name in CAPABILITIES))
    for name in MODELS:
        accuracy = world["validation_accuracy"][name]
        echo(f"{name:12s}" + "".join(f"{100 * accuracy[c]:12.1f}%" for c in CAPABILITIES))
    echo(str(folder))


if __name__ == "__main__":
    main()
