"""wp-study: the parts of one study, those that are due alone, and their page.

Heavy packages are imported inside the command, so that `wp-study --help` answers at once.
"""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_wp import __version__
from mergekit_wp.console import ProgressBars, no_progress, quiet_option, take_terminal
from mergekit_wp.fields import schema_option
from mergekit_wp.files import writable_folder
from mergekit_wp.foreign import echo
from mergekit_wp.outputs import claim, clear_partials, refuse_busy, refuse_inputs
from mergekit_wp.study.study_spec import FORM, read_study

_EPILOG = """\b
Examples:
  wp-study study.yaml --out study
  wp-study study.yaml --out study --only maps
  wp-study study.yaml --out study --plan

\b
study.yaml:
  base: ./base
  expert: ./maths
  scores: {kl: scores/kl.safetensors, ap: scores/ap.safetensors}
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

A part is skipped while its score files, models, settings and code are those of its last run.
"""


@click.command(epilog=_EPILOG)
@click.argument("study_file", metavar="STUDY.yaml", type=click.Path())
@click.option("--out", required=True, metavar="DIR", help="Folder of a part each, and of study.html.")
@click.option("--only", metavar="PARTS", help="Do these parts, parted by commas: maps,drift (default: all).")
@click.option("--plan", "plan_only", is_flag=True, help="Say what would be done and why; do nothing.")
@quiet_option()
@schema_option(FORM)
@click.version_option(__version__)
def main(study_file: str, out: str, only: str | None, plan_only: bool, quiet: bool) -> None:
    """Study what a fine-tune changed in its base and where, from score files of the pair.

    Every part gives JSON, CSV and SVG, and a section of one page that needs nothing else.
    """
    study = read_study(study_file)
    from mergekit_wp.study.inputs import read_inputs
    from mergekit_wp.study.parts import PAGE, PARTS, chosen_parts, made_of, why_due, write_page, write_part

    parts, folder = chosen_parts(only, study), Path(out)
    refuse_inputs(out, [study_file, *study.reads()])
    writable_folder(folder)
    refuse_busy(out)
    if any(part.models for part in parts):
        take_terminal(not quiet)
    inputs = read_inputs(study, folder)
    keys = {part.name: made_of(part, study, inputs) for part in parts}
    why = {part.name: why_due(part, folder, keys[part.name]) for part in parts}
    if study.prompts and any(why[part.name] is not None and "prompts" in part.settings for part in parts):
        assert inputs.ready  # prompts that cannot be used are found before the first part, not after it
    if not quiet or plan_only:
        for part in parts:
            echo(f"{part.name}: {'done' if why[part.name] is None else f'to do ({why[part.name]})'}")
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


if __name__ == "__main__":
    main()
