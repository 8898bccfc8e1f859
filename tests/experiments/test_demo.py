"""The demo's steps; the demo itself is run by `make demo` and CI, its report is tested in pipeline/test_report.py."""

from __future__ import annotations

from pathlib import Path

import yaml

from experiments.demo.demo_pipeline import demo_steps, write_pipeline
from experiments.demo.world_choice import WorldChoice
from mergekit_wp.hashing import digest


def test_the_plan_makes_every_input_before_it_is_read(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path)
    made: set[Path] = set()
    for step in demo_steps(pipeline, WorldChoice(tmp_path / "worlds")):
        for path in step.inputs:
            there = path.exists() or made & {path, *path.parents} or tmp_path / "world" in path.parents
            assert there, f"{step.name} reads {path}"
        made |= set(step.outputs)
    assert tmp_path / "report.html" in made


def test_the_pipeline_file_is_written_the_same_again(tmp_path: Path) -> None:
    first = write_pipeline(tmp_path)
    before = digest(tmp_path)
    assert write_pipeline(tmp_path) == first
    assert digest(tmp_path) == before
    wp = yaml.safe_load((tmp_path / "recipes" / "wp.yaml").read_text())
    assert [list(model["parameters"]) for model in wp["models"]] == [["scores"]] * 3
