"""wp-compare: one table out of the results of several runs of wp-eval, with a warning where they are not alike."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_wp import __version__
from mergekit_wp.console import json_option, quiet_option
from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import echo, echo_lines

if TYPE_CHECKING:
    from mergekit_wp.eval.rows import Row
    from mergekit_wp.eval.tables import Table

_EPILOG = """\b
Examples:
  wp-compare runs/eval-monday runs/eval-tuesday --baseline linear
  wp-compare vllm=runs/a hf=runs/b --out runs/compared
"""


@click.command(epilog=_EPILOG)
@click.argument("results", metavar="[NAME=]RESULTS...", nargs=-1, required=True)
@click.option("--baseline", metavar="NAME", help="Row that differences are taken from (default: the first results').")
@click.option("--out", type=Path, metavar="DIR", help="Folder for comparison.csv, .md and .html.")
@quiet_option("Print the table only.")
@json_option("Print the table as JSON instead.")
@click.version_option(__version__)
def main(results: tuple[str, ...], baseline: str | None, out: Path | None, quiet: bool, as_json: bool) -> None:
    """Put the rows of several runs of wp-eval into one table, and say where they were not measured alike.

    RESULTS is an --out folder of wp-eval, or the results.json in it. Where two have a row of one name, the rows are
    told apart by NAME, or else by the folder's.
    """
    from mergekit_wp.eval.models import name_models
    from mergekit_wp.eval.tables import read_results, to_json, to_text, write_tables

    named = {name: read_results(_file(path)) for name, path in name_models(results).items()}
    table = joined(named, baseline)
    text, written = to_text(table), list[Path]()
    if out is not None:
        text, written = write_tables(table, out, "comparison", f"Comparison: {table.suite.name}")
    echo_lines(to_json(table, {"suite": table.suite.name}).rstrip() if as_json else text)
    if written and not quiet:
        echo(f"Written: {', '.join(map(str, written))}", err=True)


def joined(tables: Mapping[str, Table], baseline: str | None) -> Table:
    """All rows of these tables, by name of their results, under the columns of all.

    `baseline` is a row's name; None takes the first table's own, if it has one. Raises `BadInput` when there is
    no such row.
    """
    from mergekit_wp.eval.suite import Suite
    from mergekit_wp.eval.tables import Table

    counts = Counter(row.model.name for table in tables.values() for row in table.rows)
    rows, first = [], None
    for name, table in tables.items():
        for row in table.rows:
            rows.append(row if counts[row.model.name] == 1 else _renamed(row, f"{name}/{row.model.name}"))
            if first is None and row.model.name == table.baseline:
                first = rows[-1].model.name
    names = [row.model.name for row in rows]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise BadInput(f"two rows would be named {twice!r}; tell the results apart with NAME=RESULTS.")
    if baseline is not None and baseline not in names:
        raise BadInput(f"--baseline {baseline}: there is no such row; the rows are {', '.join(names)}.")
    tasks = {task.column: task for table in reversed(list(tables.values())) for task in table.suite.tasks}
    columns = dict.fromkeys(task.column for table in tables.values() for task in table.suite.tasks)
    suites = dict.fromkeys(table.suite.name for table in tables.values())
    suite = Suite(" and ".join(suites), tuple(tasks[column] for column in columns))
    return Table(suite, rows, baseline or first, None)


def _renamed(row: Row, name: str) -> Row:
    return replace(row, model=replace(row.model, name=name))


def _file(path: str) -> Path:
    return Path(path) / "results.json" if os.path.isdir(path) else Path(path)


if __name__ == "__main__":
    main()
