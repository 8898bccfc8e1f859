"""Score files that a study has made: first, once, by wp-score itself, and refused before anything is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from click.testing import CliRunner
from study_world import write_study

from mergekit_wp import execute
from mergekit_wp.scores import read_scores
from mergekit_wp.scoring.cli import main as wp_score
from mergekit_wp.study.cli import main
from mergekit_wp.study.study_spec import FORM


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The runs of wp-score, which are in this process."""
    found: list[list[str]] = []

    def in_process(command: Sequence[str]) -> int:
        found.append([Path(command[0]).name, *command[1:]])
        return CliRunner().invoke(wp_score, list(command[1:])).exit_code

    monkeypatch.setattr(execute, "_run", in_process)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("scored")
    tiny.save_pair(folder, "llama")
    asked = ("w10 w11", "w12", "w13 w14 w15", "w16")
    pairs = [{"task": "a", "prompt": f"w1 {words} w5 w2", "contrast": f"w1 {words} w2"} for words in asked]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    written = write_study(folder, {"ap": {"method": "ap", "tasks": ("a",)}})
    return {"pairs": str(folder / "pairs.jsonl"), **yaml.safe_load(written.read_text())}


def study_in(folder: Path, world: dict[str, Any], **changes: Any) -> Path:
    job = {"pairs": world["pairs"], "device": "cpu", "utility": "anchor", "layer": 1, "base": "elsewhere"}
    (folder / "anchor.yaml").write_text(yaml.safe_dump(job))
    scores = {
        **world["scores"],
        "kl": {"pairs": world["pairs"], "device": "cpu"},
        "anchor": str(folder / "anchor.yaml"),
    }
    content = {**world, "scores": scores, **changes}
    del content["pairs"]
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "study.yaml"


def run(*arguments: object, code: int = 0) -> list[str]:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done.output.splitlines()


def test_missing_scores_are_made_first_and_once(world, tmp_path, ran) -> None:
    out = tmp_path / "out"
    arguments = [study_in(tmp_path, world), "--out", out, "--only", "maps"]
    plan = [
        "scores.kl: to do (not run yet)",
        "scores.anchor: to do (not run yet)",
        "maps: to do (after scores.kl)",
    ]
    assert run(*arguments, "--plan") == plan
    assert not out.exists(), "a plan does nothing"
    assert ran == []
    said = run(*arguments)
    assert said[:2] == plan[:2]
    assert ran == [
        ["wp-score", str(out / f"scoring/{name}.yaml"), "--out", str(out / f"scores/{name}.safetensors")]
        for name in ("kl", "anchor")
    ]
    assert [line for line in said if line.startswith("$")] == [f"$ {' '.join(command)}" for command in ran]
    for name, utility in (("kl", "kl"), ("anchor", "anchor")):
        meta = read_scores(out / f"scores/{name}.safetensors").meta
        assert (meta.utility, meta.expert.name, list(meta.tasks)) == (utility, world["expert"], ["a"])
    assert list(json.loads((out / "maps/maps.json").read_text())["files"]) == ["ap", "kl", "anchor"]
    done = ["scores.kl: done", "scores.anchor: done", "maps: done"]
    assert run(*arguments)[:3] == done
    assert len(ran) == 2
    job = tmp_path / "anchor.yaml"
    job.write_text(job.read_text() + "seed: 3\n")
    assert run(*arguments, "--plan") == [
        "scores.kl: done",
        f"scores.anchor: to do ({out / 'scoring/anchor.yaml'} has changed)",
        "maps: to do (after scores.anchor)",
    ]
    (out / "scores/kl.safetensors").unlink()
    assert run(*arguments, "--plan")[0] == f"scores.kl: to do ({out / 'scores/kl.safetensors'} is missing)"
    run(*arguments, "--quiet")
    assert [command[-1] for command in ran[2:]] == ["--quiet", "--quiet"]


def test_a_run_that_fails_ends_the_study(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(execute, "_run", lambda _: 3)
    said = run(study_in(tmp_path, world), "--out", tmp_path / "out", "--only", "maps", code=3)
    assert said[-1].startswith("Error: the step `Score for scores.kl` failed (exit code 3)")
    assert not (tmp_path / "out/maps").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scores": {"kl": {"pairs": "no.jsonl"}}}, "`scores.kl`: no.jsonl: cannot read the pairs"),
        ({"scores": {"kl": {"pairs": "PAIRS", "methods": "ap"}}}, "`scores.kl`: unknown field 'methods'; expected "),
        ({"scores": {"kl": "no.yaml"}}, "`scores.kl`: no.yaml: cannot read this scoring job"),
        ({"scores": {"kl": {}}}, "`scores.kl`: pairs: a scoring job needs this field"),
        ({"scores": [{"pairs": "PAIRS"}]}, "scores: found [{'pairs': "),
        ({"others": {"x": {"pairs": "PAIRS"}}}, "`others.x`: the scoring job names no expert; an expert of `others`"),
        ({"scores": {"kl": {"pairs": "PAIRS"}, "ap": "no.safetensors"}}, "`scores.ap`: no such score file: no.saf"),
        ({"scores": {"kl": {"pairs": "PAIRS"}}, "prompts": {"pairs": "no.jsonl"}}, "prompts: no.jsonl: cannot read"),
    ],
)  # fmt: skip
def test_bad_jobs_are_found_before_any_runs(world, tmp_path, ran, changes, sentence) -> None:
    placed = json.loads(json.dumps(changes).replace("PAIRS", world["pairs"]))
    said = run(study_in(tmp_path, world, **placed), "--out", tmp_path / "out", code=2)
    assert len(said) == 1, said
    assert sentence in said[0]
    assert said[0].startswith("Error: ")
    assert ran == []
    assert not (tmp_path / "out").exists()


def test_a_score_file_of_another_expert_is_found_before_any_runs(world, tmp_path, ran) -> None:
    tiny.save(tiny.fine_tuned(tiny.random_model("llama", seed=1), seed=9), tmp_path / "other")
    result = CliRunner().invoke(
        main, [str(study_in(tmp_path, world, expert=str(tmp_path / "other"))), "--out", str(tmp_path / "study")]
    )
    assert result.exit_code == 2, result.output
    assert "`expert`: the score files are of" in result.output
    assert ran == []


def test_the_schema_takes_what_the_study_takes(world, tmp_path) -> None:
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(FORM.schema())
    validator.validate(yaml.safe_load(study_in(tmp_path, world).read_text()))
    wrong = {"base": "b", "expert": "e", "scores": {"kl": {"pairs": "p", "methods": "ap"}}}
    assert not validator.is_valid(wrong)
