"""The word lists of NLTK that graders read; lm-eval misses them only when all answers are there."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from mergekit_wp.scoring.graders import check_punkt

_TOKENIZER_DATA = "punkt_tab"


def check_word_lists(task: str, folders: Iterable[Path]) -> None:
    """Whether NLTK has what the Python in these folders, a task's own, asks for. Raises `BadInput`."""
    if any(map(_asks_for_it, folders)):
        check_punkt(f"task {task}: its grader")


@lru_cache
def _asks_for_it(folder: Path) -> bool:
    return any(_TOKENIZER_DATA in file.read_text(encoding="utf-8", errors="replace") for file in folder.glob("*.py"))
