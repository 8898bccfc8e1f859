"""mergekit's own commands as a user runs them: other processes, another folder, nothing imported by hand.

Needs the package installed (pip install -e . is enough), so that its `.pth` is read. All commands start at
once and each test looks at one of them.
"""

from __future__ import annotations

import os
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
    """Every command, run side by side from the world's folder with relative paths."""
    same_rows = [str(world.base), str(world.expert(1))]
    linear = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in same_rows]}
    missing = relative_config(world)
    missing["models"][1]["parameters"] = {}
    broken = world.root / "site"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text("import sys; sys.modules['mergekit_wp.merge.methods.wp'] = None\n")
    nested = [
        {"name": "first", **relative_config(world)},
        {
            "merge_method": "linear",
            "models": [{"model": m, "parameters": {"weight": 1}} for m in ("first", str(world.base))],
        },
    ]
    files = flat(world)
    commands = {
        "yaml": (["mergekit-yaml"], relative_config(world), {}),
        "fit": (["mergekit-yaml"], fitted(relative_config(world)), {}),
        "fit-pytorch": (["mergekit-pytorch"], fitted(files), {}),
        "missing": (["mergekit-yaml"], missing, {}),
        "twice": (["mergekit-yaml"], yaml.safe_dump(relative_config(world)) + "parameters: {}\n" * 2, {}),
        "disabled": (["mergekit-yaml"], relative_config(world), {"MERGEKIT_WP_DISABLE": "1"}),
        "broken": (["mergekit-yaml"], linear, {"PYTHONPATH": str(broken)}),
        "pytorch": (["mergekit-pytorch"], files, {}),
        "multi": (["mergekit-multi", "-I", str(world.root / "steps"), "--out-path"], nested, {}),
    }
    running = {}
    for name, (command, config, environment) in commands.items():
        recipe = world.root / f"{name}.yaml"
        text = yaml.safe_dump_all(config) if isinstance(config, list) else yaml.safe_dump(config)
        recipe.write_text(config if isinstance(config, str) else text)
        program = str(Path(sys.executable).with_name(command[0]))
        paths = [*command[1:], f"out-{name}", recipe.name] if len(command) > 1 else [recipe.name, f"out-{name}"]
        running[name] = subprocess.Popen(
            [program, *paths],
            cwd=world.root,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    results = {}
    for name, process in running.items():
        stderr = process.communicate(timeout=300)[1]
        results[name] = Done(process.returncode, world.root / f"out-{name}", stderr)
    return results


def test_mergekit_yaml(world, done):
    assert done["yaml"].code == 0, done["yaml"].stderr
    assert_merged(tensors_of(done["yaml"].out), reference(world), torch.bfloat16)


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
