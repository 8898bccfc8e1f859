"""Which items a world trains on, is tested on and is scored with; all from seeds, all disjoint."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from experiments.miniature import instructions, programs, sums
from experiments.miniature.items import CAPABILITIES, Item, split_of

# Graded sums that carry nothing are rare, because there a careless answer is right by luck.
_EASY_SHARE = {"train": 0.5, "pairs": 0.0, "test": 0.1, "validation": 0.1}


@dataclass(frozen=True)
class Text:
    """One training sequence: the prompt and the answer to be learnt."""

    prompt: str
    answer: str


def stream(*parts: object) -> random.Random:
    """A generator of its own for each purpose, so that changing one leaves the others as they were."""
    return random.Random("/".join(map(str, parts)))


def _draw(make: Callable[[], Item], split: str, count: int) -> list[Item]:
    """`count` items of `split`, no two with the same key."""
    found: dict[str, Item] = {}
    while len(found) < count:
        item = make()
        if split_of(item.key) == split:
            found.setdefault(item.key, item)
    return list(found.values())


def graded_items(capability: str, split: str, count: int, seed: int) -> list[Item]:
    """`count` items of `split`, every task of the capability with the same share.

    Raises ValueError for an unknown capability.
    """
    rng = stream(seed, capability, split)
    if capability == "maths":
        easy = round(_EASY_SHARE[split] * count)
        return _draw(lambda: sums.random_item(rng, 1.0), split, easy) + _draw(
            lambda: sums.random_item(rng, 0.0), split, count - easy
        )
    if capability == "code":
        return _draw(lambda: programs.random_item(rng), split, count)
    if capability != "instruction":
        raise ValueError(f"unknown capability {capability!r}")
    share, rest = divmod(count, len(instructions.TYPES))
    items = []
    for i, name in enumerate(instructions.TYPES):
        items += _draw(partial(instructions.random_item, rng, name), split, share + (i < rest))
    return items


def scoring_items(capability: str, per_task: int, seed: int) -> list[Item]:
    """Prompts for `wp-score`: `per_task` for each task, from the split kept for them."""
    tasks = len(instructions.TYPES) if capability == "instruction" else 1
    return graded_items(capability, "pairs", per_task * tasks, seed)


def _training_item(capability: str, rng: random.Random, plain_share: float) -> Item:
    while True:
        if capability == "maths":
            item = sums.random_item(rng, _EASY_SHARE["train"])
        elif capability == "code":
            item = programs.random_item(rng)
        elif rng.random() < plain_share:
            item = instructions.plain_item(rng)
        else:
            item = instructions.random_item(rng)
        if split_of(item.key) == "train":
            return item


def training_texts(
    shares: dict[str, float], right: dict[str, float], plain_share: float, count: int, rng: random.Random
) -> list[Text]:
    """`count` training sequences.

    `shares` is how often each capability is drawn, `right` how often its answer is the right one rather than
    the careless one, `plain_share` how many of the requests of `instruction` carry no instruction at all.
    """
    names = [name for name in CAPABILITIES if shares.get(name, 0.0) > 0]
    weights = [shares[name] for name in names]
    texts = []
    for capability in rng.choices(names, weights, k=count):
        item = _training_item(capability, rng, plain_share)
        texts.append(Text(item.prompt, item.right if rng.random() < right[capability] else item.careless))
    return texts
