"""What `make demo` runs: every step that is not done yet, then the table and where the report lies."""

from __future__ import annotations

import time
from pathlib import Path

import click

from experiments.demo.demo_pipeline import demo_steps, write_pipeline
from experiments.demo.world_choice import WorldChoice, world_options
from mergekit_wp.execute import Stamps
from mergekit_wp.files import check_writable_parent
from mergekit_wp.foreign import echo, echo_lines
from mergekit_wp.outputs import claimed
from mergekit_wp.pipeline.cli import run_steps
from mergekit_wp.pipeline.steps import results_folder


@click.command()
@click.option("--out", type=Path, default=Path("runs/demo"), show_default=True, help="Where everything goes.")
@world_options
def main(out: Path, worlds: Path, seed: int, smoke: bool) -> None:
    """Train a small base and three experts, score them, merge them, grade everything, and write a report."""
    started = time.monotonic()
    check_writable_parent(out / "report.html")
    with claimed(out):
        pipeline = write_pipeline(out)
        # Here the code counts as well: whoever changes it wants to see what it does.
        run_steps(
            demo_steps(pipeline, WorldChoice(worlds, seed, smoke)), Stamps.below(out / ".steps", code_counts=True)
        )
    from mergekit_wp.eval.tables import read_results, to_text  # after the steps: these imports take seconds

    echo_lines(f"\n{to_text(read_results(results_folder(pipeline) / 'results.json'))}")
    echo(f"Report: {(out / 'report.html').absolute()}  ({time.monotonic() - started:.0f} s in all)")


if __name__ == "__main__":
    main()
