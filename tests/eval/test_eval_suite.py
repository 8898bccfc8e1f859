"""Suite files, row names, the table's three formats and the check for data sets, without any model."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from datasets import Dataset, DatasetDict, load_from_disk

from experiments.miniature.lm_eval_tasks import SUITE
from mergekit_wp.errors import BadInput
from mergekit_wp.eval import datafiles
from mergekit_wp.eval.cli import main
from mergekit_wp.eval.measure import cache_file
from mergekit_wp.eval.models import EvalModel, _distinct_names, _split
from mergekit_wp.eval.rows import Cell, Row, cell_of, plain
from mergekit_wp.eval.suite import Suite, SuiteTask, read_suite
from mergekit_wp.eval.tables import Table, read_results, results_html, to_csv, to_json, to_markdown, to_text
from mergekit_wp.eval.tasks import ReadyTask, about_metric, leaves, ready_tasks, task_manager
from mergekit_wp.files import shipped

TASK = {"task": "t", "column": "T", "metric": "acc,none"}


@pytest.mark.parametrize(("path", "tasks"), [(SUITE, 3), (shipped("eval/lm-eval.yaml"), 6)])
def test_shipped_suites_parse(path: Path, tasks: int) -> None:
    suite = read_suite(path)
    assert suite.name in ("miniature", path.stem)
    assert len(suite.tasks) == tasks


def test_the_lm_eval_suite_names_real_tasks_that_need_consent_for_code() -> None:
    names = [task.task for task in read_suite(shipped("eval/lm-eval.yaml")).tasks]
    manager = task_manager(names, None)
    unsafe = [name for name in names if any(leaf.get("unsafe_code") for leaf in leaves(manager, name))]
    assert unsafe == ["humaneval", "mbpp"]
    assert len(list(leaves(manager, "mmlu"))) == 57


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "float64"}, "`dtype` must be one of"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"batch_size": True}, "`batch_size` must be"),
        ({"max_gen_toks": "many"}, "`max_gen_toks` must be"),
        ({"baseline": 3}, "`baseline` must be a string"),
        ({"include_path": 3}, "`include_path` must be a folder"),
        ({"tasks": []}, "`tasks` is empty"),
        ({"tasks": "t"}, "`tasks` must be a list"),
        ({"tasks": ["t"]}, "task 1: expected a mapping"),
        ({"tasks": [{"task": "t", "column": "T"}]}, "task 1: the field `metric` is missing"),
        ({"tasks": [TASK, {**TASK, "task": "u"}]}, "has two columns 'T'"),
        ({"tasks": [{**TASK, "num_fewshot": -1}]}, "`num_fewshot` must be"),
        ({"tasks": [{**TASK, "gen_kwargs": "x"}]}, "`gen_kwargs` must be a mapping"),
        ({"tasks": [{**TASK, "apply_chat_template": 1}]}, "`apply_chat_template` must be"),
        ({"name": ""}, "`name` must be"),
    ],
)
def test_a_bad_suite_is_refused_by_field(tmp_path: Path, changes: dict, sentence: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "tasks": [TASK], **changes}))
    with pytest.raises(BadInput) as caught:
        read_suite(path)
    assert sentence in caught.value.message
    assert caught.value.message.startswith(str(path))


def test_include_path_is_relative_to_the_suite(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"name": "s", "tasks": [TASK], "include_path": "../t"}))
    assert read_suite(tmp_path / "s.yaml").include_path == tmp_path / ".." / "t"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x=runs/a", "runs/a"], ["x", "a"]),
        (["r/a/m", "r/b/m"], ["a/m", "b/m"]),
        (["m=r/a/m", "r/b/m"], ["m", "b/m"]),
        (["user/model", "other/model"], ["user/model", "other/model"]),
    ],
)
def test_row_names(arguments: list[str], names: list[str]) -> None:
    assert _distinct_names([_split(argument) for argument in arguments]) == names


@pytest.mark.parametrize("arguments", [["a", "a"], ["=a"], ["x="], ["x=a", "x=b"]])
def test_row_names_that_cannot_be_told_apart(arguments: list[str]) -> None:
    with pytest.raises(BadInput):
        _distinct_names([_split(argument) for argument in arguments])


def table(limit: int | None = None, baseline: str | None = "linear") -> Table:
    tasks = tuple(SuiteTask(task=name, column=name.upper(), metric="acc,none") for name in ("a", "b"))
    values = {"linear": (0.5, 0.25), "wp|1": (0.75, 0.125)}
    rows = [
        Row(
            EvalModel(name, f"runs/{name}", Path(name), "f" * 64),
            {"A": Cell(a, 0.03, 100), "B": Cell(b, None if name == "linear" else 0.04, 100)},
            {},
        )
        for name, (a, b) in values.items()
    ]
    return Table(Suite("s", tasks), rows, baseline, limit)


def test_markdown_has_differences_and_bold_best_values() -> None:
    lines = to_markdown(table()).splitlines()
    assert lines[0] == "| model | A | B | Average |"
    assert lines[2] == "| linear | 50.00 ±3.00 | **25.00** | 37.50 |"
    assert lines[3] == "| wp\\|1 | **75.00** ±3.00 (+25.00) | 12.50 ±4.00 (-12.50) | **43.75** ±2.50 (+6.25) |"


def test_text_is_aligned_and_a_limit_is_marked() -> None:
    lines = to_text(table(limit=5)).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[2].startswith("linear*")
    assert "first 5 items" in lines[-1]


ERRORS = {"base": (0.5, 0.02), "wp": (0.25, 0.02)}


def with_perplexity(recorded: bool) -> Table:
    """Two rows: a perplexity of which less is better, and a share."""
    tasks = (SuiteTask("wikitext", "Wiki", "word_perplexity,none"), SuiteTask("a", "A", "acc,none"))
    said = {"Wiki": {"higher_is_better": False, "share": False}, "A": {"higher_is_better": True, "share": True}}
    values = {"base": (12.5, 0.5), "wp": (9.25, 0.375)}
    rows = [
        Row(
            EvalModel(name, name, Path(name), "f" * 64),
            {t.column: Cell(v, e, 100) for t, v, e in zip(tasks, found, ERRORS[name], strict=True)},
            said if recorded else {},
        )
        for name, found in values.items()
    ]
    return Table(Suite("s", tasks), rows, "base", None)


@pytest.mark.parametrize("recorded", [True, False])
def test_what_is_no_share_or_better_when_lower(tmp_path: Path, recorded: bool) -> None:
    table = with_perplexity(recorded)
    lines = to_markdown(table).splitlines()
    assert lines[2] == "| base | 12.50 ±0.50 | **50.00** ±2.00 | **50.00** ±2.00 |"
    assert lines[3].startswith("| wp | **9.2500** ±0.2500 (-3.2500) | 37.50 ±2.00 (-12.50) | 37.50 ±2.00")
    assert "Wiki: not in percent, lower is better, not in Average." in table.notes()
    assert to_csv(table).splitlines()[2].startswith("wp,9.2500,37.5000,37.5000,-3.2500,-12.5000,-12.5000,0.2500,2.0000")
    page = results_html(table)
    assert re.findall(r"<strong>([\d.]+) ", page) == ["50.00", "50.00", "9.2500"]
    assert re.findall(r'class="(\w+)">([-+.\d]+)<', page) == [("up", "-3.2500"), ("down", "-12.50"), ("down", "-12.50")]
    content = json.loads(to_json(table, {"suite_content": {"name": "s"}}))
    path = tmp_path / "results.json"
    for average in (0.5, (12.5 + 0.5) / 2):  # the second as files of before have it
        content["rows"][0]["cells"]["Average"]["value"] = average
        path.write_text(json.dumps(content))
        assert to_markdown(read_results(path)) == to_markdown(table)
    content["rows"][0]["cells"]["Average"]["value"] = 0.6
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="the average of the row base is not the mean of its columns"):
        read_results(path)


def test_without_a_share_there_is_no_average() -> None:
    table = with_perplexity(True)
    alone = Table(replace(table.suite, tasks=table.suite.tasks[:1]), table.rows, "base", None)
    assert to_markdown(alone).splitlines()[0] == "| model | Wiki |"
    assert "value ±" in alone.notes()[0]


def test_errors_of_columns_with_the_same_items_are_added() -> None:
    names = {"prompt": "ifeval", "instruction": "ifeval", "mmlu": "mmlu", "law": "mmlu_law", "gsm8k": "gsm8k"}
    tasks = tuple(SuiteTask(task, column, "acc,none") for column, task in names.items())

    def error(*columns: str) -> float | None:
        cells = {column: Cell(0.5, 0.125, 8) for column in columns}
        row = Row(EvalModel("m", "m", Path(), "f" * 64), cells, {"mmlu": {"subtasks": ["mmlu_art", "mmlu_law"]}})
        return Table(Suite("s", tuple(t for t in tasks if t.column in columns)), [row], None, None).stderr(
            row, "Average"
        )

    assert error("prompt", "instruction") == error("law", "mmlu") == 0.125
    assert error("prompt", "gsm8k") == pytest.approx(0.125 / math.sqrt(2))
    assert error(*names) == pytest.approx(0.125 * 3 / 5)  # 2, 2 and 1 of them


def test_csv_and_json() -> None:
    header, linear, wp = to_csv(table()).splitlines()
    assert header.startswith("model,A,B,Average,A - linear,B - linear,Average - linear,A stderr")
    assert linear.startswith("linear,50.0000,25.0000,37.5000,,,,3.0000,,")
    assert wp.startswith("wp|1,75.0000,12.5000,43.7500,25.0000,-12.5000,6.2500,3.0000,4.0000,2.5000")
    content = json.loads(to_json(table(), {"suite": "s.yaml"}))
    cells = content["rows"][1]["cells"]
    assert cells["Average"]["difference"] == 0.0625
    assert cells["Average"]["stderr"] == pytest.approx(math.hypot(0.03, 0.04) / 2)
    assert content["rows"][0]["cells"]["Average"]["stderr"] is None
    assert " - " not in to_csv(table(baseline=None)).splitlines()[0]


def test_json_survives_numpy_and_what_json_lacks() -> None:
    raw = {
        "acc": np.float64(0.5),
        "n": np.int64(3),
        "err": "N/A",
        "bad": float("nan"),
        "t": (np.bool_(True),),
    }
    assert json.loads(json.dumps(plain(raw))) == {"acc": 0.5, "n": 3, "err": "N/A", "bad": "nan", "t": [True]}


@pytest.mark.parametrize("results", [{}, {"acc,none": "N/A"}, {"acc,none": "nan"}, {"acc,none": None}])
def test_a_metric_without_a_number_is_an_error(results: dict) -> None:
    model = EvalModel("m", "m", Path("m"), "f")
    task = ReadyTask(SuiteTask(**TASK), None, "k")
    with pytest.raises(BadInput, match="`acc,none` of t"):
        cell_of(model, task, {"results": results, "samples": 1})
    cell = cell_of(model, task, {"results": {"acc,none": 1, "acc_stderr,none": "N/A"}, "samples": 1})
    assert cell == Cell(1.0, None, 1)


def test_a_data_set_that_is_nowhere_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    config = {"dataset_path": "nobody/nothing-of-that-name"}
    with pytest.raises(BadInput, match=r"the Hub cannot be reached \(ConnectionError: no route to host\)"):
        datafiles.check_data("t", config)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE is set"):
        datafiles.check_data("t", config)
    monkeypatch.setattr(datafiles, "_is_cached", lambda name: name == "nobody/nothing-of-that-name")
    datafiles.check_data("t", config)


MADE_OF = {
    "tasks/ask.py": """
import json, sys
import datasets, helper, words.lists
from pathlib import Path
HERE = Path(__file__).parent
LISTED = {"test": HERE / "few.lst", "train": [HERE / f"part-{i}.json" for i in range(2)], "all": HERE / "extra"}
SHOWN = "{}.csv".format("rows"), ".secret", "one", "run", "../above.json", "/etc/passwd", "prod", "data:", ""
""",
    "tasks/beside.py": "UNUSED = 'notes.txt'",
    "tasks/helper.py": "FILE = 'helped.json'",
    "tasks/words/lists.py": "FILE = 'spelt.txt'",
    **dict.fromkeys(["words/spelt.txt", "few.lst", "part-7.json", "extra/deep/b.jsonl", "helped.json", "rows.csv"], ""),
}
NOT_OF_IT = (
    ".git/config", ".secret", "prod.env", "notes.txt", "results.json", "words/other.txt", "extra/.env", "extra/key.pem",
    "extra/.hidden/a.json", "other/pack.py", "above.json",
    "one/config.json", "one/model.safetensors", "run/results.json",
    "extra/lora/adapter_config.json", "extra/lora/adapter_model.safetensors",
)  # fmt: skip


def test_what_a_task_is_made_of(tmp_path: Path) -> None:
    """Its Python with what this names; nothing hidden, no model, no results, nothing that only lies beside it."""
    tasks = tmp_path / "tasks"
    made = {tmp_path / name if name.startswith("tasks") else tasks / name: text for name, text in MADE_OF.items()}
    model = EvalModel("one", "one", tasks / "one", "f" * 64)
    foreign = [*(tasks / name for name in NOT_OF_IT), cache_file(tasks / "run" / "cache", model, "a" * 64)]
    for path, text in (made | dict.fromkeys(foreign, "{}")).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert datafiles.files_read([{"doc_to_text": f"{tasks}/ask.ask"}]) == set(made)
    nested = datafiles.files_read([{"doc_to_text": f"{tasks}/words.lists.ask"}])
    assert nested == {tasks / "words" / name for name in ("lists.py", "spelt.txt")}
    (tasks / "ask.py").write_text("not Python")
    assert datafiles.files_read([{"process_docs": f"{tasks}/ask.ask"}]) == {*tasks.glob("*.py")}

    (tmp_path / "set").mkdir()
    for name in ("a.json", "b.csv", ".c.json", "d.env"):
        (tmp_path / "set" / name).write_text("{}")
    assert datafiles.files_read([{"dataset_path": str(tmp_path / "set")}]) == {
        tmp_path / "set" / name for name in ("a.json", "b.csv")
    }


def test_the_commits_of_the_hubs_data_sets(tmp_path: Path) -> None:
    """By the folders that `datasets` makes: .../NAME/CONFIG/VERSION/COMMIT/; those of local files are no commits."""
    rows = Dataset.from_dict({"q": ["w1"]})
    loaded = []
    for source, kept in (("openai/gsm8k", "a" * 40), ("json", "b" * 64)):
        rows.save_to_disk(tmp_path / kept)
        splits = DatasetDict(test=load_from_disk(tmp_path / kept))
        loaded.append(SimpleNamespace(dataset=splits, get_config={"dataset_path": source}.get))
    loaded += [SimpleNamespace(dataset=DatasetDict(test=rows)), SimpleNamespace(dataset=None), SimpleNamespace()]
    assert datafiles.revisions(loaded) == {"openai/gsm8k": "a" * 40}


def test_how_values_are_put_together_is_known(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"q": "w1", "a": "w2"}\n')
    for name in "ab":
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/d.json"}},
                "test_split": "test", "doc_to_text": "q", "doc_to_target": "a", "output_type": "generate_until",
                "generation_kwargs": {"until": ["w1"]}, "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))

    def tasks_of(weighted: bool) -> list[ReadyTask]:
        inner = {"group": "inner", "task": ["a", "b"]}
        inner["aggregate_metric_list"] = [{"metric": "exact_match", "weight_by_size": weighted}]
        outer = {"group": "outer", "task": ["inner"], "aggregate_metric_list": [{"metric": "exact_match"}]}
        for group in (inner, outer):
            (tmp_path / f"{group['group']}.yaml").write_text(yaml.safe_dump(group))
        asked = tuple(SuiteTask(name, name, "exact_match,none") for name in ("inner", "outer", "a"))
        asked += (SuiteTask("ppl", "ppl", "word_perplexity,none"), SuiteTask("low", "low", "exact_match,none"))
        return ready_tasks(Suite("s", asked), tmp_path, False)

    rolling = {**task, "task": "ppl", "output_type": "loglikelihood_rolling", "doc_to_target": "q"}
    rolling["metric_list"] = [{"metric": "word_perplexity"}]
    lower = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": False}
    for each in (rolling, {**task, "task": "low", "metric_list": [lower]}):
        (tmp_path / f"{each['task']}.yaml").write_text(yaml.safe_dump(each))
    tasks = tasks_of(True)
    before, after = [task.key for task in tasks], [task.key for task in tasks_of(False)]
    assert before[2:] == after[2:]
    assert not set(before[:2]) & set(after[:2])

    share = {"higher_is_better": True, "share": True}
    group = {**share, "subtasks": ["a", "b"]}
    found = [about_metric(task) for task in tasks]
    assert found[:3] == [group, group, share]
    assert found[3:] == [{"higher_is_better": False, "share": is_share} for is_share in (False, True)]


def test_help_groups_the_options() -> None:
    text = CliRunner().invoke(main, ["--help"]).output
    for heading in ("Suite:", "Output Settings:", "Performance:", "Dangerous Options:", "Examples:"):
        assert heading in text
