"""wp-study: the parts of one study, those that are due alone, and their page.

Heavy packages are imported inside the command, so that `wp-study --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_wp import __version__
from mergekit_wp.console import ProgressBars, no_progress, quiet_option, take_terminal
from mergekit_wp.fields import schema_option
from mergekit_wp.files import writable_folder
from mergekit_wp.foreign import echo
from mergekit_wp.outputs import claim, claimed, clear_partials, refuse_busy, refuse_inputs
from mergekit_wp.study.study_spec import FORM, Study, read_study

if TYPE_CHECKING:
    from mergekit_wp.study.scored import ToScore

_EPILOG = """\b
Examples:
  wp-study study.yaml --out study
  wp-study study.yaml --out study --only maps
  wp-study study.yaml --out study --plan

\b
study.yaml:
  base: ./base
  expert: ./maths
  scores: {kl: scores/kl.safetensors, ap: ap.yaml}
  prompts: {pairs: maths.jsonl}

\b
Parts:
  maps       where scores lie; top sets of two files, of several tasks; from score files alone
  certainty  how far scores hang on the prompts; from score files made with --per-prompt
  drift      what moved, by layer, module, head and neuron; whether that predicts scores; reads both models
  words      directions, neurons and heads as tokens; reads final norms, heads, o_proj, down_proj; with prompts, more
  attention  whether the top heads look at the instruction; needs prompts with contrasts; one forward pass a model
  links      what runs through which heads; a circuit, beside chance, other heads and noise; needs prompts
  sets       how much the top of a ranking restores and takes out, beside random sets; needs prompts; a pass a set
  answers    the same by what models answer; needs prompts with checks; the plan says how many answers
  cases      what the models answer to single prompts, side by side; needs prompts with checks

A scoring job (.yaml, or its fields) in the place of a score file is run first, as wp-score would.
A part is skipped while its score files, models, settings and code are those of its last run.
"""


@click.command(epilog=_EPILOG)
@click.argument("study_file", metavar="STUDY.yaml", type=click.Path())
@click.option("--out", required=True, metavar="DIR", help="Folder of a part each, and of study.html.")
@click.option("--only", metavar="PARTS", help="Do these parts, parted by commas: maps,drift (default: all).")
@click.option("--plan", "plan_only", is_flag=True, help="Say what would be done and why; do nothing.")
@click.option("--allow-code-execution", "allow_code", is_flag=True, help="Run Python that the models write.")
@quiet_option()
@schema_option(FORM)
@click.version_option(__version__)
def main(study_file: str, out: str, only: str | None, plan_only: bool, allow_code: bool, quiet: bool) -> None:
    """Study what a fine-tune changed in its base and where, from score files of the pair.

    Every part gives JSON, CSV and SVG, and a section of one page that needs nothing else.
    """
    study, folder = read_study(study_file), Path(out)
    from mergekit_wp.study.inputs import read_inputs
    from mergekit_wp.study.parts import PAGE, PARTS, chosen_parts, made_of, why_due, write_page, write_part
    from mergekit_wp.study.scored import to_score, with_files

    parts, made = chosen_parts(only, study), to_score(study, folder)
    refuse_inputs(out, [study_file, *study.reads(), *(path for each in made for path in each.job.reads())])
    writable_folder(folder)
    refuse_busy(out)
    if made or any(part.models for part in parts):
        take_terminal(not quiet)
    if not _scored(study, made, folder, [part.name for part in parts], quiet, plan_only):
        return
    study = with_files(study, made)
    inputs = read_inputs(study, folder, allow_code)
    keys = {part.name: made_of(part, study, inputs) for part in parts}
    why = {part.name: why_due(part, folder, keys[part.name]) for part in parts}
    if study.prompts and any(why[part.name] is not None and "prompts" in part.settings for part in parts):
        inputs.check_prompts()  # before the first part, not after it
    if not quiet or plan_only:
        for part in parts:
            due = why[part.name]
            cost = f": {part.cost(study, inputs)}" if due is not None and part.cost else ""
            echo(f"{part.name}: {'done' if due is None else f'to do ({due}){cost}'}")
        for name in [name for name in PARTS if only is None and name not in keys]:
            echo(f"{name}: left out (the study has no `prompts`)")
    if plan_only:
        return
    claim(out)
    with ProgressBars(not quiet) as progress:
        for part in parts:
            clear_partials(folder / part.name)
            if why[part.name] is not None:
                write_part(part, folder, keys[part.name], part.work(study, inputs, progress or no_progress))
                write_page(folder, study, inputs)
    write_page(folder, study, inputs)
    if not quiet:
        echo(f"Written: {folder / PAGE}")


def _scored(
    study: Study, made: Sequence[ToScore], out: Path, parts: Sequence[str], quiet: bool, plan_only: bool
) -> bool:
    """Whether all score files are there: those that are due are made first, or, of a plan, said.

    Raises `BadInput` for what would stop these runs, or the parts after them, as far as that shows before.
    """
    from mergekit_wp.execute import Stamps
    from mergekit_wp.study.inputs import Inputs, read_inputs
    from mergekit_wp.study.scored import check_jobs, with_files, write_jobs

    steps = {each.step(): each for each in made}
    stamps = Stamps.only_read(out / ".steps", {each.job_file: each.text for each in made})
    why = {step: stamps.why_not_done(step) for step in steps}
    due = [step for step in steps if why[step] is not None]
    if due:
        there = with_files(study, made, [steps[step] for step in due])
        if there.scores:
            _ = read_inputs(there).fingerprints  # of this study's models, before hours go into others
        check_jobs([steps[step] for step in due])
        if study.prompts:
            assert Inputs(study, {}, {}, {}).ready
    if not quiet or plan_only:
        for step, each in steps.items():
            echo(f"{each.field}: {'done' if why[step] is None else f'to do ({why[step]})'}")
    if not due:
        return True
    if plan_only:
        for name in parts:
            echo(f"{name}: to do (after {steps[due[0]].field})")
        return False
    with claimed(out):
        write_jobs(made)
        to_run = stamps.to_run()
        for step in due:
            if not quiet:
                echo(f"$ {step.text()}", fg="cyan")
            to_run.run(step, quiet)
    return True


if __name__ == "__main__":
    main()
