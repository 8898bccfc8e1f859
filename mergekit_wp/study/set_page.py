"""What the part `sets` says and draws: tables, curves, sentences made from the numbers, and its section of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from mergekit_wp.console import percent
from mergekit_wp.foreign import file_parts
from mergekit_wp.geometry import Kind
from mergekit_wp.page import grid, render
from mergekit_wp.palette import QUIET
from mergekit_wp.pictures import expert_colour
from mergekit_wp.study import drawings
from mergekit_wp.study.cells import cell, draws, estimate, flat, lines_of
from mergekit_wp.study.drawings import Shown
from mergekit_wp.study.held_out import about_prompts
from mergekit_wp.study.inputs import ALL, DOWN, UP
from mergekit_wp.study.parts import Answer, PartResult
from mergekit_wp.study.set_plan import CEILINGS, MATCHED, RANDOM, WORST
from mergekit_wp.study.set_rows import DIRECTIONS, RESTORED, SET_COLUMNS, Row, SetRows

SHOWN = 0.05
"""The share of a ranking that sentences and tables of the page speak of."""
_CEILINGS = {
    "heads": "all heads", "neurons": "all neurons", "components": "all heads and neurons",
    "rest": "all but heads and neurons", "everything": "everything",
}  # fmt: skip


def result_of(found: SetRows, questions: Sequence[Mapping[str, Any]]) -> PartResult:
    """All that is written of the part."""
    means = found.means()
    data = {
        "questions": list(questions), "means": means, "curves": found.curves, "ceilings": found.ceilings,
        "branches": found.branches, "without_gap": found.without_gap,
    }  # fmt: skip
    pictures = dict(_pictures(means, found.curves))
    tables: dict[str, list[list[object]]] = {
        "sets": [list(SET_COLUMNS), *found.sets],
        "curves": _flat_lines(found.curves),
        "means": _flat_lines(means),
        "ceilings": lines_of(found.ceilings),
        "branches": lines_of(found.branches),
    }
    drawn = {each.file: each.picture for each in (*pictures["means"], *pictures["tasks"])}
    return PartResult(
        data, {name: lines for name, lines in tables.items() if lines}, drawn, _section(data, pictures),
        answers=_answers(data, pictures),
    )  # fmt: skip


def _flat_lines(rows: Sequence[Row]) -> list[list[object]]:
    return lines_of([flat(row, (RANDOM, MATCHED), ("beyond_matched",)) for row in rows])


# Pictures


def _pictures(means: Sequence[Row], curves: Sequence[Row]) -> Iterator[tuple[str, list[Shown]]]:
    files = list(dict.fromkeys(row["scores"] for row in means))
    shown = []
    for part, name in zip(file_parts(files), files, strict=True):
        own = [row for row in means if row["scores"] == name]
        tasks = max(row["tasks"] for row in own)
        caption = f"{name}: mean of {tasks} tasks" if tasks > 1 else name
        shown.append(Shown(f"curves-{part}", caption, _curves(own, f"Effects of sets by {name}"), scores=name))
    yield "means", shown
    places = list(dict.fromkeys((row["scores"], row["task"]) for row in curves if row["own"]))
    several = [place for place in places if sum(one == place[0] for one, _task in places) > 1]
    shown = []
    for part, place in zip(file_parts(f"curves-{one}-{task}" for one, task in several), several, strict=True):
        own = [row for row in curves if row["own"] and (row["scores"], row["task"]) == place]
        picture = _curves(own, f"Effects of sets by {place[0]} on {place[1]}")
        shown.append(Shown(part, ": ".join(place), picture, place[1], place[0]))
    yield "tasks", shown


def _curves(rows: Sequence[Row], description: str) -> Markup:
    panels = {}
    for direction, words in DIRECTIONS.items():
        for kind, side in dict.fromkeys((row["kind"], row["side"]) for row in rows):
            own = [r for r in rows if (r["direction"], r["kind"], r["side"]) == (direction, kind, side)]
            if own:
                column = kind if side == ALL else f"{kind}, {side}"
                panels[words, f"{column}: {own[0]['metric']}"] = list(_lines_of(own))
    return drawings.set_curves(panels, description)


def _lines_of(rows: Sequence[Row]) -> Iterator[drawings.Curve]:
    def x(some: Sequence[Row]) -> list[float]:
        return [100 * row["k"] / row["components"] for row in some]

    for what, label, style in ((RANDOM, "random", "-"), (MATCHED, "random, as many a layer", "--")):
        if own := [row for row in rows if row[what]]:
            spread = [min(row[what]) for row in own], [max(row[what]) for row in own]
            yield drawings.Curve(label, x(own), [fmean(row[what]) for row in own], QUIET, style, spread)
    if own := [row for row in rows if row[WORST] is not None]:
        yield drawings.Curve("worst of the ranking", x(own), [row[WORST] for row in own], expert_colour(1), ":")
    known = all(row["low"] is not None for row in rows)
    band = ([row["low"] for row in rows], [row["high"] for row in rows]) if known else None
    yield drawings.Curve("top of the ranking", x(rows), [row["effect"] for row in rows], expert_colour(0), "-", band)


# The page


def _answers(data: Mapping[str, Any], pictures: Mapping[str, list[Shown]]) -> dict[str, Answer]:
    """What of it stands at the top of the page."""
    found = {}
    for question, said in (("carried", _carried(data["means"])), ("path", _upstream(data["curves"]))):
        if said is not None:
            name, text = said
            picture = next(each.file for each in pictures["means"] if each.scores == name)
            found[question] = Answer(text, picture, fallback=question == "path")
    return found


def _carried(means: Sequence[Row]) -> tuple[str, str] | None:
    """(file, sentence): what the tops of the first file that has controls restore."""
    tops = [row for row in nearest(means) if row["direction"] == RESTORED and row[MATCHED] is not None]
    own = [row for row in tops if row["scores"] == tops[0]["scores"]]
    shares = [
        f"{_top(row)} bring {percent(row['effect'])} of the gap by {row['metric']} (random ones of the same layers "
        f"{percent(fmean(row[MATCHED]))})"
        for row in own
    ]
    return (own[0]["scores"], f"By {own[0]['scores']}, put into the base, {'; '.join(shares)}.") if own else None


def _upstream(curves: Sequence[Row]) -> tuple[str, str] | None:
    """(file, sentence): what all heads or neurons up to the anchor layer, and above it, restore of the output. No
    verdict comes of it: a side of more layers has more to restore with, and what is enough need not be needed."""
    whole = [
        row for row in curves
        if (row["direction"], row["metric"]) == (RESTORED, "kl") and row["k"] == row["components"]
    ]  # fmt: skip
    for name in dict.fromkeys(row["scores"] for row in whole):
        own = {
            (kind, side): rows
            for kind in map(str, Kind) for side in (UP, DOWN)
            if (rows := [r for r in whole if (r["scores"], r["kind"], r["side"]) == (name, kind, side)])
        }  # fmt: skip
        if len(own) < 2 * len(Kind):
            continue
        sides = []
        for side, where in ((UP, "the layers up to the anchor restore"), (DOWN, "those above it")):
            shares = (
                f"{percent(fmean(r['effect'] for r in rows))} by their {rows[0]['components']:,} {kind}"
                for kind in ("neurons", "heads") for rows in [own[kind, side]]
            )  # fmt: skip
            sides.append(f"{where} {' and '.join(shares)}")
        return name, f"Put into the base by themselves, of the gap at the output {', '.join(sides)}."
    return None


def _section(data: Mapping[str, Any], pictures: Mapping[str, list[Shown]]) -> Markup:
    return render(
        "study_sets.html", findings=findings(data), prompts=about_prompts(data["questions"]), pictures=pictures,
        without_gap=data["without_gap"], shown=percent(SHOWN),
        top=grid(_top_grid(data["means"])), ceilings=grid(_ceiling_grid(data["ceilings"])),
        branches=grid(_branch_grid(data["branches"])), tasks=grid(_task_grid(data["curves"])),
    )  # fmt: skip


def nearest(rows: Sequence[Row]) -> list[Row]:
    """Of every curve, the point of the smallest set that has at least the shown share."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        place = tuple(row.get(key) for key in ("scores", "task", "direction", "metric", "kind", "side"))
        if row["k"] >= SHOWN * row["components"] and (place not in found or row["k"] < found[place]["k"]):
            found[place] = row
    return list(found.values())


def findings(data: Mapping[str, Any]) -> list[str]:
    """What stands out, in sentences made from the numbers."""
    found = []
    for row in nearest(data["means"]):
        if row[RANDOM] is None or row[MATCHED] is None:
            continue
        verb = "restored in the base, bring" if row["direction"] == RESTORED else "taken out of the expert, cost"
        sure = (row["beyond_matched"] or [None])[0]
        beyond = "more than" if sure is not None and sure > 0 else "not clearly more than"
        found.append(
            f"{row['scores']}: {_top(row)}, {verb} {percent(row['effect'])} of the gap ({row['metric']}), "
            f"{beyond} as many drawn at random in the same layers "
            f"({percent(fmean(row[MATCHED]))}); drawn anywhere, {percent(fmean(row[RANDOM]))}."
        )
    for direction, words in DIRECTIONS.items():
        own = [r for r in data["ceilings"] if (r["direction"], r["metric"]) == (direction, "kl")]
        whole = [r["effect"] for r in own if r["set"] == "components"]
        if whole:
            found.append(
                f"All heads and neurons together, {words}, make {percent(fmean(whole))} of the gap (kl). The rest "
                "takes keys, values, norms, embeddings and head."
            )
    return found


def _top_grid(means: Sequence[Row]) -> list[list[str]]:
    drawn = ["as many a layer", "random", "worst"]
    lines = [["ranking", "set", "", "read by", "top (95 %)", *drawn, "all of them", "additive"]]
    ends = {_place(row): row["effect"] for row in means if row["k"] == row["components"]}
    for row in nearest(means):
        sided = row["kind"] if row["side"] == ALL else f"{row['kind']}, {row['side']}"
        lines.append([
            row["scores"], f"{row['k']} of {row['components']} {sided}", DIRECTIONS[row["direction"]], row["metric"],
            estimate(row["effect"], row["low"], row["high"]), draws(row[MATCHED]), draws(row[RANDOM]), cell(row[WORST]),
            cell(ends.get(_place(row))), cell(row["additive"]),
        ])  # fmt: skip
    return lines


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("scores", "task", "direction", "metric", "kind", "side"))


def _ceiling_grid(rows: Sequence[Row]) -> list[list[str]]:
    """Means over tasks."""
    places = dict.fromkeys((row["scores"], row["direction"], row["metric"]) for row in rows)
    lines = [["scores", "", "read by", *(_CEILINGS[what] for what in CEILINGS)]]
    for place in places:
        own = [row for row in rows if (row["scores"], row["direction"], row["metric"]) == place]
        cells = [cell(fmean(row["effect"] for row in own if row["set"] == what)) for what in CEILINGS]
        lines.append([place[0], DIRECTIONS[place[1]], place[2], *cells])
    return lines


def _branch_grid(rows: Sequence[Row]) -> list[list[str]]:
    """Means over tasks of what the rankings' own metrics read."""
    head = ["scores", "set", "read by", "whole neurons", "branch", "it alone", "ranked by it", "overlap", "by chance"]
    keys = ("scores", "side", "metric", "k", "branch")
    lines, own = [head], [row for row in rows if row["own"]]
    for place in dict.fromkeys(tuple(row[key] for key in keys) for row in own):
        some = [row for row in own if tuple(row[key] for key in keys) == place]
        name, side, metric, k, branch = place
        cells = [cell(_mean(some, what)) for what in ("alone", "ranked_by", "overlap", "by_chance")]
        top = f"top {k}" if side == ALL else f"top {k} {side}"
        lines.append([name, top, metric, cell(_mean(some, "whole")), branch, *cells])
    return lines


def _mean(rows: Sequence[Row], what: str) -> float | None:
    known = [row[what] for row in rows if row[what] is not None]
    return fmean(known) if known else None


def _task_grid(curves: Sequence[Row]) -> list[list[str]]:
    head = ["ranking", "task", "", "read by", "k", "top (95 %)", "as many a layer", "random", "worst", "additive"]
    lines = [head]
    for row in curves:
        sided = row["kind"] if row["side"] == ALL else f"{row['kind']}, {row['side']}"
        lines.append([
            f"{row['scores']}: {sided}", row["task"], DIRECTIONS[row["direction"]], row["metric"], str(row["k"]),
            estimate(row["effect"], row["low"], row["high"]), draws(row[MATCHED]), draws(row[RANDOM]), cell(row[WORST]),
            cell(row["additive"]),
        ])  # fmt: skip
    return lines


def _top(row: Row) -> str:
    where = {UP: " up to the anchor layer", DOWN: " above the anchor layer"}.get(row["side"], "")
    return f"the top {row['k']} {row['kind']}{where} ({100 * row['k'] / row['components']:.0f} %)"
