"""Rotary embeddings whose angles depend on how long the sequence is: which prompts may share a batch.

transformers takes the length of a batch for that of each of its rows: `longrope` has one set of frequencies up to the
length of the original training and another above it, `dynamic` (NTK) has other frequencies for every length past the
context, and keeps those of the longest batch seen. A prompt's numbers must be those of the prompt alone, so only
prompts of one `group` share a batch, and every batch starts from what the config says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_FIXED = ("default", "linear", "yarn", "llama3", "proportional")  # of transformers' types, those blind to the length
_LONGROPE = ("longrope", "su")  # Phi-3's first configs call it su


class Lengths:
    """What a model's rotary embedding makes of a sequence's length.

    `config` is the model's as a mapping; of a multimodal one, what it says of the text decoder counts.
    """

    def __init__(self, config: Mapping[str, Any]):
        config = {**config, **(config.get("text_config") or {})}
        self._context: int = config.get("max_position_embeddings") or 10**9
        self._settings = _settings(config)
        self._original = config.get("original_max_position_embeddings")

    @property
    def limit(self) -> int:
        """Positions that the model takes: `max_position_embeddings`, which `dynamic` stretches by its factor."""
        factors = [float(rope.get("factor") or 1) for rope in self._settings if "dynamic" in _kind(rope)]
        return int(self._context * min(factors, default=1.0))

    def group(self, length: int) -> tuple[int, ...]:
        """Sequences of equal groups get the same angles, whatever the longest of them."""
        return tuple(self._side(rope, length) for rope in self._settings)

    def _side(self, rope: Mapping[str, Any], length: int) -> int:
        kind = _kind(rope)
        if kind in _FIXED:
            return 0
        if kind in _LONGROPE:
            return int(length > (self._original or rope.get("original_max_position_embeddings") or self._context))
        if "dynamic" in kind and length <= self._context:
            return 0
        return length  # dynamic, and what is not known here

    def group_answered(self, length: int, answer: int) -> tuple[int, ...]:
        """Likewise for a prompt that up to `answer` tokens are added to: a prompt that may change sides on the way
        shares its batch with prompts of its own length alone, since that is when they all do."""
        group = self.group(length)
        return group if group == self.group(length + answer) else (*group, length)


def forget_lengths(model: nn.Module) -> None:
    """Give back the frequencies that `model` began with, which a longer batch may have replaced."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                setattr(module, name.replace("original_", ""), buffer)
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)


def _settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config's rotary settings, one for all layers or one a kind of layer (full, sliding)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or [rope]


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
