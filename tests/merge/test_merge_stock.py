"""mergekit's own commands as a user runs them: other processes, another folder, nothing imported by hand.

Needs the package installed (pip install -e . is enough), so that its `.pth` is read. One is mergekit's executable in
an interpreter of its own; the others run what their executables do, in forks that have imported mergekit's libraries.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from merge_checks import assert_merged
from merge_world import World, reference, tensors_of
from safetensors.torch import save_file
from warm import script, warm


@dataclass
class Done:
    code: int
    out: Path
    stderr: str


def relative_config(world):
    """Score files by relative paths. Not the models: for those, mergekit's model card would ask the Hub."""
    config = world.config()
    for k, model in enumerate(config["models"]):
        model["parameters"] = {"scores": world.score(k).name}
    return config


def fitted(config):
    """The same recipe by the world's fit."""
    models = [{"model": model["model"]} for model in config["models"]]
    return {**config, "models": models, "parameters": {"fit": "fit.safetensors"}}


def flat(world):
    """The same models as single files, which is what mergekit-pytorch takes."""
    for name in ("base", "e0", "e1"):
        folder = world.root / "flat" / name
        folder.mkdir(parents=True)
        shutil.copy(world.root / name / "config.json", folder)
        save_file(tensors_of(world.root / name), folder / "model.safetensors")
    models = [
        {"model": f"flat/e{k}/model.safetensors", "parameters": {"scores": f"e{k}.scores.safetensors"}}
        for k in range(2)
    ]
    return {"merge_method": "wp", "base_model": "flat/base/model.safetensors", "models": models}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("stock"), "qwen2", dtypes=[torch.bfloat16] * 3, extra_rows=[1, 0]).build()
    world.write_fit([1, 0])
    return world


@pytest.fixture(scope="module")
def done(world):
    """Every command but one, from the world's folder with relative paths."""
    same_rows = [str(world.base), str(world.expert(1))]
    linear = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in same_rows]}
    missing = relative_config(world)
    missing["models"][1]["parameters"] = {}
    nested = [
        {"name": "first", **relative_config(world)},
        {
            "merge_method": "linear",
            "models": [{"model": m, "parameters": {"weight": 1}} for m in ("first", str(world.base))],
        },
    ]
    files = flat(world)
    commands = {
        "fit": (["mergekit-yaml"], fitted(relative_config(world)), {}),
        "fit-pytorch": (["mergekit-pytorch"], fitted(files), {}),
        "missing": (["mergekit-yaml"], missing, {}),
        "twice": (["mergekit-yaml"], yaml.safe_dump(relative_config(world)) + "parameters: {}\n" * 2, {}),
        "disabled": (["mergekit-yaml"], relative_config(world), {"MERGEKIT_WP_DISABLE": "1"}),
        "broken": (["mergekit-yaml"], linear, {}),
        "pytorch": (["mergekit-pytorch"], files, {}),
        "multi-unknown": (
            ["mergekit-multi", "-I", str(world.root / "steps2"), "--out-path"],
            [{**nested[0], "parameters": {"scal": 2.0}}, nested[1]],
            {},
        ),
        "multi": (["mergekit-multi", "-I", str(world.root / "steps"), "--out-path"], nested, {}),
    }
    results = {}
    for name, (command, config, environment) in commands.items():
        recipe = world.root / f"{name}.yaml"
        text = yaml.safe_dump_all(config) if isinstance(config, list) else yaml.safe_dump(config)
        recipe.write_text(config if isinstance(config, str) else text)
        paths = [*command[1:], f"out-{name}", recipe.name] if len(command) > 1 else [recipe.name, f"out-{name}"]
        before = "import sys; sys.modules['mergekit_wp.merge.methods.wp'] = None; " if name == "broken" else ""
        run = warm().run(before + script(command[0]), *paths, cwd=world.root, **environment)
        results[name] = Done(run.returncode, world.root / f"out-{name}", run.stderr)
    return results


def test_mergekit_yaml(world):
    recipe = world.recipe(relative_config(world), "yaml.yaml")
    program = Path(sys.executable).with_name("mergekit-yaml")
    done = subprocess.run([program, recipe.name, "out-yaml"], cwd=world.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_merged(tensors_of(world.root / "out-yaml"), reference(world), torch.bfloat16)


def test_mergekit_pytorch(world, done):
    assert done["pytorch"].code == 0, done["pytorch"].stderr
    assert_merged(tensors_of(done["pytorch"].out), reference(world), torch.bfloat16)


@pytest.mark.parametrize("name", ["fit", "fit-pytorch"])
def test_a_fit(world, done, name):
    assert done[name].code == 0, done[name].stderr
    assert_merged(tensors_of(done[name].out), reference(world, order=[1, 0]), torch.bfloat16)


def test_mergekit_multi(world, done):
    assert done["multi"].code == 0, done["multi"].stderr
    assert_merged(tensors_of(world.root / "steps" / "first"), reference(world), torch.bfloat16)
    assert tensors_of(done["multi"].out)


def test_a_refusal_is_one_sentence_with_exit_code_2(world, done):
    refused = done["missing"]
    assert refused.code == 2
    assert "Traceback" not in refused.stderr
    assert refused.stderr.rstrip().splitlines()[-1].startswith(f"Error: {world.expert(1)}: no scores are given")
    assert not refused.out.exists()


def test_a_parameter_that_nobody_knows_in_a_file_of_several_recipes(world, done):
    refused = done["multi-unknown"]
    assert refused.code == 2
    assert "multi-unknown.yaml, document 1: unknown parameter scal; merge_method wp knows" in refused.stderr
    assert not (world.root / "steps2" / "first").exists()


def test_two_equal_keys_of_which_mergekit_would_take_the_last(done):
    refused = done["twice"]
    assert refused.code == 2
    assert "twice.yaml: this recipe is not valid YAML: line" in refused.stderr
    assert "the key `parameters` stands twice" in refused.stderr
    assert not refused.out.exists()


def test_disabled(done):
    assert done["disabled"].code != 0
    assert "Unimplemented merge method wp" in done["disabled"].stderr


def test_broken_module_leaves_linear_working(done):
    assert done["broken"].code == 0, done["broken"].stderr
    assert tensors_of(done["broken"].out)
    assert "`merge_method: wp` is not available" in done["broken"].stderr
