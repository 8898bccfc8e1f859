"""The report of wp-run: one page with what there is, whose words and marks are those of known numbers."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_scores import EXPERTS, MERGES, synthetic_scores, synthetic_table

from mergekit_wp.choices import UTILITIES
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.tables import Table, read_results, results_html, to_json
from mergekit_wp.pipeline.examples import Example, examples_of
from mergekit_wp.pipeline.report import Report, faint_layers, merge_findings, wrapped
from mergekit_wp.score_page import JUDGED, score_page
from mergekit_wp.scores import UtilityStats

NASTY = '<script>alert("x")</script>&\x1b[2J'
SHARES = {"experts": list(EXPERTS), "heads": [[1 / 3] * 6] * 3, "neurons": [[1 / 3] * 6] * 3}


def whole_report() -> Report:
    return Report(
        table=synthetic_table(),
        scores={name: synthetic_scores(seed) for seed, name in enumerate(EXPERTS)},
        merges=MERGES,
        shares={"wp": SHARES, "wp-15": SHARES},
        examples=[Example("maths", f"2 + 2 =\n{NASTY}", [("base", NASTY, False), ("wp", "4", True)])],
        steps=[(f"Score {NASTY}", "wp-score --base a \\\n  --expert b", [("job.yaml", "base: <a>\n")])],
    )


class Outline(HTMLParser):
    """Tags with their attributes, in order, and whether every one that opens also closes; ids; text."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(page: str) -> Outline:
    """Whole, in itself, and no foreign text taken for HTML."""
    outline = Outline(page)
    assert outline.open == []
    names = [tag for tag, _ in outline.tags]
    assert not {"script", "link", "iframe", "object"} & set(names)
    for _, attributes in outline.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in page
    assert "url(http" not in page
    assert "\x1b" not in page
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return outline


def test_no_layer_of_a_fit_is_pale_for_its_experts_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_wp.pipeline.report._FAINT", 1.0)  # every layer has less
    fitted = {**SHARES, "heads": [[0.9] * 6] * 3, "neurons": [[0.1] * 6] * 3}
    seen = []
    monkeypatch.setattr("mergekit_wp.pipeline.report.shares_svg", lambda _, __, faint, name: seen.append((name, faint)))
    replace(whole_report(), shares={"wp": SHARES, "fit": fitted})._shares()
    assert {name: [bool(faint_L.all()) for faint_L in faint.values()] for name, faint in seen} == {
        "wp": [True, True],
        "fit": [False, False],
    }


def test_the_page_is_whole_and_asks_nobody_for_anything() -> None:
    outline = check_page(whole_report().html(title=NASTY, lead=NASTY))
    names = [tag for tag, _ in outline.tags]
    assert names.count("svg") == 2 * len(EXPERTS) + 1  # the two merges have the same shares
    assert names.count("details") == len(EXPERTS) + 2
    assert "wp, wp-15" in outline.text
    assert 'alert("x")' in outline.text
    assert "base: <a>\n" in outline.text
    cells = [attributes for tag, attributes in outline.tags if tag == "td" and "data-label" in attributes]
    assert {cell["data-label"] for cell in cells} >= {*EXPERTS, "Average"}


@pytest.mark.parametrize("field", ["table", "scores", "shares", "examples", "steps"])
def test_what_is_not_there_is_left_out(field: str) -> None:
    headings = {
        "table": "Results", "scores": "Where each capability is written", "examples": "A prompt and its answers",
        "shares": "Which expert carries which layer of the merge", "steps": "Each step by hand",
    }  # fmt: skip
    whole = whole_report()
    empty = None if field == "table" else type(getattr(whole, field))()
    text = check_page(replace(whole, **{field: empty}).html()).text
    assert headings[field] not in text
    assert all(heading in text for name, heading in headings.items() if name != field)


def test_an_empty_report_is_a_page() -> None:
    check_page(Report(None, {}, (), {}, (), ()).html())


def test_the_best_merge_is_marked_and_a_difference_only_beyond_its_errors() -> None:
    table = synthetic_table()  # every error is 2 points: of a difference 2.83, of which 1.96 are 5.54
    page = results_html(table, MERGES)
    assert re.findall(r"<strong>([\d.]+) ", page) == ["40.00", "30.00", "60.00", "30.00", "41.67"]
    assert '<small class="up">+10.00</small>' in page
    assert "<small>-5.00</small>" in page
    rows = [replace(row, cells={c: replace(cell, stderr=None) for c, cell in row.cells.items()}) for row in table.rows]
    assert 'class="up"' not in results_html(Table(table.suite, rows, "linear", None), MERGES)


def test_the_finding_of_the_merges() -> None:
    table = synthetic_table()
    assert merge_findings(table, MERGES) == [
        "wp has the highest average of 2 merges, 41.67 ±1.15 %, 1.67 points above linear, no more than their errors "
        "explain."
    ]
    assert merge_findings(Table(table.suite, table.rows, "base", None), ["linear"]) == [
        "linear has an average of 40.00 ±1.15 %, 28.00 points above base, more than their errors explain."
    ]
    assert merge_findings(Table(table.suite, table.rows, None, None), ["wp"]) == ["wp has an average of 41.67 ±1.15 %."]
    assert merge_findings(table, ["linear"]) == ["linear has an average of 40.00 ±1.15 %."]
    assert merge_findings(table, []) == []
    reverse = Table(table.suite, table.rows, "wp", None)
    assert merge_findings(reverse, MERGES) == merge_findings(table, MERGES)  # the best is the baseline
    assert merge_findings(table, ["base", "instruction", "maths", "code"]) == [
        "instruction, maths and code have the same average, the highest of 4 merges: 36.67 ±1.15 %."
    ]


@pytest.mark.parametrize(("utility", "metrics", "read_at"), [
    ("kl", ("kl",), None), ("projection", ("projection",), None),
    ("anchor", ("anchor",), 3), ("staged", ("anchor", "kl"), 3),
])  # fmt: skip
def test_the_anchor_is_drawn_only_where_scores_were_read_there(utility, metrics, read_at) -> None:
    scores = synthetic_scores(0)
    task = replace(scores.meta.tasks["one"], utilities=dict.fromkeys(metrics, UtilityStats(32, 0, 0.4)))
    scores = replace(scores, meta=replace(scores.meta, utility=utility, tasks={"one": task}))
    assert scores.meta.read_at == read_at
    page = score_page({"code": scores}, 3)
    assert ("above the anchor layer" in page) == ("anchor layer 3" in page) == (read_at is not None)
    assert JUDGED[utility].split("'")[0] in page
    assert set(JUDGED) == set(UTILITIES)


def test_score_files_alone_are_a_page() -> None:
    text = check_page(score_page({NASTY: synthetic_scores(0), "b": synthetic_scores(1)}, 3)).text
    assert "How far they agree" in text


def test_layers_with_hardly_any_score_are_faint() -> None:
    scores = synthetic_scores(0)
    scores.heads[1:] = 0
    assert faint_layers([scores, scores], "heads", 6).tolist() == [False] + [True] * 5
    assert not faint_layers([scores], "heads", 7).any()  # of another shape: nothing is known
    assert not np.any(faint_layers([], "heads", 2))


# ------------------------------------------------------------------ answers


def logged(folder: Path, answers: dict[str, list[tuple[object, float]]], metric: str = "acc,none") -> Table:
    """The table with a log of the task maths for each of these rows: (answer, grade) of items 0, 1, ..."""
    table = synthetic_table()
    rows = []
    for row in table.rows:
        measured = {}
        if row.model.name in answers:
            name = f"samples/{row.model.name}/maths.jsonl"
            lines = [
                {
                    "task": "mini",
                    "doc_id": i,
                    "arguments": [[f"Q{i}", {}]],
                    "resps": [[text]],
                    "filter": "none",
                    "acc": grade,
                }
                for i, (text, grade) in enumerate(answers[row.model.name])
            ]
            path = folder / name
            path.parent.mkdir(parents=True)
            path.write_text("no JSON\n" + "".join(json.dumps(line) + "\n" for line in lines))
            measured = {"maths": {"metric": metric, "samples_file": name}}
        rows.append(replace(row, measured=measured))
    return Table(table.suite, rows, "linear", None)


def test_an_example_is_the_first_that_the_base_gets_wrong_and_the_expert_right(tmp_path: Path) -> None:
    answers = {
        "base": [("b0", 1.0), ("b1", 0.0), ("b2", 0.0)], "maths": [("m0", 1.0), ("m1", 0.0), ("m2", 1.0)],
        "wp": [("w0", 0.0), ("w1", 1.0), ("w2", 0.0)],
    }  # fmt: skip
    (example,) = examples_of(logged(tmp_path, answers), tmp_path, EXPERTS, MERGES)
    assert (example.column, example.prompt) == ("maths", "Q2")
    assert example.answers == [("base", "b2", False), ("maths", "m2", True), ("wp", "w2", False)]


@pytest.mark.parametrize("answers", [
    {}, {"base": [("b", 0.0)]}, {"base": [("b", 1.0)], "maths": [("m", 1.0)]},
    {"base": [([-1.5, True], 0.0)], "maths": [([-0.5, True], 1.0)]},  # choices, which nobody wrote
    {"base": [("b", 0.0)], "maths": [("m", 0.5)]},
])  # fmt: skip
def test_without_such_an_item_there_is_no_example(tmp_path: Path, answers: dict) -> None:
    assert examples_of(logged(tmp_path, answers), tmp_path, EXPERTS, MERGES) == []


def test_logs_are_read_below_the_results_alone(tmp_path: Path) -> None:
    table = logged(tmp_path / "elsewhere", {"base": [("b", 0.0)], "maths": [("m", 1.0)]})
    for row in table.rows:
        for about in row.measured.values():
            about["samples_file"] = f"../elsewhere/{about['samples_file']}"
    (tmp_path / "eval").mkdir()
    assert examples_of(table, tmp_path / "eval", EXPERTS, MERGES) == []
    assert (
        len(
            examples_of(
                logged(tmp_path / "x", {"base": [("b", 0.0)], "maths": [("m", 1.0)]}), tmp_path / "x", EXPERTS, MERGES
            )
        )
        == 1
    )


# -------------------------------------------------------------------- steps


def test_results_json_reads_back_as_the_same_table(tmp_path: Path) -> None:
    table = synthetic_table()
    path = tmp_path / "results.json"
    path.write_text(to_json(table, {"suite_content": {"name": "miniature"}}))
    again = read_results(path)
    assert [(row.model, row.cells) for row in again.rows] == [(row.model, row.cells) for row in table.rows]
    assert again.baseline == "linear"
    path.write_text("{}")
    with pytest.raises(BadInput, match="evaluate again"):
        read_results(path)


def test_a_wrapped_command_is_the_same_command() -> None:
    words = ["wp-score", "--base", "a" * 40, "--expert", "b c" * 20, "--quiet", "x=" + "y" * 60]
    text = wrapped(words)
    assert shlex.split(text.replace("\\\n", "")) == words  # as a shell joins lines
    assert len(text.splitlines()) > 1
    assert not any(line.rstrip(" \\").endswith(("--base", "--expert")) for line in text.splitlines())
