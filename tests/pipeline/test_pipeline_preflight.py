"""wp-run looks ahead: what would stop a later stage is said at once, with its field, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import lora_files
import pytest
import tiny
import yaml
from click.testing import CliRunner
from eval_world import TASKS, write_suite
from merge_world import write_random_fit
from pipeline_world import build, content, pipeline_of

from mergekit_wp.pipeline.cli import main
from mergekit_wp.pipeline.spec import read_pipeline
from mergekit_wp.pipeline.steps import pipeline_steps


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build(tmp_path_factory.mktemp("ahead"))
    (root / "job.yaml").write_text(yaml.safe_dump({"base": "x", "expert": "two", "pairs": "two.jsonl"}))
    own = {"merge_method": "linear", "base_model": "base", "models": [{"model": "one"}], "dtype": "float32"}
    (root / "ties.yaml").write_text(yaml.safe_dump({**own, "merge_method": "tise"}))
    (root / "twice.yaml").write_text(yaml.safe_dump(own) + "parameters: {weight: 1}\nparameters: {weight: 2}\n")
    (root / "away.yaml").write_text(yaml.safe_dump({**own, "models": [{"model": "./away"}]}))
    write_suite(root / "unsafe.yaml", tasks=[{**TASKS[0], "task": "tiny_unsafe"}])
    write_suite(root / "unknown.yaml", tasks=[{**TASKS[0], "task": "tiny_gne"}])
    write_suite(root / "nodata.yaml", tasks=[{**TASKS[0], "task": "tiny_nodata"}])
    write_suite(root / "folder.yaml", include_path="taskz")
    write_suite(root / "metric.yaml", tasks=[{**TASKS[0], "metric": "exact_match"}])
    write_suite(root / "chat.yaml", tasks=[{**TASKS[0], "apply_chat_template": True}])
    official = {"task": "wp_gsm8k", "column": "GSM8K", "metric": "exact_match,none"}
    write_suite(root / "official.yaml", include_path=None, tasks=[official])
    (root / "bad.safetensors").write_bytes(b"no scores")
    write_random_fit(root / "one.fit.safetensors", str(root / "base"), [str(root / "one")])
    return root


def run(world: Path, monkeypatch: pytest.MonkeyPatch, file: Path, *flags: str) -> tuple[int, str]:
    monkeypatch.chdir(world)
    before = sorted(path for path in world.rglob("*"))
    outcome = CliRunner().invoke(main, [file.name, *flags])
    assert sorted(path for path in world.rglob("*")) == before, "it wrote something"
    return outcome.exit_code, outcome.output


def expert(**changes: object) -> dict:
    return {"experts": {**content()["experts"], "one": {"model": "one", **changes}}}


def merge(**fields: object) -> dict:
    return {"merges": {**content()["merges"], "mine": fields}}


def graded(**fields: object) -> dict:
    return {"experts": {"one": {"model": "one"}}, "merges": {}, "evaluate": fields}


def pushed(**fields: object) -> dict:
    linear = {"linear": content()["merges"]["linear"]}
    return {
        "experts": {"one": {"model": "one"}},
        "merges": linear,
        "push": {"merge": "linear", **fields},
        "evaluate": None,
    }


TASK_ARITHMETIC = {"merge_method": "task_arithmetic", "expert_parameters": {"weight": 1.0}}


def test_a_merge_that_is_scored_at_is_an_input(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe, models and files: where one of them changes, the step is due."""
    monkeypatch.chdir(world)
    recipe = {"merge_method": "wp", "base_model": "base", "models": [{"model": "two"}]}
    recipe["parameters"] = {"fit": "one.fit.safetensors"}
    (world / "wp.yaml").write_text(yaml.safe_dump(recipe))
    scored = expert(scoring={"pairs": "one.jsonl", "at": "wp.yaml"})
    step = pipeline_steps(read_pipeline(pipeline_of(world, "scored-at", **scored)))[0]
    assert {Path("wp.yaml"), Path("one.fit.safetensors"), Path("base"), Path("two"), Path("one")} <= set(step.inputs)


@pytest.mark.parametrize(
    ("until", "changes", "said"),
    [
        ("score", expert(scoring={"pairs": "one.jsonl", "metod": "attr"}), "`experts.one`: unknown field 'metod'"),
        ("score", expert(scoring={"pairs": "one.jsonl", "gap_floor": "1"}), "`experts.one`: gap_floor: found '1'"),
        ("score", expert(scoring={"pairs": "onne.jsonl"}), "`experts.one`: onne.jsonl: cannot read the pairs"),
        ("score", expert(scoring={"pairs": "builtin:math"}), "`experts.one`: pairs: no built-in set 'math'"),
        ("score", expert(scoring={"pairs": "one.jsonl", "layers": "3-9"}), "`experts.one`: layers: 3-9 is out of"),
        ("score", expert(scoring={"pairs": "one.jsonl", "top": [5, "no.safetensors"]}), "no such score file"),
        (
            "score",
            expert(scoring={"pairs": "one.jsonl", "at": "no.yaml"}),
            "`experts.one.scoring.at`: no.yaml is neither",
        ),
        (
            "score",
            expert(scoring={"pairs": "one.jsonl", "at": "ties.yaml"}),
            "`experts.one`: at: ties.yaml: mergekit has no",
        ),
        ("score", expert(scoring={"pairs": "one.jsonl", "at": "away.yaml"}), "`experts.one`: at: ./away: no such"),
        ("score", expert(model="onne", scoring={"pairs": "one.jsonl"}), "`experts.one`: onne: no such model folder"),
        ("score", {"score": {"flags": ["--devise", "cpu"]}}, "`score.flags`: No such option"),
        ("merge", expert(scores="bad.safetensors"), "`merges.wp`: "),
        ("merge", {"merge": {"flags": ["--version"]}}, "`merge.flags`: "),
        ("merge", merge(merge_method="tise"), "`merges.mine`: out/recipes/mine.yaml: mergekit has no merge_method"),
        ("merge", merge(parameters={"fit": "bad.safetensors"}), "bad.safetensors: cannot be read as a safetensors fit"),
        (
            "merge",
            merge(parameters={"fit": "one.fit.safetensors"}),
            "two cannot be found among these; merge all of the",
        ),
        ("merge", merge(fit={"famly": "layer"}), "`merges.mine.fit`: unknown field `famly`; it has template"),
        ("merge", merge(fit={"steps": 0}), "`merges.mine.fit.steps`: found 0, expected a whole"),
        ("merge", {"fit": {"flags": ["--stepz", "3"]}, **merge(fit={})}, "`fit.flags`: No such option"),
        ("merge", merge(recipe="ties.yaml"), "`merges.mine`: ties.yaml: mergekit has no merge_method 'tise'"),
        ("merge", merge(recipe="away.yaml"), "`merges.mine`: "),
        ("merge", merge(recipe="twice.yaml"), "the key `parameters` stands twice"),
        ("merge", merge(**TASK_ARITHMETIC, parameters={"lamda": 1}), "unknown parameter lamda; merge_method task_ari"),
        ("merge", merge(parameters={"scael": 2}), "`merges.mine`: out/recipes/mine.yaml: unknown parameter scael"),
        ("merge", merge(parameters={"scale": "x"}), "`merges.mine`: "),
        ("merge", merge(**TASK_ARITHMETIC, out_dtype="float12"), "`merges.mine`: the recipe's dtype float12"),
        ("evaluate", graded(suite="unknown.yaml"), "`evaluate`: unknown task `tiny_gne`"),
        ("evaluate", graded(suite="unsafe.yaml"), "`evaluate`: tiny_unsafe: this runs Python"),
        ("evaluate", graded(suite="nodata.yaml"), "`evaluate`: task tiny_nodata: its data file"),
        ("evaluate", graded(suite="folder.yaml"), "`evaluate`: taskz: the suite's include_path is not a folder"),
        ("evaluate", graded(suite="metric.yaml"), "`evaluate`: task tiny_gen has no metric `exact_match`; it has"),
        ("evaluate", graded(suite="chat.yaml"), "`evaluate`: base: its tokenizer has no chat template, which task"),
        (
            "evaluate",
            graded(suite="official.yaml", data="tasks"),
            "`evaluate`: task wp_gsm8k: there is no tasks/gsm8k-t",
        ),
        ("evaluate", graded(suite="suite.yaml", flags=["--dtype", "int8"]), "`evaluate.flags`: "),
        ("push", pushed(to="me", dry_run=True), "`push`: me: expected USER/NAME"),
        ("push", pushed(to="me/x", dry_run=True), "`push`: the licence of the merge cannot be told"),
        ("push", pushed(to="me/x", license="A B"), "`push`: --license A B"),
        ("push", pushed(to="me/x", license="mit", license_name="X"), "`push`: --license-name and --license-link go"),
        ("push", pushed(to="me/x", license_link="https://x"), "`push`: --license-name and --license-link go"),
        ("push", pushed(to="me/x", license="other"), "`push`: --license other: its terms need a name"),
        ("push", pushed(to="me/x", parents={"one": "x"}, license="mit"), "`push`: --parent"),
    ],
)
def test_what_would_stop_a_later_stage_is_said_at_once(
    world: Path, until: str, changes: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pipeline_of(world, **changes)
    code, printed = run(world, monkeypatch, file, "--plan", "--until", until)
    assert code == 2, printed
    (line,) = [line for line in printed.splitlines() if said in line]
    assert line.startswith(f"Error: {file.name}: `")


def test_a_lora_with_a_chat_template_of_its_own_is_graded(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_files.write(world / "lora", world / "base")
    tiny.tokenizer().save_pretrained(lora)
    (lora / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    own = {"experts": {"lora": {"model": "base+lora"}}, "merges": {}, "score": None}
    file = pipeline_of(world, **own, evaluate={"suite": "chat.yaml", "models": ["lora"]})
    code, printed = run(world, monkeypatch, file, "--plan", "--until", "evaluate")
    assert code == 0, printed


def test_a_run_is_refused_as_its_plan_is(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, which would take hours; with every trouble, not the first alone."""
    changes = {**merge(merge_method="tise"), "evaluate": {"suite": "unsafe.yaml"}}
    file = pipeline_of(world, **changes)
    code, printed = run(world, monkeypatch, file)
    assert code == 2
    first, second = (line for line in printed.splitlines() if line.startswith(f"Error: {file.name}: "))
    assert "`merges.mine`" in first
    assert "`evaluate`: tiny_unsafe: this runs Python that the models write; add --allow-code" in second
    assert "[1/" not in printed
    # What is not asked for is not looked at.
    code, printed = run(world, monkeypatch, file, "--plan", "--until", "score")
    assert code == 0, printed


def test_a_plan_reads_and_writes_nothing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed = run(world, monkeypatch, pipeline_of(world), "--plan")
    assert code == 0, printed
    assert printed.count("to do (not run yet)") == 6
    away = world / "away.pipeline"
    away.write_text(yaml.safe_dump({**content(), "out": "suite.yaml/x"}))
    code, printed = run(world, monkeypatch, away, "--plan")
    assert code == 2
    assert "cannot write there" in printed


def test_models_that_are_not_here_yet_are_left_out(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = pipeline_of(world, base="nobody/not-in-the-cache")
    code, printed = run(world, monkeypatch, file, "--plan")
    assert code == 0, printed
    assert "not looked into, since a run fetches them first: nobody/not-in-the-cache" in printed


def test_scores_that_lie_in_an_experts_own_folder_are_not_taken_for_those_to_come(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "one", world / "own")
    (world / "own" / "wp").mkdir()
    (world / "own" / "wp" / "scores.safetensors").write_bytes(b"of another time")
    file = pipeline_of(world, **expert(model="own", scoring={"pairs": "one.jsonl"}))
    code, printed = run(world, monkeypatch, file, "--plan")
    assert code == 0, printed
