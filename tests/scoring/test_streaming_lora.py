"""A LoRA streamed tensor by tensor against the model that mergekit merges."""

from __future__ import annotations

import pytest
import tiny
import torch
from lora_files import write
from safetensors.torch import load_file, save_file
from streamed_world import assert_same, resident, streamed, swept

from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.models.load import _lora_merged


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save(tiny.random_model("llama"), tmp_path_factory.mktemp("streamed") / "llama")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 16}},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1, 3]},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_equals_what_mergekit_merges(tmp_path, stored, options):
    base = tiny.save(tiny.random_model("llama-biased"), tmp_path / "base", stored)
    lora = write(tmp_path / "lora", base, **options)
    job = ScoringJob(base=str(base), expert=f"{base}+{lora}", pairs="unused")
    for dtype in (torch.float32, torch.bfloat16):
        stack = streamed(base, dtype, adapter=str(lora))
        with _lora_merged(job.expert, job.trust_remote_code) as merged:
            whole = resident(merged, dtype)
        assert_same(stack, whole)
        plain = swept(streamed(base, dtype))
        assert not torch.equal(plain[-1], swept(stack)[-1])


def test_tied_model(tmp_path):
    base = tiny.save(tiny.random_model("qwen2"), tmp_path / "base")
    lora = write(tmp_path / "lora", base)
    with _lora_merged(f"{base}+{lora}", False) as merged:
        assert_same(streamed(base, adapter=str(lora)), resident(merged))
    lora = write(tmp_path / "tied", base, target_modules=["embed_tokens"])
    with pytest.raises(BadInput, match=r"model\.embed_tokens\.weight.*--offload none"):
        streamed(base, adapter=str(lora))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        ({"bias": "all"}, "bias 'all'"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices \[1\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ],
    ids=str,
)
def test_more_than_plain_lora_is_refused(llama, tmp_path, options, said):
    lora = write(tmp_path / "lora", llama, **options)
    with pytest.raises(BadInput, match=f"{said} cannot be streamed; use --offload none"):
        streamed(llama, adapter=str(lora))


def test_embeddings_in_the_adapter_are_refused(llama, tmp_path):
    """peft would put them in place of the base's."""
    lora = write(tmp_path / "lora", llama, target_modules=["embed_tokens"], save_embedding_layers=True)
    with pytest.raises(BadInput, match=r"carries weights of the base.*--offload none"):
        streamed(llama, adapter=str(lora))


def test_other_adapters_are_refused(llama, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    peft.get_peft_model(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    with pytest.raises(BadInput, match="only LoRA can"):
        streamed(llama, adapter=str(tmp_path / "ia3"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda key, tensor: None, "lacks its tensors for model.layers.0.mlp.down_proj"),
        (lambda key, tensor: tensor * float("nan"), "down_proj hold a NaN"),
        (lambda key, tensor: torch.ones(7, 7), "could not be merged"),
    ],
    ids=["missing", "nan", "shape"],
)
def test_damaged(llama, tmp_path, change, said):
    lora = write(tmp_path / "lora", llama)
    file = lora / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in sorted(tensors) if "layers.0.mlp.down_proj.lora_B" in key)
    changed = change(key, tensors.pop(key))
    save_file(tensors if changed is None else {**tensors, key: changed}, file)
    with pytest.raises(BadInput, match=said):
        streamed(llama, adapter=str(lora))


def test_missing_folder(llama):
    with pytest.raises(BadInput, match="could not be merged"):
        streamed(llama, adapter="./nowhere")
