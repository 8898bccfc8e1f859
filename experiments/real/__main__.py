"""`python -m experiments.real`: train the experts of the pretrained base, or go on where that was stopped."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import click

from experiments.real.real_config import RealConfig, data_digests
from mergekit_wp.foreign import echo


@click.command()
@click.option("--root", type=Path, default=Path("runs/worlds"), show_default=True, help="Cache of trained worlds.")
@click.option("--kind", type=click.Choice(["near", "far", "smoke"]), default="near", show_default=True)
@click.option("--data", type=Path, help="Folder with gsm8k-train.jsonl and mbpp.jsonl, whose training rows to mix in.")
def main(root: Path, kind: str, data: Path | None) -> None:
    """Write SmolLM2-135M-Instruct and three experts of it (instruction, maths, code), with prompts and test items."""
    from transformers.utils import logging

    from experiments.real.real_world import build_real_world

    logging.disable_progress_bar()  # those of loading and saving; the training has one
    config = {"near": RealConfig(), "far": RealConfig.far(), "smoke": RealConfig.smoke()}[kind]
    started = time.monotonic()
    folder = build_real_world(
        replace(config, data=data_digests(data)), root, data, lambda part: echo(f"{kind}: {part}", err=True)
    )
    echo(f"{folder}  ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
