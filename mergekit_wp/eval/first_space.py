"""Keep the first space of an answer under transformers, as vLLM does.

A Llama-style tokenizer writes a space as part of the word after it and leaves it out where a text begins. lm-eval
decodes an answer by itself, so one space is lost at its beginning; HumanEval's answers begin with an indentation,
and every program is then a syntax error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SPACE = "\u2581"  # how such tokenizers write a space within a token


def keep_first_space(lm: Any) -> None:
    """Make lm-eval's class for transformers decode answers as continuations; other tokenizers are left alone."""
    anchor = _anchor(lm.tokenizer)
    if anchor is None:
        return
    decode: Callable[..., str] = lm.tok_decode
    word = decode([anchor])

    def continued(tokens: Any, skip_special_tokens: bool = True) -> str:
        if not isinstance(tokens, list):
            return decode(tokens, skip_special_tokens=skip_special_tokens)
        return decode([anchor, *tokens], skip_special_tokens=skip_special_tokens).removeprefix(word)

    lm.tok_decode = continued


def _anchor(tokenizer: Any) -> int | None:
    """A token to put before an answer; None if this tokenizer loses no space."""
    words = ((token, i) for token, i in tokenizer.get_vocab().items() if token[:1] == _SPACE and token[1:].isalpha())
    anchor = next((i for _, i in sorted(words)), None)
    if anchor is None or tokenizer.decode([anchor]).startswith(" "):
        return None
    return anchor
