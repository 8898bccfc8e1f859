"""The two ends of a model that its vocabulary rules: embeddings and output head, and whether these are one tensor.

What config.json says of the two (`tie_word_embeddings`) and what a checkpoint stores may contradict each other. What
counts is what transformers 5 computes with (`modeling_utils.tie_weights`):

    config says    stored                     the head is
    tied           one of the two             the embeddings
    tied           two of equal values        the embeddings
    tied           two that differ            a tensor of its own (vLLM and transformers 4 leave it out)
    apart          both                       a tensor of its own
    apart          one of the two             random numbers: refused here

Rows: an expert may have more than its base (added tokens, padding to a multiple of 64) or fewer (padding cut off).
Scores are read off the rows that both have; a merge has the base's rows, and an expert has changed nothing in those
that it does not have (`align_rows`).

Tokenizers of two models side by side, from their files (`differences`): a merge mixes row i of one model's embeddings
with row i of another's, and scores come from prompts that the base's tokenizer has cut: both take it that an id means
the same token in both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_wp.checkpoint import model_config as modelconfig
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.errors import BadInput, reason_of
from mergekit_wp.geometry import SUPPORTED

_EMBEDDINGS, _HEAD = "embed_tokens.weight", "lm_head.weight"  # what their names end in
_ROWS = 1024  # compared at a time


def says_tied(checkpoint: Checkpoint) -> bool:
    """What the config says, as its class reads it.

    Where the file leaves the field out, the class decides (Gemma's heads are tied); of a wrapper, some classes take the
    language model's word where their own is no (Llava). Raises `BadInput` for a config that no class reads.
    """
    said = checkpoint.config.get("tie_word_embeddings")
    if said is None or _known(checkpoint):
        return modelconfig.says_tied(checkpoint.config, str(checkpoint.folder / "config.json"))
    return bool(said)


def head_equals_embeddings(checkpoint: Checkpoint) -> bool:
    """Whether the head computes with the values of the embeddings, be they stored once or twice.

    Raises `BadInput` when one of the two is missing and the config does not say that they are one.
    """
    embeddings, head = embeddings_of(checkpoint), head_of(checkpoint)
    if embeddings and head:
        return _equal(checkpoint, embeddings, head)
    if (embeddings or head) and _known(checkpoint) and not says_tied(checkpoint):
        raise BadInput(
            f"{checkpoint.name}: stores {embeddings or head} without {_HEAD if embeddings else _EMBEDDINGS}, "
            "and its config does not say that head and embeddings are one tensor; if they are, set "
            "`tie_word_embeddings: true` in its config.json, else download it again."
        )
    return True


def head_is_tied(checkpoint: Checkpoint) -> bool:
    """Whether head and embeddings are one tensor in the loaded model. Raises as `head_equals_embeddings`."""
    return says_tied(checkpoint) and head_equals_embeddings(checkpoint)


def head_against_config(checkpoint: Checkpoint) -> str | None:
    """One sentence about a head of its own in a model whose config says that it has none; None where all agrees.

    Raises as `head_equals_embeddings`.
    """
    if head_equals_embeddings(checkpoint) or not _known(checkpoint) or not says_tied(checkpoint):
        return None
    return (
        f"{checkpoint.name}: its config says that head and embeddings are one tensor (tie_word_embeddings), and it "
        f"stores a {head_of(checkpoint)} that differs from {embeddings_of(checkpoint)}, which transformers uses and "
        "vLLM leaves out; set `tie_word_embeddings: false` in its config.json, or remove that tensor."
    )


def align_rows(tensor_V: torch.Tensor, base_V: torch.Tensor) -> torch.Tensor:
    """An expert's embeddings or head [V', ...] with the rows of the base's [V, ...]: cut, or completed from them."""
    missing = len(base_V) - len(tensor_V)
    return torch.cat([tensor_V, base_V[len(tensor_V) :]]) if missing > 0 else tensor_V[: len(base_V)]


def _known(checkpoint: Checkpoint) -> bool:
    """How other architectures name and tie theirs is not known here; wp-eval and foreign merges see those too."""
    return (checkpoint.config.get("architectures") or [None])[0] in SUPPORTED


def embeddings_of(checkpoint: Checkpoint) -> str | None:
    """The name of the stored embeddings; None where there are none."""
    return _find(checkpoint, _EMBEDDINGS)


def head_of(checkpoint: Checkpoint) -> str | None:
    """The name of the stored output head; None where there is none."""
    return _find(checkpoint, _HEAD)


def _find(checkpoint: Checkpoint, last: str) -> str | None:
    return next((name for name in checkpoint.tensors if f".{name}".endswith(f".{last}")), None)


def _equal(checkpoint: Checkpoint, embeddings: str, head: str) -> bool:
    """Whether two stored matrices hold equal numbers, whatever their dtypes."""
    one, other = checkpoint.tensors[embeddings], checkpoint.tensors[head]
    if one.shape != other.shape:
        return False
    parts = (slice(start, start + _ROWS) for start in range(0, one.shape[0], _ROWS))
    return all(_equal_values(one.part(embeddings, rows), other.part(head, rows)) for rows in parts)


def _equal_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.dtype == other.dtype
    return torch.equal(one, other) if same else torch.equal(one.double(), other.double())


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
    return load_tokenizer(str(folder), folder, remote_code) if has_tokenizer(folder) else None


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a file of a tokenizer in a folder."""
    return any((folder / name).is_file() for name in _FILES)


def load_tokenizer(name: str, folder: Path, remote_code: bool) -> Any:
    """The tokenizer of the model that the user calls `name`. Raises `BadInput` when there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=remote_code)
    except Exception as error:  # transformers and tokenizers raise many types; each means "not a usable tokenizer"
        raise BadInput(f"{name}: its tokenizer could not be loaded ({reason_of(error)}).") from error
