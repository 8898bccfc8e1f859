"""wp-fit: learn the weights of a merge from the experts' own answers, and write one fit file.

Heavy packages are imported inside the command, so that `wp-fit --help` answers at once.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mergekit_wp import __version__
from mergekit_wp.console import (
    GroupedCommand,
    ProgressBars,
    json_option,
    names_safetensors,
    quiet_option,
    take_terminal,
)
from mergekit_wp.fields import groups, options, schema_option
from mergekit_wp.fit.job import FORM, FitJob, load_fit_job
from mergekit_wp.foreign import echo, echo_lines
from mergekit_wp.outputs import check_file, claim

if TYPE_CHECKING:
    from mergekit_wp.fit_file import Fit

_GROUPS = groups(FitJob) | {"Output Settings": ("out", "quiet", "as_json")}

_EPILOG = """\b
Examples:
  wp-fit fit.yaml --out fit.safetensors
  wp-fit fit.yaml --family layer --steps 30 --out fit.safetensors
  accelerate launch --num_processes 4 $(which wp-fit) fit.yaml --out fit.safetensors

\b
fit.yaml:
  base: ./base
  experts:
    - {expert: ./maths, pairs: maths.jsonl}
    - {expert: ./code, pairs: "builtin:code"}

A flag overrides the field of the same name. The merge is then made by merge_method wp with
`parameters: {fit: fit.safetensors}`. A run that was killed goes on where it was when started again.
"""


@click.command(cls=GroupedCommand, groups=_GROUPS, epilog=_EPILOG)
@click.argument("job_file", metavar="JOB.yaml", type=click.Path())
@options(FitJob)
@click.option(
    "--out", required=True, metavar="FILE", callback=names_safetensors, help="Fit file to write (.safetensors)."
)
@quiet_option()
@json_option("Print the loss, and what each expert recovers, as JSON when all is written.")
@schema_option(FORM)
@click.version_option(__version__)
def main(job_file: str, out: str, quiet: bool, as_json: bool, **flags: Any) -> None:
    """Fit the weights of a merge: of every attention head and MLP neuron of every expert, or of fewer groups.

    Every expert answers its own prompts; the weights are learnt so that the merge answers as the experts do. No labels
    are read.
    """
    job = load_fit_job(job_file, {name: value for name, value in flags.items() if value is not None})
    from mergekit_wp.fit_file import METADATA_KEY
    from mergekit_wp.scoring.distributed import ProcessGroup

    target = check_file(out, METADATA_KEY, "fit", [job_file, *job.reads()])
    processes = ProcessGroup.join(job.device)
    shown = not quiet and processes.first
    take_terminal(shown)
    if processes.first:
        claim(target)
    from mergekit_wp.fit.fit import fit
    from mergekit_wp.fit_file import write_fit
    from mergekit_wp.scoring.resume import Resume

    resume = Resume(target if processes.first else None)
    if shown:
        echo(f"Fitting {len(job.experts)} experts of {job.base} (by {job.family})", err=True)
    if shown and processes.size > 1:
        echo(f"Shared by {processes.size} processes.", err=True)
    with ProgressBars(shown) as progress:
        found = fit(job, progress, processes, resume, target)
    if processes.first:
        write_fit(found, target)
        resume.forget()
    if as_json and processes.first:
        echo_lines(json.dumps(as_data(found), indent=2))
    if shown:
        echo_lines(summary(found), err=True)
        echo(f"Written: {out}", err=True)


def as_data(found: Fit) -> dict[str, Any]:
    """The loss curve and what each expert recovers, for programs."""
    meta = found.meta
    return {
        "experts": [expert.name for expert in meta.experts],
        "unrecovered": [{"base": x.base, "start": x.start, "end": x.end} for x in meta.unrecovered],
        "curve": [{"step": x.step, "fitted": x.fitted, "held_out": x.held_out} for x in meta.curve],
        "best_step": meta.best_step,
        "keep": None if meta.keep is None else {"start": meta.keep.start, "end": meta.keep.end},
    }


def summary(found: Fit) -> str:
    """What a user checks first: how much of each expert's gap is left open, and how much of each the merge takes."""
    meta = found.meta
    where = "held out" if meta.prompts[0].held_out else "fitted"
    lines = [
        f"{meta.dtype} on {meta.device}; started from {meta.start}; weights of step {meta.best_step} of "
        f"{meta.curve[-1].step}",
        f"Share of each expert's gap that is left open, on prompts {where}, and mean weights:",
    ]
    for k, expert in enumerate(meta.experts):
        left, heads, neurons = meta.unrecovered[k], float(found.heads[k].mean()), float(found.neurons[k].mean())
        lines.append(
            f"  {expert.name}: {left.start:.3f} -> {left.end:.3f}   heads {heads:.2f}, neurons {neurons:.2f}, "
            f"rest {float(found.rest[k]):.2f}"
        )
    if meta.keep is not None:
        lines.append(
            f"Distance from the base on {meta.keep.pairs}, as a share of an expert's: "
            f"{meta.keep.start:.3f} -> {meta.keep.end:.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
