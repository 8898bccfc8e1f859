"""wp-eval: grade models on a suite of lm-eval tasks and write one table.

Heavy packages are imported inside the command, so that `wp-eval --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_wp import __version__
from mergekit_wp.click_help import GroupedCommand
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.suite import DTYPES, Suite, read_suite
from mergekit_wp.files import check_writable_parent, write_text

if TYPE_CHECKING:
    from mergekit_wp.eval.run import Settings
    from mergekit_wp.eval.table import Table

_GROUPS = {
    "Suite": ("baseline", "include_path", "limit"),
    "Output Settings": ("out",),
    "Performance": ("device", "dtype", "batch_size"),
    "Dangerous Options": ("allow_code", "trust_remote_code"),
}

_EPILOG = """\b
Examples:
  wp-eval eval/miniature.yaml runs/demo/merges/wp --allow-code-execution --out runs/eval
  wp-eval eval/lm-eval.yaml base=meta-llama/Llama-2-13b-hf wp=./merged --baseline base \\
      --allow-code-execution --out runs/eval
  wp-eval my.yaml a=runs/a b=runs/b --limit 20 --out /tmp/quick

A task already measured on a model of the same fingerprint, with the same dtype, limit and package versions,
is taken from OUT/cache: a run that was killed goes on where it stopped.
"""


class BatchSize(click.ParamType):
    """A whole number, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto" or isinstance(value, int):
            return value
        if str(value).isdigit() and int(value) > 0:
            return int(value)
        self.fail(f"{value!r} is neither a whole number from 1 up nor `auto`.", param, ctx)


@click.command(cls=GroupedCommand, groups=_GROUPS, epilog=_EPILOG)
@click.argument("suite_file", metavar="SUITE.yaml")
@click.argument("models", metavar="[NAME=]MODEL...", nargs=-1, required=True)
@click.option("--baseline", metavar="NAME", help="Row that differences are taken from (default: the suite's).")
@click.option("--include-path", metavar="DIR", type=Path, help="Folder of lm-eval tasks, instead of the suite's.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N items of each task.")
@click.option("--out", required=True, type=Path, metavar="DIR", help="Folder for results.json, .csv, .md, cache/.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one).")
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype to run in (default: the suite's, or `auto`).")
@click.option("--batch-size", type=BatchSize(), help="Sequences at a time (default: the suite's).")
@click.option("--allow-code-execution", "allow_code", is_flag=True, help="Run Python that the models write.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python that comes with a model folder.")
@click.option("--quiet", is_flag=True, help="Print the table only.")
@click.version_option(__version__)
def main(
    suite_file: str,
    models: tuple[str, ...],
    baseline: str | None,
    include_path: Path | None,
    limit: int | None,
    out: Path,
    device: str | None,
    dtype: str | None,
    batch_size: int | str | None,
    allow_code: bool,
    trust_remote_code: bool,
    quiet: bool,
) -> None:
    """Grade models on a suite of lm-eval tasks: one row a MODEL, one column a task, and their mean.

    A MODEL is a local folder or a Hub name (user/model, user/model@revision); NAME=MODEL names its row. The
    table is printed and written to OUT as results.json, results.csv and results.md.
    """
    suite = read_suite(suite_file)
    bars = not quiet and sys.stderr.isatty()  # only where somebody watches; lines of ours say what runs
    _quieten(bars)
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    from mergekit_wp.eval.run import Settings

    settings = Settings(
        device=_device(device or suite.device),
        dtype=dtype or suite.dtype,
        batch_size=batch_size or suite.batch_size,
        limit=limit,
        allow_code=allow_code,
        trust_remote_code=trust_remote_code,
        progress_bars=bars,
    )
    table = _evaluate(suite, models, settings, baseline, include_path or suite.include_path, out, quiet)
    _write(table, suite_file, out)


def _evaluate(
    suite: Suite,
    references: tuple[str, ...],
    settings: Settings,
    baseline: str | None,
    include_path: Path | None,
    out: Path,
    quiet: bool,
) -> Table:
    """All checks, then model after model."""
    from mergekit_wp.eval.models import name_models, needs_download, open_model
    from mergekit_wp.eval.run import evaluate_model
    from mergekit_wp.eval.table import Table
    from mergekit_wp.eval.tasks import ready_tasks

    names = name_models(references)
    trust = settings.trust_remote_code
    opened = {n: open_model(n, ref, trust) for n, ref in names.items() if not needs_download(ref)}
    if baseline is not None and baseline not in names:
        raise BadInput(f"--baseline {baseline}: there is no such row; the rows are {', '.join(names)}.")
    tasks = ready_tasks(suite, include_path, settings.allow_code)
    check_writable_parent(out / "results.json")
    # Downloads only now, when everything that can be checked without them has been.
    models = [opened.get(n) or open_model(n, ref, trust) for n, ref in names.items()]
    rows = []
    for number, model in enumerate(models, start=1):

        def say(text: str, place: str = f"[{number}/{len(models)}]") -> None:
            if not quiet:
                click.echo(f"{place} {text}", err=True)

        rows.append(evaluate_model(model, tasks, settings, out / "cache", say))
    chosen = baseline or suite.baseline
    return Table(suite, rows, chosen if chosen in names else None, settings.limit)


def _write(table: Table, suite_file: str, out: Path) -> None:
    from mergekit_wp.eval.run import versions
    from mergekit_wp.eval.table import to_csv, to_json, to_markdown, to_text

    about = {"suite": suite_file, "suite_content": asdict(table.suite), "versions": versions()}
    write_text(out / "results.json", to_json(table, about))
    write_text(out / "results.csv", to_csv(table))
    write_text(out / "results.md", to_markdown(table))
    click.echo(to_text(table))
    if table.suite.baseline and not table.baseline:
        click.echo(f"(no row named {table.suite.baseline}, the suite's baseline: no differences)", err=True)
    click.echo(f"Written: {', '.join(str(out / f'results.{kind}') for kind in ('json', 'csv', 'md'))}", err=True)


def _device(wanted: str | None) -> str:
    """The device asked for, or a GPU where there is one. lm-eval itself takes another one without a word."""
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = [*(["cuda", *gpus] if gpus else []), "cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    if wanted is not None and wanted not in here:
        raise BadInput(f"device {wanted}: this machine has {', '.join(here)}.")
    return wanted or here[0]


def _says_something(record: logging.LogRecord) -> bool:
    """Not lm-eval's advice on its own command, nor, for every model, that a metric counts for some items only."""
    text = record.getMessage()
    return "Custom kwargs can be passed" not in text and "not scored on the same number" not in text


def _quieten(bars: bool) -> None:
    """Silence what the libraries say about themselves; must run before they are first imported."""
    if not bars:
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    for name in ("lm_eval.api.task", "lm_eval.evaluator_utils"):
        logging.getLogger(name).addFilter(_says_something)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
