"""Prompts that models were scored or fitted on and that are items of the suite too: there, items are not new.

An item is among the prompts if one of them is what the task asks, or any one text of the item as the data set has it
(the question without the task's frame around it), but for space at both ends. What is merely alike is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergekit_wp.eval.tasks import ReadyTask
from mergekit_wp.scoring.pairs import read_pairs


def read_prompts(files: Iterable[str]) -> dict[str, set[str]]:
    """The prompts of pairs files, by file. Raises `BadInput` for one that is none."""
    return {file: {pair.prompt.strip() for pair in read_pairs(file)} for file in files}


def seen_items(tasks: Sequence[ReadyTask], prompts: Mapping[str, set[str]]) -> dict[str, dict[str, Any]]:
    """Of each column with items among the prompts, what `measured` is to say: the files by name, how many, of how many.

    Of items that a `--limit` leaves out, too.
    """
    found = {}
    for task in tasks if prompts else ():
        items = [set(_texts(leaf, item)) for leaf in task.loaded["tasks"].values() for item in leaf.eval_docs]
        seen = [{file for file, texts in prompts.items() if not texts.isdisjoint(item)} for item in items]
        if files := sorted(map(os.path.basename, set().union(*seen))):
            found[task.spec.column] = {"files": files, "seen": sum(map(bool, seen)), "items": len(items)}
    return found


def _texts(leaf: Any, item: Mapping[str, Any]) -> Iterator[str]:
    for text in (*item.values(), leaf.doc_to_text(item)):
        if isinstance(text, str) and text.strip():
            yield text.strip()
