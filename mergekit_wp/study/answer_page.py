"""What the part `answers` says and draws: tables, curves, radar, matrices, sentences, and its section of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup

from mergekit_wp.console import percent
from mergekit_wp.foreign import file_parts
from mergekit_wp.page import grid, render
from mergekit_wp.palette import INK, QUIET
from mergekit_wp.pictures import expert_colour
from mergekit_wp.study import drawings
from mergekit_wp.study.answer_plan import BASE, BOTH, EXPERT, KIND_WORDS, KINDS
from mergekit_wp.study.answer_rows import AnswerRows, Answers, Row
from mergekit_wp.study.cells import cell, draws, estimate, flat, lines_of
from mergekit_wp.study.drawings import Shown
from mergekit_wp.study.held_out import about_prompts
from mergekit_wp.study.parts import Answer, PartResult
from mergekit_wp.study.set_plan import MATCHED, RANDOM
from mergekit_wp.study.set_rows import DIRECTIONS, RESTORED

_LEAST_GAP = 0.1
_MANY_LOOPS = 0.1


def result_of(
    found: AnswerRows, every: Sequence[Answers], across: Sequence[Row], steered: Sequence[Row], left_out: Sequence[str]
) -> PartResult:
    """All that is written of the part."""
    questions = [
        {
            "task": e.question.task,
            "prompts": len(e.question.prompts),
            "held_out": e.question.held_out,
            "known": e.question.known,
        }
        for e in every
    ]
    data: dict[str, Any] = {
        "questions": questions, "means": found.means(), "curves": found.curves, "models": found.models,
        "across": list(across), "steered": list(steered), "left_out": list(left_out),
    }  # fmt: skip
    pictures = list(_pictures(data))
    tables = {
        "means": _flat_lines(data["means"]), "curves": _flat_lines(data["curves"]),
        "models": lines_of(data["models"]), "across": _across_lines(across), "steered": lines_of(steered),
    }  # fmt: skip
    return PartResult(
        data, {name: lines for name, lines in tables.items() if lines},
        {each.file: each.picture for each in pictures}, _section(data, pictures), documents={"texts": _texts(every)},
        answers={"behaviour": Answer(_behaviour(data["means"]), pictures[0].file)} if pictures else {},
    )  # fmt: skip


def _texts(every: Sequence[Answers]) -> dict[str, Any]:
    """Every answer: of each task the prompts, and of each model what it said and whether that passed."""
    found = {}
    for answers in every:
        rows: dict[str, dict[str, Any]] = {}
        for model in answers.models:
            said = answers.said[model.key]
            rows.setdefault(model.key, {"answers": said.texts, "passed": said.passed, "models": []})
            rows[model.key]["models"].append(model.called)
        found[answers.question.task] = {"prompts": answers.question.texts, "said": list(rows.values())}
    return found


def _flat_lines(rows: Sequence[Row]) -> list[list[object]]:
    return lines_of([flat(row, (RANDOM, MATCHED)) for row in rows])


def _across_lines(rows: Sequence[Row]) -> list[list[object]]:
    lines: list[list[object]] = [["scores", "direction", "set_of", "prompts_of", "right", "recipient"]]
    for row in rows:
        for of, rights in zip(row["tasks"], row["right"], strict=True):
            for task, right, own in zip(row["tasks"], rights, row["recipient"], strict=True):
                lines.append([row["scores"], row["direction"], of, task, right, own])
    return lines if len(lines) > 1 else []


# Pictures


def _pictures(data: Mapping[str, Any]) -> Iterator[Shown]:
    means, curves, across = data["means"], data["curves"], data["across"]
    files = [name for name in dict.fromkeys(row["scores"] for row in means) if any(
        row["scores"] == name and row[MATCHED] for row in means
    )]  # fmt: skip
    for part, name in zip(file_parts(files), files, strict=True):
        own = [row for row in means if row["scores"] == name]
        mean = f", mean of {own[0]['tasks']} tasks" if own[0]["tasks"] > 1 else ""
        drawn = _curves(own, f"Right answers by sets of {name}")
        yield Shown(f"curves-{part}", f"Right answers by size of the set, {name}{mean}", drawn, scores=name)
    if polygons := _polygons(curves):
        tasks = list(dict.fromkeys(row["task"] for row in curves))
        described = "Right answers of each task, of base, expert and the base with top sets"
        drawn = drawings.radar(polygons, tasks, described)
        yield Shown("radar", "Base with the top of all heads and of all neurons, by task", drawn)
    for part, name in zip(file_parts(names := list(dict.fromkeys(r["scores"] for r in across))), names, strict=True):
        own = [row for row in across if row["scores"] == name]
        panels = {f"{DIRECTIONS[row['direction']]}, %": np.round(100 * np.array(row["right"])) for row in own}
        caption = f"Right answers, %, {name}: a row is the task whose set it is, a column whose prompts"
        drawn = drawings.matrix_svg(panels, own[0]["tasks"], f"Tasks across sets of {name}")
        yield Shown(f"across-{part}", caption, drawn, scores=name)


def _polygons(curves: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Of every file that has three tasks and more: base, the base with each share restored, expert."""
    found = {}
    tasks = list(dict.fromkeys(row["task"] for row in curves))
    restored = [row for row in curves if row["direction"] == RESTORED and row["kinds"] == BOTH and row["share"] < 1]
    for name in dict.fromkeys(row["scores"] for row in restored):
        own = [row for row in restored if row["scores"] == name]
        shares = sorted({row["share"] for row in own})
        of = {share: {row["task"]: row for row in own if row["share"] == share} for share in shares}
        if len(tasks) >= 3 and all(set(rows) == set(tasks) for rows in of.values()):
            first = of[shares[0]]
            top = {f"top {100 * share:g} %": [rows[task]["right"] for task in tasks] for share, rows in of.items()}
            found[name] = {BASE: [first[t]["base"] for t in tasks], **top, EXPERT: [first[t]["expert"] for t in tasks]}
    return found


def _curves(rows: Sequence[Row], description: str) -> Markup:
    panels = {}
    for direction, words in DIRECTIONS.items():
        for kinds in KINDS:
            own = sorted(
                (r for r in rows if (r["direction"], r["kinds"]) == (direction, kinds)), key=lambda r: r["share"]
            )
            if own:
                panels[words, KIND_WORDS[kinds]] = list(_lines_of(own))
    return drawings.set_curves(panels, description)


def _lines_of(rows: Sequence[Row]) -> Iterator[drawings.Curve]:
    x = [100 * row["share"] for row in rows]
    for end, style in ((BASE, ":"), (EXPERT, "--")):
        yield drawings.Curve(end, x, [row[end] for row in rows], INK, style)
    for what, label, style in ((RANDOM, "random", "-"), (MATCHED, "random, as many a layer", "--")):
        if own := [row for row in rows if row[what]]:
            spread = [min(row[what]) for row in own], [max(row[what]) for row in own]
            sizes = [100 * row["share"] for row in own]
            yield drawings.Curve(label, sizes, [fmean(row[what]) for row in own], QUIET, style, spread)
    known = all(row["right_low"] is not None for row in rows)
    band = ([row["right_low"] for row in rows], [row["right_high"] for row in rows]) if known else None
    yield drawings.Curve("top of the ranking", x, [row["right"] for row in rows], expert_colour(0), "-", band)


# The page


def _section(data: Mapping[str, Any], pictures: Sequence[Shown]) -> Markup:
    return render(
        "study_answers.html", findings=findings(data), prompts=about_prompts(data["questions"]), pictures=pictures,
        means=grid(_mean_grid(data["means"])) if data["means"] else "", left_out=data["left_out"],
        across=grid(_across_grid(data["across"])) if data["across"] else "",
        steered=grid(_steered_grid(data)) if data["steered"] else "",
        tasks=grid(_task_grid(data["curves"])) if data["curves"] else "",
    )  # fmt: skip


def _behaviour(means: Sequence[Row]) -> str:
    """What changed in behaviour, and how much of that the smallest top set brings."""
    least = min(row["share"] for row in means)
    row = next(r for r in means if (r["direction"], r["kinds"], r["share"]) == (RESTORED, BOTH, least))
    over = f"mean of {row['tasks']} tasks, " if row["tasks"] > 1 else ""
    return (
        f"The base answers {percent(row[BASE])} right, the expert {percent(row[EXPERT])}; the base with the top "
        f"{100 * least:g} % of heads and neurons {percent(row['right'])} ({over}by {row['scores']})."
    )


def findings(data: Mapping[str, Any]) -> list[str]:
    """What stands out, in sentences made from the numbers: of the smallest sets, as large ones carry a lot whatever is
    in them."""
    means, found = data["means"], []
    least = min((row["share"] for row in means), default=None)
    tops = [row for row in means if row["share"] == least and row[MATCHED] is not None]
    found += [_of_top(row) for row in sorted(tops, key=lambda row: row["kinds"] != BOTH)]
    for row in (r for r in means if r["share"] == 1 and r["kinds"] == BOTH and r["scores"] == means[0]["scores"]):
        verb = "make the base answer" if row["direction"] == RESTORED else "leave the expert answering"
        found.append(
            f"All heads and neurons that {row['scores']} ranks, {DIRECTIONS[row['direction']]}, {verb} "
            f"{percent(row['right'])} right ({percent(row['right_low'])} to {percent(row['right_high'])}); base "
            f"{percent(row[BASE])}, expert {percent(row[EXPERT])}."
        )
    for row in data["across"]:
        found.append(
            f"{row['scores']}: the top {100 * row['share']:g} % of {row['kinds']} of a task, "
            f"{DIRECTIONS[row['direction']]}, change right answers to its own prompts by {_points(row['own'])}, the "
            f"sets of other tasks by {_points(row['others'])} (p = {row['p']:.2g} over {len(row['tasks'])} tasks)."
        )
    if loops := [row for row in data["models"] if row["loops"] > _MANY_LOOPS]:
        worst = max(loops, key=lambda row: row["loops"])
        found.append(
            f"Of {len(data['models'])} models, {len(loops)} run in loops in more than {percent(_MANY_LOOPS)} of their "
            f"answers, up to {percent(worst['loops'])} ({worst['task']}): a check may pass there all the same."
        )
    return found


def _of_top(row: Row) -> str:
    restored = row["direction"] == RESTORED
    low, high = row["beyond_matched_low"], row["beyond_matched_high"]
    sure = low is not None and (low > 0 if restored else high < 0)
    how = ("more than" if restored else "less than") if sure else "not surely other than"
    alike = "" if row[EXPERT] - row[BASE] >= _LEAST_GAP else "; they hardly differ"
    return (
        f"{row['scores']}: the top {100 * row['share']:g} % of {KIND_WORDS[row['kinds']]}, "
        f"{DIRECTIONS[row['direction']]}, "
        f"{'make it answer' if restored else 'leave it answering'} {percent(row['right'])} right "
        f"({percent(row['right_low'])} to {percent(row['right_high'])}; base {percent(row[BASE])}, expert "
        f"{percent(row[EXPERT])}{alike}), {how} as many drawn in the same layers ({percent(fmean(row[MATCHED]))})."
    )


def _mean_grid(means: Sequence[Row]) -> list[list[str]]:
    head = [
        "ranking",
        "set",
        "",
        "base",
        "expert",
        "right (95 %)",
        "as many a layer",
        "random",
        "beyond as many a layer",
    ]
    lines = [head]
    for row in means:
        lines.append([
            row["scores"], f"{100 * row['share']:g} % of {KIND_WORDS[row['kinds']]} ({row['size']:.0f})",
            DIRECTIONS[row["direction"]], cell(row[BASE]), cell(row[EXPERT]), _estimate(row, "right"),
            draws(row[MATCHED]), draws(row[RANDOM]), _estimate(row, "beyond_matched", "+.2f"),
        ])  # fmt: skip
    return lines


def _task_grid(curves: Sequence[Row]) -> list[list[str]]:
    lines = [["ranking", "task", "set", "", "base", "expert", "right (95 %)", "as many a layer", "random"]]
    for row in curves:
        lines.append([
            row["scores"], row["task"], f"{100 * row['share']:g} % of {KIND_WORDS[row['kinds']]} ({row['size']})",
            DIRECTIONS[row["direction"]], cell(row[BASE]), cell(row[EXPERT]), _estimate(row, "right"),
            draws(row[MATCHED]), draws(row[RANDOM]),
        ])  # fmt: skip
    return lines


def _across_grid(rows: Sequence[Row]) -> list[list[str]]:
    lines = [["ranking", "", "own task", "other tasks", "p"]]
    for row in rows:
        lines.append([
            row["scores"], DIRECTIONS[row["direction"]], cell(row["own"], "+.2f"), cell(row["others"], "+.2f"),
            cell(row["p"], ".2g"),
        ])  # fmt: skip
    return lines


def _steered_grid(data: Mapping[str, Any]) -> list[list[str]]:
    lines = [["scores", "task", "prompts", "base", "steered, best layer", "expert", "base with the largest set"]]
    restored = [r for r in data["curves"] if r["direction"] == RESTORED and r["kinds"] == BOTH and r["share"] < 1]
    for row in data["steered"]:
        best = [r["right"] for r in restored if r["task"] == row["task"]]
        lines.append([
            row["scores"], row["task"], str(row["prompts"]), cell(row[BASE]),
            f"{row['steered']:.2f} (layer {row['layer']})", cell(row[EXPERT]), cell(max(best, default=None)),
        ])  # fmt: skip
    return lines


def _estimate(row: Row, name: str, form: str = ".2f") -> str:
    return estimate(row[name], row[f"{name}_low"], row[f"{name}_high"], form)


def _points(share: float) -> str:
    return f"{100 * share:+.0f} points"
