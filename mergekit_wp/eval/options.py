"""The options of a backend that a suite may set, by name: what they hold, who takes them, what they move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_wp.errors import BadInput, shown

BACKENDS = ("hf", "vllm")


@dataclass(frozen=True)
class Option:
    """`answers` is whether it can change an answer by more than rounding: then it is part of the cache's key."""

    kind: str
    backends: tuple[str, ...] = BACKENDS
    answers: bool = False


# Names as vLLM has them, or lm-eval's class for transformers where vLLM has none.
OPTIONS: Mapping[str, Option] = {
    "max_model_len": Option("count", answers=True),
    "add_bos_token": Option("flag", answers=True),
    "quantization": Option("text", ("vllm",), answers=True),
    "kv_cache_dtype": Option("text", ("vllm",), answers=True),
    "tensor_parallel_size": Option("count", ("vllm",)),
    "data_parallel_size": Option("count", ("vllm",)),
    "gpu_memory_utilization": Option("share", ("vllm",)),
    "max_num_seqs": Option("count", ("vllm",)),
    "max_num_batched_tokens": Option("count", ("vllm",)),
    "enforce_eager": Option("flag", ("vllm",)),
    "enable_prefix_caching": Option("flag", ("vllm",)),
    "parallelize": Option("flag", ("hf",)),
    "attn_implementation": Option("text", ("hf",)),
}
_KINDS = {
    "count": ("a whole number from 1 up", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1),
    "share": ("a number above 0 and up to 1", lambda v: _is_number(v) and 0 < v <= 1),
    "flag": ("true or false", lambda v: isinstance(v, bool)),
    "text": ("a non-empty string", lambda v: isinstance(v, str) and bool(v.strip())),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_options(options: Any) -> None:
    """Refuse an unknown name or a value of the wrong kind. Raises `BadInput`."""
    if not isinstance(options, dict):
        raise BadInput(f"`backend_options` must be a mapping, found {shown(options)}.")
    for name, value in options.items():
        if name not in OPTIONS:
            raise BadInput(f"`backend_options` has the unknown option `{name}`; it may have {', '.join(OPTIONS)}.")
        words, fits = _KINDS[OPTIONS[name].kind]
        if not fits(value):
            raise BadInput(f"`backend_options`: `{name}` must be {words}, found {shown(value)}.")


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
