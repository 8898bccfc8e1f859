"""Build the miniature world, or find it in the cache, and give it a fixed name by a link."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import echo


@dataclass(frozen=True)
class WorldChoice:
    """Which world the demo is about: the options that its commands share."""

    worlds: Path
    seed: int = 0
    smoke: bool = False

    def flags(self) -> tuple[str, ...]:
        """The options as typed."""
        return ("--worlds", str(self.worlds), "--seed", str(self.seed), *(("--smoke",) if self.smoke else ()))


def world_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The click options of a `WorldChoice`, passed on as `worlds`, `seed` and `smoke`."""
    options = (
        click.option(
            "--worlds", type=Path, default=Path("runs/worlds"), show_default=True, help="Cache of trained worlds."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the world."),
        click.option("--smoke", is_flag=True, help="A world that trains in seconds and knows nothing, for tests."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("link", type=Path)
@world_options
def main(link: Path, worlds: Path, seed: int, smoke: bool) -> None:
    """Train the miniature base and its three experts into the cache, and make LINK point at them."""
    from experiments.miniature.world import WorldConfig, build_world

    if link.exists() and not link.is_symlink():
        raise BadInput(f"{link}: is a folder or file of its own, not a link to a world; move it away.")
    folder = build_world(WorldConfig.smoke(seed) if smoke else WorldConfig(seed=seed), worlds)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(folder, link.parent.resolve()), target_is_directory=True)
    echo(f"{link} -> {folder}")


if __name__ == "__main__":
    main()
