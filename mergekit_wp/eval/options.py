"""The options of a backend that a suite may set, by name: what they hold, who takes them, what they move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_wp.errors import BadInput, shown
from mergekit_wp.fields import ValueKind, number, switch, text, whole

BACKENDS = ("hf", "vllm")


@dataclass(frozen=True)
class Option:
    """`answers` is whether it can change an answer by more than rounding: then it is part of the cache's key."""

    kind: ValueKind
    what: str
    backends: tuple[str, ...] = BACKENDS
    answers: bool = False

    @property
    def meaning(self) -> str:
        alone = f" For {self.backends[0]} alone." if len(self.backends) == 1 else ""
        return self.what + alone + (" Changes answers." if self.answers else "")


_COUNT = whole(1, "a whole number from 1 up")
_TEXT = text("a non-empty string")
_SHARE = number(0, 1, "a number above 0 and up to 1", above=True)
_VLLM = ("vllm",)

# Names as vLLM has them, or lm-eval's class for transformers where vLLM has none.
OPTIONS: Mapping[str, Option] = {
    "max_model_len": Option(_COUNT, "Tokens of prompt and answer together.", answers=True),
    "add_bos_token": Option(switch(), "Begin prompts with the token of the beginning.", answers=True),
    "quantization": Option(_TEXT, "How weights are quantised.", _VLLM, answers=True),
    "kv_cache_dtype": Option(_TEXT, "Dtype of keys and values.", _VLLM, answers=True),
    "tensor_parallel_size": Option(_COUNT, "GPUs that share a model.", _VLLM),
    "data_parallel_size": Option(_COUNT, "Copies of a model.", _VLLM),
    "gpu_memory_utilization": Option(_SHARE, "Share of a GPU's memory that is taken.", _VLLM),
    "max_num_seqs": Option(_COUNT, "Sequences at a time.", _VLLM),
    "max_num_batched_tokens": Option(_COUNT, "Tokens at a time.", _VLLM),
    "enforce_eager": Option(switch(), "Run without CUDA graphs.", _VLLM),
    "enable_prefix_caching": Option(switch(), "Keep what beginnings have in common.", _VLLM),
    "parallelize": Option(switch(), "Spread a model over the GPUs.", ("hf",)),
    "attn_implementation": Option(_TEXT, "Which code computes attention, such as `sdpa`.", ("hf",)),
}
BACKEND_OPTIONS = ValueKind(
    "a mapping",
    lambda value: isinstance(value, dict),
    {
        "type": "object",
        "properties": {name: {"description": option.meaning, **option.kind.schema} for name, option in OPTIONS.items()},
        "additionalProperties": False,
    },
    None,
)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse an unknown name or a value of the wrong kind. Raises `BadInput`."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise BadInput(f"`backend_options` has the unknown option `{name}`; it may have {', '.join(OPTIONS)}.")
        kind = OPTIONS[name].kind
        if not kind.fits(value):
            raise BadInput(f"`backend_options`: `{name}` must be {kind.expected}, found {shown(value)}.")


def split_options(backend: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options that this backend takes, and the names of the other's that are left out.

    Raises `BadInput` for an option of the other backend that changes answers: leaving it out would grade another
    thing than the suite says.
    """
    own = {name: value for name, value in options.items() if backend in OPTIONS[name].backends}
    other = [name for name in options if name not in own]
    if lost := [name for name in other if OPTIONS[name].answers]:
        raise BadInput(
            f"backend {backend}: it has no option `{lost[0]}`, which changes answers; "
            f"run the suite with --backend {OPTIONS[lost[0]].backends[0]}, or take the option out of the suite."
        )
    return own, other
