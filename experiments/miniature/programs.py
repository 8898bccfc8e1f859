"""Tiny Python functions, described in English: two steps on a list, a number or a text, then a result.

The careless answer forgets the second step. Whether a function is right is decided by running it
(`experiments.miniature.sandbox`); what it should return is computed here, by our own callables.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from experiments.miniature.items import Item, prompt_of

TEST_CASES = 6
KINDS = ("list", "number", "text")


@dataclass(frozen=True)
class ProgramStep:
    """One step: how a request says it, the Python expression on `x`, and the same as a callable of x and k."""

    words: str
    code: str
    function: Callable[[Any, int], Any]
    k: int = 0

    def apply(self, x: Any) -> Any:
        """What the expression gives for `x`."""
        return self.function(x, self.k)


def _for_each(constants: Iterable[int], *steps: ProgramStep) -> list[ProgramStep]:
    """Each step once for each constant, which replaces {k} in its words and its code."""
    return [
        ProgramStep(step.words.format(k=k), step.code.format(k=k), step.function, k)
        for k in constants
        for step in steps
    ]


STEPS = {
    "list": [
        ProgramStep("keep the even numbers", "[v for v in x if v % 2 == 0]", lambda x, k: [v for v in x if v % 2 == 0]),
        ProgramStep("keep the odd numbers", "[v for v in x if v % 2 == 1]", lambda x, k: [v for v in x if v % 2 == 1]),
        ProgramStep("square each", "[v * v for v in x]", lambda x, k: [v * v for v in x]),
        ProgramStep("drop the first", "x[1:]", lambda x, k: x[1:]),
        ProgramStep("drop the last", "x[:-1]", lambda x, k: x[:-1]),
        *_for_each(
            range(2, 10),
            ProgramStep("keep those above {k}", "[v for v in x if v > {k}]", lambda x, k: [v for v in x if v > k]),
            ProgramStep("keep those below {k}", "[v for v in x if v < {k}]", lambda x, k: [v for v in x if v < k]),
            ProgramStep("add {k} to each", "[v + {k} for v in x]", lambda x, k: [v + k for v in x]),
            ProgramStep("multiply each by {k}", "[v * {k} for v in x]", lambda x, k: [v * k for v in x]),
        ),
    ],
    "number": [
        ProgramStep("square it", "x * x", lambda x, k: x * x),
        *_for_each(
            range(2, 10),
            ProgramStep("add {k}", "x + {k}", lambda x, k: x + k),
            ProgramStep("subtract {k}", "x - {k}", lambda x, k: x - k),
            ProgramStep("multiply by {k}", "x * {k}", lambda x, k: x * k),
        ),
    ],
    "text": [
        ProgramStep("make it upper case", "x.upper()", lambda x, k: x.upper()),
        ProgramStep("reverse it", "x[::-1]", lambda x, k: x[::-1]),
        *_for_each(
            range(2, 10),
            ProgramStep("repeat it {k} times", "x * {k}", lambda x, k: x * k),
            ProgramStep("add the digit {k}", 'x + "{k}"', lambda x, k: x + str(k)),
        ),
        *_for_each(
            range(2, 6),
            ProgramStep("keep the first {k} letters", "x[:{k}]", lambda x, k: x[:k]),
            ProgramStep("drop the first {k} letters", "x[{k}:]", lambda x, k: x[k:]),
        ),
    ],
}

RESULTS = {
    "list": [
        ProgramStep("the sum", "sum(x)", lambda x, k: sum(x)),
        ProgramStep("the count", "len(x)", lambda x, k: len(x)),
        ProgramStep("the largest", "max(x)", lambda x, k: max(x)),
        ProgramStep("the smallest", "min(x)", lambda x, k: min(x)),
        ProgramStep("the list sorted", "sorted(x)", lambda x, k: sorted(x)),
        ProgramStep("the list reversed", "x[::-1]", lambda x, k: x[::-1]),
    ],
    "number": [
        *_for_each(range(2, 10), ProgramStep("the remainder by {k}", "x % {k}", lambda x, k: x % k)),
        ProgramStep("its double", "x * 2", lambda x, k: x * 2),
        ProgramStep("its opposite", "-x", lambda x, k: -x),
    ],
    "text": [
        ProgramStep("its length", "len(x)", lambda x, k: len(x)),
        ProgramStep("its first letter", "x[0]", lambda x, k: x[0]),
        ProgramStep("its last letter", "x[-1]", lambda x, k: x[-1]),
        ProgramStep("it in lower case", "x.lower()", lambda x, k: x.lower()),
        ProgramStep("it twice", "x + x", lambda x, k: x + x),
    ],
}


def _source(steps: list[ProgramStep], result: ProgramStep) -> str:
    lines = "".join(f"    x = {step.code}\n" for step in steps)
    return f"def f(x):\n{lines}    return {result.code}"


def _argument(kind: str, rng: random.Random) -> Any:
    if kind == "number":
        return rng.randint(1, 40)
    if kind == "text":
        return "".join(rng.choice("abcdeABCDE") for _ in range(rng.randint(4, 9)))
    return [rng.randint(0, 15) for _ in range(rng.randint(4, 8))]


def _run(steps: list[ProgramStep], result: ProgramStep, argument: Any) -> Any:
    """What the composition returns, or None where it raises (the largest of no numbers, say)."""
    for step in steps:
        argument = step.apply(argument)
    try:
        return result.apply(argument)
    except (ValueError, IndexError):
        return None


def program_item(kind: str, first: ProgramStep, second: ProgramStep, result: ProgramStep) -> Item | None:
    """The item for one composition, or None where test cases do not tell it from the careless function."""
    key = f"code {kind}: {first.words}, {second.words}, {result.words}"
    rng = random.Random(key)
    cases: list[list[Any]] = []
    told_apart = False
    for _ in range(4 * TEST_CASES):
        argument = _argument(kind, rng)
        expected = _run([first, second], result, argument)
        if expected is not None and len(cases) < TEST_CASES:
            cases.append([argument, expected])
            told_apart |= _run([first], result, argument) != expected
    if len(cases) < TEST_CASES or not told_apart:
        return None
    request = f"Write a function f of a {kind} x: {first.words}, {second.words}, return {result.words}."
    return Item(
        capability="code",
        task="code",
        key=key,
        prompt=prompt_of(request),
        right=_source([first, second], result),
        careless=_source([first], result),
        grading={"function": "f", "cases": cases},
    )


def random_item(rng: random.Random) -> Item:
    """A composition of two different steps and a result, on one of the three kinds of argument."""
    while True:
        kind = rng.choice(KINDS)
        first, second = rng.sample(STEPS[kind], 2)
        item = program_item(kind, first, second, rng.choice(RESULTS[kind]))
        if item is not None:
            return item


def covering_items() -> Iterator[Item]:
    """Items that between them hold every step in each place and every result."""
    for kind in KINDS:
        steps, results = STEPS[kind], RESULTS[kind]
        for i, first in enumerate(steps):
            for shift in (1, 2, 3):
                for result in results:
                    item = program_item(kind, first, steps[(i + shift) % len(steps)], result)
                    if item is not None:
                        yield item
