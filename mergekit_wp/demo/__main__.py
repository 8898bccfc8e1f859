"""What `make demo` runs: every step that is not done yet, then the table and where the report lies."""

from __future__ import annotations

import time
from pathlib import Path

import click

from mergekit_wp.demo.steps import demo_steps, readable, write_recipes
from mergekit_wp.demo.world import WorldChoice, world_options
from mergekit_wp.files import check_writable_parent, shipped


@click.command()
@click.option("--out", type=Path, default=Path("runs/demo"), show_default=True, help="Where everything goes.")
@world_options
def main(out: Path, worlds: Path, seed: int, smoke: bool) -> None:
    """Train a small base and three experts, score them, merge them, grade everything, and write a report."""
    started = time.monotonic()
    check_writable_parent(out / "report.html")
    write_recipes(out)
    steps = demo_steps(out, WorldChoice(worlds, seed, smoke), readable(shipped("eval/miniature.yaml")))
    stamps = out / ".steps"
    for number, step in enumerate(steps, start=1):
        click.secho(f"\n[{number}/{len(steps)}] {step.title}", bold=True)
        if step.is_done(stamps):
            click.echo("      done before, and its inputs have not changed since")
            continue
        click.secho(f"      $ {step.text()}\n", fg="cyan")
        begun = time.monotonic()
        step.run(stamps)
        click.echo(f"      {time.monotonic() - begun:.0f} s")
    from mergekit_wp.eval.table import read_results, to_text  # after the steps: these imports take seconds

    click.echo(f"\n{to_text(read_results(out / 'eval' / 'results.json'))}")
    click.echo(f"Report: {(out / 'report.html').absolute()}  ({time.monotonic() - started:.0f} s in all)")


if __name__ == "__main__":
    main()
