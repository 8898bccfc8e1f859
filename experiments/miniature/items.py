"""What every capability is made of: one request with its right and its careless answer, and the split it is in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

CAPABILITIES = ("instruction", "maths", "code")

# Of every ten request keys: one is for tests, one for validation, one for scoring prompts, the rest for training.
_SPLIT_OF_RESIDUE = ("test", "validation", "pairs") + ("train",) * 7


@dataclass(frozen=True)
class Item:
    """A request and its two answers.

    `key` identifies the request whatever its wording and decides its split; `right` shows the capability and
    `careless` is what a model without it says; `contrast` is the same prompt without the instruction, where
    there is one; `grading` holds what the grader needs, as JSON values.
    """

    capability: str
    task: str
    key: str
    prompt: str
    right: str
    careless: str
    contrast: str | None = None
    grading: dict[str, Any] = field(default_factory=dict)


def split_of(key: str) -> str:
    """The one split a request may appear in, from a hash of its key.

    It depends on nothing else, so no world, whatever its seed, trains on another world's test items.
    """
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return _SPLIT_OF_RESIDUE[digest[0] % len(_SPLIT_OF_RESIDUE)]


def prompt_of(request: str) -> str:
    """The exact text a model reads before it answers; its last token, the line break, is the anchor position."""
    return f"Request: {request}\nAnswer:\n"
