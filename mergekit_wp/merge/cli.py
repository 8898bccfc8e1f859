"""wp-merge: mergekit-yaml with our methods registered explicitly, a dry run before and an audit after.

The merge is written beside OUT_PATH and moved there when all is well, so that no half a model is ever found
under that name.

Heavy packages are imported inside the command, so that `wp-merge --help` answers at once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_wp import __version__
from mergekit_wp.console import GroupedCommand, say_nothing
from mergekit_wp.errors import BadInput, enough_memory
from mergekit_wp.files import explained
from mergekit_wp.foreign import echo, echo_lines
from mergekit_wp.merge import register
from mergekit_wp.merge.mergekit_options import GROUPS, check_options, merge_options, mergekit_options
from mergekit_wp.outputs import REPLACED, claim, put_back, refuse_inputs

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_wp.merge.plan import MergePlan, PlannedTensor
    from mergekit_wp.merge.recipe import Recipe

_GROUPS = {
    "Checks": ("dry_run", "audited"),
    **{title: [str(option.name) for option in options] for title, options in GROUPS.items()},
}
_GROUPS["Output Settings"] = ("overwrite", *_GROUPS["Output Settings"])

_EPILOG = """\b
Examples:
  wp-merge recipes/13b-all.yaml merged --dry-run
  wp-merge recipes/13b-all.yaml merged
  wp-merge recipes/13b-all-ties.yaml merged --cuda --overwrite
  PYTHONPATH=TARGET python -S -m mergekit_wp.merge.cli recipe.yaml merged
                                          (after pip install --target TARGET)
"""


@click.command("wp-merge", cls=GroupedCommand, groups=_GROUPS, epilog=_EPILOG)
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("out_path", type=click.Path(file_okay=False), required=False)
@click.option(
    "--dry-run", is_flag=True, help="Run all checks, print each expert's share of each layer (of wp), write nothing."
)
@click.option("--audit/--no-audit", "audited", default=True, show_default=True, help="Check the merged model.")
@click.option("--overwrite", is_flag=True, help="Replace OUT_PATH if it exists.")
@mergekit_options
@click.version_option(__version__)
def main(
    recipe: str,
    out_path: str | None,
    dry_run: bool,
    audited: bool,
    overwrite: bool,
    **typed: Any,
) -> None:
    """Merge models as the RECIPE (a mergekit YAML) says, and write the result to OUT_PATH.

    The same as mergekit-yaml, with `merge_method: wp`, `wp_patch`, `widen` and `aim` known, every check before the
    first weight is read, and an audit of the result. Files that a recipe names are looked for in the working directory,
    then beside it. Models are read from safetensors alone, whatever the method.
    """
    from mergekit_wp.merge.recipe import read_recipe

    options = merge_options(typed)
    check_options(options)
    options.apply_global_options()
    register()
    loaded = read_recipe(recipe)
    if out_path is None:
        if not dry_run:
            raise click.UsageError("Missing argument 'OUT_PATH' (only --dry-run goes without).")
        out_path = "merged"
    out = Path(out_path).absolute()
    refuse_inputs(out, [recipe, *loaded.reads()])
    if dry_run:
        _dry_run(loaded, out, options)
        return
    claim(out)  # which may put back what a killed run had moved away
    refuse_existing(out, overwrite)
    say = say_nothing if options.quiet else echo
    carry_out(loaded, out, options, audited, say)
    say(f"wrote {out}")


def carry_out(
    recipe: Recipe,
    out: Path,
    options: MergeOptions,
    audited: bool,
    say: Callable[[str], None],
    show: Callable[[MergePlan], object] = lambda _plan: None,
) -> None:
    """Merge, audit, and put the folder at `out` once all is well; what is there is replaced. The caller has claimed it.

    say: told what the audit found, a line each. show: given the plan once it is checked. Raises `BadInput` and
    `AuditFailed`.
    """
    with new_folder(out) as work:
        _merge(recipe, out, work, options, audited, say, show)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Inside the block a folder beside `out`, in which `out.name` is made; at its end that is put at `out`, in place of
    what was there. The caller has claimed it."""
    with explained(out), _workplace(out) as work:
        yield work
        if os.path.exists(out):
            os.replace(out, work / REPLACED)
        os.replace(work / out.name, out)


def _dry_run(recipe: Recipe, out: Path, options: MergeOptions) -> None:
    from mergekit_wp.merge.checks import check_plan, check_room, size_text
    from mergekit_wp.merge.plan import WP, MergePlan

    recipe.prepare(options, merge_loras=False)
    plan = recipe.plan(out, options)
    check_plan(MergePlan(plan.tensors, plan.checkpoints, None))
    check_room(plan.nbytes(), out, touch=False)
    if plan.method == WP:
        echo_lines(shares_table(plan))
    else:
        echo(f"merge_method {plan.method}: {len(plan.tensors)} tensors of {len(plan.checkpoints)} models.")
    echo(f"all checks passed; the merge would write {size_text(plan.nbytes())} to {out}. Nothing was written.")


def _merge(
    recipe: Recipe,
    out: Path,
    work: Path,
    options: MergeOptions,
    audited: bool,
    tell: Callable[[str], None],
    show: Callable[[MergePlan], object],
) -> None:
    """Merge into work/<name of out>, and audit it there."""
    from mergekit.merge import run_merge

    from mergekit_wp.merge.audit import AuditFailed, audit
    from mergekit_wp.merge.certificate import write_certificate
    from mergekit_wp.merge.checks import check_plan
    from mergekit_wp.merge.outcome import settle

    if options.lora_merge_cache is None:
        options = options.model_copy(update={"lora_merge_cache": str(work / "loras")})
    recipe.prepare(options, merge_loras=True)
    plan = recipe.plan(work / out.name, options)
    check_plan(plan)
    show(plan)
    # Under the name that it will have: the model card quotes it.
    too_much = f"the merge does not fit into the memory of {options.device}; " + (
        "use a machine with more." if options.device == "cpu" else "leave --cuda and --device out."
    )
    with enough_memory(too_much):
        run_merge(recipe.config(), str(work / out.name), options, config_source=recipe.text)
    if options.copy_tokenizer:
        _check_tokenizer(recipe, plan, work / out.name, out)
    if recipe.config().base_model is not None:
        _copy_generation_config(plan, work / out.name)
    settle(work / out.name, plan)
    if not audited:
        return
    if not options.safe_serialization:
        tell("audit: skipped, because --no-safe-serialization writes pickled weights, which are never opened.")
        return
    checked: list[str] = []

    def say(line: str) -> None:
        tell(line)
        checked.append(line)

    try:
        audit(work / out.name, plan, seed=options.random_seed or 0, say=say)
    except AuditFailed as error:
        rejected = _free_name(out)
        os.replace(work / out.name, rejected)
        raise AuditFailed(
            f"{error.message.replace(str(work / out.name), str(rejected))} It is kept there for inspection; "
            f"{out} was not written."
        ) from error
    write_certificate(work / out.name, plan, checked)


def _free_name(out: Path) -> Path:
    """OUT.rejected, or OUT.rejected-2 and so on where that is taken, by whatever it may be."""
    name, number = out.with_name(f"{out.name}.rejected"), 1
    while os.path.lexists(name):
        number += 1
        name = out.with_name(f"{out.name}.rejected-{number}")
    return name


def _check_tokenizer(recipe: Recipe, plan: MergePlan, merged: Path, out: Path) -> None:
    """mergekit only logs that it could not copy the tokenizer, and calls the merge a success. Raises `BadInput`."""
    from mergekit_wp.checkpoint.vocabulary import has_tokenizer

    first = plan.tensors[0]
    # Without a base it takes that of any model.
    donors = [first.base] if recipe.config().base_model is not None else list(plan.checkpoints)
    if not has_tokenizer(merged) and all(has_tokenizer(plan.tokenizer_folder(donor)) for donor in donors):
        raise BadInput(
            f"{out}: mergekit could not copy the tokenizer of {donors[0]}; see that transformers loads it, or leave it "
            "out with --no-copy-tokenizer. Nothing was written."
        )


def _copy_generation_config(plan: MergePlan, merged: Path) -> None:
    """mergekit leaves it out when the recipe has a `tokenizer:`; the merged model is the base's in this too."""
    original = plan.checkpoints[plan.tensors[0].base].folder / "generation_config.json"
    if original.is_file() and not (merged / original.name).exists():
        shutil.copy(original, merged / original.name)


def refuse_existing(out: Path, overwrite: bool) -> None:
    if os.path.isdir(out) and any(out.iterdir()) and not overwrite:
        raise BadInput(f"{out}: exists and is not empty; name another folder, or add --overwrite to replace it.")


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A folder beside `out`, on the same disk, gone at the end whatever happens."""
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    work.chmod(0o755)
    try:
        yield work
    finally:
        put_back(work, out)
        shutil.rmtree(work, ignore_errors=True)


def shares_table(plan: MergePlan) -> str:
    """Which expert carries which layer: the mean share (of a fit: weight) over the heads and the neurons of each."""
    from mergekit_wp.geometry import layer_of, slot_of

    rows: dict[tuple[int, int], dict[str, PlannedTensor]] = {}
    for tensor in plan.tensors:
        slot, to = slot_of(tensor.source), layer_of(tensor.output)
        if slot is not None and to is not None:
            # Filters may weigh tensors of a layer differently: the first of a kind (q_proj, gate_proj) stands for it.
            rows.setdefault((to, slot.layer), {}).setdefault(slot.shares[0], tensor)
    lines: list[str] = []
    shown: object = None
    for (to, source), kinds in sorted(rows.items()):
        heads, neurons = kinds["head"], kinds["neuron"]
        if shown != heads.experts:
            shown = heads.experts
            names = [Path(str(expert)).name[-18:] for expert in heads.experts]
            width = max(9, *(len(name) + 2 for name in names))
            header = "".join(name.rjust(width) for name in names)
            lines += ["", f"{'layer':<12}{'heads'.ljust(len(header))}  neurons", f"{'':<12}{header}  {header}"]
        alpha_KH, _ = plan.layer_weights(heads, source)
        _, alpha_KF = plan.layer_weights(neurons, source)
        cells = [
            "".join(f"{x:.3f}".rjust(width) for x in alpha_Kn.mean(-1).tolist()) for alpha_Kn in (alpha_KH, alpha_KF)
        ]
        label = str(to) if to == source else f"{to} (from {source})"
        lines.append(f"{label:<12}{cells[0]}  {cells[1]}")
    if fit := plan.tensors[0].fit:
        rest_K = plan.rest_weights(plan.tensors[0])
        names = [Path(str(expert)).name for expert in plan.tensors[0].experts]
        lines += ["", "all else: " + ", ".join(f"{name} {x:.3f}" for name, x in zip(names, rest_K, strict=True))]
        title = f"mean weight of each expert by {fit} (1: all that the expert changed)"
    else:
        title = "mean share of each expert (shares of a component sum to 1)"
    return "\n".join([title, *lines[1:], ""])


if __name__ == "__main__":
    main()
