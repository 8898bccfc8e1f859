"""`make table3`, and the search for settings: everything that is not done yet, then the table.

A worker imports this module too, and has one thread only if torch is not imported before `prepare`: hence `page`,
which draws, is imported where it is used.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from experiments.table3.formats import remarks, search_text, to_csv, to_markdown, to_text
from experiments.table3.frozen import CHANGES, KINDS, Disjoint
from experiments.table3.grid import read_variants
from experiments.table3.jobs import CHOICES, SeedResult, Setup, expected, seconds_of, seed_plan
from experiments.table3.schedule import TableProgress, pool, run
from experiments.table3.table import RivalTable, by_setting
from experiments.table3.variants import BASELINE, COMBINATIONS, FOR_PRETRAINED, VARIANTS, Variant
from experiments.table3.work import prepare
from mergekit_wp.errors import BadInput
from mergekit_wp.files import check_writable_parent, write_text
from mergekit_wp.foreign import echo, echo_lines

_PACKAGES = ("mergekit", "lm-eval", "torch", "transformers")


@click.command()
@click.option("--seeds", default="0,1,2", show_default=True, metavar="N,N,...", help="Seeds of the world.")
@click.option("--out", type=Path, help="Where everything goes; default: runs/table3, or runs/table3-KIND.")
@click.option("--worlds", type=Path, default=Path("runs/worlds"), show_default=True, help="Cache of trained worlds.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this variant or combination; may be repeated.")
@click.option("--variants", "file", metavar="FILE.yaml", help="Variants of one's own; implies --validation-only.")
@click.option("--validation-only", is_flag=True, help="Grade on validation items and stop before the test items.")
@click.option(
    "--choose",
    multiple=True,
    type=click.Choice([*CHOICES, "none"]),
    default=CHOICES,
    show_default=True,
    help="How a grid's setting is chosen beside the authors' own: by labels of validation items, by the loss on "
    "unlabelled prompts; may be repeated.",
)
@click.option("--plan", "plan_only", is_flag=True, help="Say what is left to do and how long it takes; do nothing.")
@click.option("--workers", type=click.IntRange(min=1), default=min(2, os.cpu_count() or 1), show_default=True)
@click.option("--keep", is_flag=True, help="Keep merged models (4 MB each) in OUT/merged.")
@click.option("--allow-code-execution", "allow_code", is_flag=True, help="Run Python that the models write.")
@click.option(
    "--kind",
    type=click.Choice(list(KINDS)),
    default="near",
    show_default=True,
    help="How far the experts are from the base; smoke: in seconds, for tests; real: of a pretrained model.",
)
@click.option("--device", help="Where models run, such as cuda; default: cpu, and auto for a pretrained model.")
@click.option("--data", type=Path, help="Official files whose training rows a real world learns, see `make real`.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of products while models are graded; default: the suite's. Scores, fits and merges are as ever.",
)
def main(
    seeds: str,
    out: Path | None,
    worlds: Path,
    only: tuple[str, ...],
    file: str | None,
    validation_only: bool,
    choose: tuple[str, ...],
    plan_only: bool,
    workers: int,
    keep: bool,
    allow_code: bool,
    kind: str,
    device: str | None,
    data: Path | None,
    dtype: str | None,
) -> None:
    """The paper's table of merges on the miniature world: four combinations, each by many methods, several seeds.

    Prints the table and writes OUT/table3.md, .csv, .html and results.json. A run that was stopped goes on where it
    was. With --variants, settings of your own are compared on validation items.
    """
    numbers = _seeds(seeds)
    out = out or Path("runs/table3" if kind == "near" else f"runs/table3-{kind}")
    known = (*VARIANTS, *FOR_PRETRAINED) if kind.startswith("real") else VARIANTS
    variants, combinations = _chosen(read_variants(file) if file else known, only, file is None)
    search = validation_only or file is not None
    choices = tuple(name for name in CHOICES if name in choose)
    setup = Setup(out, worlds, variants, combinations, kind, allow_code, keep, search, choices, data, dtype)
    left = expected(setup, numbers)
    seconds = seconds_of(kind)
    minutes = sum(seconds[what] * count for what, count in left.items()) / workers / 60
    todo = ", ".join(f"{count} {kind}" for kind, count in left.items() if count) or "nothing"
    echo(f"To do: {todo}; about {minutes:.0f} minutes on {workers} quiet cores", err=True)
    if plan_only:
        return
    if not allow_code and any("code" in COMBINATIONS[c] for c in combinations):
        raise BadInput(
            "mini_code: this runs Python that the models write; add --allow-code-execution if you accept that on this "
            "machine."
        )
    check_writable_parent(out / "results.json")
    started, disjoint = time.monotonic(), Disjoint()
    plans = [seed_plan(seed, setup, disjoint) for seed in numbers]
    device = device or ("auto" if kind.startswith("real") else "cpu")
    with pool(workers, partial(prepare, device)) as runner:
        try:
            results = run(plans, runner, TableProgress(seconds, dict(left), workers))
        except BaseException:
            runner.shutdown(cancel_futures=True)
            raise
    _write(results, setup, numbers)
    echo(f"({time.monotonic() - started:.0f} s)", err=True)


def _write(results: list[SeedResult], setup: Setup, seeds: tuple[int, ...]) -> None:
    """results.json with everything, the tables, and what is printed."""
    content = {
        "worlds": {result.seed: dict(result.world) for result in results},
        "changes_of_the_worlds": CHANGES,
        "packages": {name: version(name) for name in _PACKAGES},
        "variants": [asdict(variant) for variant in setup.variants],
        "seeds": [asdict(result) for result in results],
    }
    validation = by_setting([entry for result in results for entry in result.validation])
    searched = RivalTable(seeds, validation, "validation")
    name = "search" if setup.validation_only else "results"
    write_text(setup.out / f"{name}.json", json.dumps(content, indent=2) + "\n")
    write_text(setup.out / "validation.txt", search_text(searched))
    write_text(setup.out / "validation.csv", to_csv(searched))
    if setup.validation_only:
        echo_lines(search_text(searched))
        return
    from experiments.table3.html import to_html

    world = "a pretrained model" if setup.kind.startswith("real") else RivalTable.world
    table = RivalTable(seeds, tuple(entry for result in results for entry in result.test), "test", world)
    worlds = ", ".join(f"{result.seed}: {result.world['hash']}" for result in results)
    notes = [f"Worlds, by their configuration hash: {worlds}."]
    if setup.dtype:
        notes.append(f"Graded with products in {setup.dtype}.")
    notes += remarks(setup.variants, {name: COMBINATIONS[name] for name in setup.combinations})
    write_text(setup.out / "table3.md", to_markdown(table, notes))
    write_text(setup.out / "table3.csv", to_csv(table))
    write_text(setup.out / "table3.html", to_html(table, notes))
    echo_lines(to_text(table, notes))
    echo(f"Written: {', '.join(str(setup.out / f'table3.{kind}') for kind in ('md', 'csv', 'html'))}", err=True)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0:
        raise BadInput(f"--seeds {text}: expected whole numbers from 0 up with commas between them, such as 0,1,2.")
    return seeds


def _chosen(
    variants: tuple[Variant, ...], only: tuple[str, ...], with_baseline: bool
) -> tuple[tuple[Variant, ...], tuple[str, ...]]:
    """What --only leaves: variants by name or group, combinations by name. The average always stays in the table."""
    known = {*COMBINATIONS, *(v.name for v in variants), *(v.group for v in variants)}
    if unknown := [name for name in only if name not in known]:
        raise BadInput(f"--only {unknown[0]}: there is no such variant or combination; there are {', '.join(known)}.")
    combinations = tuple(c for c in COMBINATIONS if c in only) or tuple(COMBINATIONS)
    wanted: Any = {name for name in only if name not in COMBINATIONS}
    kept = [v for v in variants if not wanted or v.name in wanted or v.group in wanted]
    if with_baseline and all(v.name != BASELINE for v in kept):
        kept.insert(0, next(v for v in variants if v.name == BASELINE))
    return tuple(kept), combinations


if __name__ == "__main__":
    main()
