"""Why does wp lose to task arithmetic on the miniature: the wrong experts or too small a step? Are other scores better?

    python experiments/benchmarks/why.py runs/worlds/<seed 0> runs/worlds/<seed 1>  # a quarter of an hour a world, busy

The first time in a world, exact scores take nearly as long again.

A merge is theta(alpha, rho) = base + sum_k alpha_k(c) (theta_k - base) for the slices of component c (keys and values:
the mean over their heads), and rho_k in the place of alpha_k for tensors of no component. It is smooth in alpha, so
autograd tells what each weight is worth. With NLL_j the mean negative log-likelihood of an answer token, over right
answers of capability j, the loss is L = mean of NLL_j over the merged capabilities, and g_k(c) = dL/dalpha_k(c).

    size       mean_k g_k: all experts' weights should be larger (or smaller) at c
    choice     g_k - mean_k g_k: one expert's weight should grow at the cost of another's. The two are orthogonal, so
               |g|^2 is the sum of both; of independent gradients size has the share 1/K
    wrong      sum_k (alpha_k - mean alpha)(g_k - mean g) > 0: to first order the rule's lean at c raises L. For two
               experts: it leans to the one that should have less. A random lean is wrong half of the time; where alpha
               is equal there is no lean. Seen from wp, and from average, where no lean is paid for yet
    closed     (L(average) - L(rule)) / (L(average) - L(best simplex)), on validation items

The best weights of a family are found by Adam on L, in batches of 12 texts a capability: `simplex` (sum_k alpha_k = 1,
rho = 1/K), `simplex x scale` (both times one learnt scale), `[0, 1]` and `[0, 2]` (each weight by itself, rho = 1,
from 1). They are ceilings that know the answers, not rules that one could use.

Two more scores are first order and know the answers: `own NLL`, -dNLL_k/dalpha_k at the base (attr with the likelihood
of right answers for its utility), and `merged NLL`, -g_k at average. Both become shares as wp's do.

`change of L` says whether first order can be believed: the 20 components that lean wrongly with the largest |choice|,
20 random ones, and all wrong ones are given wholly to another expert; foretold by g, on g's own texts, on items.

Texts for gradients and descent are drawn anew from the requests that experts train on; `split_of` keeps them apart from
validation and test requests. NLL and percent right in the tables are on validation items; test items are not read.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
import transformers
from rules import COMBINATIONS, PAPER, Rule, State, World

from experiments.miniature.corpus import Text, stream, training_texts
from experiments.miniature.train import Encoded, encode, padded
from mergekit_wp.geometry import slot_of
from mergekit_wp.ranking import spearman

GRADIENT_TEXTS, DESCENT_TEXTS = 192, 512  # of each capability
STEPS, BATCH = 50, 12
MOVED = 20
FAMILIES = ("simplex", "simplex x scale", "[0, 1]", "[0, 2]")
LARGE = 1.75
CHANGES = ("foretold", "texts", "items")
Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and targets [B, T]; -100 is not learnt
Texts = dict[str, list[Encoded]]


SCORES = (
    PAPER,
    Rule("exact staged", method="exact"),
    Rule("attr anchor (the paper)", method="attr", utility="anchor"),
    Rule("writeback anchor", utility="anchor"),
    Rule("writeback kl", utility="kl"),
    Rule("writeback staged, anchor layer 2", layer=2),
)


@dataclass(frozen=True)
class Weights:
    """alpha [K, L, H + F], heads first, and rho [K]."""

    alpha_KLC: torch.Tensor
    rho_K: torch.Tensor

    def times(self, scale: float | torch.Tensor) -> Weights:
        return Weights(self.alpha_KLC * scale, self.rho_K * scale)


class Scored(World):
    """With a copy of the model in float32 to differentiate."""

    def __init__(self, folder: Path, scores: Path):
        super().__init__(folder, scores)
        self.smooth = copy.deepcopy(self.model).float().requires_grad_(False)
        self.smooth.set_attn_implementation("eager")  # faster than SDPA at this size, backwards
        self.validation = {
            name: self.encoded([Text(item["prompt"], item["target"]) for item in items])
            for name, items in self.items.items()
        }

    def encoded(self, texts: list[Text]) -> list[Encoded]:
        return sorted(encode(texts, self.tokenizer), key=lambda row: len(row.ids))

    def fresh(self, count: int, purpose: str) -> Texts:
        """Right answers to requests of the training split, from streams of their own."""
        return {
            name: self.encoded(
                training_texts({name: 1.0}, {name: 1.0}, 0.0, count, stream(self.folder.name, "why", purpose, name))
            )
            for name in self.items
        }


class Blend:
    """The merges of some experts of a world."""

    def __init__(self, world: Scored, experts: tuple[str, ...]):
        self.world, self.experts = world, experts
        self.deltas = {
            name: torch.stack([world.experts[expert][name] - base for expert in experts])
            for name, base in world.base.items()
        }

    def shares(self, score_KLC: torch.Tensor) -> Weights:
        """Shares as wp makes them, of scores that are no file's."""
        positive = score_KLC.clamp(min=0)
        total, count = positive.sum(0), len(self.experts)
        return Weights(torch.where(total > 0, positive / total, 1 / count), torch.full((count,), 1 / count))

    def of(self, rule: Rule) -> Weights:
        shares = [self.world.shares(self.experts, rule, kind).float() for kind in ("heads", "neurons")]
        return Weights(torch.cat(shares, -1), torch.full((len(self.experts),), 1 / len(self.experts)))

    def constant(self, alpha: float) -> Weights:
        geometry, count = self.world.geometry, len(self.experts)
        shape = (count, geometry.layers, geometry.heads + geometry.neurons)
        return Weights(torch.full(shape, alpha), torch.full((count,), alpha))

    def merge(self, weights: Weights) -> State:
        """theta(alpha, rho), differentiable in both."""
        geometry, merged = self.world.geometry, {}
        heads_KLH, neurons_KLF = weights.alpha_KLC.split([geometry.heads, geometry.neurons], -1)
        for name, delta in self.deltas.items():
            slot, ones = slot_of(name), [1] * (delta.ndim - 2)
            if slot is None:
                weight = weights.rho_K.reshape(-1, 1, *ones)
            else:
                weight = geometry.expand(slot, heads_KLH[:, slot.layer], neurons_KLF[:, slot.layer])
                weight = weight.reshape(len(weight), *((-1, *ones) if slot.axis == 0 else (*ones, -1)))
            merged[name] = self.world.base[name] + (weight * delta).sum(0)
        return merged

    def nll(self, state: State, batch: Batch, fast: bool = False) -> torch.Tensor:
        """Sum over answer tokens; `fast` in bfloat16, as the models were trained."""
        ids_BT, targets_BT = batch
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
            inputs = {"input_ids": ids_BT, "use_cache": False}
            logits = torch.func.functional_call(self.world.smooth, state, (), inputs).logits
        logits = logits.float() if fast else logits
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), ignore_index=-100, reduction="sum")

    @torch.no_grad()
    def loss(self, weights: Weights, texts: Texts) -> float:
        """L."""
        state = self.merge(weights)
        sums = [sum(float(self.nll(state, b)) for b in cut(texts[name])) / tokens(texts[name]) for name in self.experts]
        return sum(sums) / len(sums)

    def gradient(self, weights: Weights, texts: Texts) -> torch.Tensor:
        """dNLL_j/dalpha_k(c) [J, K, L, C]; its mean over j is g."""
        rows = []
        for name in self.experts:
            alpha = weights.alpha_KLC.clone().requires_grad_()
            for batch in cut(texts[name]):
                (self.nll(self.merge(replace(weights, alpha_KLC=alpha)), batch) / tokens(texts[name])).backward()
            assert alpha.grad is not None
            rows.append(alpha.grad)
        return torch.stack(rows)

    def right(self, weights: Weights) -> float:
        merged = self.merge(weights)
        return sum(self.world.right(merged, name) for name in self.experts) / len(self.experts)

    def best(self, family: str, texts: Texts, seed: int = 0) -> Weights:
        """Adam on L, then a rate that falls to nothing; boxes by projection after every step."""
        box = {"[0, 1]": 1.0, "[0, 2]": 2.0}.get(family)
        raw = self.constant(0.0 if box is None else 1.0).alpha_KLC.requires_grad_()
        learnt = family == "simplex x scale"
        log_scale = torch.tensor(math.log(LARGE) if learnt else 0.0, requires_grad=learnt)
        groups = [{"params": [raw], "lr": 0.15 if box is None else 0.06}]
        if learnt:
            groups.append({"params": [log_scale], "lr": 0.05})
        adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
        rng, count = random.Random(seed), len(self.experts)

        def weights() -> Weights:
            if box is not None:
                return Weights(raw, torch.ones(count))
            return Weights(raw.softmax(0), torch.full((count,), 1 / count)).times(log_scale.exp())

        for _ in range(STEPS):
            adam.zero_grad()
            state = self.merge(weights())
            batches = [padded(rng.sample(texts[name], BATCH)) for name in self.experts]
            torch.stack([self.nll(state, b, fast=True) / (b[1] >= 0).sum() for b in batches]).mean().backward()
            adam.step()
            schedule.step()
            if box is not None:
                raw.data.clamp_(0, box)
        with torch.no_grad():
            found = weights()
        return Weights(found.alpha_KLC.detach().clone(), found.rho_K.detach().clone())


def cut(rows: list[Encoded], size: int = 32) -> list[Batch]:
    return [padded(rows[start : start + size]) for start in range(0, len(rows), size)]


def tokens(rows: list[Encoded]) -> int:
    return sum(len(row.ids) - row.prompt_length for row in rows)


@dataclass(frozen=True)
class Lean:
    """What weights alpha prefer at each component [L, C], against what a gradient g says of it."""

    leans: torch.Tensor  # whether at all
    wrong: torch.Tensor
    choice: torch.Tensor  # |g_k - mean g|
    towards: torch.Tensor  # the expert of the largest weight
    better: torch.Tensor  # of the others, the one that g wants most

    @classmethod
    def of(cls, alpha_KLC: torch.Tensor, g_KLC: torch.Tensor) -> Lean:
        lean, choice = alpha_KLC - alpha_KLC.mean(0), g_KLC - g_KLC.mean(0)
        leans, towards = lean.abs().amax(0) > 1e-6, alpha_KLC.argmax(0)
        better = g_KLC.scatter(0, towards[None], torch.inf).argmin(0)
        return cls(leans, ((lean * choice).sum(0) > 0) & leans, choice.norm(dim=0), towards, better)

    def share(self, part: slice = slice(None)) -> float:
        """Percent of the components with a lean that lean wrongly."""
        return 100 * float(self.wrong[:, part].sum() / self.leans[:, part].sum().clamp(min=1))

    def weighted(self) -> float:
        """The same, each component counted by |choice|."""
        return 100 * float((self.choice * self.wrong).sum() / (self.choice * self.leans).sum())

    def moved(self, weights: Weights, chosen: torch.Tensor) -> Weights:
        """The chosen components [n], of the flat ones, wholly to the better of the other experts."""
        alpha = weights.alpha_KLC.flatten(1).clone()
        alpha[:, chosen] = F.one_hot(self.better.flatten()[chosen], len(alpha)).T.float()
        return replace(weights, alpha_KLC=alpha.view_as(weights.alpha_KLC))


def examine(blend: Blend, wp: Weights, g_wp: torch.Tensor, g_average: torch.Tensor, texts: Texts) -> dict[str, float]:
    """Choice against size; what happens when components that lean wrongly, or any, are given to another expert."""
    heads = blend.world.geometry.heads
    found = {"size": 100 * float(len(g_wp) * g_wp.mean(0).square().sum() / g_wp.square().sum())}
    for where, g in (("", g_wp), (" (average)", g_average)):
        lean = Lean.of(wp.alpha_KLC, g)
        found["wrong heads" + where] = lean.share(slice(heads))
        found["wrong neurons" + where] = lean.share(slice(heads, None))
        found["wrong by choice" + where] = lean.weighted()
    lean = Lean.of(wp.alpha_KLC, g_wp)
    found["no lean"] = 100 * float((~lean.leans).float().mean())
    blame = lean.choice * lean.wrong / (lean.choice * lean.wrong).sum() * 100
    found["of heads"] = float(blame[:, :heads].sum())
    found |= {f"layer {layer}": float(part) for layer, part in enumerate(blame.sum(1))}
    found |= {f"to {name}": float(blame[lean.towards == k].sum()) for k, name in enumerate(blend.experts)}
    before, graded = blend.loss(wp, texts), blend.loss(wp, blend.world.validation)
    any_lean = lean.leans.flatten().nonzero()[:, 0]
    wrong = (lean.choice * lean.wrong).flatten()
    picks = {
        "strongest": wrong.topk(MOVED).indices,
        "random": any_lean[torch.randperm(len(any_lean), generator=torch.Generator().manual_seed(0))[:MOVED]],
        "all": wrong.nonzero()[:, 0],
    }
    for name, chosen in picks.items():
        moved = lean.moved(wp, chosen)
        found[f"{name} foretold"] = 100 * float((g_wp * (moved.alpha_KLC - wp.alpha_KLC)).sum()) / before
        found[f"{name} texts"] = 100 * (blend.loss(moved, texts) / before - 1)
        found[f"{name} items"] = 100 * (blend.loss(moved, blend.world.validation) / graded - 1)
    return found


def study(world: Scored, experts: tuple[str, ...]) -> dict[str, dict[str, list[float] | dict[str, float]]]:
    """Everything about one combination in one world: rules (NLL, right), examine's numbers, scores' numbers."""
    blend, count = Blend(world, experts), len(experts)
    small, texts = world.fresh(GRADIENT_TEXTS, "gradient"), world.fresh(DESCENT_TEXTS, "descent")
    average, wp = blend.constant(1 / count), blend.of(PAPER)
    ours, theirs = blend.merge(wp), world.merge(experts, PAPER)
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in theirs)
    g_wp, per_capability = blend.gradient(wp, small).mean(0), blend.gradient(average, small)
    g_average = per_capability.mean(0)
    own = -blend.gradient(blend.constant(0.0), small)[range(count), range(count)]
    found = examine(blend, wp, g_wp, g_average, small)

    best = {family: blend.best(family, texts) for family in FAMILIES}
    again = blend.best("simplex", world.fresh(DESCENT_TEXTS, "other texts"), seed=1)
    by_score = {rule.name: blend.of(rule) for rule in SCORES}
    by_score |= {"own NLL": blend.shares(own), "merged NLL": blend.shares(-g_average)}
    by_score |= {"best simplex": best["simplex"], "best simplex, other texts": again}
    rules = {
        "average": average,
        f"average, scale {LARGE}": average.times(LARGE),
        PAPER.name: wp,
        f"{PAPER.name}, scale {LARGE}": wp.times(LARGE),
        "exact staged": by_score["exact staged"],
        f"exact staged, scale {LARGE}": by_score["exact staged"].times(LARGE),
        "order inf": Weights(wp.alpha_KLC / wp.alpha_KLC.amax(0), torch.ones(count)),
        "task arithmetic": blend.constant(1.0),
        **{f"best {family}": weights for family, weights in best.items()},
    }
    graded = {name: [blend.loss(w, world.validation), blend.right(w)] for name, w in rules.items()}
    first, last = graded["average"][0], graded["best simplex"][0]
    strong = Lean.of(wp.alpha_KLC, g_average).choice
    strong = strong >= strong.flatten().quantile(0.9)
    scores: dict[str, dict[str, float]] = {}
    for name, weights in by_score.items():
        nll, lean = blend.loss(weights, world.validation), Lean.of(weights.alpha_KLC, g_average)
        scores[name] = {
            "nll": nll,
            "large": blend.loss(weights.times(LARGE), world.validation),
            "closed": 100 * (first - nll) / (first - last),
            "spearman": spearman(weights.alpha_KLC.flatten(), best["simplex"].alpha_KLC.flatten()) or 0.0,
            "strong": spearman(weights.alpha_KLC[:, strong].flatten(), best["simplex"].alpha_KLC[:, strong].flatten())
            or 0.0,
            "wrong": lean.share(),
            "weighted": lean.weighted(),
        }
    found["learnt scale"] = float(best["simplex x scale"].rho_K.sum())
    found |= {f"mean of {box}": float(best[box].alpha_KLC.mean()) for box in FAMILIES[2:]}
    return {"rules": graded, "gradient": found, "scores": scores}  # type: ignore[dict-item]


Studies = list[list[dict]]  # [worlds][combinations]


def row(name: str, cells: Sequence[str]) -> None:
    click.echo(f"| {name} | " + " | ".join(cells) + " |")


def header(first: str, columns: Sequence[str]) -> None:
    click.echo(f"\n| {first} | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")


def print_gradients(studies: Studies, names: list[str]) -> None:
    """One row for each combination; a cell has the worlds in turn."""
    wrong = ["wrong heads", "wrong neurons", "wrong by choice"]
    layers = [key for key in studies[0][0]["gradient"] if key.startswith("layer ")]
    tables = (
        ("wp's gradient, %", ["size", "no lean", *wrong, *(f"{key} (average)" for key in wrong)], 0),
        ("wrong by choice, %", ["of heads", *layers, *(f"to {name}" for name in COMBINATIONS[-1])], 0),
        ("change of L, %", [f"{w} {x}" for w in ("strongest", "random", "all") for x in CHANGES], 1),
        ("learnt weights", ["learnt scale", "mean of [0, 1]", "mean of [0, 2]"], 2),
    )  # fmt: skip
    for title, keys, digits in tables:
        header(title, keys)
        for c, name in enumerate(names):
            found = [world[c]["gradient"] for world in studies]
            row(name, [" / ".join(f"{f[key]:.{digits}f}" if key in f else "-" for f in found) for key in keys])


def print_rules(studies: Studies, names: list[str], worlds: list[str]) -> None:
    for title, which, factor, digits in (("NLL x 1000", 0, 1000, 2), ("% right", 1, 1, 2)):
        header(title, [*names, "mean", *worlds])
        for rule in studies[0][0]["rules"]:
            table = factor * torch.tensor([[found["rules"][rule][which] for found in world] for world in studies])
            cells = [*table.mean(0).tolist(), float(table.mean()), *table.mean(1).tolist()]
            row(rule, [f"{cell:.{digits}f}" for cell in cells])


def print_scores(studies: Studies, names: list[str]) -> None:
    keys = ("nll", "large", "spearman", "strong", "wrong", "weighted")
    titles = ["NLL x 1000", f"at scale {LARGE}", "Spearman", "Spearman, strong", "wrong, %", "wrong by choice, %"]
    header("scores", [*(f"closed, {name}, %" for name in names), "closed, mean", *titles])
    for name in studies[0][0]["scores"]:
        found = [[combination["scores"][name] for combination in world] for world in studies]
        closed = torch.tensor([[f["closed"] for f in world] for world in found])
        means = [float(torch.tensor([[f[key] for f in world] for world in found]).mean()) for key in keys]
        cells = [f"{cell:.0f}" for cell in (*closed.mean(0).tolist(), float(closed.mean()))]
        cells += [f"{1000 * mean:.2f}" for mean in means[:2]] + [f"{mean:.2f}" for mean in means[2:4]]
        row(name, cells + [f"{mean:.0f}" for mean in means[4:]])


@click.command()
@click.argument("worlds", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--scores", type=click.Path(path_type=Path), default=Path("runs/rules"), show_default=True)
def main(worlds: tuple[Path, ...], scores: Path) -> None:
    """Print Markdown tables. What is known of a world is kept in SCORES/<hash>/why.json: delete it to measure again.

    Runs the functions that the models write, in the miniature's sandbox.
    """
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = [" + ".join(experts) for experts in COMBINATIONS]
    studies: Studies = []
    for folder in worlds:
        kept = scores / folder.name / "why.json"
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        world = None if all(name in known for name in names) else Scored(folder, scores)
        for name, experts in zip(names, COMBINATIONS, strict=True):
            if world is not None and name not in known:
                click.echo(f"{folder.name}: {name}", err=True)
                known[name] = study(world, experts)
                kept.write_text(json.dumps(known))
        studies.append([known[name] for name in names])
    print_gradients(studies, names)
    print_rules(studies, names, [folder.name for folder in worlds])
    print_scores(studies, names)


if __name__ == "__main__":
    main()
