"""The shipped recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from mergekit.config import MergeConfiguration

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("13b-*.yaml"))


def test_the_four_combinations_of_the_paper():
    assert [r.stem for r in RECIPES] == ["13b-all", "13b-code-instruction", "13b-code-maths", "13b-instruction-maths"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_parses_and_its_scores_have_jobs(path):
    text = path.read_text()
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    assert config.merge_method == "wp"
    assert str(config.base_model) == "meta-llama/Llama-2-13b-hf"
    jobs = {job.stem for job in (ROOT / "scoring").glob("*.yaml")}
    for model in config.models:
        scores = Path(model.parameters["scores"])
        assert scores.parts[0] == "scores"
        assert scores.stem in jobs
        assert f"wp-score scoring/{scores.stem}.yaml --out {scores}" in text
    assert f"recipes/{path.name}" in text
