"""Build the miniature world, or find it in the cache, and give it a fixed name by a link."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import click

from mergekit_wp.errors import BadInput


@click.command()
@click.argument("link", type=Path)
@click.option("--worlds", type=Path, default=Path("runs/worlds"), show_default=True, help="Cache of worlds.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the whole world.")
def main(link: Path, worlds: Path, seed: int) -> None:
    """Train the miniature base and its three experts into the cache, and make LINK point at them."""
    from mergekit_wp.miniature.world import WorldConfig, build_world

    if link.exists() and not link.is_symlink():
        raise BadInput(f"{link}: is a folder or file of its own, not a link to a world; move it away.")
    folder = build_world(replace(WorldConfig(), seed=seed), worlds)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)
    click.echo(f"{link} -> {folder}")


if __name__ == "__main__":
    main()
