"""A model with a tensor missing is refused before it is evaluated, whatever its architecture."""

from __future__ import annotations

import json
import time

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_merge_bad_input import edit_config, rewrite

from mergekit_wp.checkpoint import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.backends import Backend
from mergekit_wp.eval.completeness import check_complete
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.preflight import check_model
from mergekit_wp.eval.settings import Settings

SMALL = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {**SMALL, "intermediate_size": 20, "num_key_value_heads": 2}
FOREIGN = {
    "gpt2": transformers.GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=4),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=20),
    "falcon": transformers.FalconConfig(**SMALL),
    "bloom": transformers.BloomConfig(vocab_size=97, hidden_size=24, n_layer=2, n_head=4),
    "mamba": transformers.MambaConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2),
    "gemma": transformers.GemmaConfig(**GQA, head_dim=8),
    "mixtral": transformers.MixtralConfig(**GQA, num_local_experts=3),
    "qwen3_moe": transformers.Qwen3MoeConfig(**GQA, num_experts=4, moe_intermediate_size=8),
}


def loads_whole(folder):
    """What transformers itself says when it loads the weights."""
    try:
        _model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except RuntimeError:
        return False
    return not report["missing_keys"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_as_transformers_loads_it(tmp_path, kind):
    transformers.AutoModelForCausalLM.from_config(FOREIGN[kind]).save_pretrained(tmp_path)
    check_complete(Checkpoint.open(str(tmp_path)), False)
    assert loads_whole(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    inside = sorted(name for name in whole if ".1." in name)
    for lost in (inside[0], inside[-1]):
        rest = {name: tensor for name, tensor in whole.items() if name != lost}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert not loads_whole(tmp_path)
        with pytest.raises(BadInput, match=r"the checkpoint lacks 1 tensors, such as|one is missing or has another"):
            check_complete(Checkpoint.open(str(tmp_path)), False)


@pytest.mark.parametrize("kind", [*tiny.VARIANTS, *tiny.FAMILIES, *tiny.WRAPPERS])
def test_no_model_that_is_whole_is_refused(tmp_path, kind):
    folder = tiny.save(tiny.random_model(kind), tmp_path / "m", torch.bfloat16)
    check_complete(Checkpoint.open(str(folder)), False)
    norm = next(n for n in Checkpoint.open(str(folder)).tensors if n.endswith("layers.1.mlp.down_proj.weight"))
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != norm})
    with pytest.raises(BadInput, match=r"m: the checkpoint lacks 1 tensors, such as .*layers\.1\.mlp\.down_proj"):
        check_complete(Checkpoint.open(str(folder)), False)


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_preflight_asks(tmp_path, backend):
    folder = tiny.save(tiny.random_model("llama", head_dim=32), tmp_path / "m", max_shard_size="5GB")
    model = EvalModel("m", str(folder), folder, "")
    settings = Settings("cuda", "float32", 1, None, False, False, False, Backend(backend))
    check_model(model, [], settings)
    rewrite(folder, lambda t: {name: x for name, x in t.items() if name != "model.layers.2.self_attn.k_proj.weight"})
    with pytest.raises(BadInput, match=r"lacks 1 tensors, such as model\.layers\.2\.self_attn\.k_proj\.weight"):
        check_model(model, [], settings)


def test_what_it_knows_nothing_of_passes(tmp_path):
    folder = tiny.save(tiny.random_model("llama"), tmp_path / "m")
    rewrite(folder, lambda t: {name: x for name, x in t.items() if "layers.2" not in name})
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    check_complete(Checkpoint.open(str(folder)), False)


def test_no_weight_is_read(tmp_path):
    """A file of 64 GB, all hole: only its header is looked at."""
    config = transformers.LlamaConfig(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=16,
                                      num_attention_heads=64, num_key_value_heads=8)  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    started = time.monotonic()
    check_complete(Checkpoint.open(str(tmp_path)), False)
    assert time.monotonic() - started < 20
