"""`merge_method: widen` through mergekit and wp-merge: the checks and seams that wp has, with no scores."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple

import pytest
import tiny
import torch
import transformers
from click.testing import CliRunner
from merge_checks import (
    MIXED_DTYPES,
    assert_merged,
    change,
    edit_config,
    files_under,
    make_lora,
    merged_by_stock,
    refused,
    rewrite,
    run,
    written_config,
)
from merge_world import World, merge, tensors_of
from plain_widen import plain
from safetensors.torch import save_file

from mergekit_wp.merge.audit import AuditFailed, audit
from mergekit_wp.merge.cli import main
from mergekit_wp.merge.recipe import read_recipe


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"), "llama", experts=3, extra_rows=[0, 1, 0]).build()


@pytest.fixture
def world(built, tmp_path):
    shutil.copytree(built.root, tmp_path / "w")
    return World(tmp_path / "w", "llama", experts=3)


def reference(world, **parameters):
    """Every tensor of the base by the paper's formulas; experts' added rows left out."""
    base = tensors_of(world.base)
    experts = [tensors_of(world.expert(k)) for k in range(world.experts)]
    return {
        name: plain(
            tensor,
            [expert[name][: tensor.shape[0]] for expert in experts],
            by_row=name == "model.embed_tokens.weight",
            **parameters,
        )
        for name, tensor in base.items()
    }


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_every_architecture_with_added_token_rows(kind, tmp_path):
    world = World(tmp_path, kind, experts=3, extra_rows=[0, 1, 3]).build()
    out = merge(world, world.widen())
    assert_merged(tensors_of(out), reference(world))
    assert written_config(out)["vocab_size"] == tiny.SHAPE["vocab_size"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (world.base / name).read_bytes()
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_parameters_reach_the_arithmetic(world):
    out = merge(world, world.widen(parameters={"t": 0.5, "s": 0.75}))
    assert_merged(tensors_of(out), reference(world, t=0.5, s=0.75))


@pytest.mark.parametrize(("inputs", "more", "expected"), MIXED_DTYPES)
def test_dtypes_of_config_and_tensors_agree(inputs, more, expected, tmp_path):
    world = World(tmp_path, "llama", dtypes=list(inputs)).build()
    out = merge(world, world.widen(**more))
    assert_merged(tensors_of(out), reference(world), expected)
    assert written_config(out)["dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize("route", [{"tokenizer": {"source": "base"}}, {"unsafe": True}])
def test_mergekits_own_ways_with_vocabularies(route, world):
    route = dict(route)
    unsafe = bool(route.pop("unsafe", False))
    out = merge(world, world.widen(**route), unsafe_truncate_embeddings=unsafe)
    assert_merged(tensors_of(out), reference(world))


def test_moved_layers(world):
    """Under slices an output tensor has another name than its inputs; embeddings stay embeddings."""
    ranges = [(2, 4), (0, 2)]
    models = [world.expert(k) for k in range(3)] + [world.base]
    listed = [{"sources": [{"model": str(m), "layer_range": list(span)} for m in models]} for span in ranges]
    out = merge(world, {"merge_method": "widen", "base_model": str(world.base), "slices": listed})
    want = reference(world)
    moved = {0: 2, 1: 3, 2: 0, 3: 1}
    for name, tensor in tensors_of(out).items():
        parts = name.split(".")
        if ".layers." in name:
            parts[2] = str(moved[int(parts[2])])
        torch.testing.assert_close(tensor.double(), want[".".join(parts)], rtol=1e-5, atol=1e-6)


def test_the_stock_command_finds_it(world):
    assert_merged(merged_by_stock(world, world.widen()), reference(world))


def test_without_base_or_experts(world):
    config = world.widen()
    del config["base_model"]
    assert "merge_method widen needs base_model" in refused(world, config)
    alone = {"merge_method": "widen", "base_model": str(world.base), "models": [{"model": str(world.base)}]}
    assert "merge_method widen found no expert" in refused(world, alone)


@pytest.mark.parametrize(("name", "value"), [("t", -1), ("t", "x"), ("s", float("nan")), ("s", True)])
def test_parameters_that_are_no_numbers(name, value, world):
    assert refused(world, world.widen(parameters={name: value})).startswith(
        f"{name}: found {value!r}, expected a number"
    )


def test_a_parameter_of_another_method(world):
    recipe = world.recipe(world.widen(parameters={"density": 0.5}))
    assert "unknown parameter density; merge_method widen knows t, s" in run(recipe, world.root / "out", code=2)


def test_experts_that_cannot_be_merged(world, tmp_path):
    other = World(tmp_path / "other", "llama", experts=1).build(intermediate_size=12)
    config = world.widen()
    config["models"][1]["model"] = str(other.expert(0))
    assert "not of the shape of the base" in refused(world, config)
    rewrite(world.expert(2), lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"})
    assert "the tensor model.norm.weight is missing" in refused(world, world.widen())


def test_biases_that_mergekit_would_drop(tmp_path):
    world = World(tmp_path, "llama-biased").build()
    assert "silently leave out 28 tensors" in refused(world, world.widen())


def test_no_room_on_the_disk(world, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1000))
    assert "are free there" in refused(world, world.widen())


@pytest.mark.parametrize("bad", ["base", "e1"])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_weights(bad, name, world):
    def spoil(tensors):
        tensors[name].view(-1)[3] = float("nan")
        return tensors

    rewrite(world.root / bad, spoil)
    with pytest.raises(Exception, match=rf"{bad}: {name.replace('.', '[.]')} holds a NaN"):
        merge(world, world.widen())
    assert not list((world.root / "out").glob("*.safetensors"))


def test_expert_of_another_lineage_is_warned_about(world, caplog):
    edit_config(world.expert(1), rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    with caplog.at_level(logging.WARNING):
        merge(world, world.widen())
    assert "rope_theta 1000000.0" in caplog.text


def test_dry_run_writes_nothing_and_says_what_would_be(world):
    recipe = world.recipe(world.widen())
    before = files_under(world.root)
    text = run(recipe, world.root / "out", "--dry-run")
    assert files_under(world.root) == before
    assert "merge_method widen: 39 tensors of 4 models" in text
    assert "all checks passed" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"dtype": "bfloat16"}, {"parameters": {"t": 1.4, "s": 2.0}}])
def test_wp_merge_audits(dtype, more, tmp_path):
    world = World(tmp_path, "qwen2", experts=3, dtypes=[dtype] * 4, extra_rows=[0, 1, 0]).build()
    text = run(world.recipe(world.widen(**more)), world.root / "out")
    assert "of 14 kinds of tensors recomputed" in text
    assert "it generates a token" in text


def test_wp_merge_with_a_lora(world):
    make_lora(world.base, world.root / "lora", seed=3)
    config = world.widen()
    config["models"][1]["model"] = f"{world.base}+{world.root / 'lora'}"
    assert "recomputed" in run(world.recipe(config), world.root / "out")


def plan_of(world):
    from mergekit.options import MergeOptions

    recipe = read_recipe(str(world.recipe(world.widen())))
    recipe.prepare(MergeOptions(), merge_loras=False)
    return recipe.plan(world.root / "out", MergeOptions())


@pytest.mark.parametrize(
    "name", ["model.layers.{}.self_attn.v_proj.weight", "model.layers.{}.mlp.down_proj.weight", "model.norm.weight"]
)
def test_audit_catches_a_wrong_tensor(world, name):
    """In every layer, since the audit takes a sample of them."""
    out = world.root / "out"
    run(world.recipe(world.widen()), out, "--no-audit")
    audit(out, plan_of(world), say=lambda _: None, load=False)
    for layer in range(4):
        change(out, name.format(layer), ..., tensors_of(out)[name.format(layer)] * 1.01)
    with pytest.raises(AuditFailed, match="is not what its inputs and widen give"):
        audit(out, plan_of(world), say=lambda _: None, load=False)


def test_audit_tells_widen_from_the_mean(world):
    out = world.root / "out"
    run(world.recipe(world.widen()), out, "--no-audit")
    base = tensors_of(world.base)
    experts = [tensors_of(world.expert(k)) for k in range(3)]
    mean = {k: sum(e[k][: v.shape[0]] for e in experts) / 3 for k, v in base.items()}
    for file in out.glob("*.safetensors*"):
        file.unlink()
    save_file(mean, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AuditFailed):
        audit(out, plan_of(world), say=lambda _: None, load=False)


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_stock_methods_are_checked_too(world, method):
    """Rows that differ end a merge by mergekit's own methods at the first tensor: here, before."""
    models = [{"model": str(world.expert(k)), "parameters": {"weight": 1.0}} for k in (0, 1)]
    config = {"merge_method": method, "base_model": str(world.base), "models": models}
    if method == "linear":
        models.append({"model": str(world.base), "parameters": {"weight": 0.0}})
    text = run(world.recipe(config), world.root / "out", "--dry-run", code=2)
    assert f"98 rows, another model 97; merge_method {method} needs" in text
    assert "all checks passed" in run(world.recipe({**config, "tokenizer": {"source": "base"}}), "--dry-run")
    result = CliRunner().invoke(main, [str(world.recipe(config)), "--dry-run", "--unsafe-truncate-embeddings"])
    assert "all checks passed" in result.output


def test_stock_methods_missing_tensor_and_full_disk(world, monkeypatch):
    models = [{"model": str(world.expert(k)), "parameters": {"weight": 1.0}} for k in (0, 2)]
    recipe = world.recipe({"merge_method": "task_arithmetic", "base_model": str(world.base), "models": models})
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1000))
        assert "are free there" in run(recipe, world.root / "out", code=2)
    rewrite(world.expert(2), lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"})
    assert "the tensor model.norm.weight is missing" in run(recipe, "--dry-run", code=2)
