"""wp-run: the stages of one pipeline file, what is missing of them alone.

Heavy packages are imported inside the command, so that `wp-run --help` answers at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_wp import __version__
from mergekit_wp.console import json_option, quiet_option
from mergekit_wp.errors import BadInput
from mergekit_wp.execute import Stamps, Step
from mergekit_wp.fields import schema_option
from mergekit_wp.files import check_writable_parent, writable_folder
from mergekit_wp.foreign import echo, echo_lines
from mergekit_wp.outputs import claimed, refuse_busy
from mergekit_wp.pipeline.look_ahead import Ahead, troubles_of
from mergekit_wp.pipeline.spec import FORM, STAGES, Pipeline, read_pipeline

if TYPE_CHECKING:
    from mergekit_wp.checkpoint.references import Source

_EPILOG = """\b
Examples:
  wp-run pipeline.yaml --plan
  wp-run pipeline.yaml --allow-code-execution
  wp-run pipeline.yaml --until merge
  wp-run pipeline.yaml --redo evaluate --allow-code-execution

A step is skipped while its command, the content of what it reads and the content of what it wrote are those of its
last run. To look into one stage, type its command: it is printed before it runs.
"""


@click.command(epilog=_EPILOG)
@click.argument("pipeline_file", metavar="PIPELINE.yaml", type=click.Path())
@click.option("--plan", "plan_only", is_flag=True, help="Say what would be run and why; run nothing.")
@click.option("--until", type=click.Choice(STAGES), default=STAGES[-1], help="Stop after this stage.")
@click.option("--redo", type=click.Choice(STAGES), multiple=True, help="Run this stage even if it is done.")
@click.option("--allow-code-execution", "allow_code", is_flag=True, help="Run Python that the models write.")
@quiet_option("Print errors, and what --quiet leaves of the stages' output.")
@json_option("With --plan: print the steps as JSON instead.")
@schema_option(FORM)
@click.version_option(__version__)
def main(
    pipeline_file: str,
    plan_only: bool,
    until: str,
    redo: tuple[str, ...],
    allow_code: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Score the experts, merge them, grade everything and push, as PIPELINE.yaml says; only what is not done yet.

    A run that was stopped, or that failed, goes on where it was when it is started again.
    """
    if as_json and not plan_only:
        raise click.UsageError("--json prints a plan: give --plan too.")
    pipeline = read_pipeline(pipeline_file)
    from mergekit_wp.pipeline.steps import absent_models, derived_files, hub_models, pipeline_steps, write_derived

    wanted = STAGES[: STAGES.index(until) + 1]
    writable_folder(pipeline.out / "pipeline")
    refuse_busy(pipeline.out)

    def steps() -> list[Step]:  # what they read of a model on the Hub is known when it is here
        return [step for step in pipeline_steps(pipeline, allow_code) if step.stage in wanted]

    stamps = Stamps.only_read(pipeline.out / ".steps", derived_files(pipeline))
    due = find_due(steps(), stamps, redo)
    if plan_only:
        echo_lines(plan_json(steps(), due)) if as_json else show_plan(steps(), due)
    look_ahead(pipeline, due, network=not plan_only)
    if plan_only:
        return
    check_writable_parent(pipeline.out / "pipeline")
    with claimed(pipeline.out):  # what steps read is written anew, which must not happen under a run at work
        if absent_models(pipeline):
            _fetch(hub_models(pipeline), quiet)
            look_ahead(pipeline, find_due(steps(), stamps, redo), network=True)
        write_derived(pipeline)
        run_steps(steps(), stamps.to_run(), redo, quiet)
    if not quiet:
        echo("")
        echo(f"All of {pipeline_file} is done; everything is under {pipeline.out}.")


def run_steps(steps: Sequence[Step], stamps: Stamps, redo: Sequence[str] = (), quiet: bool = False) -> None:
    """Run every step that is due, in order. Raises `StepFailed` at the first that fails."""
    for number, step in enumerate(steps, start=1):
        if quiet:
            if step.stage in redo or stamps.why_not_done(step) is not None:
                stamps.run(step, quiet=True)
            continue
        echo("")
        echo(f"[{number}/{len(steps)}] {step.title}", bold=True)
        why = "asked for by --redo" if step.stage in redo else stamps.why_not_done(step)
        if why is None:
            echo("      done before, and its inputs have not changed since")
            continue
        echo(f"      {why}")
        echo(f"      $ {step.text()}", fg="cyan")
        echo("")
        begun = time.monotonic()
        stamps.run(step)
        echo(f"      {time.monotonic() - begun:.0f} s")


def find_due(steps: Sequence[Step], stamps: Stamps, redo: Sequence[str] = ()) -> dict[Step, str]:
    """The steps that would be run, or may have to be, and why."""
    due: dict[Step, str] = {}
    anew: set[Path] = set()
    for step in steps:
        why = "asked for by --redo" if step.stage in redo else stamps.why_not_done(step)
        upstream = [path for path in step.inputs if any(path == made or made in path.parents for made in anew)]
        if why is None and upstream:
            why = f"unless {upstream[0]} comes out as it was"
        if why is not None:
            due[step] = why
            anew.update(step.outputs)
    return due


def look_ahead(pipeline: Pipeline, due: Collection[Step], *, network: bool) -> None:
    """Check what is due as its stages would. Raises `BadInput`, naming the pipeline's file and field; of several
    troubles for the last, after the others were printed."""
    from mergekit_wp.pipeline.steps import absent_models, derived_files

    made = frozenset(path for step in due for path in step.outputs)
    absent = frozenset(map(str, absent_models(pipeline)))
    troubles = troubles_of(list(due), Ahead(derived_files(pipeline), made, absent, network))
    for trouble in troubles[:-1]:
        echo(f"Error: {pipeline.file}: {trouble}", err=True)
    if troubles:
        raise BadInput(f"{pipeline.file}: {troubles[-1]}")
    if absent and due and not network:
        echo(f"not looked into, since a run fetches them first: {', '.join(sorted(absent))}", err=True)


def show_plan(steps: Sequence[Step], due: Mapping[Step, str]) -> None:
    """One line a step: done, or to do and why; and what would be typed."""
    for number, step in enumerate(steps, start=1):
        why = due.get(step)
        echo(f"[{number}/{len(steps)}] {step.title}: ", bold=True, nl=False)
        echo("done" if why is None else f"to do ({why})")
        if why is not None:
            echo(f"      $ {step.text()}", fg="cyan")


def plan_json(steps: Sequence[Step], due: Mapping[Step, str]) -> str:
    """The same as a JSON list: `why` is null where a step is done."""
    rows = [
        {"name": step.name, "stage": step.stage, "why": due.get(step), "command": list(step.command)} for step in steps
    ]
    return json.dumps(rows, indent=2)


def _fetch(sources: Sequence[Source], quiet: bool) -> None:
    """Get models from the Hub before anything else, so that a missing one is known at once."""
    from mergekit_wp.checkpoint.folder import local_folder

    for source in sources:
        if not quiet:
            echo(f"{source}: fetching what of it is not here yet ...", err=True)
        local_folder(source)


if __name__ == "__main__":
    main()
