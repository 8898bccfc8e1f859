"""`wp-eval --data DIR`: what is refused, what a table records, and the published files themselves where they are.

That rows, prompts and shots are those of the Hub is tested in test_official_tasks.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from eval_world import make_model, results, wp_eval
from official_world import GSM8K, GSM8K_TRAIN, HUMANEVAL, IFEVAL, MBPP, write_world

from mergekit_wp.errors import BadInput
from mergekit_wp.eval.comparability import differences
from mergekit_wp.eval.official_data import PUBLISHED, DataFolder, odd_counts
from mergekit_wp.eval.suite import Suite, SuiteTask, read_suite
from mergekit_wp.eval.tables import read_results
from mergekit_wp.eval.tasks import find_tasks, ready_tasks

REAL = Path(os.environ.get("OFFICIAL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_suite(path: Path, **more: Any) -> Path:
    """One task that needs no index of lm-eval's: our own, on GSM8K."""
    task = {"task": "wp_gsm8k", "column": "GSM8K", "metric": "exact_match,none"}
    path.write_text(json.dumps({"name": "one", "batch_size": 2, "max_gen_toks": 2, "tasks": [task], **more}))
    return path


def loaded(folder: Path, dataset: str, config: str) -> dict[str, list[dict[str, Any]]]:
    return PUBLISHED[dataset].load(folder, config)


CHANGES: dict[str, tuple[str, str, str, list[Any], str]] = {
    "column missing": (
        "openai/gsm8k", "main", "gsm8k-test.jsonl", [GSM8K[0], {"question": "q", "solution": "a"}],
        "line 2: there is no column answer, only question, solution",
    ),
    "column of another kind": (
        "openai/gsm8k", "main", "gsm8k-test.jsonl", [{"question": "q", "answer": 3}],
        "line 1: the column answer must be text, found 3",
    ),
    "no object": (
        "openai/openai_humaneval", "openai_humaneval", "humaneval.jsonl", [HUMANEVAL[0], 7],
        "line 2: expected an object",
    ),
    "no rows": (
        "openai/openai_humaneval", "openai_humaneval", "humaneval.jsonl", [], "there are no rows of the split test"
    ),
    "task of another set": (
        "google-research-datasets/mbpp", "full", "mbpp.jsonl", [{**MBPP[0], "task_id": 975}],
        "line 1: the task_id 975, and MBPP has 1 to 974",
    ),
    "no test among them": (
        "google-research-datasets/mbpp", "full", "mbpp.jsonl", [{**MBPP[0], "task_id": 601}],
        "there are no rows of the split test",
    ),
    "tests are no list": (
        "google-research-datasets/mbpp", "full", "mbpp.jsonl", [{**MBPP[0], "test_list": "assert f()"}],
        "the column test_list must be a list of texts",
    ),
    "arguments of no instruction": (
        "google/IFEval", "default", "ifeval.jsonl", [{**IFEVAL[0], "kwargs": [{"colour": "red"}]}],
        "kwargs has 'colour', which no instruction of IFEval takes",
    ),
    "argument of another kind": (
        "google/IFEval", "default", "ifeval.jsonl", [{**IFEVAL[0], "kwargs": [{"num_words": "ten"}]}],
        "num_words of kwargs must be a whole number of at least 0, found 'ten'",
    ),
    "fewer arguments": (
        "google/IFEval", "default", "ifeval.jsonl", [{**IFEVAL[0], "kwargs": []}], "1 instructions with 0 kwargs",
    ),
    "MATH without solutions": (
        "EleutherAI/hendrycks_math", "algebra", "math/test/algebra.jsonl",
        [{"problem": "p", "level": "Level 1", "type": "Algebra"}], "there is no column solution",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_is_not_as_published(name: str, tmp_path: Path) -> None:
    dataset, config, file, rows, said = CHANGES[name]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    lines(tmp_path / file, rows)
    with pytest.raises(BadInput) as caught:
        loaded(tmp_path, dataset, config)
    assert said in caught.value.message
    assert str(tmp_path / file) in caught.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("What?,1,2,3,4,E\n", "line 1: the answer is 'E', expected 0 to 3 or A to D"),
        ("question,choice0,choice1,choice2,choice3,answer\nWhat?,1,2,3,0\n", "line 2: 5 cells, expected question"),
        ('"What?\n', "not valid CSV"),
        ("", "there are no rows of the split test"),
    ],
)
def test_mmlu_that_is_not_as_published(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mmlu/test").mkdir(parents=True)
    (tmp_path / "mmlu/test/anatomy_test.csv").write_text(text)
    with pytest.raises(BadInput) as caught:
        loaded(tmp_path, "cais/mmlu", "anatomy")
    assert said in caught.value.message


def test_mbpp_is_cut_by_task_id(tmp_path: Path) -> None:
    ids = [1, 10, 11, 510, 511, 600, 601, 974]
    lines(tmp_path / "mbpp.jsonl", [{**MBPP[0], "task_id": number, "more": 1} for number in ids])
    found = loaded(tmp_path, "google-research-datasets/mbpp", "full")
    assert {split: [row["task_id"] for row in rows] for split, rows in found.items()} == {
        "prompt": [1, 10], "test": [11, 510], "validation": [511, 600], "train": [601, 974],
    }  # fmt: skip


def ask(folder: Path, **config: Any) -> None:
    DataFolder.open(folder).check("t", config)


def test_what_is_not_in_the_folder(tmp_path: Path) -> None:
    """Which file is expected where."""
    gsm8k = {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test", "fewshot_split": "train"}
    with pytest.raises(BadInput, match=rf"task t: there is no {tmp_path}/gsm8k-test\.jsonl, the test rows of openai/"):
        ask(tmp_path, **gsm8k)
    lines(tmp_path / "gsm8k-test.jsonl", GSM8K)
    with pytest.raises(BadInput, match=r"gsm8k-train\.jsonl, the train rows"):
        ask(tmp_path, **gsm8k)
    lines(tmp_path / "gsm8k-train.jsonl", GSM8K_TRAIN)
    ask(tmp_path, **gsm8k)
    with pytest.raises(BadInput, match="test of openai/gsm8k socratic, which is not among the published files"):
        ask(tmp_path, **{**gsm8k, "dataset_name": "socratic"})
    with pytest.raises(BadInput, match=rf"has no data set allenai/ai2_arc; .* into {tmp_path}/allenai/ai2_arc "):
        ask(tmp_path, dataset_path="allenai/ai2_arc", test_split="test")
    with pytest.raises(BadInput, match="--data is not a folder"):
        DataFolder.open(tmp_path / "gsm8k-test.jsonl")


def test_a_suite_is_refused_before_anything_loads(tmp_path: Path) -> None:
    """Also one whose data set the Hub's cache would have: what is named with --data is where data come from."""
    suite = Suite("s", (SuiteTask("wp_gsm8k", "G", "exact_match,none"),), data=tmp_path)
    with (
        mock.patch("mergekit_wp.eval.datafiles._is_cached", return_value=True),
        pytest.raises(BadInput, match=r"task wp_gsm8k: there is no .*gsm8k-test\.jsonl"),
    ):
        find_tasks(suite, None, False)


def test_a_copy_of_the_hubs_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any data set, and before published files; it is hashed as a whole."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_world(tmp_path / "data")
    (tmp_path / "data/openai").rename(tmp_path / "data/someone")
    lines(tmp_path / "data/gsm8k-test.jsonl", GSM8K[:1])
    data = DataFolder.open(tmp_path / "data")
    with data.answering():
        copied = datasets.load_dataset("someone/gsm8k", "main")
        published = datasets.load_dataset("openai/gsm8k", "main")
    assert (copied["test"].to_list(), len(copied["train"]), len(published["test"])) == (GSM8K, len(GSM8K_TRAIN), 1)

    def record() -> dict[str, Any]:
        leaf = mock.Mock(dataset=copied)
        leaf.config = mock.Mock(spec=[], dataset_path="someone/gsm8k", dataset_name="main", test_split="test")
        return DataFolder.open(tmp_path / "data").record([leaf])

    before = record()
    assert (list(before["files"]), before["rows"], before["published"]) == (["someone/gsm8k"], {"test": 4}, {})
    lines(tmp_path / "data/someone/gsm8k/main/test.jsonl", GSM8K[1:])
    assert record()["files"] != before["files"]
    assert datasets.load_dataset.__module__.startswith("datasets")  # as it was


def test_a_table_says_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child process, with nothing of the Hub's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make_model(tmp_path / "m", seed=1)
    (tmp_path / "data").mkdir()
    file = lines(tmp_path / "data/gsm8k-test.jsonl", GSM8K)
    write_suite(tmp_path / "suite.yaml")
    done = wp_eval("suite.yaml", "m", "--data", "data", "--limit", 2, "--device", "cpu", "--out", "one")
    assert done.exit_code == 0, done.output
    assert "data: GSM8K has 4 rows of test (1,319 are published)" in done.stderr
    about = results(tmp_path / "one")["rows"][0]["measured"]["GSM8K"]
    assert about["samples"] == 2
    assert about["data"] == {
        "files": {"gsm8k-test.jsonl": hashlib.sha256(file.read_bytes()).hexdigest()},
        "rows": {"test": 4},
        "published": {"test": 1319},
    }
    assert "GSM8K: its data has 4 rows of test (1,319 are published)." in (tmp_path / "one/results.md").read_text()
    write_suite(tmp_path / "suite.yaml", data="data")  # in the suite, too
    inside = wp_eval("suite.yaml", "m", "--out", "data/out")
    assert (inside.exit_code, "lies inside what is read" in inside.output) == (2, True)


def test_a_file_that_changed_is_measured_anew(tmp_path: Path) -> None:
    """What is in the files is part of the cache's key; how they are named is not."""
    file = lines(tmp_path / "gsm8k-test.jsonl", GSM8K)
    suite = read_suite(write_suite(tmp_path / "suite.yaml", data="."))

    def key(folder: Path) -> str:
        (task,) = ready_tasks(replace(suite, data=folder), None, False)
        return task.key

    first = key(tmp_path)
    (tmp_path / "other").mkdir()
    lines(tmp_path / "other/gsm8k-test.jsonl", GSM8K)
    assert key(tmp_path / "other") == first
    lines(file, GSM8K[::-1])
    assert key(tmp_path) != first


def test_rows_of_other_data_are_told_apart(tmp_path: Path) -> None:
    """By content: another name for the same file is no difference."""

    def row(name: str, data: dict[str, str] | None) -> Any:
        model = mock.Mock()
        model.name = name
        measured = {"C": {"data": {"files": data, "rows": {}, "published": {}}}} if data else {"C": {}}
        return mock.Mock(model=model, cells={"C": mock.Mock(samples=3)}, measured=measured, suite="s")

    one, same, other, hub = (
        row("one", {"a.jsonl": "1" * 64}), row("same", {"b.jsonl": "1" * 64}), row("other", {"a.jsonl": "2" * 64}),
        row("hub", None),
    )  # fmt: skip
    assert differences([one, same], ["C"]) == []
    (said,) = differences([one, other, hub], ["C"])
    assert said.startswith("data is files of content ")
    assert len({said.split("content ")[i][:12] for i in (1, 2)}) == 2
    assert said.endswith("as its task names it for hub.")


def test_more_rows_than_were_published_are_said_too() -> None:
    counts = {"rows": {"test": 3, "train": 9, "dev": 5, "own": 1}, "published": {"test": 4, "train": 8, "dev": 5}}
    assert odd_counts(counts) == ["3 rows of test (4 are published)", "9 rows of train (8 are published)"]


def test_a_suites_folder_is_relative_to_it(tmp_path: Path) -> None:
    suite = read_suite(write_suite(tmp_path / "s.yaml", data="sets"))
    assert suite.data == tmp_path / "sets"
    assert suite.hash == replace(suite, data=None).hash
    with pytest.raises(BadInput, match="`data` must be a folder, found 3"):
        read_suite(write_suite(tmp_path / "s.yaml", data=3))


def test_results_with_data_of_other_kinds_are_refused(tmp_path: Path) -> None:
    from push_world import write_results

    write_results(tmp_path / "r", "f" * 64, tmp_path / "m")
    content = json.loads((tmp_path / "r/results.json").read_text())
    about = next(iter(content["rows"][0]["measured"].values()))
    about["data"] = {"files": {"a": "no hash"}, "rows": {}, "published": {}}
    (tmp_path / "r/results.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"data\.files\.a"):
        read_results(tmp_path / "r/results.json")


@pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not here; OFFICIAL_DATA names their folder")
@pytest.mark.parametrize("dataset", PUBLISHED)
def test_the_published_files_have_as_many_rows_as_is_said(dataset: str) -> None:
    published = PUBLISHED[dataset]
    here = [
        config
        for config in published.rows
        if published.found(REAL, config, "test" if dataset != "google/IFEval" else "train")
    ]
    if not here:
        pytest.skip(f"{dataset} is not among them")
    assert len(here) == len(published.rows)
    for config in here:
        found = {split: len(rows) for split, rows in loaded(REAL, dataset, config).items()}
        assert found == dict(published.rows[config])
