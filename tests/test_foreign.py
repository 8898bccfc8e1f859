"""Text from elsewhere: on a terminal, in tables, Markdown and HTML, and as part of a path."""

from __future__ import annotations

import csv
import io
import logging
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mergekit_wp.errors import BadInput, reason_of
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.rows import Cell, Row
from mergekit_wp.eval.suite import Suite, SuiteTask
from mergekit_wp.eval.tables import Table, to_csv, to_html, to_markdown, to_text
from mergekit_wp.foreign import code, csv_cell, echo, fenced, file_part, file_parts, html, logger, markdown, one_line

# Everything that text can hold, lone surrogates too, and often what does harm.
HARM = [
    *("\x1b[2J", "\x9b31m", "\n", "\r", "\0", "\u202e", "\u2066", "\u2028", "\u200b", "\ud800"),
    *("../", "..\\", "/", "~", "`", "|", "[a](http://b)", "<b>", "https://c.d", "www.e.f", "g@h.i", "&lt;"),
    *("# ", "- ", "1. ", "$x$", "*", "_"),
]
TEXT = st.lists(st.one_of(st.sampled_from(HARM), st.text(st.characters(), max_size=4)), max_size=8).map("".join)

NASTY = "ev\x1b[31mil\n| [x](http://y.z) | <img src=x> \u202e`*"


def prints_in_order(text: str) -> bool:
    """Whether a terminal shows this as one line from left to right: no control, no format, no line break."""
    return not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn") for c in text)


@given(TEXT)
def test_a_text_is_one_line_in_order_and_changes_nothing_twice(text):
    assert prints_in_order(one_line(text))
    assert one_line(one_line(text)) == one_line(text)
    if prints_in_order(text) and not re.search(r"[^\S ]", text):
        assert one_line(text) == text


def test_errors_lines_and_logs_reach_a_terminal_clean(caplog):
    @click.command()
    def command():
        echo(f"found {NASTY}", bold=True)
        echo(f"found {NASTY}", err=True)
        raise BadInput(f"{NASTY}: not known")

    result = CliRunner().invoke(command)
    assert result.exit_code == 2
    lines = result.output.splitlines()
    assert len(lines) == 3
    assert all(prints_in_order(line) for line in lines)
    assert r"ev\x1b[31mil\n" in lines[2]
    log = logger("mergekit_wp.test")
    with caplog.at_level(logging.WARNING):
        log.warning("%s may not be a fine-tune of %s", NASTY, "x")
    assert prints_in_order(caplog.records[-1].getMessage())
    assert caplog.records[-1].getMessage().endswith("may not be a fine-tune of x")


class Seen(HTMLParser):
    """The tags of a page and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


MARKDOWN = MarkdownIt("gfm-like", {"linkify": False, "html": True})


@given(TEXT)
def test_markdown_reads_as_the_text_itself(text):
    """By a renderer of its own: one paragraph, no mark, no link, no tag."""
    seen = Seen(MARKDOWN.render("x " + markdown(text) + " y"))
    assert seen.tags == ["p"]
    assert seen.text.strip() == f"x {one_line(text)} y"
    assert Seen(MARKDOWN.render(markdown(text) + "y")).tags == ["p"]  # also at the beginning of a line
    cell = Seen(MARKDOWN.render(f"| a |\n|---|\n| {markdown(text)} |\n"))
    assert cell.tags.count("td") == 1
    assert not {"a", "img", "b", "code", "em", "strong"} & set(cell.tags)


@pytest.mark.parametrize("link", ["https://a.b", "HTTP://a.b", "ftp://a.b", "www.a.b", "a@b.c"])
def test_no_link_is_made_of_bare_addresses(link):
    """What GitHub turns into links without any mark is broken up by a backslash."""
    assert "\\" in markdown(link)
    assert re.sub(r"\\(.)", r"\1", markdown(link)) == link


@given(TEXT)
def test_code_and_blocks_of_code_cannot_be_left(text):
    line = Seen(MARKDOWN.render(f"x {code(text)} y"))
    assert line.tags == ["p", "code"]
    assert " ".join(line.text.split()) == " ".join(f"x {one_line(text)} y".split())
    block = Seen(MARKDOWN.render(fenced(text + "\n```\n# out", "yaml")))
    assert block.tags == ["pre", "code"]


@given(TEXT)
def test_html_is_text(text):
    assert Seen(f"<p title='{html(text)}'>{html(text)}</p>").tags == ["p"]


@settings(max_examples=300)
@given(TEXT, TEXT)
@example("../../../x", "../../x")
@example("CON", "con.txt")
@example("COM\u00b9", "LPT1.a.b")
@example("a" * 300, "a" * 301)
@example("\u00e9", "e\u0301")
@example("a/b", "a_b")
@example("a.", "a")
@example("a\0", "a")
@example("\uff0e\uff0e\uff0fx", "../x")
def test_a_part_of_a_path_is_safe_and_another_for_another_text(one, other):
    for text in (one, other):
        part = file_part(text)
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.~-]*", part)
        assert len(part) <= 80
        assert not part.endswith(".")
        assert not re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", part)
        assert Path("/top", part).parent == Path("/top")
        # What one text was cut to is no name of another: not even of the text that reads like it.
        assert part == text or file_part(part) != part
    assert (file_part(one) == file_part(other)) == (one == other)


@pytest.mark.parametrize("name", ["mine", "llama-2.5_x", "a.b", "_x", "7"])
def test_plain_names_stay(name):
    assert file_part(name) == name


@pytest.mark.parametrize("name", ["$\\frac{$", "a $ b $", "_x", NASTY, "100 %"])
def test_a_name_in_a_picture_reads_as_it_is(name):
    import numpy as np
    from matplotlib.figure import Figure

    from mergekit_wp.pictures import LONGEST, draw_shares, shares_png

    share_KL = np.full((2, 3), 0.5)
    assert shares_png({"heads": share_KL}, [name, "plain"]).startswith(b"\x89PNG")
    axes = Figure().add_subplot()
    draw_shares(axes, share_KL, [name, "plain"], "heads")
    labels = axes.get_legend_handles_labels()[1]
    read, plain = (label.strip().replace(r"\$", "$") for label in labels)
    beginning, _, end = read.partition("…")  # a long name's middle is left out
    assert one_line(name).startswith(beginning)
    assert one_line(name).endswith(end)
    assert len(read) == min(len(one_line(name)), LONGEST)
    assert plain == "plain"


# ---------------------------------------------------------------------- tables


def table_of(names: list[str], columns: list[str], baseline: str | None = None) -> Table:
    tasks = tuple(SuiteTask(f"t{i}", column, "acc,none") for i, column in enumerate(columns))

    def row(number: int, name: str) -> Row:
        cells = {column: Cell(number / len(names), 0.01, 4) for column in columns}
        measured = {column: {"dtype": name, "cut_prompts": 1} for column in columns}
        return Row(EvalModel(name, name, Path("x"), f"{number:064d}"), cells, measured)

    return Table(Suite("s", tasks), [row(number, name) for number, name in enumerate(names)], baseline, None)


def test_foreign_names_in_every_table():
    table = table_of([NASTY, "plain"], [NASTY, "Code"], NASTY)
    text, lines = to_text(table), to_text(table).splitlines()
    assert all(prints_in_order(line) for line in lines)
    assert len({len(line) for line in lines[:4]}) == 1, "columns stay aligned"
    assert len(text.splitlines()) == len(to_text(table_of(["a", "plain"], ["b", "Code"], "a")).splitlines())
    seen = Seen(MARKDOWN.render(to_markdown(table)))
    assert (seen.tags.count("tr"), seen.tags.count("td")) == (3, 8)
    assert not {"a", "img", "code"} & set(seen.tags)
    page = Seen(to_html(table, NASTY))
    assert not {"a", "img"} & set(page.tags)
    assert all(prints_in_order(line) for line in to_html(table, NASTY).splitlines())
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [row["model"] for row in rows] == [one_line(NASTY), "plain"]


@given(st.lists(st.sampled_from(["a", "A", "a-2", "A-2", "a b", "A B", "", "é", "É", "con", "CON"]), max_size=9))
def test_several_parts_are_several_files_where_case_does_not_count(texts):
    parts = file_parts(texts)
    assert len({part.lower() for part in parts}) == len(texts)
    assert parts[:1] == [file_part(text) for text in texts[:1]]
    assert all(file_part(part) == part for part in parts if "~" not in part)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\u00a0=1"])
def test_no_cell_of_a_csv_is_a_formula(name):
    rows = list(csv.reader(io.StringIO(to_csv(table_of([name, "a"], [name, "b"], name)))))
    texts = [cell for line in (rows[0], *([row[0], row[-1]] for row in rows[1:])) for cell in line]
    assert any(cell.endswith(one_line(name)) for cell in texts)
    assert not [cell for cell in texts if cell.strip()[:1] in ("=", "+", "-", "@")]
    assert csv_cell("a=b-c") == "a=b-c"


def test_tables_grow_with_their_rows(monkeypatch):
    """Counted, not timed: cells looked at, and characters written."""
    looked = [0]
    value = Table.value
    monkeypatch.setattr(Table, "value", lambda *a: looked.__setitem__(0, looked[0] + 1) or value(*a))
    for write in (to_text, to_markdown, to_csv, lambda table: to_html(table, "x")):
        cost = []
        for count in (50, 100, 200):
            looked[0] = 0
            size = len(write(table_of([f"m{i:03}" for i in range(count)], ["A", "B"], f"m{count - 1:03}")))
            cost.append((looked[0], size))
        for first, second, third in zip(*cost, strict=True):
            assert third - second <= 2.1 * (second - first) + 10, write


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\n  two.\n"), "one two"),
        (KeyError("rope_theta"), "KeyError: 'rope_theta'"),
        (TypeError("int() argument must be\na string"), "TypeError: int() argument must be a string"),
        (RuntimeError(), "RuntimeError"),
        (AssertionError(), "AssertionError"),
        (MemoryError(), "MemoryError"),
        (OSError("x" * 1000), "x" * 200 + "..."),
    ],
)
def test_what_another_librarys_error_says(error, said):
    assert reason_of(error) == said
    assert "\x1b" not in BadInput(f"m: ({reason_of(ValueError('a' + chr(27) + '[2J'))})").message
