"""Prompts against the model's context length: lm-eval cuts what does not fit, from the left and without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's, in its order
DEFAULT_MAX_GEN_TOKS = 256  # what lm-eval's backends take where a task names none


def answer_tokens(gen_kwargs: Mapping[str, Any] | None) -> int:
    """How many tokens an answer may have under these generation settings."""
    named = ((gen_kwargs or {}).get(name) for name in _LENGTH_NAMES)
    return int(next((value for value in named if value is not None), DEFAULT_MAX_GEN_TOKS))


def context_length(config: Any, tokenizer: Any) -> int:
    """The model's own limit in tokens, as lm-eval finds it."""
    from lm_eval.models.utils import DEFAULT_MAX_LENGTH, resolve_max_length

    return resolve_max_length(config, tokenizer, default=DEFAULT_MAX_LENGTH)


def count_cut(lm: Any, leaves: list[Any], backend: str) -> int:
    """How many items of tasks just evaluated had a prompt cut: prompt and answer did not fit into the context."""
    return sum(len({r.doc_id for r in leaf.instances if _does_not_fit(lm, r, backend)}) for leaf in leaves)


def _does_not_fit(lm: Any, request: Any, backend: str) -> bool:
    if request.request_type == "generate_until":
        text, room = request.args[0], lm.max_length - answer_tokens(request.args[1])
    elif request.request_type == "loglikelihood":
        # The last token is only predicted; vLLM makes one more and throws it away.
        text, room = "".join(request.args[:2]), lm.max_length + (1 if backend == "hf" else -1)
    else:
        return False
    # A token covers a byte at least, so a short text fits without being counted; two are special ones.
    return len(text.encode()) + 2 > room and len(lm.tok_encode(text)) > room
