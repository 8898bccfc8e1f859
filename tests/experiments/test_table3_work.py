"""What the table's workers do, on a world that knows nothing: the stock command's merge, lm-eval's grades."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from warm import script, warm

from experiments.miniature import grading, sandbox
from experiments.miniature.training import WorldConfig
from experiments.miniature.world import build_world
from experiments.table3 import __main__ as command
from experiments.table3 import work
from experiments.table3.frozen import TrainedWorld
from experiments.table3.grade import TestGrade, ValidationGrade, _right_programs_remembered, grade, grade_settings
from experiments.table3.keys import recipe, score_key
from experiments.table3.variants import Point
from experiments.table3.work import (
    Grading,
    LossJob,
    MergeJob,
    grade_model,
    measure_loss,
    measure_of,
    merge,
    read_grade,
    read_loss,
    write_answers,
    write_fit_file,
    write_score,
)
from mergekit_wp.errors import BadInput
from mergekit_wp.fit.job import FitJob
from mergekit_wp.fit_file import read_fit
from mergekit_wp.scores import read_scores
from mergekit_wp.scoring.config import ScoringJob

BOTH = ("instruction", "maths")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    build_world(WorldConfig.smoke(), folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def world(root: Path) -> TrainedWorld:
    return TrainedWorld(0, root / WorldConfig.smoke().hash12)


def merge_of(
    point: Point, world: TrainedWorld, out: Path, scores: dict[str, Path] | None = None, fit: Path | None = None
) -> MergeJob:
    return MergeJob(recipe(point, BOTH, world, scores or {}, fit), out / "recipe.yaml", out / "merged", 3, False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_merge_in_the_process_is_the_executables(world: TrainedWorld, tmp_path: Path) -> None:
    """Tensor by tensor, where random numbers are drawn and another merge went before."""
    point = Point("dare_ties", {"rescale": True}, {"weight": 1.0, "density": 0.5})
    merge(merge_of(Point("ties", {}, {"weight": 1.0, "density": 0.5}), world, tmp_path / "before"))
    task = merge_of(point, world, tmp_path)
    mine = weights(merge(task))
    out = tmp_path / "stock"
    done = warm().run(script("mergekit-yaml"), task.recipe_file, out, "--quiet", "--random-seed", "3")
    assert done.returncode == 0, done.stderr
    theirs = weights(out)
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(not torch.equal(mine[name], weights(world.folder / "base")[name]) for name in mine)


@pytest.mark.parametrize("first", BOTH)
def test_a_merge_without_a_base_loads_whichever_config_mergekit_takes(
    world: TrainedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """One expert has a row for padding, which its config names and the merge does not have."""
    plain = MergeConfiguration.referenced_models

    def chosen(self: MergeConfiguration) -> list[Any]:
        return sorted(plain(self), key=lambda model: not str(model).endswith(first))

    monkeypatch.setattr(MergeConfiguration, "referenced_models", chosen)
    folder = merge(merge_of(Point("karcher"), world, tmp_path))
    config, base = (AutoConfig.from_pretrained(place) for place in (folder, world.folder / "base"))
    assert config.pad_token_id == base.pad_token_id
    AutoModelForCausalLM.from_pretrained(folder)


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


def test_scores_at_the_average_of_a_combination(world: TrainedWorld, tmp_path: Path) -> None:
    settings = {"method": "attr", "at": "instruction + maths"}
    file = write_score(world.folder, "maths", settings, tmp_path / "s" / "maths.safetensors", False)
    at = read_scores(file).meta.at
    assert at is not None
    assert [Path(expert.name).name for expert in at.experts] == list(BOTH)
    other = TrainedWorld(0, world.folder)
    vars(other)["digests"] = {**world.digests, "instruction": "another"}
    assert score_key(settings, "maths", world) != score_key(settings, "maths", other)
    plain = {"method": "attr"}
    assert score_key(plain, "maths", world) == score_key(plain, "maths", other)


def test_the_loss_of_a_written_merge_is_the_fits_own(world: TrainedWorld, tmp_path: Path) -> None:
    """On the same prompts, within what a merge loses when it is written in bfloat16; the base has 1 by definition."""
    settings = {"family": "scale", "hold_out": 0.0}
    answers = {
        name: write_answers(world.folder, name, FitJob.answer_tokens, tmp_path / f"{name}.jsonl") for name in BOTH
    }
    file = write_fit_file(world.folder, BOTH, settings, answers, {}, tmp_path / "fits" / "both.safetensors")
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no answers of its own
    model = merge_of(Point("wp", fit=settings), world, tmp_path, fit=file)
    task = LossJob(tmp_path / "loss.json", model, world.folder, BOTH, tuple(answers.values()))
    found = measure_loss(task)
    expected = [share.end for share in read_fit(file).meta.unrecovered]
    assert list(found.values()) == pytest.approx(expected, rel=0.02)
    assert max(expected) < 0.95
    assert read_loss(task.result, BOTH) == found
    assert read_loss(task.result, ("code",)) is None
    assert not task.model.folder.exists()
    measure = measure_of(world.folder, BOTH, tuple(answers.values()))
    assert measure.unrecovered(world.folder / "base") == pytest.approx(dict.fromkeys(BOTH, 1.0))
    assert measure.unrecovered(world.folder / "maths")["maths"] == pytest.approx(0, abs=1e-6)


def test_a_mean_of_hyperspheres_has_no_base_among_what_it_averages(world: TrainedWorld, tmp_path: Path) -> None:
    """mergekit takes a `base_model` for one model more."""
    found, base = weights(merge(merge_of(Point("karcher"), world, tmp_path))), weights(world.folder / "base")
    average = weights(merge(merge_of(Point("linear", expert={"weight": 1.0}, base={"weight": 0.0}), world, tmp_path)))
    name = "model.layers.0.mlp.up_proj.weight"
    moved, expected = found[name].float() - base[name].float(), average[name].float() - base[name].float()
    assert found["model.embed_tokens.weight"].shape == base["model.embed_tokens.weight"].shape
    assert float(moved.norm()) == pytest.approx(float(expected.norm()), rel=0.05)


def test_grades_are_the_graders_own(world: TrainedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grader that finds every second answer right must come out as one half."""
    turn = iter(range(10**6))
    monkeypatch.setattr(grading, "grade", lambda *_: next(turn) % 2 == 0)
    found = grade(world.folder / "maths", world.folder, "test", ("maths",), tmp_path, False)
    assert isinstance(found, TestGrade)
    assert found.right == {"maths": 0.5}
    assert found.items == {"maths": WorldConfig.smoke().test_items}


def test_models_run_where_the_worker_was_told(
    world: TrainedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_device", "cuda:99")
    assert work.fit_job(world.folder, BOTH, {}).device == "cuda:99"
    with pytest.raises(BadInput, match="cuda:99"):
        write_score(world.folder, "maths", {}, tmp_path / "s.safetensors", False)
    with pytest.raises(BadInput, match="cuda:99"):
        grade(world.folder / "maths", world.folder, "test", ("maths",), tmp_path, False, "cuda:99")


def test_scores_and_fits_are_of_float32_on_any_device(
    world: TrainedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_wp.scoring import score as engine

    def stopped(job: ScoringJob) -> None:
        raise BadInput(f"asked for {job.dtype}")

    monkeypatch.setattr(engine, "score", stopped)
    with pytest.raises(BadInput, match="asked for float32"):
        write_score(world.folder, "maths", {}, tmp_path / "s.safetensors", False)
    assert work.fit_job(world.folder, BOTH, {}).dtype == "float32"


def test_models_are_graded_in_the_dtype_that_was_asked_for(
    world: TrainedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_wp.eval import rows

    seen: list[str] = []
    evaluate = rows.evaluate_model

    def watched(model: Any, tasks: Any, settings: rows.Settings, *rest: Any) -> Any:
        seen.append(settings.dtype)
        return evaluate(model, tasks, settings, *rest)

    monkeypatch.setattr(rows, "evaluate_model", watched)
    task = Grading(
        tmp_path / "g.json", world.folder / "maths", world.folder, "test", ("maths",), tmp_path, False, {}, "bfloat16"
    )
    grade_model(task)
    grade_model(replace(task, dtype=None))
    assert seen == ["bfloat16", "float32"]
    assert (
        grade_settings(world.folder, "bfloat16")
        != grade_settings(world.folder)
        == grade_settings(world.folder, "float32")
    )


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
    arguments += ["--only", "code + maths", "--only", "WP", "--only", "fit, scale"]
    refused = CliRunner().invoke(command.main, arguments)
    assert refused.exit_code == 2
    assert "--allow-code-execution" in refused.output
    first = CliRunner().invoke(command.main, [*arguments, "--allow-code-execution"])
    assert first.exit_code == 0, first.output
    assert all((tmp_path / f"table3.{kind}").is_file() for kind in ("md", "csv", "html"))
    assert WorldConfig.smoke().hash12 in (tmp_path / "table3.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    tested = {entry["variant"] for seed in results["seeds"] for entry in seed["test"]}
    assert tested == {"average", "WP", "fit, scale", "base", "instruction", "maths", "code"}
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
