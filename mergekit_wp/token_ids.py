"""The tokenizers of two models side by side, from their files.

A merge mixes row i of one model's embeddings with row i of another's, and scores come from prompts that the base's
tokenizer has cut: both take it that an id means the same token in both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_wp.errors import BadInput, reason_of

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
_SHOWN = 3


@dataclass(frozen=True)
class Differences:
    """What an expert's tokenizer has otherwise than the base's.

    moved    tokens of both under other ids: token -> (id in the base, id in the expert)
    renamed  ids that stand for a token which the other model does not have: id -> (in the base, in the expert)
    own      tokens of the expert at ids that the base's tokenizer does not use
    """

    moved: dict[str, tuple[int, int]]
    renamed: dict[int, tuple[str, str]]
    own: list[str]


def differences(base: Path, expert: Path, rows: int) -> Differences | None:
    """Of the ids below `rows`, and of the expert's own above them; None where there is nothing to compare.

    Folders without a tokenizer, and tokenizers that transformers does not load without remote code, say nothing.
    """
    ours, theirs = load_other(base, expert)
    if ours is None or theirs is None:
        return None
    ids, other_ids = ours.get_vocab(), theirs.get_vocab()
    at, other_at = ({index: token for token, index in vocabulary.items()} for vocabulary in (ids, other_ids))
    in_order = sorted(at.items())
    moved = {
        token: (index, other_ids[token])
        for index, token in in_order
        if other_ids.get(token, index) != index and max(index, other_ids[token]) < rows
    }
    renamed = {
        index: (token, other_at[index])
        for index, token in in_order
        if index < rows and other_at.get(index, token) != token and not {token, other_at[index]} & moved.keys()
    }
    own = [token for index, token in sorted(other_at.items()) if index not in at and token not in ids]
    return Differences(moved, renamed, own)


def load_other(base: Path, expert: Path) -> tuple[Any, Any]:
    """Both tokenizers; (None, None) where the files are the same, or one does not load."""
    if all(_content(base / name) == _content(expert / name) for name in _FILES):
        return None, None
    try:
        loaded = tokenizer_in(base), tokenizer_in(expert)
    except BadInput:  # whoever needs this tokenizer says what is wrong with it
        return None, None
    return loaded if all(each is not None for each in loaded) else (None, None)


def listed(tokens: Iterable[str]) -> str:
    """The first few of some tokens, quoted."""
    tokens = list(tokens)
    return ", ".join(map(repr, tokens[:_SHOWN])) + (", ..." if len(tokens) > _SHOWN else "")


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def tokenizer_in(folder: Path, remote_code: bool = False) -> Any:
    """The tokenizer of a folder; None where the folder has none. Raises `BadInput` when it does not load."""
    has_one = any((folder / name).is_file() for name in _FILES)
    return load_tokenizer(str(folder), folder, remote_code) if has_one else None


def load_tokenizer(name: str, folder: Path, remote_code: bool) -> Any:
    """The tokenizer of the model that the user calls `name`. Raises `BadInput` when there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=remote_code)
    except Exception as error:  # transformers and tokenizers raise many types; each means "not a usable tokenizer"
        raise BadInput(f"{name}: its tokenizer could not be loaded ({reason_of(error)}).") from error
