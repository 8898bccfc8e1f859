"""Component geometry against the models themselves."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from mergekit_wp.checkpoint.folder import Checkpoint, fingerprint_of
from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import (
    SUPPORTED,
    Geometry,
    Kind,
    TensorSlot,
    auto_class,
    auto_name,
    is_vocabulary,
    layer_of,
    slot_of,
    text_name,
)


def geometry_of(model):
    return Geometry.from_config(model.config.to_dict())


@pytest.mark.parametrize("kind", [*tiny.VARIANTS, *tiny.FAMILIES])
def test_slices_cover_q_o_and_mlp_exactly_once(kind):
    """Marking the slices of all components touches each element of the owned tensors once, nothing else."""
    model = tiny.random_model(kind)
    geometry = geometry_of(model)
    count = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for layer in range(geometry.layers):
        for component in Kind:
            for index in range(geometry.count(component)):
                for name, where in geometry.owned_slices(component, layer, index):
                    if name in count:
                        count[name][where] += 1
    for name, marks in count.items():
        slot = slot_of(name)
        if slot is None:
            assert not marks.any(), name
            continue
        parts = marks.split(geometry.lengths(slot), slot.axis)
        for share, part in zip(slot.shares, parts, strict=True):
            assert bool((part == int(share != "kv")).all()), name


@pytest.mark.parametrize("kind", [*tiny.VARIANTS, *tiny.FAMILIES])
def test_expand_has_the_length_of_the_axis(kind):
    model = tiny.random_model(kind)
    geometry = geometry_of(model)
    heads_H, neurons_F = torch.rand(geometry.heads), torch.rand(geometry.neurons)
    for name, tensor in model.state_dict().items():
        slot = slot_of(name)
        if slot is not None:
            assert geometry.expand(slot, heads_H, neurons_F).shape == (tensor.shape[slot.axis],), name


def test_kv_weight_is_the_mean_over_the_group():
    geometry = geometry_of(tiny.random_model("llama"))
    heads_H = torch.tensor([1.0, 3.0, 10.0, 20.0])
    got = geometry.expand(TensorSlot(0, ("k",), 0), heads_H, torch.zeros(geometry.neurons))
    assert got.tolist() == [2.0] * geometry.head_dim + [15.0] * geometry.head_dim


def test_fused_rows_are_those_of_the_projections_one_after_the_other():
    geometry = geometry_of(tiny.random_model("phi3"))
    heads_H, neurons_F = torch.tensor([1.0, 3.0, 10.0, 20.0]), torch.arange(float(geometry.neurons))
    d = geometry.head_dim
    qkv, gate_up = (slot_of(f"model.layers.1.{m}.weight") for m in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    keys = [2.0] * d + [15.0] * d
    got = geometry.expand(qkv, heads_H, neurons_F)
    assert got.tolist() == [1.0] * d + [3.0] * d + [10.0] * d + [20.0] * d + keys + keys
    assert torch.equal(geometry.expand(gate_up, heads_H, neurons_F), neurons_F.repeat(2))
    assert (qkv.axis, gate_up.axis, qkv.layer) == (0, 0, 1)


@pytest.mark.parametrize("name", ["head", "neuron", "kv", "", "Heads"])
def test_a_kind_that_is_none_is_refused(name):
    geometry = geometry_of(tiny.random_model("llama"))
    for ask in (geometry.width, geometry.count, lambda kind: geometry.columns(kind, torch.zeros(1, dtype=torch.long))):
        with pytest.raises(ValueError, match="not a valid Kind"):
            ask(name)
    with pytest.raises(ValueError, match="not a valid Kind"):
        geometry.owned_slices(name, 0, 0)


def test_columns_of_each_kind():
    geometry = geometry_of(tiny.random_model("llama"))
    assert geometry.columns(Kind.HEAD, torch.tensor([1])).tolist() == [list(range(8, 16))]
    assert geometry.columns(Kind.NEURON, torch.tensor([3, 1])).tolist() == [[3], [1]]


def test_outside_of_components():
    outside = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    outside += [f"model.layers.3.{m}" for m in ("input_layernorm.weight", "self_attn.q_norm.weight")]
    outside += ["model.layers.3.self_attn.o_proj.bias", "model.layers.3.mlp.down_proj.bias"]
    assert [slot_of(name) for name in outside] == [None] * len(outside)
    assert slot_of("model.layers.12.self_attn.q_proj.bias") == TensorSlot(12, ("q",), 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, SUPPORTED[0]),
        ({"architectures": ["Qwen3NextForCausalLM"]}, "hybrids"),
        ({"use_bidirectional_attention": True}, "left to right"),
        ({"architectures": None}, "none"),
        ({"num_local_experts": 8}, "mixtures of experts"),
        ({"hidden_size": None}, "positive whole number"),
        ({"num_key_value_heads": 3}, "3 KV heads"),
        ({"intermediate_size": 0}, "neurons"),
    ],
)
def test_refusals(change, said):
    config = {**tiny.random_model("llama").config.to_dict(), "architectures": ["LlamaForCausalLM"], **change}
    with pytest.raises(BadInput, match=r"here\.json") as caught:
        Geometry.from_config(config, where="here.json")
    assert said in caught.value.message


def test_missing_field_is_named():
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "hidden_size": 8}
    with pytest.raises(BadInput, match="num_hidden_layers"):
        Geometry.from_config(config)


@pytest.mark.parametrize(
    ("architecture", "head_dim"),
    [("LlamaForCausalLM", 64), ("Qwen3ForCausalLM", 128), ("Gemma2ForCausalLM", 256)],
)
def test_default_head_dim(architecture, head_dim):
    config = {"architectures": [architecture], "num_attention_heads": 16, "hidden_size": 1024,
              "num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 9}  # fmt: skip
    geometry = Geometry.from_config(config)
    assert (geometry.head_dim, geometry.kv_heads) == (head_dim, 16)


def wrapped(**text):
    return {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text,
            "vision_config": {"model_type": "clip_vision_model"}}  # fmt: skip


def test_text_config_of_a_wrapper_takes_the_defaults_of_its_class():
    """llava-1.5-7b-hf says no more than this of its Vicuna."""
    geometry = Geometry.from_config(wrapped(model_type="llama", vocab_size=32064, max_position_embeddings=4096))
    assert geometry == Geometry("LlavaForConditionalGeneration", 32, 32, 32, 128, 11008, 4096, 32064)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("olmo2", "Olmo2ForCausalLM"), ("mixtral", "MixtralForCausalLM"), ("qwen3_next", "Qwen3NextForCausalLM")],
)
def test_text_towers_that_are_refused(kind, said):
    with pytest.raises(BadInput, match=f"in text_config, architecture {said} is not supported"):
        Geometry.from_config(wrapped(model_type=kind))


def test_the_class_that_loads_a_model():
    assert auto_name(wrapped(model_type="llama")) == "AutoModelForImageTextToText"
    assert auto_name({"architectures": ["Phi3ForCausalLM"]}) == auto_name({}) == "AutoModelForCausalLM"
    assert auto_class(wrapped(model_type="llama")).__name__ == "AutoModelForImageTextToText"


@pytest.mark.parametrize("layers", ["model.layers", "model.language_model.layers", "language_model.model.layers"])
def test_one_name_in_every_layout(layers):
    name = f"{layers}.3.self_attn.q_proj.weight"
    assert text_name(name) == "model.layers.3.self_attn.q_proj.weight"
    assert slot_of(name) == TensorSlot(3, ("q",), 0)
    assert layer_of(name) == 3


@pytest.mark.parametrize("tower", ["vision_tower.vision_model.encoder", "model.vision_tower.encoder"])
def test_other_towers_have_no_components(tower):
    name = f"{tower}.layers.3.self_attn.q_proj.weight"
    assert (text_name(name), slot_of(name), layer_of(name)) == (None, None, None)


def test_vocabulary_in_every_layout():
    names = ["lm_head.weight", "language_model.lm_head.weight", "model.language_model.embed_tokens.weight"]
    assert all(map(is_vocabulary, [*names, "language_model.model.embed_tokens.weight", "model.embed_tokens.weight"]))
    assert not any(map(is_vocabulary, ["model.norm.weight", "vision_tower.embeddings.position_embedding.weight"]))


class TestFingerprint:
    def test_survives_resharding_and_rewriting_the_config(self, tmp_path):
        model = tiny.random_model("llama")
        one = tiny.save(model, tmp_path / "one", max_shard_size="1GB")
        many = tiny.save(model, tmp_path / "many", max_shard_size="8KB")
        config = json.loads((many / "config.json").read_text())
        theta = config.pop("rope_parameters", {}).get("rope_theta", config.get("rope_theta"))
        (many / "config.json").write_text(json.dumps({**config, "rope_theta": theta, "use_cache": False}))
        assert len(list(many.glob("*.safetensors"))) > 1
        assert fingerprint_of(str(one)) == fingerprint_of(str(many))

    def test_tells_fine_tunes_of_equal_shape_apart(self, tmp_path):
        base, expert = tiny.save_pair(tmp_path, "llama")
        assert fingerprint_of(str(base)).tensors != fingerprint_of(str(expert)).tensors
        assert fingerprint_of(str(base)).config == fingerprint_of(str(expert)).config

    def test_config_that_changes_the_computation_changes_it(self, tmp_path):
        folder = tiny.save(tiny.random_model("llama"), tmp_path / "m")
        before = fingerprint_of(str(folder))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
        after = fingerprint_of(str(folder))
        assert (before.config != after.config, before.tensors == after.tensors) == (True, True)


class TestCheckpoint:
    def test_missing_folder(self):
        with pytest.raises(BadInput, match="no such model folder"):
            Checkpoint.open("./not/there")

    def test_pickled_only(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(BadInput, match="pickled"):
            Checkpoint.open(str(tmp_path))

    def test_cut_short(self, tmp_path):
        folder = tiny.save(tiny.random_model("llama"), tmp_path / "m", max_shard_size="1GB")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(BadInput, match=r"model\.safetensors: cut short"):
            Checkpoint.open(str(folder))

    def test_not_safetensors(self, tmp_path):
        folder = tiny.save(tiny.random_model("llama"), tmp_path / "m", max_shard_size="1GB")
        (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + b"junk" * 40)
        with pytest.raises(BadInput, match="not a safetensors file"):
            Checkpoint.open(str(folder))

    def test_missing_shard(self, tmp_path):
        folder = tiny.save(tiny.random_model("llama"), tmp_path / "m")
        gone = sorted(folder.glob("*.safetensors"))[1]
        gone.unlink()
        with pytest.raises(BadInput, match=gone.name):
            Checkpoint.open(str(folder))

    def test_lineage(self, tmp_path):
        base, expert = tiny.save_pair(tmp_path, "llama")
        config = json.loads((expert / "config.json").read_text())
        config["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
        (expert / "config.json").write_text(json.dumps(config))
        differences = Checkpoint.open(str(expert)).lineage_differences(Checkpoint.open(str(base)))
        assert differences == ["rope_theta 1000000.0 against the base's 10000.0"]


def test_content_digest_sees_what_a_fingerprint_only_samples(tmp_path):
    """One element far from the sampled windows: the same fingerprint, but another model to wp-eval."""
    from mergekit_wp.checkpoint.folder import content_digest
    from mergekit_wp.eval.models import open_model

    model = tiny.random_model("llama", intermediate_size=2048)
    one = tiny.save(model, tmp_path / "one", max_shard_size="1GB")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[500, 3] += 1.0
    two = tiny.save(model, tmp_path / "two", max_shard_size="200KB")
    a, b = Checkpoint.open(str(one)), Checkpoint.open(str(two))
    assert a.fingerprint == b.fingerprint
    assert a.fingerprint.files != b.fingerprint.files
    assert Checkpoint.open(str(one)).fingerprint.files == a.fingerprint.files
    assert content_digest(a.tensors) != content_digest(b.tensors)
    assert open_model("x", str(one), False).fingerprint != open_model("x", str(two), False).fingerprint
    again = Checkpoint.open(str(tiny.save(tiny.random_model("llama", intermediate_size=2048), tmp_path / "again")))
    assert content_digest(again.tensors) == content_digest(a.tensors)
