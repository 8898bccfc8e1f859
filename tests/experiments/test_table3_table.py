"""The table's arithmetic against numpy, and its four forms."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from experiments.miniature.items import CAPABILITIES
from experiments.table3.formats import (
    NONE,
    caption,
    difference,
    number,
    remarks,
    search_text,
    summary,
    to_csv,
    to_markdown,
    to_text,
    verdict,
)
from experiments.table3.grade import TestGrade, ValidationGrade
from experiments.table3.html import to_html
from experiments.table3.jobs import AUTHORS, LABELS, ONLY, UNLABELLED, Entry
from experiments.table3.table import (
    COLUMNS,
    MEAN,
    MERGED,
    OWN,
    WITHOUT,
    RivalTable,
    Spread,
    by_setting,
    item_error,
    ranked,
)
from experiments.table3.variants import (
    BASELINE,
    COMBINATIONS,
    SAW_LABELS,
    SAW_NOTHING,
    SAW_PROMPTS,
    Point,
    Variant,
)

SEEDS = (0, 1, 2)
RNG = np.random.default_rng(7)
# right[seed, combination, method, capability]
METHODS = (BASELINE, "TIES", "WP")
RIGHT = RNG.uniform(0.2, 0.9, (3, len(COMBINATIONS), len(METHODS), 3)).round(3)


SAW = {LABELS: SAW_LABELS, UNLABELLED: SAW_PROMPTS}


def entry(seed: int, combination: str, name: str, right: np.ndarray, role: str = ONLY) -> Entry:
    grade = TestGrade(dict(zip(CAPABILITIES, map(float, right), strict=True)), dict.fromkeys(CAPABILITIES, 240))
    saw = SAW_PROMPTS if name == "WP" else SAW.get(role, SAW_NOTHING)
    return Entry(seed, combination, name, "methods", f"setting of {name}", role, grade, saw)


def make_table(seeds: tuple[int, ...] = SEEDS) -> RivalTable:
    entries = []
    for s in seeds:
        for c, combination in enumerate(COMBINATIONS):
            for m, name in enumerate(METHODS):
                entries.append(entry(s, combination, name, RIGHT[s, c, m], AUTHORS if name == "TIES" else ONLY))
            entries.append(entry(s, combination, "TIES", RIGHT[s, c, 1] / 2, UNLABELLED))
            entries.append(entry(s, combination, "TIES", RIGHT[s, c, 1] / 4, LABELS))
        entries.append(Entry(s, "", "base", "models", "", ONLY, entry(s, "", "", RIGHT[s, 0, 0]).grade))
    return RivalTable(seeds, tuple(entries), "test")


def test_means_errors_and_paired_differences_are_numpys() -> None:
    table = make_table()
    for c, (combination, experts) in enumerate(COMBINATIONS.items()):
        others = [i for i, name in enumerate(CAPABILITIES) if name != "instruction"]
        places = {MEAN: [0, 1, 2], WITHOUT: others, MERGED: [CAPABILITIES.index(name) for name in experts]}
        places |= {name: [i] for i, name in enumerate(CAPABILITIES)}
        for m, name in enumerate(METHODS):
            (row,) = [row for row in table.of(combination, "methods") if row.name == name]
            for column in COLUMNS:
                mine = 100 * RIGHT[:, c, m][:, places[column]].mean(axis=1)
                theirs = 100 * RIGHT[:, c, 0][:, places[column]].mean(axis=1)
                assert row.cells[column].mean == pytest.approx(mine.mean())
                assert row.cells[column].error == pytest.approx(mine.std(ddof=1) / np.sqrt(3))
                if name == BASELINE:
                    assert row.differences is None
                else:
                    assert row.differences is not None
                    paired = row.differences[column]
                    assert paired.mean == pytest.approx((mine - theirs).mean())
                    assert paired.error == pytest.approx((mine - theirs).std(ddof=1) / np.sqrt(3))


def test_each_way_of_choosing_a_setting_has_a_row_that_says_what_it_saw() -> None:
    table = make_table()
    rows = {row.title: row for row in table.of("all three", OWN, UNLABELLED, LABELS) if row.name == "TIES"}
    assert {title: row.saw for title, row in rows.items()} == {
        "TIES": SAW_NOTHING,
        "TIES, setting by loss": SAW_PROMPTS,
        "TIES, setting by labels": SAW_LABELS,
    }
    own = rows["TIES"].cells[MEAN].mean
    assert rows["TIES, setting by loss"].cells[MEAN].mean == pytest.approx(own / 2)
    assert rows["TIES, setting by labels"].cells[MEAN].mean == pytest.approx(own / 4)


def test_the_mean_over_combinations_is_numpys_seed_by_seed() -> None:
    mean = RIGHT.mean(axis=(1, 3)) * 100
    for m, row in ((0, BASELINE), (1, "TIES"), (2, "WP")):
        (found,) = [x for x in make_table().over_combinations if x.title == row]
        assert found.cells[MEAN].values == pytest.approx(mean[:, m])
        if m:
            assert found.differences is not None
            assert found.differences[MEAN].values == pytest.approx(mean[:, m] - mean[:, 0])


def test_a_combination_that_a_method_cannot_do_is_a_dash_and_a_sentence() -> None:
    whole = make_table()
    some = tuple(e for e in whole.entries if not (e.variant == "WP" and e.combination == "all three"))
    (line,) = [x for x in summary(RivalTable(SEEDS, some, "test")) if x[0] == "WP"]
    assert [cell == NONE for cell in line[2:]] == [False, False, False, True, True]
    twos = Variant("twos", (Point("slerp"),), "", most=2)
    assert remarks([twos], COMBINATIONS) == [f"twos takes at most 2 experts: {NONE} in all three."]
    assert remarks([Variant("any", (Point("ties"),), "")], COMBINATIONS) == []


def test_a_row_that_a_seed_lacks_is_left_out() -> None:
    whole = make_table()
    less = tuple(e for e in whole.entries if not (e.seed == 2 and e.variant == "WP" and e.combination == "all three"))
    names = [row.name for row in RivalTable(SEEDS, less, "test").of("all three", "methods")]
    assert names == [BASELINE, "TIES"]


def test_a_difference_stands_only_outside_the_t_interval() -> None:
    """4.303 standard errors for three seeds; scipy's quantile of t(2) at 0.975."""
    ones = np.array([-1.0, 0.0, 1.0])
    error = ones.std(ddof=1) / math.sqrt(3)
    assert Spread(tuple(ones + 4.31 * error)).stands
    assert not Spread(tuple(ones + 4.29 * error)).stands
    assert Spread(tuple(ones - 4.31 * error)).stands
    assert not Spread((5.0,)).stands
    assert Spread((5.0,)).error is None
    assert Spread((5.0, 5.0)).stands


def test_numbers_as_they_are_shown() -> None:
    assert number(Spread((80.0, 82.0, 84.0))) == "82.0 ± 1.2"
    assert number(Spread((80.04,))) == "80.0"
    assert difference(Spread((1.0, 1.1, 1.2))) == "+1.1 ± 0.1*"
    assert difference(Spread((-3.0, 1.0, -1.0))) == "-1.0 ± 1.2"
    assert difference(None) == ""


def test_the_error_from_items_is_a_coins() -> None:
    assert item_error(240) == pytest.approx(100 * math.sqrt(0.5 * 0.5 / 240))
    assert item_error(240, 3) == pytest.approx(item_error(240) / math.sqrt(3))


def test_the_verdict_names_the_winner_where_wp_is_and_what_lies_between_even_when_it_loses() -> None:
    lines = verdict(make_table())
    assert lines[-1].startswith("mean over the combinations: ")
    for c, line in enumerate(lines[:-1]):
        experts = COMBINATIONS[line.partition(":")[0]]
        merged = [CAPABILITIES.index(n) for n in experts]
        # The columns of METHODS, then TIES by loss and by labels.
        right = np.concatenate([RIGHT[:, c], RIGHT[:, c, 1:2] / 2, RIGHT[:, c, 1:2] / 4], axis=1)
        titles = [*METHODS, "TIES, setting by loss", "TIES, setting by labels"]
        for label, places in (("mean of all", [0, 1, 2]), ("mean of merged", merged)):
            seeds = 100 * right[:, :, places].mean(axis=2)
            means = seeds.mean(axis=0)
            (said,) = [part for part in line.partition(": ")[2].split("; ") if label in part]
            assert f"by the {label} {titles[int(means.argmax())]} is first" in said
            assert f"WP is {1 + int((means > means[2]).sum())} of 5" in said
            unlabelled = max((0, 1, 3), key=lambda m: means[m])
            for other, which in ((unlabelled, "without labels"), (4, "with them")):
                paired = seeds[:, 2] - seeds[:, other]
                assert f"less {titles[other]}, the best other {which}, {paired.mean():+.1f} ± " in said


def test_a_table_says_what_its_models_are() -> None:
    for write in (to_text, to_markdown, to_html):
        for world, other in (("the miniature world", "pretrained"), ("a pretrained model", "miniature")):
            text = str(write(replace(make_table(), world=world)))
            assert world in text
            assert other not in text


def test_markdown_marks_the_best_of_each_column() -> None:
    text = to_markdown(make_table(), ["Worlds: a.", "A mark*."])
    block = text.split("## all three")[1].split("\n\n")[2].splitlines()
    head, rows = block[0].split("|")[1:-1], [line.split("|")[1:-1] for line in block[2:]]
    assert len({len(row) for row in [head, *rows]}) == 1
    for column in range(1, 7):
        numbers = [float(re.findall(r"[\d.]+", row[column])[0]) for row in rows]
        bold = [row[column].strip().startswith("**") for row in rows]
        assert bold == [value == max(numbers) for value in numbers]
    assert "Worlds: a." in text
    singles = re.findall(r"(?<![\\*])\*(?!\*)", text)
    assert singles == []


def test_csv_has_every_cell_of_every_seed() -> None:
    table = make_table()
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(lines) == sum(len(row.cells) for row in table.rows)
    (line,) = [x for x in lines if (x["combination"], x["group"], x["row"], x["column"])
               == ("code + maths", "methods", "WP", "maths")]  # fmt: skip
    values = 100 * RIGHT[:, 1, 2, 1]
    assert [float(line[f"seed {s}"]) for s in SEEDS] == pytest.approx(values, abs=1e-4)
    assert float(line["mean"]) == pytest.approx(values.mean(), abs=1e-4)
    paired = values - 100 * RIGHT[:, 1, 0, 1]
    assert float(line[f"minus {BASELINE}"]) == pytest.approx(paired.mean(), abs=1e-4)


def test_text_and_summary_have_each_method_once() -> None:
    table = make_table()
    grid = summary(table)
    titles = [BASELINE, "TIES", "TIES, setting by loss", "TIES, setting by labels", "WP"]
    assert [line[0] for line in grid] == ["", *titles]
    assert grid[0][1:] == ["saw", *COMBINATIONS, "mean"]
    text = to_text(table)
    assert all(sentence in text for sentence in caption(table))


def test_one_seed_has_no_spread_and_says_so() -> None:
    table = make_table((1,))
    assert "±" not in to_text(table).replace("± the standard", "")
    assert "one seed says nothing about the spread" in " ".join(caption(table))


def test_the_page_is_whole_and_asks_nobody_for_anything() -> None:
    class Outline(HTMLParser):
        def __init__(self, text: str) -> None:
            super().__init__()
            self.open: list[str] = []
            self.seen: list[str] = []
            self.feed(text)

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.append(tag)
            if tag not in ("meta", "link", "br", "img"):
                self.open.append(tag)
            for name, value in attrs:
                assert name not in ("src", "href", "xlink:href") or (value or "#").startswith("#")

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    page = to_html(make_table(), ["<note>"])
    outline = Outline(page)
    assert outline.open == []
    assert outline.seen.count("svg") == 1
    assert "script" not in outline.seen
    assert "&lt;note&gt;" in page
    assert page.count("<table") == 4 + 3 * len(COMBINATIONS)


def test_a_search_is_ranked_by_the_mean_over_combinations() -> None:
    entries = []
    for seed in (0, 1):
        for combination, experts in COMBINATIONS.items():
            for scale, value in ((1.0, 0.5), (2.0, 0.7 + 0.1 * seed), (3.0, 0.6)):
                grade = ValidationGrade(dict.fromkeys(experts, value), dict.fromkeys(experts, 120))
                entries.append(Entry(seed, combination, "wp", "methods", f"scale {scale:g}", ONLY, grade))
    table = RivalTable((0, 1), by_setting(entries), "validation")
    found = ranked(table)
    assert [setting for _, setting, _, _ in found] == ["scale 2", "scale 3", "scale 1"]
    assert found[0][3] == pytest.approx(75.0)
    lines = search_text(table).splitlines()
    assert lines[2].startswith("wp | scale 2")
    assert lines[2].split()[-1] == "75.0"
