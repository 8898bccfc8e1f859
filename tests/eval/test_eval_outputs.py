"""What wp-eval writes beside the numbers: logs, provenance, standard errors, the page; and wp-compare."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from eval_world import (
    TASKS,
    build,
    cells,
    greedy,
    make_model,
    ran,
    results,
    wp_eval,
    write_held_tasks,
    write_suite,
)

from mergekit_wp.eval.compare import main as compare
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.rows import Cell, Row
from mergekit_wp.eval.standard_error import jackknife
from mergekit_wp.eval.suite import Suite, SuiteTask, read_suite
from mergekit_wp.eval.tables import AVERAGE, Table, read_results, to_json

TEMPLATE = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("eval"))


def test_every_item_is_logged_on_request(world: Path, tmp_path: Path) -> None:
    arguments = (world / "suite.yaml", world / "one", "--out", tmp_path)
    assert wp_eval(*arguments).exit_code == 0
    assert not (tmp_path / "samples").exists()
    first = wp_eval(*arguments, "--log-samples")
    assert ran(first) == ["tiny_gen", "tiny_choice"]  # measured before, but not logged
    assert ran(wp_eval(*arguments, "--log-samples")) == []
    file = tmp_path / results(tmp_path)["rows"][0]["measured"]["Gen"]["samples_file"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == list(range(8))
    assert lines[2]["filtered_resps"] == [greedy(world / "one", lines[2]["doc"]["q"])]
    assert sum(line["exact_match"] for line in lines) / 8 == cells(tmp_path, "one")["Gen"]["value"] == 5 / 8
    file.unlink()
    assert ran(wp_eval(*arguments, "--log-samples")) == ["tiny_gen"]
    assert len(file.read_text().splitlines()) == 8


def test_provenance_of_every_cell(world: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=1)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    tasks = [{**TASKS[0], "apply_chat_template": True, "system_instruction": "w3"}, TASKS[1]]
    suite = write_suite(tmp_path / "suite.yaml", include_path=str(world / "tasks"), tasks=tasks)
    outcome = wp_eval(suite, model, "--out", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    content = results(tmp_path / "out")
    (row,) = content["rows"]
    said, chosen = row["measured"]["Gen"], row["measured"]["Choice"]
    assert said["chat_template"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert chosen["chat_template"] is None
    assert said["system_instruction"] == "w3"
    assert content["suite_hash"] == row["suite_hash"] == read_suite(suite).hash
    for about in (said, chosen):
        assert about["fingerprint"] == row["fingerprint"]
        assert about["backend"] == "hf"
        assert about["backend_options"] == {}
        assert about["dtype"] == "float32"
        assert about["max_length"] == 128
        assert set(about["versions"]) == {"lm-eval", "transformers", "torch"}
    # The log shows what the model was really asked.
    logged = wp_eval(suite, model, "--log-samples", "--out", tmp_path / "out")
    assert logged.exit_code == 0
    file = tmp_path / "out" / results(tmp_path / "out")["rows"][0]["measured"]["Gen"]["samples_file"]
    prompt = json.loads(file.read_text().splitlines()[0])["arguments"][0][0]
    question = json.loads((world / "tasks" / "gen.json").read_text().splitlines()[0])["q"]
    assert prompt == f"w1 w3 w2 w1 {question} w2 "


def test_a_suite_is_known_by_what_it_asks() -> None:
    task = SuiteTask("t", "T", "acc,none")
    suite = Suite("s", (task,))
    assert suite.hash == replace(suite, name="other", baseline="b", dtype="float16", backend="hf").hash
    assert suite.hash == replace(suite, tasks=(replace(task, column="Another title"),)).hash
    assert suite.hash != replace(suite, tasks=(replace(task, num_fewshot=1),)).hash
    assert suite.hash != replace(suite, max_gen_toks=9).hash


@pytest.mark.parametrize("count", [2, 3, 50, 541])
def test_the_jackknife_of_a_mean_is_the_textbook_standard_error(count: int) -> None:
    draw = random.Random(count)
    items = [draw.random() for _ in range(count)]
    mean = sum(items) / count
    expected = math.sqrt(sum((x - mean) ** 2 for x in items) / (count - 1) / count)
    assert jackknife(lambda xs: sum(xs) / len(xs), items) == pytest.approx(expected)


def test_the_jackknife_of_many_items_and_of_a_ratio() -> None:
    draw = random.Random(0)
    many = [draw.random() for _ in range(5000)]
    assert jackknife(lambda xs: sum(xs) / len(xs), many) == pytest.approx(math.sqrt(1 / 12 / 5000), rel=0.1)

    # IFEval: prompts with one to three instructions, each followed or not. Against the spread over many draws.
    def prompts() -> list[list[bool]]:
        return [[draw.random() < 0.3 + 0.4 * kind] * (1 + kind) for kind in (draw.randrange(3) for _ in range(200))]

    def followed(items: list[list[bool]]) -> float:
        flat = [one for item in items for one in item]
        return sum(flat) / len(flat)

    values = [followed(prompts()) for _ in range(400)]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    assert jackknife(followed, prompts()) == pytest.approx(spread, rel=0.15)
    assert jackknife(followed, prompts()[:1]) is None


def test_a_metric_that_lm_eval_has_no_error_for_gets_one(tmp_path: Path) -> None:
    """`share` is a ratio of sums, here 1/3 for every item: its standard error is 0, not unknown."""
    make_model(tmp_path / "model", seed=1)
    write_held_tasks(tmp_path / "tasks", tmp_path / "model")
    columns = [{"task": "held_a", "column": name, "metric": f"{name},none"} for name in ("share", "acc")]
    suite = write_suite(tmp_path / "suite.yaml", tasks=columns)
    assert wp_eval(suite, tmp_path / "model", "--out", tmp_path / "out").exit_code == 0
    found = cells(tmp_path / "out", "model")
    assert found["share"]["value"] == pytest.approx(1 / 3)
    assert found["share"]["stderr"] == pytest.approx(0, abs=1e-12)
    assert found["acc"]["stderr"] == pytest.approx(math.sqrt(5 / 8 * 3 / 8 / 7))


# --- wp-compare, on results written here ---

COMMON = {"task": "t", "metric": "acc,none", "limit": None, "num_fewshot": 0, "dtype": "bfloat16", "backend": "hf",
          "backend_options": {}, "revisions": {"d/s": "1" * 40}, "chat_template": None, "system_instruction": None,
          "versions": {"lm-eval": "0.4.13", "torch": "2.13.0"}}  # fmt: skip


def write_results(folder: Path, rows: dict[str, dict[str, float]], about: dict | None = None, suite: str = "s") -> Path:
    """OUT/results.json of a run: row -> column -> value; `about` changes how all of it was measured."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    tasks = tuple(SuiteTask(column.lower(), column, "acc,none") for column in columns)
    made = [
        Row(
            EvalModel(name, f"runs/{name}", Path(name), name * 10),
            {column: Cell(value, 0.03, 100) for column, value in row.items()},
            {column: {**COMMON, **(about or {})} for column in row},
            suite,
        )
        for name, row in rows.items()
    ]
    folder.mkdir(parents=True)
    table = Table(Suite(suite, tasks), made, next(iter(rows)), None)
    (folder / "results.json").write_text(to_json(table, {"suite_content": {"name": suite}}))
    return folder


def compared(*arguments: object) -> str:
    outcome = CliRunner().invoke(compare, [str(argument) for argument in arguments])
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_rows_of_several_runs_in_one_table_with_differences(tmp_path: Path) -> None:
    a = write_results(tmp_path / "a", {"linear": {"A": 0.5, "B": 0.25}})
    b = write_results(tmp_path / "b", {"wp": {"A": 0.75, "B": 0.125}})
    text = compared(a, b / "results.json", "--out", tmp_path / "out")
    assert "WARNING" not in text
    assert "75.00 ±3.00 (+25.00)" in text
    linear, wp = csv.DictReader((tmp_path / "out" / "comparison.csv").open())
    assert float(wp["B - linear"]) == pytest.approx(-12.5)
    assert float(wp["A stderr"]) == pytest.approx(3)
    assert linear["warning"] == ""
    assert "| **75.00** ±3.00 (+25.00) |" in (tmp_path / "out" / "comparison.md").read_text()
    other = compared(a, b, "--baseline", "wp")
    assert "50.00 ±3.00 (-25.00)" in other
    outcome = CliRunner().invoke(compare, [str(a), "--baseline", "none"])
    assert outcome.exit_code == 2
    assert "there is no such row; the rows are linear" in outcome.output


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"backend": "vllm"}, "backend is hf for linear; vllm for wp"),
        ({"versions": {"torch": "2.14.0"}}, "version of torch is 2.13.0 for linear; 2.14.0 for wp"),
        ({"chat_template": "abc"}, "chat template is none for linear; abc for wp"),
        ({"limit": 20}, "limit is none for linear; 20 for wp"),
        ({"dtype": "float16"}, "dtype is bfloat16 for linear; float16 for wp"),
        ({"backend_options": {"max_model_len": 99}}, "max_model_len is not set for linear; 99 for wp"),
        ({"num_fewshot": 5}, "num_fewshot is 0 for linear; 5 for wp"),
        ({"revisions": {"d/s": "2" * 40}}, f"revision of d/s is {'1' * 12} for linear; {'2' * 12} for wp"),
    ],
)  # fmt: skip
def test_rows_that_were_not_measured_alike_are_said_everywhere(tmp_path: Path, about: dict, said: str) -> None:
    a = write_results(tmp_path / "a", {"linear": {"A": 0.5, "B": 0.25}})
    b = write_results(tmp_path / "b", {"wp": {"A": 0.75, "B": 0.125}}, about)
    warning = f"Not measured alike: {said}."
    assert f"WARNING: {warning}" in compared(a, b, "--out", tmp_path / "out")
    assert warning in (tmp_path / "out" / "comparison.html").read_text()
    assert warning in (tmp_path / "out" / "comparison.md").read_text().replace("\\", "")
    for row in csv.DictReader((tmp_path / "out" / "comparison.csv").open()):
        assert warning in row["warning"]


@pytest.mark.parametrize(
    "about",
    [
        {"revisions": {}},
        {"device": "cuda"},
        {"batch_size": 8},
        {"backend_options": {"tensor_parallel_size": 2}},
        {"seconds": 3},
    ],
)
def test_what_only_moves_rounding_is_no_warning(tmp_path: Path, about: dict) -> None:
    a = write_results(tmp_path / "a", {"linear": {"A": 0.5}})
    b = write_results(tmp_path / "b", {"wp": {"A": 0.75}}, about)
    assert "WARNING" not in compared(a, b)


def test_other_suites_leave_blanks_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    a = write_results(tmp_path / "a", {"linear": {"A": 0.5, "B": 0.25}, "wp": {"A": 0.6, "B": 0.3}})
    b = write_results(tmp_path / "b", {"wp": {"A": 0.75, "C": 0.125}}, suite="other")
    text = compared(a, b, "--out", tmp_path / "out")
    assert "suite is s for linear, a/wp; other for b/wp (in A)." in text
    assert "Blank: not in the suite of that row" in text
    rows = {row["model"]: row for row in csv.DictReader((tmp_path / "out" / "comparison.csv").open())}
    assert list(rows) == ["linear", "a/wp", "b/wp"]
    assert rows["b/wp"]["B"] == rows["b/wp"][AVERAGE] == rows["linear"]["C"] == rows["b/wp"]["B - linear"] == ""
    assert float(rows["b/wp"]["A - linear"]) == pytest.approx(25)
    named = compared(f"mine={a}", f"theirs={b}")
    assert "mine/wp" in named
    assert "theirs/wp" in named


def test_results_of_before_are_read_and_marked(tmp_path: Path) -> None:
    a = write_results(tmp_path / "a", {"linear": {"A": 0.5}})
    b = write_results(tmp_path / "b", {"wp": {"A": 0.75}})
    content = json.loads((b / "results.json").read_text())
    del content["rows"][0]["measured"]["A"]["backend"], content["rows"][0]["suite_hash"]
    (b / "results.json").write_text(json.dumps(content))
    text = compared(a, b)
    assert "backend is hf for linear; not recorded for wp." in text
    assert "suite is s for linear; not recorded for wp." in text
    (b / "results.json").write_text("[]")
    outcome = CliRunner().invoke(compare, [str(a), str(b)])
    assert outcome.exit_code == 2
    assert "not a results.json of wp-eval" in outcome.output


class Outline(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not any(name in ("src", "href") for name, _ in attrs)
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    a = write_results(tmp_path / "a", {"<b>linear": {"A": 0.5}, "wp": {"A": 0.75}}, {"chat_template": "<script>"})
    compared(a, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "comparison.html").read_text()
    outline = Outline(page)
    assert outline.open == []
    assert "script" not in outline.seen
    assert "&lt;b&gt;linear" in page
    assert "<strong>75.00 ±3.00</strong>" in page
    assert '<small class="up">+25.00</small>' in page
    assert "All cells: task t; metric acc,none; items not recorded; limit none; shots 0; backend hf;" in page


def test_the_page_says_once_what_is_the_same_for_all_cells(tmp_path: Path) -> None:
    a = write_results(tmp_path / "a", {"linear": {"A": 0.5}})
    b = write_results(tmp_path / "b", {"wp": {"A": 0.75}}, {"dtype": "float32"})
    compared(a, b, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "limit none; shots 0; backend hf; options none; device not recorded;" in page
    assert "<th>dtype</th>" in page
    assert '<td data-label="dtype">float32</td>' in page


def test_wp_eval_writes_the_page_too_and_wp_compare_reads_its_results(world: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert wp_eval(world / "suite.yaml", world / name, "--out", tmp_path / name).exit_code == 0
    assert "Results of the suite tiny" in (tmp_path / "one" / "results.html").read_text()
    text = compared(tmp_path / "one", tmp_path / "two", "--baseline", "one")
    assert "WARNING" not in text
    both = read_results(tmp_path / "one" / "results.json").rows + read_results(tmp_path / "two" / "results.json").rows
    gap = 100 * (both[1].cells["Gen"].value - both[0].cells["Gen"].value)
    assert f"({gap:+.2f})" in text
    other = wp_eval(world / "suite.yaml", world / "two", "--out", tmp_path / "two", "--dtype", "bfloat16")
    assert other.exit_code == 0
    assert "dtype is float32 for one; bfloat16 for two." in compared(tmp_path / "one", tmp_path / "two")
