"""Prompt pairs: the JSONL that says what a capability is, and its split into extraction and scoring halves.

One row a line: {"task": "title", "prompt": "... Add a title in << >>.", "contrast": "..."}.
`prompt` asks for the capability, `contrast` is the same request without it. A row without `contrast` belongs to
a capability that has no removable instruction (maths, code): its direction is the contrast between the expert
and the base on the same prompt (METHOD.md 2). A third field, `check`, may say how an answer to the prompt is graded
(see `graders`); `--layer auto` uses it. A fourth, `chat`, says that the prompt is a message to a chat model, to be put
into a chat template where a tokenizer has one.

Built-in sets for real models (`builtin:NAME`), drawn by seed in any number:

    instructions   six verifiable instruction types of IFEval, each with its contrast and IFEval's check
    maths          word problems, no contrast
    code           requests for a Python function, no contrast

All are requests as a user sends them, so they are marked as messages of a chat.

`python -m mergekit_wp.scoring.pairs instructions --samples 50 > pairs.jsonl` prints a draw as JSONL, to read or
to edit.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import click

from mergekit_wp.documents import parse_json, parse_yaml
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import read_text
from mergekit_wp.foreign import echo, logger
from mergekit_wp.scoring.anchor.graders import parse_check

LOG = logger(__name__)
T = TypeVar("T")
FIELDS = {"task", "prompt", "contrast", "check", "chat"}
_BUILTIN_PREFIX = "builtin:"
_MOST_NAME = 200  # characters of a task
_MOST_BYTES = 1 << 30  # a million long prompts


@dataclass(frozen=True)
class Pair:
    """One prompt x+, its contrast x- (None: contrast between models), and the JSON that says how to grade an answer.

    `chat`: both are messages to a chat model, not text that is complete.
    """

    task: str
    prompt: str
    contrast: str | None = None
    check: Mapping[str, Any] | None = field(default=None, hash=False)
    chat: bool = False


@dataclass(frozen=True)
class TaskPairs:
    """The pairs of one task: `extraction` gives the anchor direction, `scoring` the scores."""

    task: str
    extraction: tuple[Pair, ...]
    scoring: tuple[Pair, ...]


def load_pairs(source: str, samples: int | None, seed: int) -> list[Pair]:
    """Pairs from a JSONL file, or from a built-in set (`builtin:instructions`, `builtin:maths`, `builtin:code`).

    `samples` pairs a task are drawn with `seed`; None takes every row of a file, and 100 a task of a built-in set.
    Raises `BadInput` for a missing file, a malformed line (named by number) or an unknown set.
    """
    if source.startswith(_BUILTIN_PREFIX):
        name = source.removeprefix(_BUILTIN_PREFIX)
        if name not in BUILTIN:
            raise BadInput(f"pairs: no built-in set {shown(name)}; there are {', '.join(sorted(BUILTIN))}.")
        return BUILTIN[name](samples or 100, seed)
    return draw_pairs(read_pairs(source), samples, seed, source)


def draw_pairs(pairs: Sequence[Pair], samples: int | None, seed: int, source: str) -> list[Pair]:
    """`samples` pairs of each task, drawn with `seed`; None takes them all. Raises `BadInput`, naming the source."""
    if samples is None:
        return list(pairs)
    drawn = []
    for task, rows in by_task(pairs).items():
        if len(rows) < samples:
            raise BadInput(f"{source}: task {task} has {len(rows)} rows, {samples} were asked for; lower --samples.")
        drawn += shuffled(rows, seed, task)[:samples]
    return drawn


def read_pairs(path: str | Path) -> list[Pair]:
    """Every row of a JSONL file, in order; blank lines are skipped. Raises `BadInput` naming file and line."""
    try:
        text = read_text(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot read the pairs ({getattr(error, 'strerror', None) or error}).") from error
    return parse_pairs(text, path)


def parse_pairs(text: str, path: str | Path) -> list[Pair]:
    """The pairs of a file's text; `path` names it in errors. Raises as `read_pairs`."""
    lines = enumerate(text.split("\n"), start=1)
    pairs = [_parse_row(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not pairs:
        raise BadInput(f"{path}: no pairs in this file; write one JSON object a line.")
    check_contrasts(pairs, str(path))
    return pairs


def check_contrasts(pairs: Iterable[Pair], where: str) -> None:
    """Raise `BadInput` for a task that has rows with a contrast and rows without; `where` names their source."""
    for task, rows in by_task(pairs).items():
        if len({row.contrast is None for row in rows}) > 1:
            raise BadInput(f"{where}: task {task} mixes rows with and without a contrast; use one kind a task.")


def by_task(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Pairs grouped by task, in order of first appearance."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.task, []).append(pair)
    return groups


def split_pairs(pairs: Sequence[Pair], split: str | None, seed: int) -> list[TaskPairs]:
    """Cut every task's pairs into extraction and scoring sets.

    `half` (App. B.3): a seeded shuffle, then two halves that share no prompt, the first of them rounded down; `shared`:
    all pairs serve both; None: nothing is extracted, and all pairs score. Pairs that repeat a prompt go into one half.
    Raises `BadInput` when a task has too few prompts to be halved.
    """
    tasks = []
    for task, rows in by_task(pairs).items():
        if split != "half":
            tasks.append(TaskPairs(task, tuple(rows) if split == "shared" else (), tuple(rows)))
            continue
        drawn = shuffled(rows, seed, task)
        prompts = list(dict.fromkeys(pair.prompt for pair in drawn))
        if len(prompts) < 2:
            raise BadInput(f"task {task} has 1 prompt, which cannot be halved; add pairs or use --split shared.")
        first = set(prompts[: len(prompts) // 2])
        halves = [tuple(pair for pair in drawn if (pair.prompt in first) is chosen) for chosen in (True, False)]
        tasks.append(TaskPairs(task, *halves))
    return tasks


def warn_of_repeats(tasks: Iterable[TaskPairs]) -> None:
    """Say of which tasks pairs are repeated: scores and intervals take each for a prompt of its own."""
    for task in tasks:
        count, distinct = len(task.scoring), len({(pair.prompt, pair.contrast) for pair in task.scoring})
        if distinct < count:
            LOG.warning(
                "task %s: %d of its %d scoring pairs are distinct; a repeated one counts as often as it is there, and "
                "intervals take it for another prompt. Remove repeats.",
                task.task, distinct, count,
            )  # fmt: skip


def shuffled(rows: Sequence[T], seed: int, task: str) -> list[T]:
    """The order in which rows of a task are drawn."""
    # Seeded by task name too, so that a task's draw does not depend on which other tasks are in the file.
    return random.Random(f"{seed}/{task}").sample(rows, len(rows))


def _parse_row(line: str, where: str) -> Pair:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise BadInput(f"{where}: not valid JSON ({error}).") from error
    return parse_pair(row, where)


def parse_pair(row: Any, where: str) -> Pair:
    """A pair from the fields of a row; `where` names it in errors. Raises `BadInput`."""
    if not isinstance(row, dict):
        raise BadInput(f"{where}: expected an object with task and prompt, found {type(row).__name__}.")
    if unknown := set(row) - FIELDS:
        raise BadInput(
            f"{where}: unknown field {shown(sorted(unknown)[0])}; expected task, prompt, contrast, check and chat."
        )
    for name in ("task", "prompt"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise BadInput(f"{where}: the field {name} must be a non-empty string.")
    if not isinstance(row.get("contrast"), (str, type(None))) or row.get("contrast") == "":
        raise BadInput(f"{where}: the field contrast must be a non-empty string, or absent.")
    if not row["task"].isprintable() or len(row["task"]) > _MOST_NAME:
        raise BadInput(
            f"{where}: the task name {shown(row['task'])} will name tensors and lines of a table; at most {_MOST_NAME} "
            "characters, all of them printable."
        )
    if "/" in row["task"]:
        raise BadInput(f"{where}: the task name {shown(row['task'])} must not contain a slash.")
    if not isinstance(row.get("chat", False), bool):
        raise BadInput(f"{where}: the field chat must be true or false.")
    if row.get("check") is not None:
        parse_check(row["check"], where)
    return Pair(row["task"], row["prompt"], row.get("contrast"), row.get("check"), row.get("chat", False))


def fields_of(pair: Pair) -> dict[str, Any]:
    """The row of a file: what `parse_pair` takes."""
    return {key: value for key, value in asdict(pair).items() if value not in (None, False)}


@cache
def builtin_words() -> dict[str, Any]:
    """What the built-in sets are made of (`builtin_prompts.yaml`)."""
    words: dict[str, Any] = parse_yaml(Path(__file__).with_name("builtin_prompts.yaml").read_text(encoding="utf-8"))
    return words


def instruction_pairs(samples: int, seed: int) -> list[Pair]:
    """`samples` distinct pairs of each of the six instruction types; prompt = contrast + instruction."""
    words, pairs = builtin_words(), []
    for task, kind in words["instructions"].items():
        for request, remark, wording in _draw(
            [words["requests"], words["remarks"], kind["wordings"]], samples, seed, task
        ):
            contrast = f"{request} {remark}".strip()
            check = {"ifeval": kind["ifeval"], "kwargs": wording.get("kwargs", {})}
            pairs.append(Pair(task, f"{contrast} {wording['text']}", contrast, check, chat=True))
    return pairs


def maths_prompts(samples: int, seed: int) -> list[Pair]:
    """`samples` distinct word problems with seeded names and numbers."""
    words, random_source = builtin_words()["maths"], random.Random(f"{seed}/maths")
    found: dict[str, None] = {}  # a set that keeps its order
    while len(found) < samples:
        name, other = random_source.sample(words["names"], 2)
        a = random_source.randint(60, 99)
        b, c, d = random_source.randint(11, 40), random_source.randint(3, 9), random_source.randint(2, 9)
        problem = random_source.choice(words["problems"]).format(
            name=name, other=other, thing=random_source.choice(words["things"]), a=a, b=b, c=c, d=d
        )
        found[random_source.choice(words["wordings"]).format(problem=problem)] = None
    return [Pair("maths", prompt, chat=True) for prompt in found]


def code_prompts(samples: int, seed: int) -> list[Pair]:
    """`samples` distinct requests for a Python function."""
    words = builtin_words()
    drawn = _draw([words["code"]["tasks"], words["code"]["wordings"], words["remarks"]], samples, seed, "code")
    return [Pair("code", f"{wording.format(task=task)} {remark}".strip(), chat=True) for task, wording, remark in drawn]


BUILTIN: dict[str, Callable[[int, int], list[Pair]]] = {
    "instructions": instruction_pairs,
    "maths": maths_prompts,
    "code": code_prompts,
}


def _draw(choices: list[list[Any]], samples: int, seed: int, task: str) -> list[tuple[Any, ...]]:
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
        echo(json.dumps(fields_of(pair)))


if __name__ == "__main__":
    main()
