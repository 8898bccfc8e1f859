"""The report of the demo: that of `wp-run`, with words about the miniature world and the training among the steps."""

from __future__ import annotations

from pathlib import Path

import click

from experiments.demo.demo_pipeline import demo_steps, write_pipeline
from experiments.demo.world_choice import WorldChoice, world_options
from mergekit_wp.files import write_text
from mergekit_wp.foreign import echo
from mergekit_wp.pipeline.report import report_of
from mergekit_wp.pipeline.steps import report_file

TITLE = "Merging by Weight Patching: the miniature world"
LEAD = (
    "Three experts were trained from one small base model. Weight Patching scores, for every attention head and "
    "MLP neuron of an expert, how much of its capability that one component carries when it alone is put into "
    "the base. The merge wp takes each component from the experts in proportion to those scores, fit with weights that "
    "were learnt from the experts' own answers; linear is their plain average."
)


@click.command()
@click.argument("out", type=Path)
@world_options
def main(out: Path, worlds: Path, seed: int, smoke: bool) -> None:
    """Write OUT/report.html from the demo's results, score files and recipes."""
    pipeline = write_pipeline(out)
    report = report_of(pipeline, demo_steps(pipeline, WorldChoice(worlds, seed, smoke)))
    write_text(report_file(pipeline), report.html(TITLE, LEAD))
    echo(f"wrote {report_file(pipeline)}")


if __name__ == "__main__":
    main()
