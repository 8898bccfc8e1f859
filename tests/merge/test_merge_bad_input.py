"""What is refused before the first tensor is read: one sentence, and no output folder."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple

import pytest
import torch
import yaml
from merge_checks import edit_config, plan_of, refused, rewrite, slices
from merge_world import World, merge, tensors_of, write_random_scores
from safetensors.torch import save_file

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.merge.recipe import read_recipe
from mergekit_wp.scores import Scores, read_scores, write_scores


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One world, built once; each test gets its own cheap copy."""
    return World(tmp_path_factory.mktemp("world"), "llama").build()


@pytest.fixture
def world(built, tmp_path):
    shutil.copytree(built.root, tmp_path / "w")
    return World(tmp_path / "w", "llama")


E0 = {"model": "e0", "parameters": {"scores": "a"}}
SLICE = {"model": "e0", "layer_range": [0, 4]}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"paramters": {"scale": 2}}, "unknown field 'paramters'; did you mean parameters?"),
        ({"out_dtpye": "bfloat16"}, "unknown field 'out_dtpye'; did you mean out_dtype?"),
        ({"models": [{**E0, "weight": 5}]}, "models, entry 1, unknown field 'weight'; there are model, parameters."),
        ({"models": [{"model": "e0", "paramters": {}}]}, "models, entry 1, unknown field 'paramters'; did you"),
        ({"models": [{"model": {"model": {"path": "e0", "revison": "x"}}}]}, "'revison'; did you mean revision?"),
        ({"parameters": {"scale": [{"fitler": "mlp", "value": 2}]}}, "parameters, scale, entry 1, unknown field 'fitl"),
        ({"parameters": {"scale": {"filtr": "mlp", "value": 2}}}, "parameters, scale, unknown field 'filtr'; did you"),
        ({"tokenizer": {"sorce": "base"}}, "tokenizer, unknown field 'sorce'; did you mean source?"),
        ({"tokenizer": {"tokens": {"w5": {"source": {"kind": "zero"}, "x": 1}}}}, "tokens, w5, unknown field 'x'"),
        ({"slices": [{"residual_weight": 0.5, "sources": [SLICE]}]}, "slices, entry 1, unknown field 'residual_weigh"),
        ({"modules": {"default": {"modls": []}}}, "modules, default, unknown field 'modls'; did you mean models?"),
        # What lies in a place that mergekit does not look at.
        ({"models": [E0, {"model": "base", "parameters": {"weight": 7}}]}, "`weight` stands under base, which is the"),
        (
            {
                "slices": [
                    {"base_model": "e1", "sources": [SLICE, {**SLICE, "model": "e1", "parameters": {"scale": 2}}]}
                ]
            },
            "`scale` stands under e1, which is the base_model here",
        ),
        ({"slices": [{"sources": []}]}, "slices, entry 1: `sources` is empty"),
        (
            {"slices": [{"sources": [{**SLICE, "layer_range": [3, 1]}]}]},
            "sources, entry 1, layer_range: found [3, 1], exp",
        ),
        ({"slices": [{"sources": [{**SLICE, "layer_range": [-2, 2]}]}]}, "layer_range: found [-2, 2], expected [first"),
        ({"models": [E0, E0]}, "e0 is listed twice; list it once with a `weight` of 2."),
    ],
)
def test_what_mergekit_would_leave_out_in_silence(more, said):
    text = yaml.safe_dump({"merge_method": "wp", "base_model": "base", **more})
    with pytest.raises(BadInput) as caught:
        read_recipe("r.yaml", text)
    assert said in caught.value.message


def test_fields_that_mergekit_has_are_taken():
    token = {"source": {"kind": "model_token", "model": "e0", "token": "a"}, "force": True}
    conditions = [{"filter": "mlp", "value": [1, 2]}, {"value": 1}]
    more = {"tokenizer": {"source": "base", "tokens": {"w5": token}}, "parameters": {"scale": conditions}}
    slices = [{"sources": [SLICE, {**SLICE, "model": {"model": {"path": "base", "revision": "x"}, "lora": "e1"}}]}]
    text = yaml.safe_dump({"merge_method": "wp", "base_model": "base", "dtype": "float16", "slices": slices, **more})
    assert read_recipe("r.yaml", text).method == "wp"


def with_scores(world, value):
    config = world.config()
    config["models"][1]["parameters"] = {"scores": value}
    return config


def test_no_scores_for_an_expert(world):
    config = world.config()
    del config["models"][1]["parameters"]
    message = refused(world, config)
    assert message.startswith(f"{world.expert(1)}: no scores are given")


def test_missing_score_file(world):
    assert "nowhere.safetensors: cannot read this score file" in refused(
        world, with_scores(world, "nowhere.safetensors")
    )


def test_score_file_that_is_not_safetensors(world):
    world.score(1).write_text("no")
    assert str(world.score(1)) in refused(world)


def test_score_file_of_some_components_only(world):
    scores = read_scores(world.score(1))
    mask = {"heads": torch.ones_like(scores.heads), "neurons": torch.zeros_like(scores.neurons)}
    write_scores(Scores.from_tasks(scores.meta, scores.tasks, mask), world.score(1))
    message = refused(world)
    assert message.startswith(f"{world.score(1)}: holds scores of {scores.heads.numel()} of ")
    assert "without --components" in message


def test_score_file_with_a_nan(world):
    from safetensors import safe_open

    with safe_open(world.score(1), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["heads"][0, 0] = float("nan")
    save_file(tensors, world.score(1), metadata=metadata)
    assert "NaN" in refused(world)


def test_scores_that_are_not_a_path(world):
    assert "expected the path of a score file" in refused(world, with_scores(world, 5))


def test_a_list_of_score_files_is_not_a_gradient_over_layers(world):
    both = [str(world.score(0)), str(world.score(1))]
    assert "two score files are given" in refused(
        world,
        with_scores(world, both),
    )


def test_scores_of_another_shape(world, tmp_path):
    other = World(tmp_path, "llama", experts=1).build(intermediate_size=12)
    shutil.copy(other.score(0), world.score(1))
    assert "another shape" in refused(world)


def test_scores_of_another_base(world):
    rewrite(world.base, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    message = refused(world)
    assert "made for the base" in message
    assert "allow_mismatch: true" in message


def test_scores_of_another_expert_unless_allowed(world, caplog):
    shutil.copy(world.score(0), world.score(1))
    message = refused(world)
    assert message.startswith(f"{world.score(1)}: these scores were made for the expert ")
    assert f"whose weights differ from those of {world.expert(1)}" in message
    with caplog.at_level(logging.WARNING):
        merge(world, world.config(parameters={"allow_mismatch": True}))
    assert "merging all the same" in caplog.text


def test_expert_of_another_shape(world, tmp_path):
    other = World(tmp_path, "llama", experts=1).build(intermediate_size=12)
    config = world.config()
    config["models"][1]["model"] = str(other.expert(0))
    assert "not of the shape of the base" in refused(world, config)


def test_tensor_of_another_shape(world):
    rewrite(world.expert(1), lambda t: {**t, "model.norm.weight": t["model.norm.weight"][:5].clone()})
    assert "model.norm.weight has shape [5]" in refused(world, world.config(parameters={"allow_mismatch": True}))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_missing_tensor(name, world):
    rewrite(world.expert(1), lambda t: {k: v for k, v in t.items() if k != name})
    message = refused(world, world.config(parameters={"allow_mismatch": True}))
    assert f"the tensor {name} is missing" in message


def test_quantised_weights(world):
    rewrite(world.expert(1), lambda t: {**t, "model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)})
    assert "has dtype F8_E4M3" in refused(world, world.config(parameters={"allow_mismatch": True}))


def test_nan_weights(world):
    """Not known before the weights are read: refused while merging, before the only shard is written."""

    def spoil(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = float("nan")
        return tensors

    rewrite(world.expert(1), spoil)
    write_random_scores(world.score(1), str(world.base), str(world.expert(1)), seed=1)
    with pytest.raises(BadInput, match=r"e1: model\.layers\.2\.mlp\.up_proj\.weight holds a NaN"):
        merge(world)
    assert not list((world.root / "out").glob("*.safetensors"))


def test_biases_that_mergekit_would_drop(tmp_path):
    world = World(tmp_path, "llama-biased").build()
    assert "silently leave out 28 tensors" in refused(world)


def test_expert_with_a_head_of_its_own_on_a_tied_base(tmp_path):
    world = World(tmp_path, "qwen2").build()

    def untie(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2}

    rewrite(world.expert(1), untie)
    edit_config(world.expert(1), tie_word_embeddings=False)
    message = refused(world, world.config(parameters={"allow_mismatch": True}))
    assert "has its own lm_head.weight" in message


def test_a_tied_head_that_an_expert_stores_all_the_same_is_not_written(tmp_path):
    world = World(tmp_path, "qwen2").build()
    rewrite(world.expert(1), lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    out = merge(world, world.config(parameters={"allow_mismatch": True}))
    assert set(tensors_of(out)) == set(tensors_of(world.base))


def test_slices_that_mix_layers(world):
    assert "would mix layer 1 of" in refused(world, slices(world, [(0, 2), (2, 3)], shift=1))


def test_slices_of_different_experts(world):
    """mergekit has the embeddings of one and the head of another, and knows every tensor of both."""
    config = slices(world, [(0, 2), (2, 4)])
    for number, piece in enumerate(config["slices"]):
        del piece["sources"][1 - number]
    message = refused(world, config)
    assert message.startswith(f"{world.expert(0)}: is not among the models of every slice")
    assert "so its lm_head.weight would be left out; list the same models in all slices." in message


def test_a_filter_that_chooses_nothing(world, caplog):
    conditions = [{"filter": "mlpp", "value": 2}, {"filter": "mlp", "value": 1.5}, {"value": 1}]
    plan_of(world, world.root / "out", world.config(parameters={"scale": conditions}))
    assert [record.getMessage() for record in caplog.records if "filter" in record.getMessage()] == [
        f"{world.root / 'recipe.yaml'}: the filter 'mlpp' is in the name of no tensor, and chooses none."
    ]


def test_a_word_of_pipelines(world):
    said = "scale: found 'auto', expected a number (`auto` is a word of a pipeline, for wp-run); 1 is the paper's rule."
    assert said in refused(world, world.config(parameters={"scale": "auto"}))


@pytest.mark.parametrize(
    ("ranges", "text"), [([(1, 2), (0, 1), (2, 4)], "own attention type"), ([(0, 2)], "keep the number")]
)
def test_slices_against_the_attention_types(ranges, text, tmp_path):
    world = World(tmp_path, "gemma2").build()
    assert text in refused(world, slices(world, ranges))


def test_unsupported_architecture(world):
    for folder in (world.base, world.expert(0), world.expert(1)):
        edit_config(folder, architectures=["OlmoForCausalLM"])
    with pytest.raises((BadInput, RuntimeError)):
        merge(world)
    with pytest.raises(BadInput, match="not supported"):
        _ = Checkpoint.open(str(world.base)).geometry


def test_pickled_weights(world):
    for file in world.expert(1).glob("*.safetensors*"):
        file.unlink()
    torch.save({"model.norm.weight": torch.ones(24)}, world.expert(1) / "pytorch_model.bin")
    assert "pickled" in refused(world)


def test_no_base_and_no_expert(world):
    config = world.config()
    del config["base_model"]
    assert "needs base_model" in refused(world, config)
    alone = {"merge_method": "wp", "base_model": str(world.base), "models": [{"model": str(world.base)}]}
    assert "found no expert" in refused(world, alone)


@pytest.mark.parametrize("more", [{"dtype": "int64", "out_dtype": "float16"}, {"out_dtype": "float8"}])
def test_dtypes_that_cannot_hold_weights(more, world):
    assert "cannot hold weights" in refused(world, world.config(**more))


def test_output_under_a_file(world):
    (world.root / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write there"):
        merge(world, out="file/out")


def test_no_room_on_the_disk(world, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1000))
    assert "are free there" in refused(world)


def test_expert_of_another_lineage_is_warned_about(world, caplog):
    edit_config(world.expert(1), rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    with caplog.at_level(logging.WARNING):
        merge(world, world.config(parameters={"allow_mismatch": True}))
    assert "rope_theta 1000000.0" in caplog.text
