"""Certainty: how far the scores, and who leads, hang on which prompts were asked. Reads score files alone, and of them
those that keep single prompts (`wp-score --per-prompt`); no figure of arXiv 2604.13694 has it.

For every such file, task and kind (heads, neurons):

    leaders    the strongest components, each with the 95 % interval of its score and of its rank (`intervals`)
    above      how many components have an interval above zero, and below. If no score differed from zero, an interval
               would lie above in 2.5 % of them: the control
    halves     the prompts in two random halves, 50 times: rank correlation of the two rankings and overlap of their top
               sets, beside chance. A top set that two halves do not share is noise. The whole file is surer than its
               halves; what r they have, the whole is estimated to have 2 r / (1 + r) with another as large
               (Spearman-Brown). And what the leaders of one half score on it and on the other: leaders are chosen
               because they came out high, so their own intervals lie too high

and for every two files on the same prompts of a task (two methods, or another expert of `others`): how many components
surely differ, drawn together. If none did, 5 % would: the control.

Of files that `wp-score --shuffles` made: how many scores lie above what the expert's update gives in random places
(`floor`). Of files that `wp-score --sample` made: how many of the top set by exact scores can be missed, and how much
of another file's top set is in it (`missed`).

Legend: P prompts, D draws, L layers, n components of a kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import combinations
from statistics import fmean
from typing import Any

import torch

from mergekit_wp.console import StartProgress, percent
from mergekit_wp.floor import SHARES, floors
from mergekit_wp.geometry import Kind
from mergekit_wp.intervals import LEAST, LEVEL, Bootstrap, Interval, differences, ends, rescored, used_of
from mergekit_wp.missed import kept, missed
from mergekit_wp.page import grid, render
from mergekit_wp.ranking import spearman, strongest
from mergekit_wp.scores import Scores
from mergekit_wp.study import drawings
from mergekit_wp.study.cells import cell, lines_of
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.parts import Answer, Note, Part, PartResult
from mergekit_wp.study.sets import Shared, top_set
from mergekit_wp.study.study_spec import Study

HALVES = 50
_SHOWN = 12  # of the leaders, in a picture
_HALVED = 4  # prompts that can be halved


def work(study: Study, inputs: Inputs, progress: StartProgress) -> PartResult:
    """The part."""
    kept = {name: scores for name, scores in inputs.scores.items() if scores.meta.prompt_ids}
    places = [(name, scores, task) for name, scores in kept.items() for task in scores]
    others = {name: scores for name, scores in inputs.others.items() if scores.meta.prompt_ids}
    pairs = list(_comparable({**kept, **others}, set(kept)))
    tick = progress(len(places) + len(pairs), "drawing prompts again", "rankings")
    rows = []
    for name, scores, task in places:
        rows += [{"scores": name, "task": task, "kind": str(kind), **_of(study, scores, task, kind)} for kind in Kind]
        tick(1)
    compared = []
    for one, a, other, b, task in pairs:
        for kind in Kind:
            low_Ln, high_Ln = differences(a, b, kind, task, seed=study.seed)
            both_Ln = a.seen(kind) & b.seen(kind)
            surely = int(((low_Ln > 0) | (high_Ln < 0))[both_Ln].sum())
            where = {"one": one, "other": other, "task": task, "kind": str(kind)}
            compared.append(where | {"components": int(both_Ln.sum()), "differ": surely, "by_chance": 1 - LEVEL})
        tick(1)
    null = [
        {"scores": name, **asdict(each), "sentence": each.sentence}
        for name, scores in inputs.scores.items() for each in floors(scores) if each.task is not None
    ]  # fmt: skip
    audits = list(_audits(study, inputs.scores))
    data = {
        "level": LEVEL,
        "rankings": rows,
        "differences": compared,
        "audits": audits,
        "floors": null,
        "without": [name for name in inputs.scores if name not in kept],
    }
    pictures = {
        f"leaders-{number}": drawings.intervals(
            [(x["name"], x["score"], *x["interval"]) for x in row["leaders"][:_SHOWN]],
            "score, and the interval of 95 %", f"Leading {row['kind']} of {row['scores']}, {row['task']}",
        )
        for number, row in enumerate(rows) if row["leaders"]
    }  # fmt: skip
    tables = {
        "leaders": _leader_lines(rows),
        "halves": _ranking_lines(rows),
        "differences": lines_of(compared),
        "audits": _audit_lines(audits),
        "floors": lines_of([{k: v for k, v in row.items() if k != "sentence"} for row in null]),
    }
    filled = {name: lines for name, lines in tables.items() if len(lines) > 1}
    return PartResult(
        data, filled, pictures, _section(data, pictures, study), answers=_answers(data), notes=list(_notes(data))
    )


def _audits(study: Study, files: Mapping[str, Scores]) -> Iterator[dict[str, Any]]:
    """A row a task and kind of every file with a sample; `overlap`: of the top set of other files, by name."""
    for name, scores in files.items():
        for task in scores:
            for kind in Kind:
                found = missed(scores, task, kind, study.top[kind])
                if found is not None:
                    others = {x: y for x, y in files.items() if not y.chance and task in y}
                    overlap = {x: [(of := kept(y, scores, found)).low, of.high] for x, y in others.items()}
                    yield {"scores": name, **asdict(found), "sentence": found.sentence, "overlap": overlap}


def _comparable(files: Mapping[str, Scores], own: set[str]) -> Iterator[tuple[str, Scores, str, Scores, str]]:
    """Every two files, one of the study's pair, and every task of both with the same prompts."""
    for (one, a), (other, b) in combinations(files.items(), 2):
        if one in own or other in own:
            ids = [scores.meta.prompt_ids or {} for scores in (a, b)]
            same = [task for task in a if task in b and ids[0][task] == ids[1][task]]
            yield from ((one, a, other, b, task) for task in same if min(used_of(a, task), used_of(b, task)) >= LEAST)


def _of(study: Study, scores: Scores, task: str, kind: Kind) -> dict[str, Any]:
    """What there is to say of one ranking; empty where its prompts are too few."""
    used, seen_Ln, k = used_of(scores, task), scores.seen(kind), study.top[kind]
    found: dict[str, Any] = {"components": int(seen_Ln.sum()), "subset": kind in scores.scored,
                             "prompts": used, "k": k, "leaders": [], "above": None,
                             "below": None, "halves": None}  # fmt: skip
    if used < LEAST or not seen_Ln.any():
        return found
    drawn = Bootstrap(scores, task, seed=study.seed)
    found["leaders"] = [_leader(x) for x in drawn.intervals(strongest(scores, kind, k, task))]
    bounds = [ends(scores_Dn, LEVEL) for scores_Dn in drawn.layers(kind)]
    found["above"] = sum(int((low_n > 0)[seen_Ln[layer]].sum()) for layer, (low_n, _high) in enumerate(bounds))
    found["below"] = sum(int((high_n < 0)[seen_Ln[layer]].sum()) for layer, (_low, high_n) in enumerate(bounds))
    if used >= _HALVED:
        found["halves"] = halved(scores, task, kind, k, study.seed)
    return found


def halved(scores: Scores, task: str, kind: Kind, k: int, seed: int) -> dict[str, Any]:
    """Two random halves of the prompts, again and again: means over the draws, and the middle 95 % of overlaps.

    leaders, leaders_anew: the mean score of the top set of a half on that half, and on the other
    """
    P, generator = len((scores.meta.prompt_ids or {})[task]), torch.Generator().manual_seed(seed)
    order_DP = torch.rand(HALVES, P, generator=generator).argsort(1)
    one_DP = torch.zeros(HALVES, P).scatter_(1, order_DP[:, : P // 2], 1.0)
    seen_Ln = scores.seen(kind)
    halves = [
        torch.cat([rescored(scores, task, kind, x, half_DP)[:, seen_Ln[x]] for x in range(len(seen_Ln))], 1)
        for half_DP in (one_DP, 1 - one_DP)
    ]
    shared, correlations, own, anew = [], [], [], []
    for one_N, other_N in zip(*halves, strict=True):
        if not bool((one_N.isfinite() & other_N.isfinite()).all()):
            continue  # a half of which some metric used no prompt
        tops = top_set(one_N, k), top_set(other_N, k)
        shared.append(Shared.of(*tops))
        for top_N, chosen_N, held_N in zip(tops, (one_N, other_N), (other_N, one_N), strict=True):
            own += chosen_N[top_N].tolist()
            anew += held_N[top_N].tolist()
        correlations.append(spearman(one_N, other_N))
    overlaps = [each.share for each in shared if each.share is not None]
    ranks = [each for each in correlations if each is not None]
    if not overlaps or not ranks:
        empty = dict.fromkeys(("overlap", "overlap_interval", "by_chance", "spearman", "leaders", "leaders_anew"))
        return {"draws": len(shared), **empty}
    low, high = ends(torch.tensor(overlaps)[:, None], LEVEL)
    return {
        "draws": len(shared), "overlap": fmean(overlaps), "overlap_interval": [float(low), float(high)],
        "by_chance": fmean(each.by_chance for each in shared), "spearman": fmean(ranks),
        "leaders": fmean(own), "leaders_anew": fmean(anew),
    }  # fmt: skip


def of_whole(halves: float) -> float:
    """Spearman-Brown: what correlation two files of the whole size are estimated to have, from that of halves."""
    return 2 * halves / (1 + halves)


def _leader(found: Interval) -> dict[str, Any]:
    return {
        "name": found.component.name, "score": found.score, "interval": [found.low, found.high],
        "ranks": [found.best_rank, found.worst_rank],
    }  # fmt: skip


def findings(data: Mapping[str, Any]) -> list[str]:
    """What stands out, in sentences made from the numbers."""
    found = []
    for kind in Kind:
        rows = [row for row in data["rankings"] if row["kind"] == kind and row["leaders"]]
        halves = [row["halves"] for row in rows if row["halves"] and row["halves"]["overlap"] is not None]
        if whole := [row for row in rows if not row["subset"]]:  # leaders that others chose are no sample of all
            above = sum(row["above"] for row in whole) / sum(row["components"] for row in whole)
            found.append(
                f"Of all scores of {kind}, {percent(above)} are surely above zero (2.5 % would be if none was); the "
                f"strongest is within rank {min(r['leaders'][0]['ranks'][0] for r in whole)} to "
                f"{max(r['leaders'][0]['ranks'][1] for r in whole)} in every ranking."
            )
        if halves:
            overlap, chance = fmean(h["overlap"] for h in halves), fmean(h["by_chance"] for h in halves)
            r = fmean(h["spearman"] for h in halves)
            found.append(
                f"Half of the prompts find {percent(overlap)} of the top {kind} that the other half finds "
                f"({percent(chance)} by chance); their rankings correlate by {r:.2f}"
                + (f", which estimates {of_whole(r):.2f} for all prompts against as many others." if r > 0 else ".")
            )
            own, anew = (fmean(h[key] for h in halves) for key in ("leaders", "leaders_anew"))
            found.append(
                f"The top {kind} of half of the prompts score {own:.4f} on it and {anew:.4f} on the other half: "
                "leaders are also those that were lucky, so a leader's own interval lies too high."
            )
    return [*found, *(row["sentence"] for row in (*_first(data["floors"]), *data["audits"]))]


def _first(floors: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the lower percentile alone."""
    return [row for row in floors if row["share"] == SHARES[0]]


def _answers(data: Mapping[str, Any]) -> dict[str, Answer]:
    """What of it stands at the top of the page: of the halves, if there are any."""
    shown = next((f"leaders-{number}" for number, row in enumerate(data["rankings"]) if row["leaders"]), "")
    halves = next((text for text in findings(data) if text.startswith("Half")), None)
    return {} if halves is None else {"sure": Answer(halves, shown)}


def _notes(data: Mapping[str, Any]) -> Iterator[Note]:
    """The leaders' intervals."""
    for row in data["rankings"]:
        for each in row["leaders"]:
            (low, high), (best, worst) = each["interval"], each["ranks"]
            among = f" of the {row['components']:,} scored" if row["subset"] else ""
            text = f"95 %: {low:.4g} to {high:.4g}, rank {best} to {worst}{among}"
            yield Note(each["name"], row["scores"], row["task"], text)


def _leader_lines(rows: list[dict[str, Any]]) -> list[list[object]]:
    lines: list[list[object]] = [
        ["scores", "task", "kind", "component", "score", "low", "high", "best_rank", "worst_rank"]
    ]
    for row in rows:
        about = [row["scores"], row["task"], row["kind"]]
        lines += [[*about, x["name"], x["score"], *x["interval"], *x["ranks"]] for x in row["leaders"]]
    return lines


def _audit_lines(audits: list[dict[str, Any]]) -> list[list[object]]:
    about = ["scores", "task", "kind", "k", "leaders", "drawn", "rest", "found", "estimate", "at_most"]
    lines: list[list[object]] = [[*about, "of", "overlap_low", "overlap_high"]]
    for row in audits:
        own = [row[name] for name in about]
        lines += [[*own, other, *ends_] for other, ends_ in row["overlap"].items()] or [[*own, None, None, None]]
    return lines


def _ranking_lines(rows: list[dict[str, Any]]) -> list[list[object]]:
    about = ["scores", "task", "kind", "components", "prompts", "above", "below", "k"]
    of_halves = ["overlap", "by_chance", "spearman", "leaders", "leaders_anew"]
    lines: list[list[object]] = [[*about, *of_halves]]
    for row in rows:
        lines.append([*(row[name] for name in about), *((row["halves"] or {}).get(name) for name in of_halves)])
    return lines


def _section(data: Mapping[str, Any], pictures: Mapping[str, Any], study: Study) -> Any:
    head = ["scores", "task", "kind", "prompts", "above zero", "below", "overlap of halves", "by chance", "Spearman"]
    rankings = [head]
    for row in data["rankings"]:
        halves = row["halves"] or {"overlap": None, "by_chance": None, "spearman": None}
        shares = [_share(row[side], row["components"]) for side in ("above", "below")]
        rankings.append([row["scores"], row["task"], row["kind"], str(row["prompts"]), *shares,
                         cell(halves["overlap"]), cell(halves["by_chance"]), cell(halves["spearman"])])  # fmt: skip
    differ = [["files", "task", "kind", "surely differ", "by chance"]] + [
        [f"{r['one']}, {r['other']}", r["task"], r["kind"], _share(r["differ"], r["components"]), percent(1 - LEVEL)]
        for r in data["differences"]
    ]
    audits = [["audit", "task", "kind", "top", "scored one by one", "found", "missed at most", "of the top of others"]]
    for r in data["audits"]:
        others = ", ".join(f"{name} {low:.2f} to {high:.2f}" for name, (low, high) in r["overlap"].items())
        scored = f"{r['leaders']:,} leaders, {r['drawn']:,} of {r['rest']:,} others"
        audits.append(
            [r["scores"], r["task"], r["kind"], str(r["k"]), scored, str(r["found"]), str(r["at_most"]), others]
        )
    floor = [["scores", "task", "kind", "floor", "score there", "above it", "of other shuffles"]] + [
        [r["scores"], r["task"], r["kind"], percent(r["share"]), f"{r['threshold']:.4f}",
         _share(r["above"], r["components"]), cell(r["by_shuffles"], ".1%")]
        for r in data["floors"]
    ]  # fmt: skip
    shown = [
        (row, f"leaders-{number}", pictures[f"leaders-{number}"])
        for number, row in enumerate(data["rankings"]) if f"leaders-{number}" in pictures
    ]  # fmt: skip
    return render(
        "study_certainty.html", findings=findings(data), rankings=grid(rankings), shown=shown, without=data["without"],
        differences=grid(differ) if data["differences"] else "", any=bool(data["rankings"]), top=study.top,
        audits=grid(audits) if data["audits"] else "", floors=grid(floor) if data["floors"] else "",
    )  # fmt: skip


def _share(count: int | None, of: int) -> str:
    return "-" if count is None or not of else f"{percent(count / of)} ({count})"


PART = Part(
    name="certainty",
    title="How sure the scores are",
    work=work,
    settings=("top", "seed"),
    models=False,
    code=(
        "study/certainty.py",
        "study/sets.py",
        "study/drawings.py",
        "floor.py",
        "intervals.py",
        "missed.py",
        "ranking.py",
        "scores.py",
    ),
)
