"""`merge_method: aim` through mergekit and wp-merge, against its formula on whole tensors."""

from __future__ import annotations

import pytest
import tiny
import torch
from aim_inputs import EMBEDDING, recipe, write_random_activations
from merge_checks import assert_merged, change, merged_by_stock, refused, rewrite, run, same_files
from merge_world import World, merge, tensors_of
from mergekit.io.tasks import LoaderCache

from mergekit_wp.merge.activations import Activations, read_activations, write_activations
from mergekit_wp.merge.audit import AuditFailed, audit
from mergekit_wp.merge.recipe import read_recipe


def reference(world, omega=0.4):
    """W0 + (W - W0)(1 - (1 - omega) a_c), a_c over its maximum, on whole tensors in float64."""
    means = read_activations(world.root / "activations.safetensors").means
    tuned, out = tensors_of(world.expert(0)), {}
    for name, base in tensors_of(world.base).items():
        kept = torch.ones((), dtype=torch.float64)
        if name in means and means[name].any():
            kept = 1 - (1 - omega) * means[name].double() / means[name].double().max()
        out[name] = base.double() + (tuned[name][: base.shape[0]].double() - base.double()) * kept
    return out


def build(root, kind="llama", **more):
    world = World(root, kind, experts=1, **more).build()
    write_random_activations(world)
    return world


@pytest.fixture
def world(tmp_path):
    return build(tmp_path / "w")


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_every_architecture_with_added_token_rows(kind, tmp_path):
    world = build(tmp_path, kind, extra_rows=[2])
    out = merge(world, recipe(world))
    assert_merged(tensors_of(out), reference(world))
    assert_merged(tensors_of(merge(world, recipe(world, 0.75), "other")), reference(world, 0.75))


def test_half_precision_is_rounded_once(tmp_path):
    world = build(tmp_path, dtypes=[torch.float16, torch.bfloat16])
    assert_merged(tensors_of(merge(world, recipe(world))), reference(world), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_omega_1_changes_nothing(dtype, tmp_path):
    world = build(tmp_path, dtypes=[dtype, dtype])
    assert same_files(merge(world, recipe(world, 1)), world.expert(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_omega_0_gives_the_bases_column_where_the_input_is_largest(dtype, tmp_path):
    """And the merge's own where there is none, to the bit, though the two are of very different sizes."""
    world = build(tmp_path, dtypes=[dtype, dtype])
    rewrite(world.expert(0), lambda tensors: {name: tensor * 1e-3 for name, tensor in tensors.items()})
    means = read_activations(world.root / "activations.safetensors").means
    base, tuned, out = tensors_of(world.base), tensors_of(world.expert(0)), tensors_of(merge(world, recipe(world, 0)))
    for name, mean_C in means.items():
        if mean_C.any():
            top = int(mean_C.argmax())
            assert torch.equal(out[name][..., top], base[name][..., top])
            assert torch.equal(out[name][..., 0], tuned[name][..., 0])
            assert not torch.equal(out[name], base[name])
        else:
            assert torch.equal(out[name], tuned[name])
    assert torch.equal(out[EMBEDDING], tuned[EMBEDDING])


def test_moved_layers_take_the_activations_of_their_source(world):
    ranges = [(2, 4), (0, 2)]
    listed = [
        {"sources": [{"model": str(m), "layer_range": list(span)} for m in (world.expert(0), world.base)]}
        for span in ranges
    ]
    config = recipe(world, slices=listed)
    del config["models"]
    want, moved = reference(world), {0: 2, 1: 3, 2: 0, 3: 1}
    for name, tensor in tensors_of(merge(world, config)).items():
        parts = name.split(".")
        if ".layers." in name:
            parts[2] = str(moved[int(parts[2])])
        torch.testing.assert_close(tensor.double(), want[".".join(parts)], rtol=1e-5, atol=1e-6)


def test_the_stock_command_finds_it(world):
    assert_merged(merged_by_stock(world, recipe(world)), reference(world))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_no_file_or_a_bad_one(world):
    config = recipe(world)
    config["parameters"] = {}
    assert "no activations are given" in refused(world, config)
    for value, text in ((5, "expected the path of a file"), ("none.safetensors", "cannot read this activations file")):
        config["parameters"] = {"activations": value}
        assert text in refused(world, config)
    config["parameters"] = {"activations": str(world.score(0))}
    assert "without the `wp_aim` metadata" in refused(world, config)


@pytest.mark.parametrize("value", [-0.1, 1.5, "x", True, float("nan")])
def test_an_omega_that_is_none(value, world):
    assert f"omega: found {value!r}, expected a number from 0 to 1" in refused(world, recipe(world, value))


def test_activations_of_another_base(world):
    rewrite(world.base, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    assert "these activations are of the base" in refused(world, recipe(world))


def test_activations_of_another_shape(world):
    path = world.root / "activations.safetensors"
    good = read_activations(path)
    for name, mean_C in (("model.norm.weight", torch.ones(5)), ("model.layers.9.mlp.up_proj.weight", torch.ones(24))):
        write_activations(Activations(good.meta, {**good.means, name: mean_C}), path)
        assert f"{name} is not of the base's shape" in refused(world, recipe(world))


def test_two_models(world):
    config = recipe(world)
    other = World(world.root / "more", "llama", experts=1).build()
    config["models"].append({"model": str(other.expert(0))})
    assert "merge_method aim: " in refused(world, config)
    config["models"] = [{"model": str(world.base)}]
    assert "merge_method aim found no expert" in refused(world, config)


def test_a_nan(world):
    def spoil(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = float("nan")
        return tensors

    rewrite(world.expert(0), spoil)
    with pytest.raises(Exception, match=r"e0: model\.layers\.2\.mlp\.up_proj\.weight holds a NaN"):
        merge(world, recipe(world))


# --- wp-merge --------------------------------------------------------------------------------------------------------


def plan_of(world, config):
    from mergekit.options import MergeOptions

    LoaderCache.loaders.clear()
    read = read_recipe(str(world.recipe(config)))
    read.prepare(MergeOptions(), merge_loras=False)
    return read.plan(world.root / "out", MergeOptions())


@pytest.mark.parametrize("more", [{}, {"dtype": "bfloat16"}, {"out_dtype": "float16"}])
def test_wp_merge_audits(more, tmp_path):
    world = build(tmp_path, "qwen2", extra_rows=[1])
    text = run(world.recipe(recipe(world, **more)), world.root / "out")
    assert "56 slices of 14 kinds of tensors recomputed" in text
    assert "it generates a token" in text


def test_the_file_is_found_beside_the_recipe(world, monkeypatch, tmp_path):
    config = recipe(world)
    config["parameters"]["activations"] = "activations.safetensors"
    monkeypatch.chdir(tmp_path)
    run(world.recipe(config), "here", "--no-audit")
    assert_merged(tensors_of(tmp_path / "here"), reference(world))
    assert "all checks passed" in run(world.recipe(config), "--dry-run")
    assert "unknown parameter scale; merge_method aim knows activations, omega" in run(
        world.recipe(recipe(world) | {"parameters": {"scale": 2}}), world.root / "out", code=2
    )


@pytest.mark.parametrize("name", ["model.layers.{}.self_attn.o_proj.weight", "model.norm.weight"])
def test_the_audit_catches_a_wrong_tensor(world, name):
    out = world.root / "out"
    run(world.recipe(recipe(world)), out, "--no-audit")
    plan = plan_of(world, recipe(world))
    audit(out, plan, say=lambda _: None, load=False)
    for layer in range(4):
        change(out, name.format(layer), ..., tensors_of(out)[name.format(layer)] * 1.001)
    with pytest.raises(AuditFailed, match="is not what its inputs and aim give"):
        audit(out, plan, say=lambda _: None, load=False)


def test_the_audit_tells_one_omega_from_another(world):
    out = world.root / "out"
    run(world.recipe(recipe(world, 0.5)), out, "--no-audit")
    audit(out, plan_of(world, recipe(world, 0.5)), say=lambda _: None, load=False)
    with pytest.raises(AuditFailed):
        audit(out, plan_of(world, recipe(world, 0.4)), say=lambda _: None, load=False)
