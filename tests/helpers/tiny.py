"""Tiny random models with real layouts, for every test.

Every architecture comes with what makes it special: GQA everywhere, head_dim != d_model / heads, q/k/v biases
(Qwen2), all attention and MLP biases (a Llama variant), q/k norms (Qwen3), post-norms, soft-capping, sliding
windows and tied embeddings (Gemma 2), two rotary tables (Gemma 3), norms over all queries (OLMo), layers without
rotary (SmolLM3), multipliers (Granite), fused projections and partial rotary (Phi-3), queries scaled by position
(Ministral 3). Norm weights and biases are random too, so that nothing cancels.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# The families beyond the first five: their tests replace every component in turn.
_SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]
SMALL = {"num_hidden_layers": 3, "intermediate_size": 5, "hidden_size": 16}
_CONFIGS = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-biased": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 5}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {}),
    "gemma2": (
        transformers.Gemma2Config,
        {"sliding_window": 5, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": _SLIDING_AND_FULL,
         "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}}},
    ),
    "olmo2": (transformers.Olmo2Config, {}),
    "olmo3": (
        transformers.Olmo3Config,
        {"sliding_window": 4, "layer_types": _SLIDING_AND_FULL},
    ),
    "smollm3": (
        transformers.SmolLM3Config,
        {"no_rope_layers": [1, 0, 1], "sliding_window": 4, "use_sliding_window": True, "tie_word_embeddings": True,
         "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "granite": (
        transformers.GraniteConfig,
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 0.5,
         "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "phi3": (transformers.Phi3Config, {"partial_rotary_factor": 0.5, "sliding_window": 4}),
    "ministral": (
        transformers.MinistralConfig,
        {"sliding_window": 4, "layer_types": _SLIDING_AND_FULL},
    ),
    "ministral3": (
        transformers.Ministral3Config,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "llama_4_scaling_beta": 0.5,
                             "original_max_position_embeddings": 3, "beta_fast": 32.0, "beta_slow": 1.0}},
    ),
}  # fmt: skip
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
WRAPPERS = ("gemma3-wrapper", "mistral3-wrapper", "llava-wrapper")
FAMILIES = ("gemma3", "olmo2", "olmo3", "smollm3", "granite", "phi3", "ministral", "ministral3")
VARIANTS = tuple(kind for kind in _CONFIGS if kind not in FAMILIES)
_VISION = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 8, "patch_size": 4}  # fmt: skip
_WRAPPERS = {
    # The wrapper, its vision tower, its text tower, what is special.
    "gemma3-wrapper": (
        transformers.Gemma3Config, {"model_type": "siglip_vision_model", "vision_use_head": False}, "gemma3",
        {"mm_tokens_per_image": 4}),
    "mistral3-wrapper": (transformers.Mistral3Config, {"model_type": "pixtral", "head_dim": 8}, "ministral3", {}),
    "llava-wrapper": (transformers.LlavaConfig, {"model_type": "clip_vision_model", "projection_dim": 16}, "llama", {}),
}  # fmt: skip
WORDS = [f"w{i}" for i in range(SHAPE["vocab_size"] - 4)]


def _config(kind: str, overrides: dict[str, object]) -> transformers.PretrainedConfig:
    if kind in _WRAPPERS:
        wrapper, vision, text, special = _WRAPPERS[kind]
        own = {key: overrides.pop(key) for key in ("tie_word_embeddings",) if key in overrides}
        described = _config(text, {**SMALL, **overrides, **own}).to_dict()
        return wrapper(
            text_config=described, vision_config={**_VISION, **vision}, image_token_index=90, **special, **own
        )
    config_class, special = _CONFIGS[kind]
    return config_class(**{**SHAPE, **(SMALL if kind in FAMILIES else {}), **special, **overrides})


def auto_class(config: transformers.PretrainedConfig) -> Any:
    """What a user would load a model of this config with."""
    wrapped = hasattr(config, "vision_config")
    return transformers.AutoModelForImageTextToText if wrapped else transformers.AutoModelForCausalLM


def random_model(kind: str, seed: int = 0, **overrides: object) -> transformers.PreTrainedModel:
    """A float32 causal LM of the given kind with every parameter random (biases and norms included)."""
    config = _config(kind, overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config)
        model.config.architectures = [type(model).__name__]
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5
            offset = 1.0 if "norm" in name and not kind.startswith("gemma") else 0.0
            parameter.data = torch.randn_like(parameter) * scale + offset
    return model.eval()


def fine_tuned(base: transformers.PreTrainedModel, seed: int, size: float = 0.1) -> transformers.PreTrainedModel:
    """A copy of `base` whose every parameter moved by `size` of its own scale."""
    expert = auto_class(base.config).from_config(copy.deepcopy(base.config))
    expert.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for parameter in expert.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += size * parameter.data.std().nan_to_num(1.0) * noise
    return expert.eval()


def add_rows(model: transformers.PreTrainedModel, rows: int) -> transformers.PreTrainedModel:
    """Give the model extra vocabulary rows, as a fine-tune with added tokens has."""
    model.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
    return model


def tokenizer(kind: str = "llama") -> transformers.PreTrainedTokenizerFast:
    """Words w0..w92 split at spaces; ids 0-3 are special.

    transformers loads any Qwen2 folder with its own byte-level BPE class, so there the letters are the tokens.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "qwen2":
        letters = ["\u0120", "w", *map(str, range(10))]  # U+0120 is how byte-level BPE writes a space
        core = Tokenizer(models.BPE({token: i for i, token in enumerate(special + letters)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        vocabulary = {word: i for i, word in enumerate(special + WORDS)}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save(
    model: transformers.PreTrainedModel,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "20KB",
) -> Path:
    """Write a sharded safetensors folder with a tokenizer; the model in memory keeps its own dtype."""
    before = model.dtype
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    model.to(before)
    tokenizer(model.config.model_type).save_pretrained(folder)
    if model.config.model_type == "gemma3":
        rename(folder, "vision_tower.", "vision_tower.vision_model.")  # as published; transformers 5 reads and keeps it
    return folder


def rename(folder: Path, start: str, instead: str) -> None:
    """Give every tensor whose name begins with `start` another beginning, in shards and index."""

    def named(name: str) -> str:
        return instead + name.removeprefix(start) if name.startswith(start) else name

    for file in folder.glob("*.safetensors"):
        save_file({named(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text())
        index["weight_map"] = {named(name): shard for name, shard in index["weight_map"].items()}
        path.write_text(json.dumps(index))


def save_pair(
    root: Path, kind: str, *, dtype: torch.dtype = torch.float32, extra_rows: int = 0, **overrides: object
) -> tuple[Path, Path]:
    """root/base and root/expert, a fine-tune of it."""
    base = random_model(kind, seed=1, **overrides)
    expert = add_rows(fine_tuned(base, seed=2), extra_rows) if extra_rows else fine_tuned(base, seed=2)
    return save(base, root / "base", dtype), save(expert, root / "expert", dtype)
