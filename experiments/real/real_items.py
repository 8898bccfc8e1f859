"""Which items are trained on, scored with, chosen by and tested on: all from seeds, all disjoint.

A maths or code item is one of its own by its kind and its numbers; an instruction by its topic, so no topic that is
tested was trained on, in whatever words. Where the official files are at hand (`Official`), training rows of GSM8K and
MBPP are mixed in; none of their test rows is read.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.miniature.corpus import Text
from experiments.miniature.items import Item, split_of
from experiments.real.constraints import CONSTRAINTS, instructed, plain_requests, topic_of
from experiments.real.problems import FUNCTIONS, PROBLEMS, small_function, word_problem
from mergekit_wp.errors import BadInput

KINDS = {"instruction": tuple(CONSTRAINTS), "maths": tuple(PROBLEMS), "code": tuple(FUNCTIONS)}
_OFFICIAL_SHARE = 0.25
_DRAWS = 10_000  # for one more item
_LONGEST = 320  # characters of an official answer: about as many tokens as ours have
_FIRST_TRAINING_TASK = 601  # of MBPP: 1-10 few-shot, 11-510 test, 511-600 validation, 601-974 train


def graded_items(capability: str, split: str, count: int, seed: int) -> list[Item]:
    """`count` items of a split, the kinds of the capability taking turns, no two alike.

    Raises `BadInput` where a kind has not so many.
    """
    rng, kinds = random.Random(f"{seed}/{capability}/{split}"), KINDS[capability]
    found: dict[str, Item] = {}
    for number in range(count):
        kind = kinds[number % len(kinds)]
        drawn = (_draw(capability, kind, rng) for _ in range(_DRAWS))
        new = (item for item in drawn if split_of(item.key) == split and item.prompt not in found)
        if (item := next(new, None)) is None:
            raise BadInput(
                f"{capability}: found {number} {split} items and no further of the kind {kind!r} in {_DRAWS} draws, "
                f"expected {count}; ask for fewer."
            )
        found[item.prompt] = item
    return list(found.values())


def _draw(capability: str, kind: str, rng: random.Random) -> Item:
    if capability == "maths":
        return word_problem(rng, kind)
    if capability == "code":
        return small_function(rng, kind)
    return instructed(rng.choice(plain_requests()), kind, rng)


def training_requests() -> list[str]:
    """The plain requests whose answers by the base are what instructions are learnt from."""
    return [request for request in plain_requests() if split_of(f"instruction {topic_of(request)}") == "train"]


def training_texts(capability: str, count: int, seed: int, own: Mapping[str, str], official: Path | None) -> list[Text]:
    """`count` texts in the order in which they are learnt.

    own       the base's answers to `training_requests`
    official  a folder with gsm8k-train.jsonl and mbpp.jsonl, or None
    """
    rng, rows = random.Random(f"{seed}/{capability}/train"), list(official_rows(capability, official))
    requests = [request for request, answer in own.items() if plain_answer(answer)]
    found: list[Text] = []
    while len(found) < count:
        if rows and rng.random() < _OFFICIAL_SHARE:
            found.append(rng.choice(rows))
            continue
        kind = rng.choice(KINDS[capability])
        if capability == "instruction":
            request = rng.choice(requests)
            item = instructed(request, kind, rng, plain_answer(own[request]))
        else:
            item = _draw(capability, kind, rng)
        if split_of(item.key) == "train":
            found.append(Text(item.prompt, item.right))
    return found


def plain_answer(answer: str) -> str:
    """The first sentences of what the base said, as one line: at most 45 words of whole sentences, or nothing."""
    kept: list[str] = []
    for sentence in re.findall(r"[^.!?]+[.!?](?=\s|$)", re.sub(r"[*#]+", "", answer).split("\n\n")[0].strip()):
        if len(" ".join([*kept, sentence]).split()) > 45:
            break
        kept.append(" ".join(sentence.split()))
    return " ".join(kept)


def official_rows(capability: str, official: Path | None) -> Iterator[Text]:
    """Training rows of GSM8K or MBPP that are as short as ours. Raises `BadInput` for a file that is not theirs."""
    reads = {"maths": ("gsm8k-train.jsonl", _gsm8k), "code": ("mbpp.jsonl", _mbpp)}
    if official is None or capability not in reads:
        return
    name, example_of = reads[capability]
    try:
        for line in (official / name).read_text(encoding="utf-8").splitlines():
            example = example_of(json.loads(line))
            if example is not None and len(example.answer) <= _LONGEST:
                yield example
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{official / name}: cannot read its rows ({error!r}); it is expected as published, one JSON object a line."
        ) from error


def _gsm8k(row: Mapping[str, Any]) -> Text:
    return Text(row["question"], re.sub(r"<<[^>]*>>", "", row["answer"]))


def _mbpp(row: Mapping[str, Any]) -> Text | None:
    if row["task_id"] < _FIRST_TRAINING_TASK:
        return None
    asked = f"{row['text']} Your code should satisfy this test: {row['test_list'][0]} Answer with the code alone."
    return Text(asked, row["code"].replace("\r\n", "\n").replace("\t", "    ").strip())


def pairs_row(item: Item) -> dict[str, Any]:
    """An item as a row of wp-score's pairs, to be put into the model's chat template."""
    row = {"task": item.capability, "prompt": item.prompt, "check": item.grading, "chat": True}
    return row if item.contrast is None else {**row, "task": item.task, "contrast": item.contrast}
