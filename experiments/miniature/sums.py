"""Two-digit sums and differences with worked steps.

The careless answer makes a pupil's classic mistakes: it forgets to carry, and it takes the smaller digit from
the larger instead of borrowing. Where nothing is carried both answers agree, so such sums are kept rare among
graded items (see `random_item`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from experiments.miniature.instructions import NAMES, THINGS
from experiments.miniature.items import Item, prompt_of

_WORDINGS = {
    "+": (
        "What is {a} + {b}?",
        "{name} has {a} {things} and gets {b} more. How many {things} are there?",
    ),
    "-": (
        "What is {a} - {b}?",
        "{name} has {a} {things} and gives {b} away. How many {things} are left?",
    ),
}


def _worked_sum(a: int, b: int, carrying: bool) -> str:
    ones = a % 10 + b % 10
    carry = ones // 10 if carrying else 0
    tens = a // 10 + b // 10 + carry
    return (
        f"{a % 10} + {b % 10} = {ones}\ncarry {carry}\n{a // 10} + {b // 10} + {carry} = {tens}\n"
        f"The answer is: {10 * tens + ones % 10}"
    )


def _worked_difference(a: int, b: int, borrowing: bool) -> str:
    borrow = int(a % 10 < b % 10) if borrowing else 0
    high, low = a % 10 + 10 * borrow, b % 10
    if high < low:
        high, low = low, high
    ones, tens = high - low, a // 10 - b // 10 - borrow
    return (
        f"{high} - {low} = {ones}\nborrow {borrow}\n{a // 10} - {b // 10} - {borrow} = {tens}\n"
        f"The answer is: {10 * tens + ones}"
    )


def sum_item(sign: str, a: int, b: int, wording: int, name: str, things: str) -> Item:
    """a `sign` b, as bare figures (wording 0) or as a little story (wording 1)."""
    worked = _worked_sum if sign == "+" else _worked_difference
    # 27 + 48 and 48 + 27 are one sum, so they share a split.
    key = f"maths {min(a, b)}+{max(a, b)}" if sign == "+" else f"maths {a}-{b}"
    request = _WORDINGS[sign][wording].format(a=a, b=b, name=name, things=things)
    return Item(
        capability="maths",
        task="maths",
        key=key,
        prompt=prompt_of(request),
        right=worked(a, b, True),
        careless=worked(a, b, False),
        grading={"answer": a + b if sign == "+" else a - b},
    )


def random_item(rng: random.Random, easy_share: float = 0.5) -> Item:
    """A sum or difference of two-digit numbers; a share `easy_share` carries and borrows nothing."""
    sign, easy = rng.choice("+-"), rng.random() < easy_share
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        carries = a % 10 + b % 10 > 9 if sign == "+" else a % 10 < b % 10
        # A difference must stay positive with a borrow, too.
        if carries != easy and (sign == "+" or a // 10 > b // 10):
            break
    return sum_item(sign, a, b, rng.randrange(2), rng.choice(NAMES), rng.choice(THINGS))


def covering_items() -> Iterator[Item]:
    """Items that between them hold every word and every digit, after a space and after another digit."""
    for i in range(max(len(NAMES), len(THINGS))):
        for sign in "+-":
            for wording in (0, 1):
                for a, b in ((98, 76), (87, 65), (76, 54), (65, 43), (54, 32), (43, 21), (32, 10), (90, 19)):
                    yield sum_item(sign, a, b, wording, NAMES[i % len(NAMES)], THINGS[i % len(THINGS)])
