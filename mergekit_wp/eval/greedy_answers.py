"""wp-answers: what an expert says greedily to its scoring prompts, by vLLM or as wp-score makes it, in a file.

wp-score and wp-fit generate answers themselves where they are asked to. This does it apart: by vLLM, which is several
times faster on a GPU, and on whichever machine has that. The file is the one that wp-score keeps (`whole_answers`), and
goes into `answers:` of a job of wp-score or of an expert of wp-fit.

Both backends answer by the same rules: the likeliest token, up to one that ends the model's answers, none that the
base and the expert do not share. Where two tokens are equally likely within rounding they may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_wp import __version__
from mergekit_wp.console import (
    GroupedCommand,
    ProgressBars,
    StartProgress,
    Tick,
    no_progress,
    quiet_option,
    take_terminal,
)
from mergekit_wp.errors import BadInput
from mergekit_wp.fields import groups, options, schema_option
from mergekit_wp.foreign import echo
from mergekit_wp.outputs import claim, refuse_inputs
from mergekit_wp.scoring.config import FORM, ScoringJob, load_job

if TYPE_CHECKING:
    from mergekit_wp.scoring.batching import Tokens
    from mergekit_wp.scoring.greedy import Greedy

TOKENS = 32  # of an answer, where the job does not say
_AT_ONCE = 256  # prompts that vLLM is handed together, after which their answers are kept
_NEVER = -100.0  # the least that vLLM adds to a logit

# What decides prompts and answers; a job may say more, which only scoring reads.
_FIELDS = (
    "base", "expert", "pairs", "template", "chat_template", "system", "samples", "seed", "utility", "split",
    "answer_tokens", "device", "dtype", "batch_size", "offload", "trust_remote_code",
)  # fmt: skip
_GROUPS = groups(ScoringJob, _FIELDS) | {"Output Settings": ("out", "backend", "quiet")}

_EPILOG = """\b
Examples:
  wp-answers scoring/wizardlm-13b.yaml --answer-tokens 32 --backend vllm --out wizardlm.answers.jsonl
  wp-score scoring/wizardlm-13b.yaml --answer-tokens 32 --answers wizardlm.answers.jsonl --out s.safetensors

JOB.yaml and the flags are those of wp-score, so that the prompts are, too; what only scoring reads is left aside. A
run that was killed goes on.
"""


def write_answers(job: ScoringJob, backend: str | None, path: Path, start: StartProgress | None = None) -> str:
    """Answer the scoring prompts of a job of wp-score, and keep the answers at `path`; returns which backend did.

    Raises `BadInput` as wp-score does, and for a backend that is not there or does not take the model.
    """
    from mergekit_wp.checkpoint.references import read_reference
    from mergekit_wp.eval.backends import choose_backend
    from mergekit_wp.memory import pick_device
    from mergekit_wp.scoring.models.load import load_stack
    from mergekit_wp.scoring.models.offload import pick_offload
    from mergekit_wp.scoring.models.precision import pick_dtype, stored_dtype
    from mergekit_wp.scoring.score import prepare
    from mergekit_wp.scoring.whole_answers import answer_rules, answers_for, made_answers

    start = start or no_progress
    device = pick_device(job.device)
    engine, why = choose_backend(backend, {}, str(device))
    ready = prepare(job)
    checked, expert = ready.checked, ready.checked.expert
    dtype = pick_dtype(job.dtype, device, [stored_dtype(model.tensors) for model in (checked.base, expert)])
    if engine.name == "hf":
        offload, reason = pick_offload(job.offload, [expert], dtype, device, "the expert")
        stack = load_stack(job.expert, expert, dtype, device, offload, job.trust_remote_code)
        answers_for(job, checked, stack, ready.tokenizer, ready.tasks, path, start=start)
        return f"{why} {reason}"
    if read_reference(job.expert).lora:
        raise BadInput(f"expert: {job.expert} is a LoRA, which this runs with --backend hf alone; use that.")
    # Only its configs are read: vLLM holds the weights.
    stack = load_stack(job.expert, expert, dtype, device, "stream", job.trust_remote_code)
    rules, rows = answer_rules(job, checked, stack, ready.tokenizer), stack.vocabulary

    def generate(prompts: Tokens, tick: Tick, keep: Callable[[dict[int, list[int]]], object]) -> None:
        _by_vllm(job, engine, expert.folder, str(device), str(dtype).removeprefix("torch."), rules, rows, prompts, tick,
                 keep)  # fmt: skip

    made_answers(job, checked, rules, dtype, device, ready.tasks, generate, path, start=start)
    return why


def _by_vllm(
    job: ScoringJob, backend: Any, folder: Path, device: str, dtype: str, rules: Greedy, rows: int, prompts: Tokens,
    tick: Tick, keep: Callable[[dict[int, list[int]]], object],
) -> None:  # fmt: skip
    """As `greedy.generate_answers`. `rows`: of the output head."""
    from mergekit_wp.eval.backends import load, silent_bar

    model = load(
        backend, folder, device=device, dtype=dtype, batch_size="auto", trust_remote_code=job.trust_remote_code
    )
    from vllm import SamplingParams

    # vLLM feeds an answer's last token where ours is only predicted.
    rules = replace(rules, context=min(rules.context, model.max_length) - 1)
    if too_long := [len(prompt) for prompt in prompts if len(prompt) > rules.context]:
        raise BadInput(
            f"pairs: a prompt of {max(too_long)} tokens leaves vLLM no room to answer in {rules.context + 1}; shorten "
            "it, or use --backend hf."
        )
    barred = dict.fromkeys(rules.barred(rows), _NEVER) or None
    for begin in range(0, len(prompts), _AT_ONCE):
        some = prompts[begin : begin + _AT_ONCE]
        how = [
            SamplingParams(
                temperature=0.0, max_tokens=min(rules.max_tokens, rules.context - len(prompt) + 1),
                stop_token_ids=sorted(rules.eos), logit_bias=barred, detokenize=False,
            )
            for prompt in some
        ]  # fmt: skip
        bar = silent_bar(lambda ended: tick(ended * rules.max_tokens))
        found = model.model.generate([{"prompt_token_ids": prompt} for prompt in some], how, use_tqdm=bar)
        keep({begin + i: rules.sayable(list(each.outputs[0].token_ids)) for i, each in enumerate(found)})


@click.command(cls=GroupedCommand, groups=_GROUPS, epilog=_EPILOG)
@click.argument("job_file", metavar="[JOB.yaml]", required=False, type=click.Path())
@options(ScoringJob, _FIELDS)
@click.option("--out", required=True, metavar="FILE", help="File of answers to write, or to go on with (.jsonl).")
@click.option(
    "--backend",
    type=click.Choice(["hf", "vllm"]),
    help="Who answers: transformers' layers, as in wp-score, or vLLM (default: vllm if it is there for the device).",
)
@quiet_option()
@schema_option(FORM)
@click.version_option(__version__)
def main(job_file: str | None, out: str, backend: str | None, quiet: bool, **flags: Any) -> None:
    """Write down what an expert answers to its scoring prompts, for wp-score and wp-fit to read.

    The prompts are those that wp-score would score with the same job and flags.
    """
    job = load_job(job_file, {name: value for name, value in flags.items() if value is not None})
    if job.answers is not None:
        raise BadInput("answers: this makes them; leave the field out, and name the file by --out.")
    if not out.endswith(".jsonl"):
        raise BadInput(f"--out {out}: a file of answers ends in .jsonl; name it so.")
    job = job if job.answer_tokens else replace(job, answer_tokens=TOKENS)
    path = Path(out)
    refuse_inputs(path, [*([job_file] if job_file else []), *job.reads()], holds=False)
    take_terminal(not quiet)
    claim(path)
    if not quiet:
        echo(f"Answers of {job.expert}, at most {job.answer_tokens} tokens each", err=True)
    with ProgressBars(not quiet) as start:
        said = write_answers(job, backend, path, start)
    if not quiet:
        echo(said, err=True)
        echo(f"Written: {out}", err=True)


if __name__ == "__main__":
    main()
