"""wp-eval end to end on tiny random models and local lm-eval tasks, against values computed here by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from eval_world import (
    QUESTIONS,
    TASKS,
    best_choice,
    build,
    cells,
    choices_of,
    greedy,
    make_model,
    ran,
    results,
    wp_eval,
    write_suite,
    write_tasks,
)
from tiny import random_model, save
from transformers import LlamaForCausalLM


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time by sharing their work out over threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/ and two/ (models), tasks/, suite.yaml; tests write elsewhere."""
    return build(tmp_path_factory.mktemp("eval"))


def test_values_equal_an_independent_computation(world: Path, tmp_path: Path) -> None:
    """Also: differences, mean, standard error, the three files, and a second run from the cache alone."""
    arguments = (world / "suite.yaml", world / "one", f"second={world / 'two'}", "--baseline", "one")
    out = tmp_path / "out"
    outcome = wp_eval(*arguments, "--out", out)
    assert outcome.exit_code == 0, outcome.output
    answers = {row["q"]: row["a"] for row in map(json.loads, (world / "tasks/gen.json").open())}
    expected = {}
    for name, folder in (("one", world / "one"), ("second", world / "two")):
        said = [greedy(folder, q) == answers[q] for q in QUESTIONS]
        chosen = [best_choice(folder, q, choices_of(i)) == i % 4 for i, q in enumerate(QUESTIONS)]
        expected[name] = (sum(said) / 8, sum(chosen) / 8)
        assert cells(out, name)["Gen"]["value"] == pytest.approx(expected[name][0])
        assert cells(out, name)["Choice"]["value"] == pytest.approx(expected[name][1])
        assert cells(out, name)["Average"]["value"] == pytest.approx(sum(expected[name]) / 2)
    assert expected["one"][0] == 5 / 8
    deviation = (5 / 8 * 3 / 8 * 8 / 7) ** 0.5  # sample standard deviation of five ones and three zeros
    assert cells(out, "one")["Gen"]["stderr"] == pytest.approx(deviation / 8**0.5)
    assert cells(out, "one")["Gen"]["samples"] == 8
    difference = expected["second"][0] - expected["one"][0]
    assert cells(out, "second")["Gen"]["difference"] == pytest.approx(difference)
    assert cells(out, "one")["Gen"]["difference"] is None

    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["model"] for row in rows] == ["one", "second"]
    assert float(rows[0]["Gen"]) == pytest.approx(62.5)
    assert float(rows[1]["Gen - one"]) == pytest.approx(100 * difference)
    assert rows[0]["Gen - one"] == ""
    markdown = (out / "results.md").read_text().splitlines()
    assert markdown[0] == "| model | Gen | Choice | Average |"
    assert markdown[2].startswith("| one | **62.50** ±18.30 |")
    assert f"({100 * difference:+.2f})" in markdown[3]
    assert "62.50" in outcome.output

    assert ran(outcome) == ["tiny_gen", "tiny_choice"] * 2
    before = results(out)
    again = wp_eval(*arguments, "--out", out)
    assert again.exit_code == 0
    assert ran(again) == []
    assert results(out) == before


def test_what_changes_answers_is_measured_again(world: Path, tmp_path: Path) -> None:
    model, out = make_model(tmp_path / "model", seed=3), tmp_path / "out"
    suite = write_suite(tmp_path / "suite.yaml", include_path=str(world / "tasks"))

    def measured(*more: object) -> list[str]:
        outcome = wp_eval(suite, model, "--out", out, *more)
        assert outcome.exit_code == 0, outcome.output
        return ran(outcome)

    both = ["tiny_gen", "tiny_choice"]
    assert measured() == both
    assert measured() == []
    assert measured("--limit", 2) == both
    assert results(out)["rows"][0]["limit"] == 2
    assert results(out)["rows"][0]["cells"]["Gen"]["samples"] == 2
    assert "\\*" in (out / "results.md").read_text()
    assert measured("--dtype", "bfloat16") == both
    assert measured() == []
    renamed = [{**TASKS[0], "column": "Another title"}, {**TASKS[1], "num_fewshot": 1}]
    write_suite(suite, include_path=str(world / "tasks"), tasks=renamed)
    assert measured() == ["tiny_choice"]  # the title of a column changes no answer
    write_suite(suite, include_path=str(world / "tasks"), max_gen_toks=1)
    assert measured() == both
    make_model(model, seed=4)
    assert measured() == both
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.5}))
    assert measured() == both


def test_task_data_enters_the_cache_key(world: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", right=world / "one")
    suite = write_suite(tmp_path / "suite.yaml")
    assert wp_eval(suite, world / "one", "--out", tmp_path / "out").exit_code == 0
    data = tmp_path / "tasks" / "gen.json"
    data.write_text(data.read_text().replace("never said", greedy(world / "one", QUESTIONS[7])))
    assert ran(wp_eval(suite, world / "one", "--out", tmp_path / "out")) == ["tiny_gen"]
    assert cells(tmp_path / "out", "one")["Gen"]["value"] > 5 / 8


def test_graders_and_what_lies_beside_them_enter_the_cache_key(world: Path, tmp_path: Path) -> None:
    """A task whose Python reads its data from a folder of its own and grades with a module it imports."""
    tasks, package = tmp_path / "tasks", tmp_path / "graders"
    (tasks / "data").mkdir(parents=True)
    package.mkdir()
    (tasks / "data" / "rows.jsonl").write_text(json.dumps({"q": QUESTIONS[0]}) + "\n")
    (package / "rule.py").write_text("def process_results(doc, results):\n    return {'acc': 1.0}\n")
    (tasks / "glue.py").write_text(
        f"import sys\nfrom pathlib import Path\nfrom datasets import Dataset\nsys.path.insert(0, {str(package)!r})\n"
        "from rule import process_results\n\ndef rows(**_):\n"
        "    return {'test': Dataset.from_json(str(Path(__file__).parent / 'data' / 'rows.jsonl'))}\n"
    )
    (tasks / "py_task.yaml").write_text(
        "task: py_task\ncustom_dataset: !function glue.rows\ntest_split: test\ndoc_to_text: q\ndoc_to_target: q\n"
        "output_type: generate_until\ngeneration_kwargs: {until: ['w1'], max_gen_toks: 2}\n"
        "process_results: !function glue.process_results\nmetric_list: [{metric: acc, aggregation: mean}]\n"
    )
    spec = [{"task": "py_task", "column": "Py", "metric": "acc,none"}]
    suite = write_suite(tmp_path / "suite.yaml", tasks=spec)
    counted = []
    for change in (None, tasks / "data" / "rows.jsonl", package / "rule.py"):
        if change:
            change.write_text(change.read_text() + "\n")
        for _ in range(2):
            outcome = wp_eval(suite, world / "one", "--out", tmp_path / "out")
            assert outcome.exit_code == 0, outcome.output
            counted += ran(outcome)
    assert cells(tmp_path / "out", "one")["Py"]["value"] == 1.0
    assert counted == ["py_task"] * 3


def test_same_folder_names_become_distinct_rows(world: Path, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "model").symlink_to(world / "one")
    outcome = wp_eval(world / "suite.yaml", tmp_path / "a/model", tmp_path / "b/model", "--out", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    assert [row["name"] for row in results(tmp_path / "out")["rows"]] == ["a/model", "b/model"]
    assert ran(outcome) == ["tiny_gen", "tiny_choice"]  # the same model: measured once


def test_groups_and_consented_code_run(world: Path, tmp_path: Path) -> None:
    tasks = [
        {"task": "tiny_group", "column": "Group", "metric": "exact_match,none"},
        {"task": "tiny_unsafe", "column": "Unsafe", "metric": "exact_match,none"},
    ]
    suite = write_suite(tmp_path / "suite.yaml", include_path=str(world / "tasks"), tasks=tasks)
    outcome = wp_eval(suite, world / "one", "--allow-code-execution", "--out", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    assert cells(tmp_path / "out", "one")["Group"]["value"] == 5 / 8
    assert cells(tmp_path / "out", "one")["Unsafe"]["value"] == 5 / 8


def test_two_metrics_of_one_task_are_measured_once(world: Path, tmp_path: Path) -> None:
    tasks = [TASKS[1], {**TASKS[1], "column": "Again"}]
    suite = write_suite(tmp_path / "suite.yaml", include_path=str(world / "tasks"), tasks=tasks)
    assert ran(wp_eval(suite, world / "one", "--out", tmp_path / "out")) == ["tiny_choice"]
    assert cells(tmp_path / "out", "one")["Again"] == cells(tmp_path / "out", "one")["Choice"]


def _task(**changes: object) -> list[dict]:
    return [{**TASKS[0], **changes}]


@pytest.mark.parametrize(
    ("changes", "model", "more", "sentence"),
    [
        ({"tasks": _task(task="tiny_genn")}, "one", (), "unknown task `tiny_genn`"),
        ({"tasks": _task(metric="acc,none")}, "one", (), "it has `exact_match,none`"),
        ({"tasks": _task(task="tiny_unsafe")}, "one", (), "--allow-code-execution"),
        ({"tasks": _task(task="tiny_nodata")}, "one", (), "absent.json does not exist"),
        ({"tasks": _task(task="tiny_tag")}, "one", (), "is a tag"),
        ({"include_path": "/no/such/folder"}, "one", (), "include_path is not a folder"),
        ({"tasks": _task(shots=3)}, "one", (), "unknown field `shots`"),
        ({"colour": "red"}, "one", (), "unknown field `colour`"),
        ({}, "absent", (), "no such model folder"),
        ({}, "tasks", (), "no model.safetensors and no model.safetensors.index.json there"),
        ({}, "no_tokenizer", (), "cannot load the tokenizer"),
        ({}, "nan", (), "holds a NaN"),
        ({}, "one", ("--baseline", "linear"), "--baseline linear: there is no such row"),
        ({}, "one", ("--batch-size", "0"), "'0' is neither"),
        ({}, "one", ("--device", "cuda:99"), "device cuda:99: this machine has"),
        ({}, "one", ("x=one", "x=two"), "two models are named 'x'"),
    ],
)
def test_bad_input_is_one_sentence_and_no_output(
    world: Path, tmp_path: Path, changes: dict, model: str, more: tuple, sentence: str
) -> None:
    if model == "no_tokenizer":
        LlamaForCausalLM.from_pretrained(world / "one").save_pretrained(tmp_path / model)
    if model == "nan":
        broken = random_model("llama", 5)
        broken.lm_head.weight.data[3, 3] = float("nan")
        save(broken, tmp_path / model)
    folder = tmp_path / model if (tmp_path / model).exists() else world / model
    suite = write_suite(tmp_path / "suite.yaml", **{"include_path": str(world / "tasks"), **changes})
    outcome = wp_eval(suite, folder, *more, "--out", tmp_path / "out")
    assert outcome.exit_code == 2, outcome.output
    assert sentence in outcome.output
    assert len(outcome.output.rstrip("\n").rsplit("Error: ", 1)[1].splitlines()) == 1
    assert "Traceback" not in outcome.output
    assert not list((tmp_path / "out").rglob("*.*"))


def test_results_go_below_the_tasks_but_not_among_them(world: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.yaml", include_path=str(world / "tasks"), tasks=_task(metric="acc,none"))
    among, below = (wp_eval(suite, world / "one", "--out", out) for out in (world / "tasks", world / "tasks" / "run"))
    assert "tasks: this output is itself what is read" in among.output
    assert "it has `exact_match,none`" in below.output


def test_an_unwritable_output_folder_is_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    outcome = wp_eval(world / "suite.yaml", world / "one", "--out", tmp_path / "out")
    assert outcome.exit_code == 2
    assert "cannot write there" in outcome.output
    assert ran(outcome) == []
