"""wp-patch: one model with a set of heads and neurons of another, as a model folder, a LoRA or a small file of slices.

The folder is a merge by `merge_method: wp_patch`, made, audited and put in its place as wp-merge does it.

Heavy packages are imported inside the command, so that `wp-patch --help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_wp import __version__
from mergekit_wp.choices import RANKS
from mergekit_wp.console import GroupedCommand, check_safetensors_name, percent, quiet_option, say_nothing
from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import echo_lines
from mergekit_wp.merge import register
from mergekit_wp.outputs import check_file, claim, refuse_inputs, scratch

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_wp.merge.plan import MergePlan
    from mergekit_wp.merge.recipe import Recipe

_GROUPS = {
    "Set of Components": ("top", "task", "rank", "layers", "components", "remove", "patch"),
    "Output Settings": ("out", "as_lora", "sparse", "overwrite", "audited", "dry_run", "quiet"),
    "Checks": ("allow_mismatch",),
}

_EPILOG = """\b
Examples:
  wp-patch ./base ./maths scores/maths.safetensors --top 5% --out restored
  wp-patch ./base ./maths scores/maths.safetensors --top 5% --remove --out removed
  wp-patch ./base ./maths scores/m.safetensors --top heads=20,neurons=1000 --task title --out restored
  wp-patch ./base ./maths --components components.txt --out restored
  wp-patch ./base ./maths scores/maths.safetensors --top 1% --sparse --out maths.safetensors
  wp-patch ./base --apply maths.safetensors --out restored
  wp-patch ./base ./maths scores/maths.safetensors --top 5% --as-lora 32 --out lora

The folder holds its recipe (mergekit_config.yml): merge_method wp_patch, for mergekit-yaml and wp-merge, which has
more options.
"""


@click.command("wp-patch", cls=GroupedCommand, groups=_GROUPS, epilog=_EPILOG)
@click.argument("base", metavar="BASE")
@click.argument("expert", metavar="[EXPERT", required=False)
@click.argument("scores", metavar="[SCORES]]", required=False)
@click.option("--top", metavar="5%|N|heads=N,neurons=N", help="The highest heads and neurons of SCORES: how many.")
@click.option("--task", metavar="NAME", help="Of which task; needed where SCORES has several, or --rank.")
@click.option("--rank", type=click.Choice(RANKS), help="By what they rank (default: the task's own scores).")
@click.option("--layers", metavar="0-5,7", help="Components of these layers alone.")
@click.option("--components", metavar="all|heads|neurons|FILE", help="Of this kind, or this list, alone.")
@click.option("--remove", is_flag=True, help="Write EXPERT with BASE's components, not BASE with EXPERT's.")
@click.option("--apply", "patch", metavar="FILE", help="In the place of EXPERT: slices that --sparse wrote for BASE.")
@click.option("--out", metavar="DIR|FILE", help="Folder to write; with --sparse, the file.")
@click.option("--as-lora", type=click.IntRange(1), metavar="R", help="Write a LoRA of rank R, and say what it loses.")
@click.option("--sparse", is_flag=True, help="Write the set's slices alone, as one small file for --apply.")
@click.option("--overwrite", is_flag=True, help="Replace the folder that is there.")
@click.option("--audit/--no-audit", "audited", default=True, show_default=True, help="Check the patched model.")
@click.option("--dry-run", is_flag=True, help="Run all checks, print the set and its size, write nothing.")
@click.option("--allow-mismatch", is_flag=True, help="Take files that were made for other models.")
@quiet_option()
@click.version_option(__version__)
def main(
    base: str,
    expert: str | None,
    out: str | None,
    as_lora: int | None,
    sparse: bool,
    overwrite: bool,
    audited: bool,
    dry_run: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Write BASE with a set of EXPERT's attention heads and MLP neurons, the best of SCORES or a list of your own; with
    --remove, EXPERT with BASE's.

    Every patched row and column is the donor's, bit for bit, everything else the recipient's. Keys, values, norms,
    embeddings and the output head belong to no component and stay the recipient's.
    """
    if expert is None and asked["patch"] is None:
        raise click.UsageError("Missing argument 'EXPERT' (only --apply goes without).")
    if out is None:
        if not dry_run:
            raise click.UsageError("Missing option '--out' (only --dry-run goes without).")
        out = "patched.safetensors" if sparse else "patched"
    forms = ["--sparse"] * sparse + ["--as-lora"] * (as_lora is not None)
    if asked["patch"] is not None and (expert is not None or forms):
        what = forms[0] if expert is None else f"the expert {expert}"
        raise BadInput(f"--apply {asked['patch']}: has slices and a recipient of its own; leave {what} out.")
    if len(forms) > 1:
        raise BadInput("--sparse, --as-lora: two forms of one set; ask for one of them.")
    register()
    recipient, donor = (expert or base, base) if asked["remove"] else (base, expert or base)
    recipe = _recipe(out, recipient, donor, asked)
    work = _Work(recipe, out, dry_run, say_nothing if quiet else echo_lines)
    if as_lora is not None:
        work.write_lora(recipient, as_lora, overwrite)
    elif sparse:
        work.write_slices(recipient, donor)
    else:
        work.write_model(overwrite, audited)


def _recipe(out: str, recipient: str, donor: str, asked: Mapping[str, Any]) -> Recipe:
    """The recipe that says the same. Raises `BadInput`."""
    import yaml

    from mergekit_wp.checkpoint.hub import score_file
    from mergekit_wp.merge.recipe import read_recipe

    given = {name: value for name, value in asked.items() if value not in (None, False)}
    if "scores" in given:
        given["scores"] = str(score_file(given["scores"]))
    content = {
        "merge_method": "wp_patch",
        "base_model": recipient,
        "models": [{"model": donor}],
        "parameters": given,
    }
    return read_recipe(f"{out}, recipe", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


@dataclass(frozen=True)
class _Work:
    """One patch, and where it goes; `say` is told a line or a few of what is done."""

    recipe: Recipe
    out: str
    dry_run: bool
    say: Callable[[str], None]

    def write_model(self, overwrite: bool, audited: bool) -> None:
        """As wp-merge writes a folder."""
        from mergekit.options import MergeOptions

        from mergekit_wp.merge.cli import carry_out, refuse_existing

        target = Path(self.out).absolute()
        refuse_inputs(target, self.recipe.reads())
        options = MergeOptions(quiet=True)
        if self.dry_run:
            self._plan(target, options)
            return
        claim(target)  # which may put back what a killed run had moved away
        refuse_existing(target, overwrite)
        carry_out(self.recipe, target, options, audited, self.say, show=lambda plan: self.say(about(plan)))
        self.say(f"wrote {target}")

    def write_lora(self, recipient: str, rank: int, overwrite: bool) -> None:
        """The adapter's folder, and what of the change it loses; the recipient by the name that was given."""
        from mergekit.options import MergeOptions

        from mergekit_wp.merge.as_lora import loss_table, low_rank, write_adapter
        from mergekit_wp.merge.checks import size_text
        from mergekit_wp.merge.cli import new_folder, refuse_existing

        target = Path(self.out).absolute()
        refuse_inputs(target, self.recipe.reads())
        if self.dry_run:
            self._plan(target, MergeOptions(quiet=True))
            return
        claim(target)  # as above
        refuse_existing(target, overwrite)
        with new_folder(target) as work:
            plan = self._plan(target, MergeOptions(quiet=True, lora_merge_cache=str(work / "loras")))
            found, geometry = low_rank(plan, rank), plan.checkpoints[plan.tensors[0].base].geometry
            made, table = work / target.name, loss_table(found)
            write_adapter(found, made, recipient, geometry, [about(plan).splitlines()[0] + ".", "```", table, "```"])
            size = sum(file.stat().st_size for file in made.iterdir())
        self.say(table)
        whole = plan.nbytes()
        self.say(f"wrote {target}: {size_text(size)}, {percent(size / whole, 2)} of the model's {size_text(whole)}")

    def write_slices(self, recipient: str, donor: str) -> None:
        """The patch file, and how large it is beside the model; the models by the names that were given."""
        from mergekit.options import MergeOptions

        from mergekit_wp.merge.checks import size_text
        from mergekit_wp.merge.cut import cut
        from mergekit_wp.merge.patch_file import METADATA_KEY, write_patch

        check_safetensors_name("--out", self.out)
        target = check_file(self.out, METADATA_KEY, "patch", self.recipe.reads())
        if not self.dry_run:
            claim(target)
        with scratch("wp-lora-") as folder:
            plan = self._plan(target, MergeOptions(quiet=True, lora_merge_cache=str(folder)))
            if self.dry_run:
                return
            write_patch(cut(plan, recipient, donor), target)
        size, whole = os.path.getsize(target), plan.nbytes()
        self.say(f"wrote {target}: {size_text(size)}, {percent(size / whole, 2)} of the model's {size_text(whole)}")

    def _plan(self, out: Path, options: MergeOptions) -> MergePlan:
        """What is to be done, checked and said. Raises `BadInput`."""
        from dataclasses import replace

        from mergekit_wp.merge.checks import check_plan

        self.recipe.prepare(options, merge_loras=not self.dry_run)
        plan = replace(self.recipe.plan(out, options), out=None)
        check_plan(plan)
        self.say(about(plan))
        if self.dry_run:
            self.say("all checks passed. Nothing was written.")
        return plan


def about(plan: MergePlan) -> str:
    """The set and its size, and where there is a ranking what of it fits into how much of the model."""
    from mergekit_wp.merge.chosen import chosen, ranking_of
    from mergekit_wp.merge.patch_size import Sizes, budget_table, size_line

    first = plan.tensors[0]
    geometry, sizes = plan.checkpoints[first.base].geometry, Sizes.of(plan)
    lines = [size_line(chosen(first.parameters, geometry), sizes, geometry)]
    if (ranking := ranking_of(first.parameters)) is not None:
        lines.append(budget_table(ranking, sizes))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
