"""The world on disk: layout, cache, interruption, and tasks that lm-eval runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.miniature import __main__ as command
from experiments.miniature import world as world_module
from experiments.miniature.items import CAPABILITIES
from experiments.miniature.training import Schedule
from experiments.miniature.world import MODELS, WorldConfig, build_world
from mergekit_wp.errors import BadInput

CONFIG = WorldConfig.smoke()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    build_world(CONFIG, folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def world(root: Path) -> Path:
    return root / CONFIG.hash12


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            tensors.update({name: weights.get_tensor(name) for name in weights.keys()})  # noqa: SIM118
    return tensors


def test_the_second_call_trains_nothing(root: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "train", None)
    assert build_world(CONFIG, root, quiet=True) == world
    assert sorted(path.name for path in root.iterdir()) == [CONFIG.hash12]


def test_a_world_of_other_experts_takes_the_base_that_is_there(
    root: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, trained = replace(CONFIG, expert=Schedule(steps=5, batch_size=4, learning_rate=1e-3)), []
    train = world_module.train

    def counted(*arguments: Any) -> None:
        trained.append(arguments[2])
        train(*arguments)

    monkeypatch.setattr(world_module, "train", counted)
    other = build_world(config, root, quiet=True)
    assert trained == [config.expert] * 3
    assert _same(_tensors(other / "base"), _tensors(world / "base"))
    assert not _same(_tensors(other / "maths"), _tensors(world / "maths"))
    document = json.loads((other / "world.json").read_text())
    assert document["parameters"] == json.loads((world / "world.json").read_text())["parameters"]
    shutil.rmtree(other)

    trained.clear()
    changed = build_world(replace(CONFIG, latent=(0.5, 0.5, 0.5)), root, quiet=True)
    assert trained == [CONFIG.base, *[CONFIG.expert] * 3]
    shutil.rmtree(changed)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_world_json_says_what_was_built(world: Path) -> None:
    document = json.loads((world / "world.json").read_text())
    assert document["hash"] == CONFIG.hash12
    assert document["seed"] == CONFIG.seed
    assert document["parameters"] == sum(t.numel() for t in _tensors(world / "base").values())
    assert set(document["validation_accuracy"]) == set(MODELS)
    assert all(set(row) == set(CAPABILITIES) for row in document["validation_accuracy"].values())
    assert document["wall_seconds"]["total"] > 0
    assert "torch" in document["packages"]


def test_models_are_bf16_and_the_base_is_sharded(world: Path) -> None:
    assert len(list((world / "base").glob("model-*-of-*.safetensors"))) >= 2
    assert (world / "base" / "model.safetensors.index.json").is_file()
    for name in MODELS:
        assert {t.dtype for t in _tensors(world / name).values()} == {torch.bfloat16}
        config = json.loads((world / name / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        assert config["num_key_value_heads"] < config["num_attention_heads"]
        assert (world / name / "generation_config.json").is_file()
        assert (world / name / "tokenizer.json").is_file()


def test_one_expert_has_one_token_more_everywhere(world: Path) -> None:
    base = _tensors(world / "base")["model.embed_tokens.weight"].shape[0]
    for name in MODELS:
        rows = base + (name == "instruction")
        tensors = _tensors(world / name)
        assert tensors["model.embed_tokens.weight"].shape[0] == tensors["lm_head.weight"].shape[0] == rows
        assert json.loads((world / name / "config.json").read_text())["vocab_size"] == rows
        assert len(AutoTokenizer.from_pretrained(world / name)) == rows
    assert AutoTokenizer.from_pretrained(world / "instruction").pad_token == "[PAD]"


def test_experts_start_from_the_base_as_saved(world: Path) -> None:
    base = _tensors(world / "base")
    for name in CAPABILITIES:
        expert = _tensors(world / name)
        moved = [not torch.equal(expert[key][: len(base[key])], base[key]) for key in base]
        assert sum(moved) > len(moved) / 2
        assert all((expert[key][: len(base[key])] - base[key]).abs().max() < 0.1 for key in base)


def test_models_load_and_generate(world: Path) -> None:
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(world / name)
        tokenizer = AutoTokenizer.from_pretrained(world / name)
        ids = tokenizer("Request: What is 27 + 48?\nAnswer:\n", return_tensors="pt")["input_ids"]
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]


def test_pairs_are_rows_for_wp_score_and_no_task_has_their_prompts(world: Path) -> None:
    graded = set()
    for file in (world / "tasks" / "data").glob("*.jsonl"):
        graded |= {json.loads(line)["prompt"] for line in file.read_text().splitlines()}
    for name in CAPABILITIES:
        rows = [json.loads(line) for line in (world / "pairs" / f"{name}.jsonl").read_text().splitlines()]
        keys = {"task", "prompt", "check"} | ({"contrast"} if name == "instruction" else set())
        assert all(set(row) == keys for row in rows)
        assert not {row["prompt"] for row in rows} & graded
        tasks = {row["task"] for row in rows}
        assert len(rows) == CONFIG.scoring_prompts * len(tasks)
        assert len(tasks) == (6 if name == "instruction" else 1)


def test_lm_eval_runs_the_tasks_even_after_the_world_was_moved(world: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    moved = shutil.copytree(world, tmp_path / "moved")
    manager = TaskManager(include_defaults=False, include_path=str(moved / "tasks"))
    names = [f"mini_{name}{suffix}" for name in CAPABILITIES for suffix in ("", "_val")]
    assert set(names) <= set(manager.all_tasks)
    options = {
        "model": "hf",
        "model_args": {"pretrained": str(moved / "base"), "dtype": "float32", "device": "cpu"},
        "task_manager": manager,
        "bootstrap_iters": 0,
    }
    with pytest.raises(ValueError, match="unsafe"):
        simple_evaluate(tasks=["mini_code"], **options)
    results = simple_evaluate(tasks=names, confirm_run_unsafe_code=True, **options)
    assert set(results["results"]) == set(names)
    for name in names:
        assert 0 <= results["results"][name]["acc,none"] <= 1
        items = CONFIG.validation_items if name.endswith("_val") else CONFIG.test_items
        assert results["n-samples"][name]["effective"] == items
    assert "acc_title,none" in results["results"]["mini_instruction"]
    # The prompt reaches the model as it stands in the pairs: nothing before it, nothing after.
    sample = results["samples"]["mini_maths"][0]
    assert sample["arguments"][0][0] == sample["doc"]["prompt"]


def test_an_interrupted_build_leaves_nothing_that_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = world_module.train
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(world_module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_world(CONFIG, tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(world_module, "train", real)
    assert (build_world(CONFIG, tmp_path, quiet=True) / "world.json").is_file()


def test_a_seed_gives_the_same_world_again(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    again = build_world(CONFIG, tmp_path, quiet=True)
    assert torch.equal(torch.get_rng_state(), before)
    for name in MODELS:
        one, other = _tensors(world / name), _tensors(again / name)
        assert all(torch.allclose(one[key].float(), other[key].float(), atol=1e-3) for key in one)
    for file in ("pairs/instruction.jsonl", "tasks/data/mini_code.jsonl", "tasks/mini_code.yaml"):
        assert (world / file).read_text() == (again / file).read_text()


def test_the_command_prints_a_table_and_the_folder(root: Path, world: Path) -> None:
    result = CliRunner().invoke(command.main, ["--root", str(root), "--smoke", "--quiet"])
    assert result.exit_code == 0, result.output
    assert str(world) in result.output
    assert all(name in result.output for name in MODELS)


def test_a_world_finished_by_another_process_meanwhile_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(self) -> None:
        (self.folder / "half").write_text("")
        (tmp_path / CONFIG.hash12).mkdir()
        (tmp_path / CONFIG.hash12 / "world.json").write_text("{}")

    monkeypatch.setattr(world_module._Builder, "build", build)
    assert build_world(CONFIG, tmp_path, quiet=True) == tmp_path / CONFIG.hash12
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG.hash12]


def test_what_a_killed_build_left_is_removed_and_a_running_one_is_not(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    parent = os.getppid()
    for pid in (dead.pid, parent):
        (tmp_path / f".{CONFIG.hash12}.partial-{pid}" / "base").mkdir(parents=True)
    build_world(CONFIG, tmp_path, quiet=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {CONFIG.hash12, f".{CONFIG.hash12}.partial-{parent}"}


def test_a_folder_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG.hash12 / "mine").mkdir(parents=True)
    with pytest.raises(BadInput, match="no world"):
        build_world(CONFIG, tmp_path, quiet=True)


def test_a_root_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write"):
        build_world(CONFIG, tmp_path / "file", quiet=True)
