"""Attention: do the heads that a ranking puts first look at the instruction? (Figs. 11 and 29 of arXiv 2604.13694)

    R = (attention to the instruction / its tokens) / (attention to the content / its tokens)

1 is indifference. Regions, queries and how both are read without matrices of attention are in `regions`; a number of
tokens is of those that the query sees. The mean over prompts and heads is of log R. All else than the instruction in
the place of the content (`all else`) counts the first token, the frame and the query's own token with it, which most
heads look at most: it is given beside.

The top 10 heads of every ranking stand beside the same heads of the base, 200 draws of as many heads (of all layers; of
as many in each layer), and the rest. Intervals are of 1,000 draws of the prompts with return, the same ones for both
models where these are compared. What a fine-tune did is R of the expert over R of the base.

Needs prompts with contrasts: what a prompt has beyond its contrast is its instruction. One forward pass of each model.

Legend: N prompts, S draws of them, L layers, H heads, h heads of a set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from mergekit_wp.console import StartProgress
from mergekit_wp.errors import enough_memory
from mergekit_wp.foreign import file_parts
from mergekit_wp.geometry import Component, Kind
from mergekit_wp.intervals import widened
from mergekit_wp.page import grid, render, render_text
from mergekit_wp.ranking import table_of
from mergekit_wp.scoring.models.load import load_pair
from mergekit_wp.study import drawings
from mergekit_wp.study.cells import cell, finite, lines_of
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.parts import Part, PartResult
from mergekit_wp.study.regions import READINGS, REGIONS, SELF, Attended, Spans, attended, log_ratios, spans_of
from mergekit_wp.study.sets import INTERVAL, top_among
from mergekit_wp.study.study_spec import Study

MOST = 10  # heads of a set
DRAWS, RESAMPLES = 200, 1000
OTHERS = {"content": True, "all else": False}
"""What the instruction is held against, and whether that is the content alone."""


@dataclass(frozen=True)
class TaskAttention:
    """One task: its prompts, and what both models attend to in them."""

    prompts: Sequence[Spans]
    base: Attended
    expert: Attended


def work(study: Study, inputs: Inputs, progress: StartProgress) -> PartResult:
    """The part: one forward pass of each model over the prompts."""
    assert inputs.fingerprints  # the models are those that were scored
    found = _run(inputs, progress)
    rows = [row for task, each in found.items() for row in compared(study, inputs, task, each)]
    data = {
        "tasks": {task: _task_data(each) for task, each in found.items()},
        "sets": rows,
    }
    tables = {"sets": lines_of(rows), "heads": list(_head_lines(found))} if rows else {}
    tensors = {"attention": _tables(found)} if rows else {}
    pictures = _pictures(inputs, rows, found)
    headline = next(iter(findings(rows)), "")
    return PartResult(data, tables, pictures, _section(data, pictures, list(inputs.scores)), tensors, headline)


def _run(inputs: Inputs, progress: StartProgress) -> dict[str, TaskAttention]:
    job, ready = inputs.ready
    scored = {task for scores in inputs.scores.values() for task in scores}
    spans = {task: own for task, own in spans_of(ready.tasks).items() if task in scored}
    if not spans:
        return {}
    every = [each for own in spans.values() for each in own]
    with enough_memory(f"prompts: batch_size: {job.batch_size} prompts do not fit on the device; lower it."):
        pair = load_pair(job, ready.checked)
        tick = progress(2 * len(every), "reading attention", "prompts")
        base, expert = (
            attended(stack, inputs.geometry, every, job.batch_size, tick) for stack in (pair.base, pair.expert)
        )
    found, start = {}, 0
    for task, own in spans.items():
        where = slice(start, start + len(own))
        found[task] = TaskAttention(own, base.part(where), expert.part(where))
        start += len(own)
    return found


# Sets of heads, and what they are held against


def compared(study: Study, inputs: Inputs, task: str, found: TaskAttention) -> Iterator[dict[str, Any]]:
    """A row for every score file that has the task, reading, and what the instruction is held against."""
    for name, scores in inputs.scores.items():
        if task not in scores:
            continue
        seen_LH = scores.seen(Kind.HEAD)
        top_LH = top_among(table_of(scores, Kind.HEAD, task), seen_LH, min(MOST, study.top[Kind.HEAD]))
        if not top_LH.any():
            continue
        for reading in READINGS:
            for others, alone in OTHERS.items():
                base_NLH, expert_NLH = (
                    log_ratios(model, reading, alone).numpy() for model in (found.base, found.expert)
                )
                sets = HeadSets(top_LH.numpy(), seen_LH.numpy(), study.seed)
                where = {"scores": name, "task": task, "reading": reading, "against": others}
                yield where | {"prompts": len(expert_NLH)} | sets.row(base_NLH, expert_NLH)


@dataclass(frozen=True)
class HeadSets:
    """A set of heads among those that were scored, both bool [L, H]."""

    top_LH: np.ndarray
    seen_LH: np.ndarray
    seed: int

    def row(self, base_NLH: np.ndarray, expert_NLH: np.ndarray) -> dict[str, Any]:
        """R of the set in both models and their ratio, with intervals over prompts; that of draws and of the rest."""
        change_NLH = expert_NLH - base_NLH
        found: dict[str, Any] = {"heads": int(self.top_LH.sum())}
        for name, log_NLH in (("expert", expert_NLH), ("base", base_NLH), ("change", change_NLH)):
            found[name] = _exp(_mean(log_NLH[:, self.top_LH]))
            low, high = self._over_prompts(log_NLH[:, self.top_LH])
            found |= {f"{name}_low": low, f"{name}_high": high}
        rest_LH = self.seen_LH & ~self.top_LH
        for name, log_NLH in (("expert", expert_NLH), ("change", change_NLH)):
            log_LH = _mean_over_prompts(log_NLH)
            for kind, drawn in self._draws.items():
                low, high = _interval(np.array([_mean(log_LH[draw][None]) for draw in drawn]))
                found |= {f"{name}_{kind}_low": low, f"{name}_{kind}_high": high}
            found[f"{name}_rest"] = _exp(_mean(log_NLH[:, rest_LH]))
        return found

    def _over_prompts(self, log_Nh: np.ndarray) -> tuple[float | None, float | None]:
        random = np.random.default_rng(self.seed)
        count = len(log_Nh)
        drawn_SN = random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        known_Nh = np.isfinite(log_Nh)
        weight_Sh = drawn_SN @ known_Nh
        mean_Sh = drawn_SN @ np.where(known_Nh, log_Nh, 0.0) / np.where(weight_Sh > 0, weight_Sh, np.nan)
        logs_S = _mean_over_prompts(mean_Sh.T)  # of the heads, of each draw
        return _interval(widened(logs_S, _mean(log_Nh), count)) if count > 1 else (None, None)

    @property
    def _draws(self) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        """Places (layers, heads) of as many heads of those scored, drawn from all layers, and from the set's own."""
        random = np.random.default_rng(self.seed)
        every = np.argwhere(self.seen_LH)
        count_L = self.top_LH.sum(1)
        by_layer = [every[every[:, 0] == layer] for layer in range(len(count_L))]

        def matched() -> np.ndarray:
            return np.concatenate([random.permutation(own)[:n] for own, n in zip(by_layer, count_L, strict=True)])

        drawn = {
            "random": [random.permutation(every)[: self.top_LH.sum()] for _ in range(DRAWS)],
            "matched": [matched() for _ in range(DRAWS)],
        }
        return {kind: [(places[:, 0], places[:, 1]) for places in each] for kind, each in drawn.items()}


def _mean(log_Nh: np.ndarray) -> float:
    """Over prompts, then over heads, of what is known; NaN where nothing is."""
    log_h = _mean_over_prompts(log_Nh)
    known = log_h[np.isfinite(log_h)]
    return float(known.mean()) if len(known) else float("nan")


def _mean_over_prompts(log_N: np.ndarray) -> np.ndarray:
    known = np.isfinite(log_N)
    total: np.ndarray = np.where(known, log_N, 0.0).sum(0)
    count = known.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _interval(logs: np.ndarray) -> tuple[float | None, float | None]:
    known = logs[np.isfinite(logs)]
    if not len(known):
        return None, None
    low, high = np.exp(np.percentile(known, INTERVAL)).tolist()
    return low, high


def _exp(log: float) -> float | None:
    return float(np.exp(log)) if np.isfinite(log) else None


# What is said of it


def _task_data(found: TaskAttention) -> dict[str, Any]:
    """How many tokens the regions have, and what all heads together attend to at the anchor."""
    counts = np.array([[each.regions.count(r) for r in range(len(REGIONS))] for each in found.prompts])
    models = {"base": found.base, "expert": found.expert}
    mean = {name: model.shares["anchor"].double().mean((0, 1, 2)).tolist() for name, model in models.items()}
    return {
        "prompts": len(found.prompts),
        "tokens": dict(zip(REGIONS, counts.mean(0).tolist(), strict=True)),
        "all_heads_at_anchor": {n: dict(zip((*REGIONS, SELF), share, strict=True)) for n, share in mean.items()},
    }


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands out, in sentences made from the numbers: two a file and reading, against the content."""
    found = []
    for file, reading in dict.fromkeys((row["scores"], row["reading"]) for row in rows):
        own = [row for row in rows if (row["scores"], row["reading"], row["against"]) == (file, reading, "content")]
        own = [row for row in own if None not in (row["expert"], row["base"], row["expert_matched_low"])]
        if not own:
            continue
        mean = {key: float(np.exp(fmean(np.log(row[key]) for row in own))) for key in ("expert", "base", "change")}
        beyond, below, raised, more = (
            sum(test(row) for row in own)
            for test in (
                lambda row: row["expert"] > row["expert_matched_high"],
                lambda row: row["expert"] < row["expert_matched_low"],
                lambda row: row["change_low"] is not None and row["change_low"] > 1,
                lambda row: row["change"] > row["change_matched_high"],
            )
        )
        where = "At the last token" if reading == "anchor" else "Behind the instruction"
        found += [
            f"{where}, the top heads of {file} attend to a token of the instruction {mean['expert']:.2f} times as much "
            f"as to one of the content (base: {mean['base']:.2f}), more than random heads of the same layers "
            f"in {beyond} of {len(own)} tasks, less in {below}.",
            f"The fine-tune changed that by a factor of {mean['change']:.2f}: surely upwards in {raised} tasks, by "
            f"more than in random heads of the same layers in {more}.",
        ]
    return found


def _pictures(
    inputs: Inputs, rows: Sequence[Mapping[str, Any]], found: Mapping[str, TaskAttention]
) -> dict[str, Markup]:
    drawn = {}
    files = [name for name in inputs.scores if any(row["scores"] == name for row in rows)]
    for part, name in zip(file_parts(f"heads-{name}" for name in files), files, strict=True):
        panels = {
            words: [
                (row["task"], {"expert": row["expert"], "base": row["base"]}, row["expert_matched_low"],
                 row["expert_matched_high"])
                for row in rows
                if (row["scores"], row["reading"], row["against"]) == (name, reading, "content")
                and None not in (row["expert"], row["base"], row["expert_matched_low"])
            ]
            for reading, words in (("anchor", "at the last token"), ("later", "behind the instruction"))
        }  # fmt: skip
        drawn[part] = drawings.dots(
            panels, "attention to a token of the instruction,\none of the content = 1", f"Top heads of {name}"
        )
    at = REGIONS.index("instruction")
    for part, task in zip(file_parts(f"map-{task}" for task in found), found, strict=True):
        share_LH = found[task].expert.shares["anchor"][..., at].double().mean(0).numpy()
        what = "share of attention to the instruction"
        drawn[part] = drawings.heads_svg(share_LH, what, f"Attention to the instruction of {task}, expert")
    return drawn


def _ratio_tables(each: TaskAttention, alone: bool = True) -> Iterator[tuple[str, np.ndarray]]:
    """R of each head [L, H], by model and reading."""
    for name, model in (("expert", each.expert), ("base", each.base)):
        for reading in READINGS:
            yield f"{name}_{reading}", np.exp(_mean_over_prompts(log_ratios(model, reading, alone).numpy()))


def _tables(found: Mapping[str, TaskAttention]) -> dict[str, torch.Tensor]:
    return {
        f"{task}/{name}": torch.from_numpy(ratio_LH).float()
        for task, each in found.items()
        for name, ratio_LH in _ratio_tables(each)
    }


def _head_lines(found: Mapping[str, TaskAttention]) -> Iterator[list[object]]:
    """R of every head against the content, and its shares at the anchor in the expert."""
    for place, (task, each) in enumerate(found.items()):
        tables = dict(_ratio_tables(each))
        share_LHR = each.expert.shares["anchor"].double().mean(0)
        if place == 0:
            yield ["task", "head", *tables, *(f"expert_share_{name}" for name in (*REGIONS, SELF))]
        for layer, head in np.ndindex(share_LHR.shape[:2]):
            ratios = [finite(table[layer, head]) for table in tables.values()]
            yield [task, Component(Kind.HEAD, layer, head).name, *ratios, *share_LHR[layer, head].tolist()]


def _section(data: Mapping[str, Any], pictures: Mapping[str, Markup], names: Sequence[str]) -> Markup:
    if not data["sets"]:
        return render_text(
            "<p>None of the prompts' tasks that were scored has contrasts, which say what the instruction is.</p>\n"
        )
    columns = (
        ("expert", "expert"), ("base", "base"), ("expert_matched", "same layers, random"),
        ("expert_random", "random"), ("change", "change"), ("change_matched", "change, random"),
    )  # fmt: skip
    lines = [["scores", "task", "query", "against", *(words for _key, words in columns), "rest"]]
    for row in data["sets"]:
        cells = [_with_interval(row, key) for key, _words in columns]
        lines.append([*(row[c] for c in ("scores", "task", "reading", "against")), *cells, cell(row["expert_rest"])])
    tokens = [["task", "prompts", *REGIONS]]
    for task, each in data["tasks"].items():
        tokens.append([task, str(each["prompts"]), *(f"{each['tokens'][region]:.1f}" for region in REGIONS)])
    heads = {name: picture for name, picture in pictures.items() if name.startswith("heads-")}
    maps = list(zip(data["tasks"], (name for name in pictures if name not in heads), strict=True))
    files = [name for name in names if any(row["scores"] == name for row in data["sets"])]
    return render(
        "study_attention.html", findings=findings(data["sets"]), sets=grid(lines), tokens=grid(tokens),
        heads=list(zip(files, heads, heads.values(), strict=True)),
        maps=[(task, name, pictures[name]) for task, name in maps],
    )  # fmt: skip


def _with_interval(row: Mapping[str, Any], key: str) -> str:
    interval = f"{cell(row[f'{key}_low'])} to {cell(row[f'{key}_high'])}"
    return f"{cell(row[key])} ({interval})" if key in row else interval


PART = Part(
    name="attention",
    title="Whether the heads look at the instruction",
    work=work,
    settings=("top", "seed", "prompts"),
    models=True,
    code=(
        "study/attention.py", "study/regions.py", "study/sets.py", "study/drawings.py", "scoring/hooks.py",
        "scoring/sweep.py", "intervals.py",
    ),
    prompts=True,
)  # fmt: skip
