"""What the table's workers do, on a world that knows nothing: the stock command's merge, lm-eval's grades."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from experiments.miniature import grading, sandbox
from experiments.miniature.training import WorldConfig
from experiments.miniature.world import build_world
from experiments.table3 import __main__ as command
from experiments.table3.frozen import TrainedWorld
from experiments.table3.grade import TestGrade, ValidationGrade, _right_programs_remembered, grade
from experiments.table3.keys import recipe
from experiments.table3.variants import Point
from experiments.table3.work import Grading, MergeJob, grade_model, merge, read_grade, write_score
from mergekit_wp.errors import BadInput

BOTH = ("instruction", "maths")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    build_world(WorldConfig.smoke(), folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def world(root: Path) -> TrainedWorld:
    return TrainedWorld(0, root / WorldConfig.smoke().hash12)


def merge_of(point: Point, world: TrainedWorld, out: Path, scores: dict[str, Path] | None = None) -> MergeJob:
    return MergeJob(recipe(point, BOTH, world, scores or {}), out / "recipe.yaml", out / "merged", 3, False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_merge_in_the_process_is_the_executables(world: TrainedWorld, tmp_path: Path) -> None:
    """Tensor by tensor, where random numbers are drawn and another merge went before."""
    point = Point("dare_ties", {"rescale": True}, {"weight": 1.0, "density": 0.5})
    merge(merge_of(Point("ties", {}, {"weight": 1.0, "density": 0.5}), world, tmp_path / "before"))
    task = merge_of(point, world, tmp_path)
    mine = weights(merge(task))
    program = Path(sys.executable).parent / "mergekit-yaml"
    out = tmp_path / "stock"
    subprocess.run([program, task.recipe_file, out, "--quiet", "--random-seed", "3"], check=True, capture_output=True)
    theirs = weights(out)
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(not torch.equal(mine[name], weights(world.folder / "base")[name]) for name in mine)


def test_a_parameter_that_the_method_does_not_know_is_refused(world: TrainedWorld, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown parameter `lamda`"):
        merge(merge_of(Point("ties", {"lamda": 2.0}, {"weight": 1.0}), world, tmp_path))
    with pytest.raises(BadInput, match="no merge method 'tise'"):
        merge(merge_of(Point("tise"), world, tmp_path))


def test_a_grading_merges_grades_keeps_the_result_and_removes_the_model(world: TrainedWorld, tmp_path: Path) -> None:
    scores = {}
    for name in BOTH:
        settings = {"method": "attr", "utility": "anchor"}
        scores[name] = write_score(world.folder, name, settings, tmp_path / "s" / f"{name}.safetensors", False)
    task = merge_of(Point("wp", scores={}), world, tmp_path, scores)
    result = tmp_path / "result.json"
    about = {"combination": "instruction + maths", "recipe": dict(task.recipe)}
    found = grade_model(
        Grading(result, task, world.folder, "validation", BOTH, tmp_path / "cache", False, about)
    )  # fmt: skip
    assert isinstance(found, ValidationGrade)
    assert set(found.right) == set(BOTH)
    assert dict(found.items) == dict.fromkeys(BOTH, WorldConfig.smoke().validation_items)
    assert all(0 <= value <= 1 for value in found.right.values())
    assert not task.folder.exists()
    assert task.recipe_file.is_file()
    assert read_grade(result, "validation") == found
    assert read_grade(result, "test") is None
    assert json.loads(result.read_text())["recipe"]["merge_method"] == "wp"


def test_grades_are_the_graders_own(world: TrainedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grader that finds every second answer right must come out as one half."""
    turn = iter(range(10**6))
    monkeypatch.setattr(grading, "grade", lambda *_: next(turn) % 2 == 0)
    found = grade(world.folder / "maths", world.folder, "test", ("maths",), tmp_path, False)
    assert isinstance(found, TestGrade)
    assert found.right == {"maths": 0.5}
    assert found.items == {"maths": WorldConfig.smoke().test_items}


def test_code_is_not_run_without_consent(world: TrainedWorld, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="allow-code-execution"):
        grade(world.folder / "code", world.folder, "test", ("code",), tmp_path, False)


def test_only_a_right_program_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def passes(code: str, function: str, cases: list[list[object]]) -> bool:
        runs.append(code)
        return code == "right"

    monkeypatch.setattr(sandbox, "passes", passes)
    with _right_programs_remembered():
        for code in ("right", "wrong") * 3:
            assert grading.grade_code(code, "f", [[1, 1]]) is (code == "right")
        assert grading.grade_code("right", "f", [[2, 2]])
    assert runs.count("right") == 2
    assert runs.count("wrong") == 3
    assert sandbox.passes is passes


def test_the_command_from_worlds_to_table_and_again(root: Path, tmp_path: Path) -> None:
    arguments = ["--kind", "smoke", "--seeds", "0", "--worlds", str(root), "--out", str(tmp_path), "--workers", "1"]
    arguments += ["--only", "code + maths", "--only", "WP"]
    refused = CliRunner().invoke(command.main, arguments)
    assert refused.exit_code == 2
    assert "--allow-code-execution" in refused.output
    first = CliRunner().invoke(command.main, [*arguments, "--allow-code-execution"])
    assert first.exit_code == 0, first.output
    assert all((tmp_path / f"table3.{kind}").is_file() for kind in ("md", "csv", "html"))
    assert WorldConfig.smoke().hash12 in (tmp_path / "table3.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    tested = {entry["variant"] for seed in results["seeds"] for entry in seed["test"]}
    assert tested == {"average", "WP", "base", "instruction", "maths", "code"}
    assert list((tmp_path / "merged").rglob("*.safetensors")) == []
    again = CliRunner().invoke(command.main, [*arguments, "--plan"])
    assert "To do: nothing" in again.output


def test_bad_options_are_refused() -> None:
    for arguments, says in (
        (["--seeds", "a"], "--seeds a"),
        (["--seeds", "-1"], "--seeds -1"),
        (["--only", "TISE"], "--only TISE"),
    ):
        result = CliRunner().invoke(command.main, [*arguments, "--plan"])
        assert result.exit_code == 2
        assert says in result.output
