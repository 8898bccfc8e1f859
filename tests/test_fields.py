"""Fields stated once: what a reader takes is what its JSON Schema takes, and pages and help say what the field says.

The schemas are held to jsonschema, which knows nothing of ours.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from mergekit_wp.errors import BadInput
from mergekit_wp.eval.cli import main as wp_eval
from mergekit_wp.eval.options import OPTIONS
from mergekit_wp.eval.suite import Suite, SuiteTask, parse_suite
from mergekit_wp.fields import about, default_of, default_words, plain
from mergekit_wp.fit.job import FitJob
from mergekit_wp.pipeline.cli import main as wp_run
from mergekit_wp.pipeline.spec import Evaluate, Expert, Merge, Push, read_pipeline
from mergekit_wp.scoring.cli import main as wp_score
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.study.study_spec import Study

ROOT = Path(__file__).resolve().parents[1]
VALUES = [
    None, True, False, 0, 1, -1, 7, 0.5, -0.5, "", " ", "x", "auto", "0-5,7", "{prompt}", "kl", "ap", "write",
    [], [1, "f"], [0, "f"], ["f", 1], [1, "f", 2], {}, {"a": 1}, {"a": "b"},
]  # fmt: skip


def schema_of(command):
    done = CliRunner().invoke(command, ["--schema", "json"])
    assert done.exit_code == 0, done.output
    schema = json.loads(done.output)
    assert schema["$schema"].endswith("2020-12/schema")
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


JOB, SUITE, PIPELINE = map(schema_of, (wp_score, wp_eval, wp_run))


def takes(read, content):
    try:
        read(content)
    except BadInput:
        return False
    return True


def agree(validator, read, content):
    assert validator.is_valid(content) == takes(read, content), content


@pytest.mark.parametrize("field", [item.name for item in fields(ScoringJob)] + ["no_such_field"])
def test_a_job_is_taken_where_its_schema_takes_it(field):
    beside = {"object": {"method": "ap"}, "rank": {"top": [3, "f"]}, "answers": {"answer_tokens": 8},
              "sample": {"method": "exact", "top": [3, "f"]}}.get(field, {})  # fmt: skip
    for value in [*VALUES, "mean-abs", "half", "stream", "float16"]:
        content = {"base": "b", "expert": "e", "pairs": "p", **beside, field: value}
        if (field, value) != ("layer", "auto"):
            agree(JOB, lambda job: ScoringJob.from_mapping(job, ""), content)
    without = {"base": "b", "expert": "e", "pairs": "p"}
    without.pop(field, None)
    agree(JOB, lambda job: ScoringJob.from_mapping(job, ""), without)


TASK = {"task": "t", "column": "c", "metric": "acc,none"}


@pytest.mark.parametrize("field", [item.name for item in fields(Suite)] + ["no_such_field"])
def test_a_suite_is_taken_where_its_schema_takes_it(field, tmp_path):
    for value in [*VALUES, [TASK], [{}], "float16", "hf"]:
        agree(SUITE, lambda suite: parse_suite(suite, tmp_path), {"name": "n", "tasks": [TASK], field: value})


@pytest.mark.parametrize("field", [item.name for item in fields(SuiteTask)])
def test_a_task_is_taken_where_its_schema_takes_it(field, tmp_path):
    beside = {"apply_chat_template": True} if field == "fewshot_as_multiturn" else {}
    for value in VALUES:
        suite = {"name": "n", "tasks": [{**TASK, **beside, field: value}]}
        agree(SUITE, lambda suite: parse_suite(suite, tmp_path), suite)
        absent = {name: old for name, old in TASK.items() if name != field}
        agree(SUITE, lambda suite: parse_suite(suite, tmp_path), {"name": "n", "tasks": [absent]})


@pytest.mark.parametrize("option", [*OPTIONS, "no_such_option"])
def test_an_option_is_taken_where_its_schema_takes_it(option, tmp_path):
    for value in [item for item in VALUES if item is not None]:
        content = {"name": "n", "tasks": [TASK], "backend_options": {option: value}}
        agree(SUITE, lambda suite: parse_suite(suite, tmp_path), content)


PARTS = {
    "experts": Expert,
    "merges": Merge,
    "evaluate": Evaluate,
    "push": Push,
}


@pytest.mark.parametrize(
    ("part", "field"), [(part, item.name) for part, kind in PARTS.items() for item in fields(kind)]
)
def test_a_part_of_a_pipeline_is_taken_where_its_schema_takes_it(part, field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x", "auto", "0-5,7", "{prompt}", "kl", "ap", "write"):  # paths that are there
        Path(name).write_text("")
    whole = {
        "base": "b",
        "experts": {"one": {"model": "m"}},
        "merges": {"ours": {"merge_method": "linear"}},
        "evaluate": {"suite": "x"},
        "push": {"merge": "ours", "to": "a/b"},
    }
    for value in [*VALUES, {"pairs": "p"}]:
        content = json.loads(json.dumps(whole))
        holder = content[part] if part in ("evaluate", "push") else next(iter(content[part].values()))
        # Names must be those of the file, and a scoring job's file must hold one: no schema knows that.
        if isinstance(value, str) and field in ("scoring", "baseline", "merge"):
            continue
        if (isinstance(value, dict) and field in ("parents", "scoring")) or (isinstance(value, list) and value):
            continue
        if field == "recipe" and value is not None:  # the others of a merge do not go with it
            holder.clear()
        if field == "fit" and value is not None:  # it is for wp, and wants an expert's prompts
            holder.pop("merge_method")
            content["experts"]["one"]["scoring"] = {"pairs": "p"}
        holder[field] = value
        Path("p.yaml").write_text(yaml.safe_dump(content))
        assert PIPELINE.is_valid(content) == takes(read_pipeline, "p.yaml"), content


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("scoring/*.yaml"), *ROOT.glob("eval/*.yaml")]), ids=lambda p: p.name
)
def test_what_ships_is_valid(path):
    validator = JOB if path.parent.name == "scoring" else SUITE
    assert not list(validator.iter_errors(yaml.safe_load(path.read_text())))


def test_examples_of_the_pages_are_valid():
    kinds = {"job.yaml": JOB, "suite.yaml": SUITE, "pipeline.yaml": PIPELINE, "13b.yaml": PIPELINE}
    seen = set()
    for page in (ROOT / "docs").glob("*.md"):
        for title, text in re.findall(
            r'^```yaml title="([^"]+)"\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE
        ):
            if title in kinds:
                seen.add(title)
                assert not list(kinds[title].iter_errors(yaml.safe_load(text))), (page, title)
    assert {"job.yaml", "suite.yaml", "pipeline.yaml"} <= seen


@pytest.mark.parametrize("command", [wp_score, wp_eval, wp_run], ids=["job", "suite", "pipeline"])
def test_schema_as_text_has_every_field(command):
    done = CliRunner().invoke(command, ["--schema"])
    assert done.exit_code == 0
    for name, said in schema_of(command).schema["properties"].items():
        if name not in ("score", "fit", "merge"):
            line = next(line for line in done.output.splitlines() if line.strip().startswith(f"{name}: "))
            assert said["description"].startswith(line.strip().removeprefix(f"{name}: "))


def test_every_field_of_a_job_is_a_flag_that_says_the_same():
    text = " ".join(CliRunner().invoke(wp_score, ["--help"]).output.split())
    for item in fields(ScoringJob):
        assert f"--{item.name.replace('_', '-')} " in text
        assert plain(about(item).meaning).rstrip(".") in re.sub(r"- (?=[a-z])", "-", text) or item.name == "base"


TABLES = [
    ("Scoring job", "field", ScoringJob),
    ("Suite", "field", Suite),
    ("Suite", "field of a task", SuiteTask),
    ("Pipeline", "field of an expert", Expert),
    ("Pipeline", "field of a merge", Merge),
    ("Pipeline", "field of `evaluate`", Evaluate),
    ("Pipeline", "field of `push`", Push),
]


@pytest.mark.parametrize(("heading", "head", "kind"), TABLES)
def test_the_page_of_formats_says_what_the_field_says(heading, head, kind):
    """Links aside."""
    text = (ROOT / "docs/formats.md").read_text().partition(f"\n## {heading}\n")[2]
    table = text.partition(f"\n| {head} |")[2].partition("\n\n")[0].splitlines()[2:]
    page = {name.strip("`"): more for name, *more in ([cell.strip() for cell in row.split("|")[1:4]] for row in table)}
    for item in fields(kind):
        default, meaning = page[item.name]
        meaning = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", re.sub(r" \(\[\w+\]\([^)]+\)\)", "", meaning))
        assert meaning == about(item).meaning
        value = default_of(item)
        assert default == (default_words(item) or {False: "false"}.get(value if value is False else "", default))


def test_a_path_may_begin_with_the_home_directory(tmp_path, monkeypatch):
    """In every file that a person writes: there no shell puts it in the place of `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    experts = [{"expert": "u/e", "pairs": "~/p", "answers": "~/a", "scores": "~/s"}] * 2
    pipeline = {"base": "u/b", "experts": {"e": {"model": "u/e"}}, "merges": {}, "out": "~/out"}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    study = {"base": "u/b", "expert": "u/e", "scores": ["~/s"], "others": {"x": "~/o"}, "prompts": {"pairs": "~/p"}}
    job = {"pairs": "~/p", "answers": "~/a", "answer_tokens": 2, "components": "~/c", "top": [3, "~/s"]}
    suite = {"name": "s", "tasks": [{"task": "t", "column": "T", "metric": "m"}], "include_path": "~/t", "data": "~/d"}
    read = {
        "job": ScoringJob(base="u/b", expert="u/e", **job).reads(),
        "others": [
            *FitJob(base="u/b", experts=experts, keep="~/c").reads(),
            *Study.from_mapping(study).reads(),
            *(str(value) for value in vars(parse_suite(suite, Path("x"))).values() if isinstance(value, Path)),
            str(read_pipeline(tmp_path / "pipeline.yaml").out),
        ],
    }
    named = {name: {path for path in found if not path.startswith("u/")} for name, found in read.items()}
    assert named["job"] == {str(tmp_path / name) for name in "pacs"}
    assert named["others"] == {str(tmp_path / name) for name in (*"pascotd", "out")}
