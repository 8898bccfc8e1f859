"""Maths and code: word problems with worked steps, and small functions; both drawn from a few thousand million.

A problem's answer ends in `#### NUMBER`, as GSM8K's does. A function takes one argument; what it returns in each case
is computed by running the right answer, which is ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.miniature.items import Item

# fmt: off
NAMES = ("Ann", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Liam", "Mona",
         "Noah", "Olga", "Peter", "Rosa", "Sam", "Tina", "Victor")
THINGS = ("apples", "books", "stickers", "marbles", "pencils", "coins", "shells", "cards", "balloons", "cookies",
          "stamps", "flowers", "candles", "oranges", "buttons", "toys")
# fmt: on


@dataclass(frozen=True)
class _Problem:
    """A question and its worked steps, with slots {a} {b} names, {x} things, {p} {q} {r} numbers, and `steps`' results.

    numbers  the range of each of p, q, r
    steps    expressions of p, q, r and of earlier results s1, s2, ...; the last is the answer
    works    one sentence a step, in which {e} is the expression with its numbers and {v} its value
    """

    question: str
    numbers: tuple[tuple[int, int], ...]
    steps: tuple[str, ...]
    works: tuple[str, ...]
    fits: Callable[[Sequence[int]], bool] = lambda _values: True


def _none_negative(values: Sequence[int]) -> bool:
    return min(values) > 0


PROBLEMS: dict[str, _Problem] = {
    "more and less": _Problem(
        "{a} has {p} {x}. {b} gives {a} {q} more {x}. Then {a} loses {r} of them. How many {x} does {a} have now?",
        ((5, 40), (3, 30), (2, 20)), ("{p} + {q}", "{s1} - {r}"),
        ("With the new ones {a} has {e} = {v} {x}.", "After losing some {a} has {e} = {v} {x}."), _none_negative),
    "boxes": _Problem(
        "A box holds {p} {x}. {a} buys {q} boxes and gives {r} {x} to {b}. How many {x} does {a} keep?",
        ((3, 12), (2, 9), (2, 15)), ("{p} * {q}", "{s1} - {r}"),
        ("The boxes hold {e} = {v} {x}.", "{a} keeps {e} = {v} {x}."), _none_negative),
    "wages": _Problem(
        "{a} earns {p} dollars an hour. {a} works {q} hours and then spends {r} dollars. How many dollars are left?",
        ((6, 20), (2, 9), (3, 30)), ("{p} * {q}", "{s1} - {r}"),
        ("{a} earns {e} = {v} dollars.", "Then {e} = {v} dollars are left."), _none_negative),
    "times as many": _Problem(
        "{a} has {p} {x}. {b} has {q} times as many. How many {x} do they have together?",
        ((3, 25), (2, 6), (1, 1)), ("{p} * {q}", "{p} + {s1}"),
        ("{b} has {e} = {v} {x}.", "Together they have {e} = {v} {x}.")),
    "pages": _Problem(
        "A book has {r} pages. {a} reads {p} pages a day for {q} days. How many pages are left to read?",
        ((5, 20), (2, 8), (90, 200)), ("{p} * {q}", "{r} - {s1}"),
        ("{a} reads {e} = {v} pages.", "There are {e} = {v} pages left."), _none_negative),
    "change": _Problem(
        "{a} buys {q} {x} for {p} dollars each and pays with {r} dollars. How many dollars does {a} get back?",
        ((2, 9), (2, 9), (82, 100)), ("{p} * {q}", "{r} - {s1}"),
        ("The {x} cost {e} = {v} dollars.", "{a} gets {e} = {v} dollars back.")),
    "ages": _Problem(
        "{a} is {p} years old. {b} is {q} years older than {a}. How old will {b} be in {r} years?",
        ((5, 40), (2, 20), (2, 15)), ("{p} + {q}", "{s1} + {r}"),
        ("{b} is {e} = {v} years old.", "In the future {b} will be {e} = {v} years old.")),
    "three days": _Problem(
        "A shop sells {p} {x} on Monday, {q} more than that on Tuesday, and {r} {x} on Wednesday. How many {x} does it "
        "sell in the three days?",
        ((5, 40), (2, 20), (2, 40)), ("{p} + {q}", "{p} + {s1}", "{s2} + {r}"),
        ("On Tuesday it sells {e} = {v} {x}.", "On both days it sells {e} = {v} {x}.",
         "In all it sells {e} = {v} {x}.")),
    "sharing": _Problem(
        "{a} has {q} bags with {p} {x} each and finds {r} more {x}. How many {x} does {a} have?",
        ((3, 12), (2, 9), (2, 20)), ("{q} * {p}", "{s1} + {r}"),
        ("The bags hold {e} = {v} {x}.", "In all {a} has {e} = {v} {x}.")),
    "distance": _Problem(
        "{a} rides {p} miles an hour for {q} hours. {b} rides {r} miles. How many miles more does {a} ride than {b}?",
        ((6, 20), (2, 6), (2, 11)), ("{p} * {q}", "{s1} - {r}"),
        ("{a} rides {e} = {v} miles.", "That is {e} = {v} miles more."), _none_negative),
}  # fmt: skip


def word_problem(rng: random.Random, name: str | None = None) -> Item:
    """A word problem of kind `name` or of any; what makes it a problem of its own is its kind and its numbers."""
    name = name or rng.choice(list(PROBLEMS))
    problem, (a, b) = PROBLEMS[name], rng.sample(NAMES, 2)
    while True:
        numbers = dict(zip("pqr", (rng.randint(*span) for span in problem.numbers), strict=True))
        words, values, lines = {"a": a, "b": b, "x": rng.choice(THINGS)}, list[int](), list[str]()
        for i, (step, work) in enumerate(zip(problem.steps, problem.works, strict=True), start=1):
            expression = step.format(**numbers, **{f"s{j}": v for j, v in enumerate(values, start=1)})
            values.append(_value(expression))
            lines.append(work.format(e=expression, v=values[i - 1], **words))
        if problem.fits(values):
            break
    key = f"maths {name} {sorted(numbers.items())}"
    right = " ".join(lines) + f"\n#### {values[-1]}"
    return Item(
        "maths", name, key, problem.question.format(**numbers, **words), right, "", grading={"number": str(values[-1])}
    )


def _value(expression: str) -> int:
    """Of `a + b`, `a - b` or `a * b`."""
    left, sign, right = expression.split()
    a, b = int(left), int(right)
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


_LISTS: tuple[Any, ...] = ([3, 1, 4, 1, 5], [10, -2, 7], [2, 2, 9, 8, 6, 30], [], [15], [-5, -1, 0, 12])
_WORDS: tuple[Any, ...] = ("hello world", "banana", "The quick brown fox", "", "A", "level up now")
_NUMBERS: tuple[Any, ...] = (0, 1, 7, 12, 25, 100)


@dataclass(frozen=True)
class _Function:
    """A request, a name and a body, with slots {n} {m} numbers and {c} {d} letters; `cases`: what it is called with."""

    asked: str
    name: str
    argument: str
    body: str
    cases: tuple[Any, ...]


FUNCTIONS: dict[str, _Function] = {
    "scale and shift": _Function("multiplies a number by {n} and adds {m}", "times_{n}_plus_{m}", "x",
                                 "return x * {n} + {m}", _NUMBERS),
    "remainder": _Function("returns the remainder of a number plus {m} when divided by {n}", "plus_{m}_modulo_{n}", "x",
                           "return (x + {m}) % {n}", _NUMBERS),
    "divisible": _Function("returns whether a number minus {m} is divisible by {n}", "minus_{m}_divisible_by_{n}", "x",
                           "return (x - {m}) % {n} == 0", _NUMBERS),
    "above": _Function("returns the numbers of a list that are greater than {n}, each plus {m}", "above_{n}_plus_{m}",
                       "numbers", "return [x + {m} for x in numbers if x > {n}]", _LISTS),
    "sum above": _Function("returns the sum of the numbers of a list that are greater than {n}, plus {m}",
                           "sum_above_{n}_plus_{m}", "numbers",
                           "return sum(x for x in numbers if x > {n}) + {m}", _LISTS),
    "count multiples": _Function("counts how many numbers of a list are multiples of {n} and adds {m}",
                                 "count_multiples_of_{n}_plus_{m}", "numbers",
                                 "return sum(1 for x in numbers if x % {n} == 0) + {m}", _LISTS),
    "scale all": _Function("multiplies every number of a list by {n} and subtracts {m}", "all_times_{n}_minus_{m}",
                           "numbers", "return [x * {n} - {m} for x in numbers]", _LISTS),
    "first sorted": _Function("returns the {n} smallest numbers of a list, each plus {m}", "smallest_{n}_plus_{m}",
                              "numbers", "return [x + {m} for x in sorted(numbers)[:{n}]]", _LISTS),
    "count letter": _Function("counts how often the letter {c} or the letter {d} appears in a text",
                              "count_{c}_or_{d}", "text", 'return text.count("{c}") + text.count("{d}")', _WORDS),
    "replace letter": _Function("replaces every letter {c} of a text by {d}", "replace_{c}_by_{d}", "text",
                                'return text.replace("{c}", "{d}")', _WORDS),
    "repeat": _Function("repeats a text {n} times and adds the letter {c} at the end", "repeat_{n}_times_add_{c}",
                        "text", 'return text * {n} + "{c}"', _WORDS),
    "shorten": _Function("returns the first {n} letters of a text followed by the letter {c}", "first_{n}_add_{c}",
                         "text", 'return text[:{n}] + "{c}"', _WORDS),
    "backwards": _Function("turns a text around and puts the letter {c} in front and {d} at the end",
                           "turn_around_{c}_{d}", "text", 'return "{c}" + text[::-1] + "{d}"', _WORDS),
    "long words": _Function("returns the words of a text that have more than {n} letters, without the letter {c}",
                            "words_longer_than_{n}_without_{c}", "text",
                            'return [w.replace("{c}", "") for w in text.split() if len(w) > {n}]', _WORDS),
}  # fmt: skip
WORDINGS = (
    "Write a Python function {name}({argument}) that {asked}. Answer with the code alone.",
    "I need a Python function called {name} with one argument {argument}. It {asked}. Give only the code.",
    "Implement {name}({argument}) in Python: it {asked}. Reply with the code only.",
)


def small_function(rng: random.Random, kind: str | None = None) -> Item:
    """A request for a function of `kind` or of any; kind, numbers and letters make it one of its own."""
    kind = kind or rng.choice(list(FUNCTIONS))
    function, (c, d) = FUNCTIONS[kind], rng.sample("abdefghilmnoprstuw", 2)
    # Two numbers or one number and a letter: of each kind some hundred functions, a tenth of which are test items.
    most = 30 if "{m}" in function.name else 16
    slots = {"n": rng.randint(2, most), "m": rng.randint(1, most), "c": c, "d": d}
    name, asked, body = (text.format(**slots) for text in (function.name, function.asked, function.body))
    right = f"def {name}({function.argument}):\n    {body}"
    prompt = rng.choice(WORDINGS).format(name=name, argument=function.argument, asked=asked)
    found: dict[str, Any] = {}
    exec(right, found)  # our own line
    cases = [[case, found[name](case)] for case in function.cases]
    return Item(
        "code", kind, f"code {kind} {name}", prompt, right, "", grading={"python": name, "kwargs": {"cases": cases}}
    )
