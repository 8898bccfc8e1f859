"""`merge_method: wp` through mergekit, in this process, against METHOD.md 4 written naively in merge_world."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from merge_checks import MIXED_DTYPES, assert_merged, make_lora, slices, written_config
from merge_world import World, merge, reference, tensors_of, write_random_scores

from mergekit_wp.checkpoint.folder import Checkpoint


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_every_architecture_with_added_token_rows(kind, tmp_path):
    """All kinds of tensors: GQA, biases, q/k norms, post-norms, tied embeddings; and the model loads."""
    world = World(tmp_path, kind, experts=3, extra_rows=[0, 1, 3]).build()
    out = merge(world)
    assert_merged(tensors_of(out), reference(world))
    assert written_config(out)["vocab_size"] == tiny.SHAPE["vocab_size"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (world.base / name).read_bytes()
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize(("inputs", "more", "expected"), MIXED_DTYPES)
def test_dtypes_of_config_and_tensors_agree(inputs, more, expected, tmp_path):
    """Without a dtype the base's, else the recipe's; in each case the sum is rounded once."""
    world = World(tmp_path, "llama", dtypes=list(inputs)).build()
    out = merge(world, world.config(**more))
    assert_merged(tensors_of(out), reference(world), expected)
    assert written_config(out)["dtype"] == str(expected).removeprefix("torch.")


def test_recipe_dtype_is_that_of_the_output(tmp_path):
    """mergekit's `dtype` converts the inputs as they are read, so two roundings."""
    world = World(tmp_path, "llama").build()
    out = merge(world, world.config(dtype="bfloat16"))
    want = reference(world)
    for name, tensor in tensors_of(out).items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), want[name], rtol=2**-7, atol=2**-7)
    assert written_config(out)["dtype"] == "bfloat16"


def test_one_expert_is_copied(tmp_path):
    world = World(tmp_path, "mistral", experts=1, dtypes=[torch.bfloat16] * 2).build()
    got, expert = tensors_of(merge(world)), tensors_of(world.expert(0))
    assert all(torch.equal(got[name], expert[name]) for name in expert)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_scale_multiplies_the_task_vector(kind, tmp_path):
    """theta_base + 1.5 (theta_wp - theta_base) for every tensor, of components or not."""
    world = World(tmp_path, kind, experts=3, extra_rows=[0, 1, 0]).build()
    base = tensors_of(world.base)
    want = {name: base[name] + 1.5 * (wp - base[name].double()) for name, wp in reference(world).items()}
    out = merge(world, world.config(parameters={"scale": 1.5}))
    assert_merged(tensors_of(out), want)


@pytest.mark.parametrize(
    ("kind", "ranges"),
    [("llama", [(2, 4), (0, 2)]), ("llama", [(0, 3), (1, 4)]), ("llama", [(3, 4)]), ("gemma2", [(2, 4), (0, 2)])],
)
def test_moved_and_stacked_layers_take_the_shares_of_their_source_layer(kind, ranges, tmp_path):
    world = World(tmp_path, kind).build()
    out = merge(world, slices(world, ranges))
    source_layers = [layer for a, b in ranges for layer in range(a, b)]
    want = {}
    for name, tensor in reference(world).items():
        if ".layers." not in name:
            want[name] = tensor
            continue
        layer = int(name.split(".")[2])
        for to, source in enumerate(source_layers):
            if source == layer:
                want[name.replace(f".{layer}.", f".{to}.", 1)] = tensor
    assert_merged(tensors_of(out), want)
    assert written_config(out)["num_hidden_layers"] == len(source_layers)
    transformers.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("route", [{"tokenizer": {"source": "base"}}, {"unsafe": True}])
def test_mergekits_own_ways_with_vocabularies(route, tmp_path):
    world = World(tmp_path, "llama", extra_rows=[0, 1]).build()
    unsafe = bool(route.pop("unsafe", False))
    out = merge(world, world.config(**route), unsafe_truncate_embeddings=unsafe)
    assert_merged(tensors_of(out), reference(world))
    assert written_config(out)["vocab_size"] == tiny.SHAPE["vocab_size"]


def test_lora_expert(tmp_path):
    """base+lora: the score file names the adapter as published, whatever mergekit merges it into."""
    world = World(tmp_path, "llama").build()
    lora = tmp_path / "lora"
    make_lora(world.base, lora, seed=3)
    name = f"{world.base}+{lora}"
    write_random_scores(world.score(1), str(world.base), name, seed=1)
    config = world.config()
    config["models"][1]["model"] = name
    cache = tmp_path / "loras"
    out = merge(world, config, lora_merge_cache=str(cache))
    (merged,) = cache.iterdir()
    merged.rename(tmp_path / "merged")
    (tmp_path / "e1").rename(tmp_path / "unused")
    (tmp_path / "merged").rename(tmp_path / "e1")
    assert_merged(tensors_of(out), reference(world))
    assert Checkpoint.open(str(out)).geometry == Checkpoint.open(str(world.base)).geometry


def test_merge_without_a_last_task(tmp_path):
    """In memory there is no FinalizeModel: tensors are checked and adapted one by one."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    world = World(tmp_path, "qwen2", extra_rows=[2, 0]).build()
    config, options = MergeConfiguration.model_validate(world.config()), MergeOptions()
    architecture = get_architecture_info(config, options)
    planner = MergePlanner(config, architecture, options=options, out_model_config=config.base_model.config())
    # Not plan_in_memory: with the installed pydantic, mergekit 0.1.5 cannot build its ReturnTensor.
    planner._plan()
    names = {task: weight.name for weight, task in planner._tensors}
    got = {names[task]: value for task, value in Executor(list(names)).run(quiet=True)}
    assert_merged({name: value for name, value in got.items() if value is not None}, reference(world))


def test_other_methods_are_untouched(tmp_path):
    """After wp has taken its seats, linear is still linear (and still promotes dtypes its own way)."""
    world = World(tmp_path, "llama").build()
    merge(world, out="first")
    models = [{"model": str(world.expert(k)), "parameters": {"weight": 0.5}} for k in range(2)]
    got = tensors_of(merge(world, {"merge_method": "linear", "models": models}, out="second"))
    first, second = tensors_of(world.expert(0)), tensors_of(world.expert(1))
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
