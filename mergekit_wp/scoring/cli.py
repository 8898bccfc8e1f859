"""wp-score: score every head and neuron of one expert, and write one score file.

Heavy packages are imported inside the command, so that `wp-score --help` answers at once.
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
    percent,
    quiet_option,
    take_terminal,
)
from mergekit_wp.fields import groups, options, schema_option
from mergekit_wp.foreign import echo, echo_lines
from mergekit_wp.outputs import check_file, claim
from mergekit_wp.scoring.config import FORM, ScoringJob, load_job

if TYPE_CHECKING:
    from mergekit_wp.scores import Scores

_GROUPS = groups(ScoringJob) | {"Output Settings": ("out", "quiet", "as_json")}

_EPILOG = """\b
Examples:
  wp-score scoring/wizardlm-13b.yaml --out scores/wizardlm-13b.safetensors
  wp-score scoring/wizardlm-13b.yaml --method writeback --device cuda:1 --out scores/lm.safetensors
  wp-score --base ./base --expert ./maths --pairs maths.jsonl --out scores/maths.safetensors
  wp-score --base ./base --expert ./base+./lora --pairs builtin:instructions --samples 50 --out s.safetensors
  wp-score JOB.yaml --method exact --top 20 first.safetensors --out validated.safetensors
  wp-score JOB.yaml --method exact --top 400 first.safetensors --sample 10% --out audit.safetensors
  wp-score JOB.yaml --at recipes/average.yaml --out at-average.safetensors
  accelerate launch --num_processes 4 $(which wp-score) JOB.yaml --out s.safetensors

A flag overrides the field of the same name in JOB.yaml. Pairs are JSON lines {"task", "prompt", "contrast"};
without "contrast" the expert is contrasted with the base; with "chat": true prompts are messages of a chat.
A run of exact or ap that was killed goes on where it was when started again.
"""


@click.command(cls=GroupedCommand, groups=_GROUPS, epilog=_EPILOG)
@click.argument("job_file", metavar="[JOB.yaml]", required=False, type=click.Path())
@options(ScoringJob)
@click.option(
    "--out", required=True, metavar="FILE", callback=names_safetensors, help="Score file to write (.safetensors)."
)
@quiet_option()
@json_option("Print the leaders, as wp-scores --json does, when all is written.")
@schema_option(FORM)
@click.version_option(__version__)
def main(job_file: str | None, out: str, quiet: bool, as_json: bool, **flags: Any) -> None:
    """Score every attention head and MLP neuron of an expert by Weight Patching.

    A score is the share of the gap between base and expert, on prompts that ask for a capability, that the
    component restores when it alone is put into the base.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    job = load_job(job_file, given)
    from mergekit_wp.scores import METADATA_KEY
    from mergekit_wp.scoring.distributed import ProcessGroup
    from mergekit_wp.scoring.whole_answers import answers_beside

    reads = [*([job_file] if job_file else []), *job.reads()]
    target = check_file(out, METADATA_KEY, "score", reads)
    beside = answers_beside(target, reads) if job.answer_tokens and job.answers is None else None

    processes = ProcessGroup.join(job.device)
    shown = not quiet and processes.first
    take_terminal(shown)
    if processes.first:
        claim(target)
    from mergekit_wp.scores import write_scores
    from mergekit_wp.scoring.resume import Resume
    from mergekit_wp.scoring.score import score

    resume = Resume(target if processes.first else None)
    if shown:
        where = "" if job.at is None else f" at the merge of {job.at}"
        echo(f"Scoring {job.expert} against {job.base}{where} ({job.method}, {job.utility})", err=True)
    if shown and processes.size > 1:
        echo(f"Shared by {processes.size} processes.", err=True)
    with ProgressBars(shown) as progress:
        scores = score(job, progress, processes, resume, answers=beside)
    if processes.first:
        write_scores(scores, target)
        resume.forget()
    if as_json and processes.first:
        from mergekit_wp.score_tables import as_data

        echo_lines(json.dumps(as_data({out: scores}, 10), indent=2))
    if shown:
        echo_lines(summary(scores), err=True)
        echo(f"Written: {out}", err=True)


def summary(scores: Scores) -> str:
    """What a user checks first: prompts used and dropped, the gap, and the leading heads and neurons."""
    from mergekit_wp.geometry import Kind
    from mergekit_wp.ranking import strongest

    meta = scores.meta
    where = "" if meta.read_at is None else f"Anchor layer {meta.read_at} of {meta.geometry.layers}; "
    lines = [f"{where}{meta.dtype} on {meta.device}"]
    if meta.recovery is not None:
        lines.append(meta.recovery.summary())
    for task, about in meta.tasks.items():
        parts = [
            f"{utility} gap {stats.mean_gap:.3g} over {stats.used} prompts"
            + (f" ({stats.dropped} dropped)" if stats.dropped else "")
            for utility, stats in about.utilities.items()
        ]
        lines.append(f"  {task}: {'; '.join(parts)}")
    for kind in Kind:
        if leaders := [f"{c.name} {c.score:.3f}" for c in strongest(scores, kind, 5)]:
            lines.append(f"Leading {kind}: {', '.join(leaders)}")
    if meta.shuffles:
        from mergekit_wp.floor import floors

        lines += [each.sentence for each in floors(scores)]
    if scores.chance:
        from mergekit_wp.missed import cost, every

        lines += [each.sentence for each in every(scores) if each.rest]
        lines.append(f"Cost: {percent(cost(scores), 1)} of scoring all of these one by one.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
