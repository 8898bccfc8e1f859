"""What transformers builds from a config.json, whoever wrote it and however it is spelled.

One model has many spellings: `rope_scaling` beside `rope_theta` (transformers 4) or both in `rope_parameters` (5),
`type` or `rope_type`, 1000000 or 1000000.0, a field left out because it has the class's default, a window that
`use_sliding_window: false` switches off. So configs are compared, and hashed into a fingerprint, after the config
class of transformers has read them. No code of a checkpoint is run: a config with `auto_map` is read by the built-in
class of its type.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mergekit_wp.errors import BadInput, shown

# Every field that the config class declares counts, but for these: so a field that a later transformers adds makes two
# models differ, and is not overlooked. A field that the class does not declare is not read by the class's own model
# (unsloth_version and the like make no difference). A test compares both with what the models' code reads.
_NO_EFFECT = frozenset({
    # how weights were made, and how they are stored and called
    "initializer_range", "use_cache", "pretraining_tp", "dtype", "architectures", "transformers_version",
    # what a call returns
    "output_hidden_states", "return_dict", "tie_last_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder",
    # heads of classifiers
    "id2label", "label2id", "problem_type",
    # said by layer_types, no_rope_layers and rope_parameters, once resolved
    "max_window_layers", "no_rope_layer_interval", "sliding_window_pattern", "original_max_position_embeddings",
})  # fmt: skip
# Which token is special changes when generation stops, not what is computed; and evaluation drops nothing out.
_NO_EFFECT_ENDINGS = ("_token_id", "_token_index", "_dropout", "_pdrop")
# Read from any config, declared or not, by code that all models share: masks, key/value caches, the head width.
_SHARED = ("head_dim", "is_causal", "layer_types", "sliding_window", "attention_chunk_size")
# Compared as shapes, with a message of its own (`Geometry.differences`).
_SHAPES = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
})  # fmt: skip

# What each kind of rotary scaling reads beside rope_theta and partial_rotary_factor (modeling_rope_utils).
# What no kind reads (llama_4_scaling_beta, say) may be read by a model's own code, and counts always.
_ROPE_READS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "proportional": ("factor",),
    "yarn": ("factor", "attention_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
    "longrope": (
        "factor", "attention_factor", "original_max_position_embeddings", "short_factor", "long_factor"
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
# Whose own code for `default` turns whole heads, whatever partial_rotary_factor says (a test compares). Of types that
# are not named here the field counts.
_WHOLE_ROTARY = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "olmo3", "smollm3", "granite", "ministral",
    "ministral3",
})  # fmt: skip
_ROPE_KNOWN = frozenset({"type", "mscale", "mscale_all_dim"}.union(*_ROPE_READS.values()))


def resolved(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that change a forward pass, as the config class of transformers has them; `where` names the file.

    Of a multimodal wrapper, those of its language model. Rotary parameters are named `rope_theta`, `rope factor`, or
    `full_attention: rope_theta` where layers differ in them. What is switched off (None, False) is left out: a switch
    that a later transformers adds then changes no fingerprint.

    Raises `BadInput` for a config of which transformers cannot build a model.
    """
    whole = _build(config, where)
    text = whole.get_text_config(decoder=True)
    declared = {field.name for field in dataclasses.fields(text)}
    fields: dict[str, Any] = {name: getattr(text, name, None) for name in declared | set(_SHARED)}
    if whole is not text and hasattr(whole, "tie_word_embeddings"):
        fields["tie_word_embeddings"] = whole.tie_word_embeddings  # the wrapper's decides
    rope = _rope(text, fields.pop("rope_parameters", None), where)
    if not any(value == "dynamic" for name, value in rope.items() if name.endswith("rope_type")):
        fields.pop("max_position_embeddings", None)  # a limit, but to dynamic scaling where it begins
    _check_buildable(fields, where)
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]
    for name in ("hidden_act", "hidden_activation"):
        if isinstance(fields.get(name), str):
            fields[name] = _activation(name, fields[name], where)
    if set(fields["layer_types"] or ()) <= {"full_attention"}:
        fields["layer_types"] = None
        if "layer_types" in declared:  # then no layer has the window
            fields["sliding_window"] = fields["use_sliding_window"] = None
    kept = {name: value for name, value in fields.items() if not _without_effect(name)} | rope
    kept["model_type"] = type(text).model_type
    return {name: value for name, value in kept.items() if value is not None and value is not False}


def decoder(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of a wrapper's language model, defaults filled in, as config.json would have it alone."""
    fields: dict[str, Any] = _build(config, where).get_text_config(decoder=True).to_dict()
    return fields


def says_tied(config: Mapping[str, Any], where: str) -> bool:
    """Whether the output head is to be the embeddings, by the whole model's config. Raises `BadInput` as `resolved`."""
    return bool(getattr(_build(config, where), "tie_word_embeddings", False))


def digest(fields: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what `resolved` gives."""
    return hashlib.sha256(json.dumps(_canonical(dict(fields)), sort_keys=True).encode()).hexdigest()


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Readable differences between two resolved configs beside the shapes; [] when there are none."""
    return [
        f"{name} {mine.get(name)!r} against the base's {theirs.get(name)!r}"
        for name in sorted({*mine, *theirs} - _SHAPES)
        if _canonical(mine.get(name)) != _canonical(theirs.get(name))
    ]


def _without_effect(name: str) -> bool:
    return name in _NO_EFFECT or name.startswith("_") or name.endswith(_NO_EFFECT_ENDINGS)


def _build(config: Mapping[str, Any], where: str) -> Any:
    """The config object of transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        kind = _type_of_architecture(config, where)
    with quiet():
        try:
            return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(config)))
        except Exception as error:  # each class checks its fields in its own way
            raise BadInput(
                f"{where}: transformers cannot make a model of type {kind} of this config ({_reason(error)}); mend "
                "that field, or take the config.json of the model that this one was made from."
            ) from error


def _type_of_architecture(config: Mapping[str, Any], where: str) -> str:
    """The built-in type of a model whose own type transformers does not know (custom code), or that names none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WRAPPER

    names = config.get("architectures")
    first = str(names[0] if isinstance(names, list) and names else None)
    kinds = [kind for mapping in (TEXT, WRAPPER) for kind, architecture in mapping.items() if architecture == first]
    if not kinds:
        raise BadInput(
            f"{where}: found model_type {shown(config.get('model_type'))} and architectures {shown(names)}, of which "
            "transformers knows neither; take the config.json of the model that this one was made from."
        )
    # Several types may share an architecture; one of them has a config class of its name.
    own = f"{first.partition('For')[0]}Config"
    return str(next((kind for kind in kinds if CONFIG_MAPPING_NAMES.get(kind) == own), kinds[0]))


def _rope(text: Any, parameters: Any, where: str) -> dict[str, Any]:
    """Rotary parameters as they are computed with, flat, under readable names."""
    if not isinstance(parameters, dict) or not parameters:
        return {}
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]  # one for each type of layer
    used = set(getattr(text, "layer_types", None) or nested)
    groups = {f"{key}: ": parameters[key] for key in nested if key in used} or {"": parameters}
    return {
        start + (name if name.startswith("rope_") else f"rope {name}"): value
        for start, group in groups.items()
        for name, value in _rotary(text, group, where).items()
    }


def _rotary(text: Any, group: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = group.get("rope_type")
    if not isinstance(kind, str) or kind not in _ROPE_READS:
        raise BadInput(
            f"{where}: found the rope_type {shown(kind)}, expected one of {', '.join(_ROPE_READS)}; mend "
            "rope_parameters (or rope_scaling)."
        )
    for name in ("rope_theta", *(set(_ROPE_READS[kind]) & {"factor"} & set(group))):
        value = group.get(name)
        if name == "factor" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise BadInput(f"{where}: found the rotary parameter {name} {shown(value)}, expected a number above 0.")
    kept = {name: value for name, value in group.items() if name in _ROPE_READS[kind] or name not in _ROPE_KNOWN}
    if kept.get("partial_rotary_factor") in (1, None) or (kind == "default" and text.model_type in _WHOLE_ROTARY):
        kept.pop("partial_rotary_factor", None)
    if kind in ("linear", "proportional") and kept.get("factor", 1) == 1 and "partial_rotary_factor" not in kept:
        kept = {**kept, "rope_type": "default", "factor": None}  # scales by 1
    if kind in ("yarn", "longrope"):
        try:
            kept |= _defaults(kind, text, group)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise BadInput(f"{where}: a rotary parameter of {kind} is not a number above 0 ({error}).") from error
    return kept


def _defaults(kind: str, text: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """What yarn and longrope compute with where the config is silent."""
    original = group["original_max_position_embeddings"]
    factor = group.get("factor") or text.max_position_embeddings / original
    attention = group.get("attention_factor")
    if kind == "longrope":
        if attention is None:
            attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return {"factor": factor, "attention_factor": attention}
    if attention is None:
        one, two = group.get("mscale"), group.get("mscale_all_dim")
        attention = _mscale(factor, one) / _mscale(factor, two) if one and two else _mscale(factor, 1)
    return {
        "factor": factor,
        "attention_factor": attention,
        "beta_fast": group.get("beta_fast") or 32,
        "beta_slow": group.get("beta_slow") or 1,
        "truncate": 1 if group.get("truncate", True) else 0,
    }


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _check_buildable(fields: Mapping[str, Any], where: str) -> None:
    """What the config class lets through, and the model's constructor stumbles over."""
    for name in sorted(_SHAPES - {"head_dim"}):
        value = fields.get(name)
        if type(value) is not int or value < 1:
            raise BadInput(f"{where}: found {name} {shown(value)}, expected a positive whole number.")
    padding, rows = fields.get("pad_token_id"), fields["vocab_size"]
    if padding is not None and not -rows <= padding < rows:
        raise BadInput(
            f"{where}: found pad_token_id {padding}, and the vocabulary has the ids 0 to {rows - 1}; transformers "
            "cannot build such a model, so set it to null, or to the id of the tokenizer's padding token."
        )


def _activation(field: str, name: str, where: str) -> str:
    """One name for each activation: silu is also called swish."""
    from transformers.activations import ACT2CLS

    if name not in ACT2CLS:
        raise BadInput(f"{where}: found {field} {shown(name)}, which transformers does not know.")
    return {"swish": "silu"}.get(name, name)


def _canonical(value: Any) -> Any:
    """Equal for equal numbers: whole ones as int, others as float32 holds them (models compute in no more)."""
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        return struct.unpack("f", struct.pack("f", value))[0]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _reason(error: Exception) -> str:
    """The last sentence of an error of transformers: before it stands which field was being checked."""
    text = " ".join(str(error).split())
    return text.rpartition("TypeError: ")[2].replace('"', "")[:200].rstrip(".")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of transformers about a model, which come once more when it is loaded."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
