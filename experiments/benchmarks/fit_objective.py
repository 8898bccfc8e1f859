"""What does the fit owe to its objective? One thing of it changed at a time, on validation items of a miniature world.

    python -m experiments.benchmarks.fit_objective runs/worlds/023a35260726 --out runs/objective --allow-code-execution

    own answers     wp-fit's defaults: experts' own answers, the loss in shares of the gaps, weights free in [0, 2]
    right answers   along the right answers in the place of the experts' own: labels, which the fit does without
    no division     KL in nats: the expert with the largest gap has the most to say
    near the start  a weight that has moved by 0.1 (or 0.3) is drawn back as hard as the first step's gradient pulls at
                    its largest, so that only what the prompts insist on moves far
    sum of start    the weights of a component keep the sum over the experts that they had at the start: who carries it
                    is fitted, how much of it is not
    other draws     the defaults with other seeds: other prompts held out, other prompts in a step

The last row says what of the others is the luck of a draw. A fit takes about a minute on a core, a grading half of one;
what is in --out is not done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import torch

from experiments.miniature.corpus import CAPABILITIES, scoring_items
from experiments.miniature.items import Item
from experiments.miniature.world import scoring_row
from experiments.table3.work import Grading, MergeJob, fit_job, grade_model, prepare, read_grade, write_answers
from mergekit_wp.files import write_text
from mergekit_wp.fit import fit as fitting
from mergekit_wp.fit.descent import Descent
from mergekit_wp.fit.job import FitJob
from mergekit_wp.fit.objective import Lesson
from mergekit_wp.fit_file import MOST, write_fit
from mergekit_wp.pipeline.steps import build_recipe

TOKENS = FitJob.answer_tokens
Answers = Mapping[str, Path]
Replacement = AbstractContextManager[object]


@dataclass(frozen=True)
class Change:
    """One row: `right` answers in the place of own ones, and what else of the fit is replaced while it runs."""

    name: str
    right: bool = False
    replaced: Callable[[], Replacement] = nullcontext
    seed: int = 0


def undivided() -> Replacement:
    """Lessons whose gap is one nat, so that shares of it are nats."""
    read = fitting.read_teachers

    def in_nats(*args: object) -> list[Lesson]:
        return [replace(lesson, gap=1.0) for lesson in read(*args)]  # type: ignore[arg-type]

    return mock.patch.object(fitting, "read_teachers", in_nats)


class TiedDescent(Descent):
    """A descent that is drawn back to its start: as hard as the first gradient's largest entry, `near` from it."""

    def __init__(self, number_P: torch.Tensor, *rest: object, near: float) -> None:
        super().__init__(number_P, *rest)  # type: ignore[arg-type]
        self.first_P, self.largest, self.near = number_P.clone(), 0.0, near

    def advance(self, loss: float, gradient_P: torch.Tensor) -> None:
        self.largest = self.largest or float(gradient_P.abs().max())
        back_P = self.largest * (self.number_P.detach() - self.first_P) / self.near
        super().advance(loss, gradient_P + back_P)


class SummedDescent(Descent):
    """A descent along which the experts' numbers of a component keep their sum; one expert's lie after another's."""

    def __init__(self, number_P: torch.Tensor, *rest: object) -> None:
        super().__init__(number_P, *rest)  # type: ignore[arg-type]
        self.sum_C = number_P.view(len(CAPABILITIES), -1).sum(0)

    def advance(self, loss: float, gradient_P: torch.Tensor) -> None:
        of_experts = gradient_P.view(len(CAPABILITIES), -1)
        super().advance(loss, (of_experts - of_experts.mean(0)).flatten())
        with torch.no_grad():
            number_KC = self.number_P.view(len(CAPABILITIES), -1)
            number_KC -= (number_KC.sum(0) - self.sum_C) / len(CAPABILITIES)
            number_KC.clamp_(0, MOST)  # a sum is missed where that cuts


def descending(kind: Callable[..., Descent]) -> Callable[[], Replacement]:
    return lambda: mock.patch.object(fitting, "Descent", kind)


CHANGES = (
    Change("own answers"),
    Change("right answers", right=True),
    Change("no division", replaced=undivided),
    *(Change(f"near the start, {near}", replaced=descending(partial(TiedDescent, near=near))) for near in (0.1, 0.3)),
    Change("sum of start", replaced=descending(SummedDescent)),
    *(Change(f"other draws, seed {seed}", seed=seed) for seed in (1, 2)),
)


def right_answers(world: Path, expert: str, own: Path, file: Path) -> Path:
    """The right answers to the scoring prompts, cut to as many tokens, as if the expert had said them."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads((world / "world.json").read_text(encoding="utf-8"))["config"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(world / expert)
    rows = [own.read_text(encoding="utf-8").splitlines()[0]]
    for item in scoring_items(expert, config["scoring_prompts"], config["seed"]):
        row = scoring_row(item, tokenizer)
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        answer = _rest(item, row["prompt"], tokenizer)[:TOKENS]
        said = {"task": row["task"], "prompt": prompt, "answer": answer, "text": tokenizer.decode(answer)}
        rows.append(json.dumps(said))
    write_text(file, "\n".join(rows) + "\n")
    return file


def _rest(item: Item, prompt: str, tokenizer: Callable[..., Mapping[str, Sequence[int]]]) -> list[int]:
    """What of the right answer follows the prompt, which may have its beginning, and the end token."""
    whole = tokenizer(item.right, add_special_tokens=False)["input_ids"]
    begun = tokenizer(prompt.removeprefix(item.prompt), add_special_tokens=False)["input_ids"]
    assert list(whole[: len(begun)]) == list(begun), "the prompt has no beginning of the right answer"
    return [*whole[len(begun) :], tokenizer.eos_token_id]  # type: ignore[attr-defined]


def right_share(world: Path, change: Change, own: Answers, right: Answers, out: Path, allow_code: bool) -> float:
    """Fit, merge and grade; percent right on validation items, the mean over the capabilities."""
    name = change.name.replace(",", "").replace(" ", "-")
    result, file = out / f"{name}.json", (out / f"{name}.safetensors").absolute()
    if (grade := read_grade(result, "validation")) is None:
        job = fit_job(world, CAPABILITIES, {"seed": change.seed}, right if change.right else own)
        with change.replaced():
            write_fit(fitting.fit(job), file)
        listed: dict[str, dict[str, object]] = {str(world / expert): {} for expert in CAPABILITIES}
        recipe = build_recipe("wp", str(world / "base"), listed, shared={"fit": str(file)}, out_dtype="bfloat16")
        merging = MergeJob(recipe, out / f"{name}.yaml", out / name, 0, False)
        task = Grading(result, merging, world, "validation", CAPABILITIES, out / "cache", allow_code, {"row": name})
        grade = grade_model(task)
    return 100 * grade.mean(CAPABILITIES)


@click.command()
@click.argument("world", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--allow-code-execution", "allow_code", is_flag=True, help="Run Python that the models write.")
def main(world: Path, out: Path, allow_code: bool) -> None:
    """Print a Markdown table."""
    prepare()
    world = world.absolute()
    out.mkdir(parents=True, exist_ok=True)
    own = {name: out / f"own-{name}.jsonl" for name in CAPABILITIES}
    for name, file in own.items():
        if not file.is_file():
            write_answers(world, name, TOKENS, file)
    right = {name: right_answers(world, name, own[name], out / f"right-{name}.jsonl") for name in CAPABILITIES}
    click.echo(f"| {world.name}, all three experts, validation items | right, % |\n|---|---:|")
    for change in CHANGES:
        click.echo(f"| {change.name} | {right_share(world, change, own, right, out, allow_code):.1f} |")


if __name__ == "__main__":
    main()
