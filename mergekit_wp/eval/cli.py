"""wp-eval: grade models on a suite of lm-eval tasks and write one table.

Heavy packages are imported inside the command, so that `wp-eval --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_wp import __version__
from mergekit_wp.console import GroupedCommand, json_option, quiet_option, quieten, typed
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.options import BACKENDS
from mergekit_wp.eval.suite import DTYPES, FORM, Suite, read_suite
from mergekit_wp.fields import WholeOr, schema_option
from mergekit_wp.files import check_writable_parent, write_text
from mergekit_wp.foreign import echo, echo_lines
from mergekit_wp.outputs import claim, refuse_inputs

if TYPE_CHECKING:
    from mergekit_wp.eval.backends import Backend
    from mergekit_wp.eval.rows import Settings
    from mergekit_wp.eval.tables import Table

_GROUPS = {
    "Suite": ("baseline", "include_path", "data", "limit"),
    "Output Settings": ("out", "log_samples"),
    "Backend": ("backend", "tensor_parallel", "data_parallel", "max_model_len"),
    "Performance": ("device", "dtype", "batch_size"),
    "Dangerous Options": ("allow_code", "trust_remote_code"),
}

_EPILOG = """\b
Examples:
  wp-eval eval/lm-eval.yaml merged --dtype bfloat16 --out runs/eval
  wp-eval eval/lm-eval.yaml base=meta-llama/Llama-2-13b-hf wp=./merged --baseline base \\
      --allow-code-execution --out runs/eval
  wp-eval my.yaml a=runs/a b=runs/b --limit 20 --out /tmp/quick
  HF_HUB_OFFLINE=1 wp-eval eval/lm-eval.yaml merged --data datasets --allow-code-execution --out runs/eval

A task already measured on a model of the same fingerprint, with the same dtype, limit, backend and package
versions, is taken from OUT/cache: a run that was killed goes on where it stopped.
"""


@click.command(cls=GroupedCommand, groups=_GROUPS, epilog=_EPILOG)
@click.argument("suite_file", metavar="SUITE.yaml", type=click.Path())
@click.argument("models", metavar="[NAME=]MODEL...", nargs=-1, required=True)
@click.option("--baseline", metavar="NAME", help="Row that differences are taken from (default: the suite's).")
@click.option("--include-path", metavar="DIR", type=Path, help="Folder of lm-eval tasks, instead of the suite's.")
@click.option("--data", metavar="DIR", type=Path, help="Folder of data sets in the Hub's place (default: the suite's).")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N items of each task.")
@click.option(
    "--prompts", multiple=True, metavar="PAIRS", help="What models were scored or fitted on; warns of items among them."
)
@click.option(
    "--out", required=True, type=Path, metavar="DIR", help="Folder for results.json, .csv, .md, .html, cache/."
)
@click.option("--log-samples", is_flag=True, help="Log every item, answer and grade under OUT/samples/, as JSON lines.")
@click.option("--backend", type=click.Choice(BACKENDS), help="Default: the suite's, or vllm if it and a GPU are there.")
@click.option("--tensor-parallel", type=click.IntRange(min=1), metavar="N", help="GPUs that share a model (vllm).")
@click.option("--data-parallel", type=click.IntRange(min=1), metavar="N", help="Copies of a model (vllm, with ray).")
@click.option("--max-model-len", type=click.IntRange(min=1), metavar="N", help="Tokens of prompt and answer together.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one).")
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype to run in (default: the suite's, or `auto`).")
@click.option("--batch-size", type=WholeOr("auto", 1), help="Sequences at a time, for hf (default: the suite's).")
@click.option("--allow-code-execution", "allow_code", is_flag=True, help="Run Python that the models write.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python that comes with a model folder.")
@quiet_option("Print the table only.")
@json_option("Print the table as results.json has it instead.")
@schema_option(FORM)
@click.version_option(__version__)
def main(
    suite_file: str,
    models: tuple[str, ...],
    baseline: str | None,
    include_path: Path | None,
    data: Path | None,
    limit: int | None,
    prompts: tuple[str, ...],
    out: Path,
    log_samples: bool,
    device: str | None,
    dtype: str | None,
    batch_size: int | str | None,
    allow_code: bool,
    trust_remote_code: bool,
    quiet: bool,
    as_json: bool,
    **backend_flags: Any,
) -> None:
    """Grade models on a suite of lm-eval tasks: one row a MODEL, one column a task, and their mean.

    A MODEL is a local folder or a Hub name (user/model, user/model@revision), MODEL+LORA one with a LoRA (merged
    once, and kept under OUT/cache); NAME=MODEL names its row. Each
    model runs in a process of its own. The table is printed and written to OUT as results.json, .csv, .md and
    .html; `wp-compare` puts several of them together.
    """
    suite = _suite(suite_file, data)
    from mergekit_wp.eval.models import name_models
    from mergekit_wp.eval.seen_items import read_prompts

    folders = [suite.data] if suite.data else []
    refuse_inputs(out, [suite_file, *folders, *prompts, *name_models(models).values()], holds=False)
    if tasks := include_path or suite.include_path:  # results may lie below: often it is the whole working directory
        refuse_inputs(out, [tasks], holds=False, inside=False)
    texts = read_prompts(prompts)
    bars = not quiet and sys.stderr.isatty()  # only where somebody watches; lines of ours say what runs
    quieten(bars)
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    from mergekit_wp.eval.rows import Settings

    where = _device(device or suite.device)
    backend, why = _backend(suite, where, batch_size, **backend_flags)
    settings = Settings(
        device=where,
        dtype=dtype or suite.dtype,
        batch_size=batch_size or suite.batch_size,
        limit=limit,
        allow_code=allow_code,
        trust_remote_code=trust_remote_code,
        progress_bars=bars,
        backend=backend,
        samples=out / "samples" if log_samples else None,
    )
    if not quiet:
        echo(why, err=True)
    claim(out)
    table = _evaluate(suite, models, settings, baseline, include_path or suite.include_path, texts, out, quiet)
    _write(table, suite_file, settings, out, quiet, as_json)


def check_asked(typed: Mapping[str, Any]) -> dict[str, str]:
    """What can be known of a run before its models are there; row name -> model. Raises `BadInput`.

    typed: the arguments of `main` by name.
    """
    from mergekit_wp.eval.models import name_models
    from mergekit_wp.eval.tasks import find_tasks

    suite = _suite(typed["suite_file"], typed["data"])
    names = name_models(typed["models"])
    _check_baseline(typed["baseline"], names)
    where = _device(typed["device"] or suite.device)
    flags = ("batch_size", "backend", "tensor_parallel", "data_parallel", "max_model_len")
    _backend(suite, where, **{name: typed[name] for name in flags})
    find_tasks(suite, typed["include_path"] or suite.include_path, typed["allow_code"])
    return names


def _suite(file: str, data: Path | None) -> Suite:
    """The suite of a file, with another folder of data if one is given."""
    suite = read_suite(file)
    return replace(suite, data=data) if data else suite


def _check_baseline(baseline: str | None, names: Mapping[str, str]) -> None:
    if baseline is not None and baseline not in names:
        raise BadInput(f"--baseline {baseline}: there is no such row; the rows are {', '.join(names)}.")


def _backend(
    suite: Suite,
    device: str,
    batch_size: int | str | None,
    backend: str | None,
    tensor_parallel: int | None,
    data_parallel: int | None,
    max_model_len: int | None,
) -> tuple[Backend, str]:
    """The backend by flags, suite and machine, and why. Raises `BadInput`."""
    from mergekit_wp.eval.backends import choose_backend
    from mergekit_wp.eval.preflight import check_parallel

    flags = {
        "tensor_parallel_size": tensor_parallel, "data_parallel_size": data_parallel, "max_model_len": max_model_len,
    }  # fmt: skip
    given = {name: value for name, value in flags.items() if value is not None}
    chosen, why = choose_backend(backend or suite.backend, {**suite.backend_options, **given}, device)
    for name in given:
        if name not in chosen.options:
            flag = "--" + name.removesuffix("_size").replace("_", "-")
            raise BadInput(f"{flag}: this is vLLM's alone, and the backend is {chosen.name} ({why.rstrip('.')}).")
    if chosen.name == "vllm" and batch_size not in (None, "auto"):
        raise BadInput(f"--batch-size {batch_size}: vLLM forms its batches itself; leave it out, or --backend hf.")
    check_parallel(chosen, device)
    return chosen, why


def _evaluate(
    suite: Suite,
    references: tuple[str, ...],
    settings: Settings,
    baseline: str | None,
    include_path: Path | None,
    prompts: Mapping[str, set[str]],
    out: Path,
    quiet: bool,
) -> Table:
    """All checks, then model after model."""
    from mergekit_wp.eval import preflight
    from mergekit_wp.eval.models import name_models, open_model, takes_long
    from mergekit_wp.eval.official_data import odd_counts
    from mergekit_wp.eval.process import measure_in_child, start_importing
    from mergekit_wp.eval.rows import evaluate_model, missing_tasks
    from mergekit_wp.eval.seen_items import seen_items
    from mergekit_wp.eval.tables import Table
    from mergekit_wp.eval.tasks import ready_tasks

    names = name_models(references)
    trust, cache = settings.trust_remote_code, out / "cache"
    opened = {n: open_model(n, ref, trust) for n, ref in names.items() if not takes_long(ref)}
    _check_baseline(baseline, names)
    tasks = ready_tasks(suite, include_path, settings.allow_code)
    preflight.check_tasks(tasks)
    if not quiet:
        for task in tasks:
            for odd in odd_counts(task.data):
                echo(f"{suite.data}: {task.spec.column} has {odd}", err=True)
    seen = seen_items(tasks, prompts)
    for model in opened.values():
        preflight.check_model(model, tasks, settings)
    check_writable_parent(out / "results.json")
    # Downloads and merges only now, when everything that can be checked without them has been.
    for name, reference in names.items():
        if name not in opened:
            if not quiet:
                echo(f"{name}: making {reference} ready ...", err=True)
            opened[name] = open_model(name, reference, trust, cache / "loras")
            preflight.check_model(opened[name], tasks, settings)
    models = [opened[name] for name in names]
    for model in models:
        if missing_tasks(model, tasks, settings, cache):
            start_importing()
            preflight.check_memory(model, settings)
    run, rows = partial(measure_in_child, suite=suite, include_path=include_path), []
    for number, model in enumerate(models, start=1):

        def say(text: str, place: str = f"[{number}/{len(models)}]") -> None:
            if not quiet:
                echo(f"{place} {text}", err=True)

        row = evaluate_model(model, tasks, settings, cache, say, run)
        about = {c: how | ({"seen_items": seen[c]} if c in seen else {}) for c, how in row.measured.items()}
        rows.append(replace(row, measured=about, suite=suite.hash))
    chosen = baseline or suite.baseline
    return Table(suite, rows, chosen if chosen in names else None, settings.limit)


def _write(table: Table, suite_file: str, settings: Settings, out: Path, quiet: bool, as_json: bool) -> None:
    from mergekit_wp.eval.rows import versions
    from mergekit_wp.eval.tables import to_json, write_tables

    about = {
        "suite": suite_file,
        "suite_hash": table.suite.hash,
        "suite_content": asdict(table.suite),
        "command": typed(click.get_current_context(), "wp-eval"),
        "versions": {"mergekit-wp": __version__, **versions(settings.backend)},
    }
    content = to_json(table, about)
    write_text(out / "results.json", content)
    text, written = write_tables(table, out, "results", f"Results of the suite {table.suite.name}")
    echo_lines(content.rstrip() if as_json else text)
    if quiet:
        return
    if table.suite.baseline and not table.baseline:
        echo(f"(no row named {table.suite.baseline}, the suite's baseline: no differences)", err=True)
    echo(f"Written: {', '.join(map(str, [out / 'results.json', *written]))}", err=True)


def _device(wanted: str | None) -> str:
    """The device asked for, or a GPU where there is one. lm-eval itself takes another one without a word."""
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = [*(["cuda", *gpus] if gpus else []), "cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    if wanted is not None and wanted not in here:
        raise BadInput(f"device {wanted}: this machine has {', '.join(here)}.")
    return wanted or here[0]


if __name__ == "__main__":
    main()
