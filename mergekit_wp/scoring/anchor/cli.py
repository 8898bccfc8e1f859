"""wp-anchor: write a task's anchor direction to a file of its own, for steering.

    .safetensors   direction [D] and alpha [], float32; JSON metadata `wp_anchor`: task, layer, hookpoint, models
    .pt            the file that lm-eval's `steered` model reads: its action `clamp` is Eq. 37 at every position

Heavy packages are imported inside the command, so that `wp-anchor --help` answers at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_wp import __version__
from mergekit_wp.console import GroupedCommand, quiet_option
from mergekit_wp.errors import BadInput, enough_memory
from mergekit_wp.files import atomic_path
from mergekit_wp.foreign import echo, echo_lines
from mergekit_wp.outputs import check_file, claim

if TYPE_CHECKING:
    import torch

    from mergekit_wp.scores import Scores

_GROUPS = {
    "Which Direction": ("task",),
    "Output Settings": ("out", "format"),
    "Dangerous Options": ("allow_code_execution",),
}
METADATA_KEY = "wp_anchor"
_SUFFIXES = {".safetensors": "safetensors", ".pt": "pt", ".pth": "pt"}
_EPILOG = """\b
Examples:
  wp-anchor scores/lm.safetensors --task title --out title.safetensors
  wp-anchor scores/lm.safetensors --task title --out title.pt
  lm_eval --model steered --model_args pretrained=BASE,steer_path=title.pt --tasks ifeval

lm-eval steers every token, the answer's too. A direction that says how an answer begins (a title, a quotation mark)
then begins it again and again; --layer auto therefore steers the prompt alone.

From a JOB.yaml of wp-score, only the directions are computed, and the anchor layer if the job says `layer: auto`.
"""


@dataclass(frozen=True)
class Anchor:
    """One direction: `direction_D` as found, not of unit length; `alpha` the expert's mean projection on its unit."""

    task: str
    layer: int
    alpha: float
    direction_D: torch.Tensor
    base: str
    expert: str

    @property
    def hookpoint(self) -> str:
        """Where lm-eval finds the layer, whose output is steered: a module of the model's `base_model`."""
        return f"layers.{self.layer}"


@click.command(cls=GroupedCommand, groups=_GROUPS, epilog=_EPILOG)
@click.argument("source", metavar="SCORES.safetensors|JOB.yaml", type=click.Path())
@click.option("--task", help="Which task's direction (needed where there are several).")
@click.option("--out", required=True, metavar="FILE", help="File to write: .safetensors, or .pt for lm-eval.")
@click.option("--format", type=click.Choice(["safetensors", "pt"]), help="Format (default: by the suffix of --out).")
@click.option("--allow-code-execution", is_flag=True, help="With layer: auto, run programs that the models write.")
@quiet_option()
@click.version_option(__version__)
def main(source: str, task: str | None, out: str, format: str | None, allow_code_execution: bool, quiet: bool) -> None:
    """Write the anchor direction of one task to a file of its own.

    The base, held at alpha along it after the anchor layer, does what the expert does. There is no mean over tasks:
    it would be the direction of none.
    """
    kind = format or _SUFFIXES.get(Path(out).suffix)
    if kind is None:
        raise BadInput(f"--out {out}: expected a name that ends in .safetensors or .pt; rename it, or give --format.")
    if _SUFFIXES.get(Path(out).suffix, kind) != kind:
        raise BadInput(f"--out {out}: --format {kind} writes no such file; name one that ends in .{kind}.")
    target = check_file(out, METADATA_KEY if kind == "safetensors" else None, "direction", [source])
    claim(target)
    if Path(source).suffix in (".yaml", ".yml"):
        found = _from_job(source, task, allow_code_execution, quiet)
    else:
        found = _from_scores(source, task)
    (write_pt if kind == "pt" else write_safetensors)(found, target)
    if not quiet:
        echo(f"Task {found.task}, {found.hookpoint}, alpha {found.alpha:.4g}; written: {out}", err=True)


def write_safetensors(anchor: Anchor, path: Path) -> None:
    """Write the file atomically. Raises `BadInput` when the folder cannot be written."""
    import torch
    from safetensors.torch import save_file

    about = {name: value for name, value in asdict(anchor).items() if name not in ("direction_D", "alpha")}
    about["hookpoint"] = anchor.hookpoint
    tensors = {"direction": anchor.direction_D.float().contiguous(), "alpha": torch.tensor(anchor.alpha)}
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})


def write_pt(anchor: Anchor, path: Path) -> None:
    """Write the file that lm-eval's steered model reads, atomically; nothing here ever reads one."""
    import torch

    steering = {
        "action": "clamp",
        "steering_vector": anchor.direction_D.float().contiguous(),  # lm-eval brings it to unit length
        "steering_coefficient": anchor.alpha,
        "bias": None,
        "head_index": None,
    }
    with atomic_path(path) as partial:
        torch.save({anchor.hookpoint: steering}, partial)


def _from_scores(path: str, task: str | None) -> Anchor:
    from mergekit_wp.scores import read_scores

    return anchor_of(read_scores(path), task, path)


def anchor_of(scores: Scores, task: str | None, where: str) -> Anchor:
    """The direction of a task (None: of the only one) that scores were read along; `where` names them in errors.

    Raises `BadInput` when there is no such task, or none was read along a direction.
    """
    name = _choose(task, list(scores.tasks), where)
    meta, alpha, direction_D = scores.meta, scores.meta.tasks[name].alpha, scores.tasks[name].anchor
    if meta.anchor_layer is None or direction_D is None:
        raise BadInput(
            f"{where}: its scores, by {meta.utility}, were read along no direction; give the JOB.yaml that it was made "
            "of, or score with --utility anchor."
        )
    if alpha is None:
        raise BadInput(f"{where}: this score file is from before alpha was kept; make it again with wp-score.")
    return Anchor(name, meta.anchor_layer, alpha, direction_D, meta.base.name, meta.expert.name)


def _from_job(path: str, task: str | None, allow_code_execution: bool, quiet: bool) -> Anchor:
    from mergekit_wp.checkpoint.vocabulary import load_tokenizer
    from mergekit_wp.console import ProgressBars, no_progress, take_terminal
    from mergekit_wp.scoring.anchor.search import check_graders, locate
    from mergekit_wp.scoring.batching import check_rows, tokenize_tasks
    from mergekit_wp.scoring.config import load_job
    from mergekit_wp.scoring.models.load import check_pair, load_pair
    from mergekit_wp.scoring.pairs import load_pairs, split_pairs
    from mergekit_wp.scoring.prompt_format import prompt_format_of
    from mergekit_wp.scoring.score import anchor_layer, search_of

    take_terminal(not quiet)
    job = load_job(path, {"allow_code_execution": True} if allow_code_execution else {})
    checked = check_pair(job)
    depth, auto = checked.base.geometry.layers, job.layer == "auto"
    asked = None if auto else anchor_layer(job.layer, depth)
    if job.utility == "projection":
        asked = depth - 1
    pairs = split_pairs(load_pairs(job.pairs, job.samples, job.seed), job.split, job.seed)
    name = _choose(task, [each.task for each in pairs], path)
    # The layer that wp-score would choose is a choice over all tasks.
    pairs = [each for each in pairs if auto or each.task == name]
    tokenizer = load_tokenizer(checked.base.name, checked.base.folder, job.trust_remote_code)
    prompt_format = prompt_format_of(job, checked.base, checked.expert, tokenizer, pairs)
    tasks = tokenize_tasks(prompt_format, pairs, checked.context_limit)
    check_rows((ids for each in tasks for ids in each.prompts), tokenizer, checked.vocabulary)
    search = search_of(job, depth)
    if auto:
        check_graders(tasks, search)
    pair = load_pair(job, checked)
    too_much = f"batch_size: {job.batch_size} prompts do not fit on {pair.device}; lower it."
    with enough_memory(too_much), ProgressBars(not quiet) as progress:
        start = progress or no_progress
        layer, directions, curve = locate(pair.base, pair.expert, tokenizer, tasks, asked, search, start=start)
    if curve is not None and not quiet:
        echo_lines(curve.summary(), err=True)
    found = directions[[each.task for each in tasks].index(name)]
    return Anchor(name, layer, float(found.alpha_L[layer]), found.v_LD[layer].cpu(), job.base, job.expert)


def _choose(task: str | None, names: list[str], where: str) -> str:
    if task is None and len(names) == 1:
        return names[0]
    if task not in names:
        asked = "no task was named" if task is None else f"it has no task {task!r}"
        raise BadInput(f"{where}: {asked}; give --task with one of {', '.join(names)}.")
    return task


if __name__ == "__main__":
    main()
