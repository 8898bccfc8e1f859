"""The word lists of NLTK that graders read; lm-eval misses them only when all answers are there."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from mergekit_wp.errors import BadInput

_TOKENIZER_DATA = "punkt_tab"


def check_word_lists(task: str, folders: Iterable[Path]) -> None:
    """Whether NLTK has what the Python in these folders, a task's own, asks for. Raises `BadInput`."""
    if not any(map(_asks_for_it, folders)):
        return
    import nltk

    try:
        nltk.data.find(f"tokenizers/{_TOKENIZER_DATA}/english/")
    except LookupError as error:
        raise BadInput(
            f"task {task}: its grader needs NLTK's {_TOKENIZER_DATA}, which is in none of NLTK's folders; run "
            f"`python -m nltk.downloader {_TOKENIZER_DATA}` where there is network (NLTK_DATA names another folder)."
        ) from error


@lru_cache
def _asks_for_it(folder: Path) -> bool:
    return any(_TOKENIZER_DATA in file.read_text(encoding="utf-8", errors="replace") for file in folder.glob("*.py"))
