"""Which changes of the paper's fusion rule earn their place? Merges in memory, graded on validation items alone.

    python experiments/benchmarks/rules.py runs/worlds/<seed 0> runs/worlds/<seed 1>  # 20 minutes, one quiet core

Every rule merges the experts of the four combinations of Table 3 in every world; a number is the mean over the
capabilities that are merged, in percent right. What a rule may change, one or more at a time:

    scale      the task vector is multiplied                       power    s+^power in the place of s+
    shrink     so much of the way back to 1/K                      norm     each expert's scores divided by their mean
    fallback   where no expert scores: `base` instead of 1/K       utility  of the scores (writeback); `layer` too
    elect      per weight, the sign of the merge is elected and only updates that agree count (TIES, with wp's shares)
    keep       first only so large a part of each update, the largest weights
    order      the experts' weights have so large a norm of this order 1 at each component (1: they sum to 1; inf: the
               best expert's update is taken whole, the others' in proportion to their scores)
    draws      scores are means over so many draws of prompts, and `error` shrinks shares to 1/K where experts differ
               by no more than the error of those means
    omega      AIM after the merge, calibrated on 256 texts as the base was trained on (1: no AIM)

`scale` is an option of `merge_method: wp`; the others were dropped on what this printed (RESULTS.md).
"""

from __future__ import annotations

import json
import math
import os
import random
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import torch
import transformers

from experiments.miniature.corpus import CAPABILITIES as NAMES
from experiments.miniature.corpus import training_texts
from experiments.miniature.grading import grade
from mergekit_wp.calibrate import cut, mean_inputs
from mergekit_wp.geometry import Geometry, slot_of
from mergekit_wp.scores import Scores, read_scores, write_scores
from mergekit_wp.scoring.anchor.graders import cut as cut_answer
from mergekit_wp.scoring.batching import batches
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.greedy import Greedy, generate_answers
from mergekit_wp.scoring.models.layerwise import ResidentStack
from mergekit_wp.scoring.prompt_format import PromptFormat
from mergekit_wp.scoring.score import score

CAPABILITIES = ("instruction", "maths", "code")
COMBINATIONS = (("code", "instruction"), ("code", "maths"), ("instruction", "maths"), CAPABILITIES)
UNTIL = ("Request:",)
INF = math.inf
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rule:
    name: str
    utility: str = "staged"
    method: str = "writeback"
    layer: int | None = None
    scale: float = 1.0
    power: float = 1.0
    shrink: float = 0.0
    norm: bool = False
    base_fallback: bool = False
    average: bool = False
    omega: float = 1.0
    elect: bool = False
    keep: float = 1.0
    order: float = 1.0
    draws: int = 1
    error: bool = False

    def equal(self, experts: int) -> float:
        """The weight of each of so many experts where their scores are equal, or where there are none."""
        return float(experts ** (-1 / self.order))


PAPER = Rule("wp, writeback staged")
RULES = (
    Rule("average", average=True),
    Rule("average, scale 1.5", average=True, scale=1.5),
    Rule("average, scale 2", average=True, scale=2.0),
    Rule("wp, attr anchor (the paper)", utility="anchor", method="attr"),
    PAPER,
    Rule("wp, writeback kl", utility="kl"),
    replace(PAPER, name="power 2", power=2.0),
    replace(PAPER, name="norm", norm=True),
    replace(PAPER, name="shrink 0.25", shrink=0.25),
    replace(PAPER, name="fallback base", base_fallback=True),
    Rule("sum (task arithmetic)", average=True, order=INF),
    replace(PAPER, name="order 2", order=2.0),
    replace(PAPER, name="order inf", order=INF),
    replace(PAPER, name="order inf, power 0.5", order=INF, power=0.5),
    replace(PAPER, name="order inf, power 2", order=INF, power=2.0),
    replace(PAPER, name="order inf, shrink 0.5", order=INF, shrink=0.5),
    replace(PAPER, name="order 2, scale 1.25", order=2.0, scale=1.25),
    replace(PAPER, name="order 2, kl", order=2.0, utility="kl"),
    replace(PAPER, name="order inf, kl", order=INF, utility="kl"),
    replace(PAPER, name="order inf, kl, scale 0.7", order=INF, utility="kl", scale=0.7),
    replace(PAPER, name="order inf, kl, scale 0.7, power 0.5", order=INF, utility="kl", scale=0.7, power=0.5),
    replace(PAPER, name="scale 1.25, kl, shrink 0.5", scale=1.25, utility="kl", shrink=0.5),
    replace(PAPER, name="scale 1.25, kl", scale=1.25, utility="kl"),
    replace(PAPER, name="scale 1.5", scale=1.5),
    replace(PAPER, name="scale 1.75", scale=1.75),
    replace(PAPER, name="scale 2", scale=2.0),
    replace(PAPER, name="scale 1.5, power 2", scale=1.5, power=2.0),
    replace(PAPER, name="scale 1.5, shrink 0.25", scale=1.5, shrink=0.25),
    replace(PAPER, name="scale 1.5, kl", scale=1.5, utility="kl"),
    replace(PAPER, name="elect", elect=True),
    replace(PAPER, name="elect, scale 1.25", elect=True, scale=1.25),
    replace(PAPER, name="elect, scale 1.5", elect=True, scale=1.5),
    replace(PAPER, name="elect, scale 1.25, keep 0.5", elect=True, scale=1.25, keep=0.5),
    Rule("average, elect", average=True, elect=True),
    Rule("average, elect, scale 1.25", average=True, elect=True, scale=1.25),
    replace(PAPER, name="4 draws", draws=4),
    replace(PAPER, name="4 draws, scale 1.75", draws=4, scale=1.75),
    replace(PAPER, name="4 draws, shrunk by their error", draws=4, error=True),
    replace(PAPER, name="4 draws, shrunk by their error, scale 1.75", draws=4, error=True, scale=1.75),
    *(
        replace(rule, name=f"{rule.name}, aim {omega}", omega=omega)
        for rule in (
            Rule("average", average=True),
            Rule("average, scale 2", average=True, scale=2.0),
            PAPER,
            replace(PAPER, name="scale 1.75", scale=1.75),
        )
        for omega in (0.4, 0.8)
    ),
)


class World:
    """Base and experts in float32, score files, and the validation items of a trained miniature."""

    def __init__(self, folder: Path, scores: Path):
        self.folder, self.scores = folder, scores / folder.name
        self.model = self._load("base")
        self.base: State = {name: tensor.float().clone() for name, tensor in self.model.state_dict().items()}
        self.experts = {
            expert: {
                # An expert with an added token is cut to the base's rows.
                name: tensor.float()[: self.base[name].shape[0]]
                for name, tensor in self._load(expert).state_dict().items()
            }
            for expert in CAPABILITIES
        }
        self.geometry = Geometry.from_config(json.loads((folder / "base/config.json").read_text()))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
        self.greedy = Greedy.of([self.model], self.tokenizer, 64, 128)
        self.items = {
            capability: [json.loads(line) for line in (folder / f"tasks/data/mini_{capability}_val.jsonl").open()]
            for capability in CAPABILITIES
        }

    def _load(self, name: str) -> transformers.PreTrainedModel:
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.bfloat16)

    def scores_of(self, expert: str, rule: Rule, seed: int = 0) -> Scores:
        """Scored with wp-score's engine, once; `seed` draws and splits the prompts."""
        at = "" if rule.layer is None else f"-layer{rule.layer}"
        file = self.scores / f"{expert}-{rule.method}-{rule.utility}{at}-{seed}.safetensors"
        if not file.is_file():
            self.scores.mkdir(parents=True, exist_ok=True)
            base, model, pairs = (str(self.folder / name) for name in ("base", expert, f"pairs/{expert}.jsonl"))
            job = ScoringJob(base, model, pairs, method=rule.method, utility=rule.utility, layer=rule.layer, seed=seed)
            write_scores(score(job), file)
        return read_scores(file)

    def shares(self, experts: tuple[str, ...], rule: Rule, kind: str) -> torch.Tensor:
        """alpha [K, L, n] under the rule."""
        draws = [
            [getattr(self.scores_of(expert, rule, seed), kind).double() for seed in range(rule.draws)]
            for expert in experts
        ]
        drawn = torch.stack([torch.stack(files) for files in draws])  # [K, draws, L, n]
        mean = drawn.mean(1)
        positive = mean.clamp(min=0)
        if rule.norm:
            positive /= positive.mean((1, 2), keepdim=True)
        sharp, uniform = positive**rule.power, rule.equal(len(experts))
        total = torch.linalg.vector_norm(sharp, rule.order, dim=0)
        alpha = torch.where(total > 0, sharp / total, 0.0 if rule.base_fallback else uniform)
        back: float | torch.Tensor = rule.shrink
        if rule.error:
            apart = ((mean - mean.mean(0)) ** 2).sum(0)
            back = ((drawn.var(1) / rule.draws).sum(0) / apart.clamp(min=1e-30)).clamp(max=1)
        alpha = (1 - back) * alpha + back * uniform
        return torch.full_like(alpha, uniform) if rule.average else alpha

    def merge(self, experts: tuple[str, ...], rule: Rule) -> State:
        """METHOD.md 4 with the rule's changes, in float32."""
        heads, neurons = (self.shares(experts, rule, kind) for kind in ("heads", "neurons"))
        merged: State = {}
        for name, base in self.base.items():
            slot = slot_of(name)
            weight = torch.full((len(experts), 1), rule.equal(len(experts)))
            if slot is not None:
                weight = self.geometry.expand(slot, heads[:, slot.layer], neurons[:, slot.layer]).float()
            along_rows = base.ndim > 1 and (slot is None or slot.axis == 0)
            shape = (len(experts), -1, 1) if along_rows else (len(experts), *[1] * (base.ndim - 1), -1)
            deltas = torch.stack([self.experts[expert][name] - base for expert in experts])
            merged[name] = base + rule.scale * _fused(weight.reshape(shape), deltas, rule)
            if rule.omega < 1 and name in self.activations:
                mean_C = self.activations[name]
                merged[name] = base + (merged[name] - base) * (1 - (1 - rule.omega) * mean_C / mean_C.max())
        return merged

    @cached_property
    def activations(self) -> State:
        """Mean |x| at the input of every module of the base, on texts drawn as those that it was trained on."""
        config = json.loads((self.folder / "world.json").read_text())["config"]
        shares, latent = (dict(zip(NAMES, config[key], strict=True)) for key in ("shares", "latent"))
        texts = training_texts(shares, latent, config["plain_share"], 256, random.Random("aim"))
        documents = [text.prompt + text.answer for text in texts]
        _, blocks = cut(PromptFormat(self.tokenizer), documents, len(documents), 256, str(self.folder))
        base = ResidentStack(self._load("base").float(), torch.device("cpu"), torch.float32)
        return mean_inputs(base, list(batches(blocks, 8, base)), lambda _done: None)

    def right(self, merged: State, capability: str) -> float:
        """Percent of the validation items of a capability that the merge, rounded to bfloat16, gets right."""
        self.model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in merged.items()})
        items = self.items[capability]
        prompts = [self.tokenizer(item["prompt"])["input_ids"] for item in items]
        stack = ResidentStack(self.model, torch.device("cpu"), torch.bfloat16)
        answers = generate_answers(
            stack, self.greedy, prompts, ended=lambda _number, answer: self.greedy.holds(answer, UNTIL)
        )
        texts = [cut_answer(self.greedy.text(*both), UNTIL) for both in zip(prompts, answers, strict=True)]
        passed = (grade(capability, t, json.loads(item["grading"])) for t, item in zip(texts, items, strict=True))
        return 100 * sum(passed) / len(items)


def _fused(alpha: torch.Tensor, deltas: torch.Tensor, rule: Rule) -> torch.Tensor:
    """What is added to the base: sum_k alpha_k delta_k, or the mean, by alpha, of those that have the sum's sign."""
    if rule.keep < 1:
        flat = deltas.abs().flatten(1)
        least = flat.kthvalue(flat.shape[1] - max(1, int(rule.keep * flat.shape[1])) + 1, dim=1).values
        deltas = torch.where(deltas.abs() >= least.reshape(-1, *[1] * (deltas.ndim - 1)), deltas, 0)
    total = (alpha * deltas).sum(0)
    if not rule.elect:
        return total
    agree = ((deltas.sign() == total.sign()) & (deltas != 0)).float()
    share = (alpha * agree).sum(0)
    return torch.where(share > 0, (alpha * deltas * agree).sum(0) / share.clamp(min=1e-30), 0)


@click.command()
@click.argument("worlds", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--only", default="", help="Only rules whose name has this in it.")
@click.option("--scores", type=click.Path(path_type=Path), default=Path("runs/rules"), show_default=True)
def main(worlds: tuple[Path, ...], only: str, scores: Path) -> None:
    """Print a Markdown table: rules by combinations, the mean over worlds, and the mean of each world.

    Runs the functions that the models write, in the miniature's sandbox.
    """
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    opened = [World(folder, scores) for folder in worlds]
    names = [" + ".join(experts) for experts in COMBINATIONS]
    click.echo(f"| rule | {' | '.join(names)} | mean | " + " | ".join(folder.name for folder in worlds) + " |")
    click.echo("|---" * (len(names) + 2 + len(worlds)) + "|")
    for rule in (rule for rule in RULES if only in rule.name):
        table = torch.zeros(len(opened), len(COMBINATIONS))
        for w, world in enumerate(opened):
            for c, experts in enumerate(COMBINATIONS):
                merged = world.merge(experts, rule)
                table[w, c] = sum(world.right(merged, capability) for capability in experts) / len(experts)
        cells = [*table.mean(0).tolist(), float(table.mean()), *table.mean(1).tolist()]
        click.echo(f"| {rule.name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
