"""Built-in prompt sets for real models, drawn by seed in any number.

    instructions   six verifiable instruction types of IFEval, each with its contrast and IFEval's check
    maths          word problems, no contrast
    code           requests for a Python function, no contrast

All are requests as a user sends them, so they are marked as messages of a chat.

`python -m mergekit_wp.scoring.prompts instructions --samples 50 > pairs.jsonl` prints a draw as JSONL, to read or
to edit.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import asdict

import click

from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import echo
from mergekit_wp.scoring import requests as words
from mergekit_wp.scoring.pairs import Pair


def instruction_pairs(samples: int, seed: int) -> list[Pair]:
    """`samples` distinct pairs of each of the six instruction types; prompt = contrast + instruction."""
    pairs = []
    for task, wordings in words.INSTRUCTIONS.items():
        for request, remark, wording in _draw([words.REQUESTS, words.REMARKS, wordings], samples, seed, task):
            contrast = f"{request} {remark}".strip()
            check = {"ifeval": words.IFEVAL_TYPES[task], "kwargs": words.IFEVAL_ARGUMENTS.get(wording, {})}
            pairs.append(Pair(task, f"{contrast} {wording}", contrast, check, chat=True))
    return pairs


def maths_prompts(samples: int, seed: int) -> list[Pair]:
    """`samples` distinct word problems with seeded names and numbers."""
    random_source = random.Random(f"{seed}/maths")
    found: dict[str, None] = {}  # a set that keeps its order
    while len(found) < samples:
        name, other = random_source.sample(words.NAMES, 2)
        a = random_source.randint(60, 99)
        b, c, d = random_source.randint(11, 40), random_source.randint(3, 9), random_source.randint(2, 9)
        problem = random_source.choice(words.MATHS_PROBLEMS).format(
            name=name, other=other, thing=random_source.choice(words.THINGS), a=a, b=b, c=c, d=d
        )
        found[random_source.choice(words.MATHS_WORDINGS).format(problem=problem)] = None
    return [Pair("maths", prompt, chat=True) for prompt in found]


def code_prompts(samples: int, seed: int) -> list[Pair]:
    """`samples` distinct requests for a Python function."""
    drawn = _draw([words.CODE_TASKS, words.CODE_WORDINGS, words.REMARKS], samples, seed, "code")
    return [Pair("code", f"{wording.format(task=task)} {remark}".strip(), chat=True) for task, wording, remark in drawn]


BUILTIN: dict[str, Callable[[int, int], list[Pair]]] = {
    "instructions": instruction_pairs,
    "maths": maths_prompts,
    "code": code_prompts,
}


def _draw(choices: list[tuple[str, ...]], samples: int, seed: int, task: str) -> list[tuple[str, ...]]:
    combinations = list(itertools.product(*choices))
    if samples > len(combinations):
        raise BadInput(f"samples: {samples} asked for, the built-in set {task} has {len(combinations)} a task.")
    return random.Random(f"{seed}/{task}").sample(combinations, samples)


@click.command()
@click.argument("name", type=click.Choice(sorted(BUILTIN)))
@click.option("--samples", type=click.IntRange(min=1), default=100, show_default=True, help="Pairs a task.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(name: str, samples: int, seed: int) -> None:
    """Print a built-in prompt set as JSONL, ready for wp-score --pairs."""
    for pair in BUILTIN[name](samples, seed):
        echo(json.dumps({key: value for key, value in asdict(pair).items() if value is not None}))


if __name__ == "__main__":
    main()
