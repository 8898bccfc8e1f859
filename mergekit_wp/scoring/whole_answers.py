"""Whole answers: what an expert says greedily to its prompts, made once and kept in a file.

`greedy.generate_answers` makes them, `answers_for` keeps them beside the score file as they come, so that a run that
was killed goes on and the next one finds them, and `given_answers` reads those that another machine made. The file is
JSON lines. The first says whose answers they are:

    {"wp_answers": 1, "expert": {...}, "max_tokens": 32, "vocabulary": 32000, "dtype": ..., "device": ..., "versions":
     {...}, "date": ..., "files": ...}

expert: name and fingerprint, as in a score file; vocabulary: ids from there on were not to be chosen; files: sizes and
times of the expert's files where answers were made (`Fingerprint.files`), so that a run goes on with what it kept only
while these are as they were. Every other line is one prompt's, token ids and the answer as text, in any order:

    {"task": "maths", "prompt": [1, 415, 6], "answer": [306, 2], "text": "I"}

An answer has at least one token and at most `max_tokens`. Its last is the end token where the model came to an end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mergekit_wp.checkpoint.folder import Fingerprint
from mergekit_wp.console import StartProgress, Tick, no_progress
from mergekit_wp.documents import Count, Date, Positive, Text, Versions, now, parse_json, read_record, strict, versions
from mergekit_wp.errors import BadInput
from mergekit_wp.files import explained, open_file, write_text
from mergekit_wp.foreign import logger
from mergekit_wp.outputs import refuse_inputs
from mergekit_wp.scores import ModelId
from mergekit_wp.scoring.batching import TaskTokens, Tokens
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.greedy import Found, Greedy, generate_answers
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.models.load import CheckedPair

LOG = logger(__name__)
FORMAT = 1
_MOST_BYTES = 1 << 30  # a million answers
_MOST_LINE = 1 << 22


@strict
@dataclass(frozen=True)
class AnswersMeta:
    """The first line of a file of answers."""

    wp_answers: Count
    expert: ModelId
    max_tokens: Positive
    vocabulary: Positive
    dtype: Text
    device: Text
    versions: Versions
    date: Date
    files: str = ""

    def goes_on(self, other: AnswersMeta) -> bool:
        """Whether `other` would have the same answers."""
        decide = ("max_tokens", "vocabulary", "dtype", "files", "wp_answers")
        return self.same_expert(other.expert) and all(getattr(self, x) == getattr(other, x) for x in decide)

    def same_expert(self, print_: ModelId | Fingerprint) -> bool:
        return (self.expert.config, self.expert.tensors) == (print_.config, print_.tensors)


@strict
@dataclass(frozen=True)
class AnswerRow:
    """Every other line: one prompt's answer."""

    task: Text
    prompt: list[Count]
    answer: list[Count]
    text: str

    def __post_init__(self) -> None:
        if not self.prompt or not self.answer:
            raise ValueError(f"the {'answer' if self.prompt else 'prompt'} has no token")


Known = dict[tuple[int, ...], list[int]]
"""Answers by the tokens of their prompt."""


def answers_beside(out: Path, reads: Iterable[str] = ()) -> Path:
    """Where answers are kept that belong to an output. Raises `BadInput` where that is one of the files read."""
    path = out.with_name(f"{out.stem}.answers.jsonl")
    refuse_inputs(path, reads, holds=False)
    return path


def given_answers(path: str, checked: CheckedPair, max_tokens: int, tasks: Sequence[TaskTokens]) -> list[TaskTokens]:
    """`tasks` with the answers to their scoring prompts out of a file, each cut to `max_tokens`.

    Raises `BadInput` for a file that is none of answers, for answers of another model, shorter ones, such as the models
    cannot read, and where prompts have none.
    """
    meta, known = read_answers(path)
    if not meta.same_expert(checked.expert_print):
        raise BadInput(
            f"answers: {path} holds answers of {meta.expert.name}, whose weights are not those of this expert; make "
            "them with this one."
        )
    if meta.max_tokens < max_tokens:
        raise BadInput(
            f"answers: {path} holds answers of at most {meta.max_tokens} tokens, and answer_tokens is {max_tokens}; "
            "lower that, or make longer answers."
        )
    wanted = [prompt for task in tasks for prompt in task.scoring]
    if without := [prompt for prompt in wanted if tuple(prompt) not in known]:
        raise BadInput(
            f"answers: {path} has none to {len(without)} of {len(wanted)} prompts; make them from the same pairs, with "
            "the same tokenizer, chat template, seed and split."
        )
    found = _with(tasks, {prompt: answer[:max_tokens] for prompt, answer in known.items()})
    for task in found:
        for prompt, answer in zip(task.scoring, task.answers, strict=True):
            fed = [*prompt, *answer[:-1]]
            if max(fed) >= checked.vocabulary or len(fed) > checked.context_limit:
                raise BadInput(
                    f"answers: {path} holds {len(fed)} tokens up to id {max(fed)} of a prompt and its answer; these "
                    f"models read {checked.context_limit} below {checked.vocabulary}; make answers with this pair."
                )
    return found


def read_answers(path: str | Path) -> tuple[AnswersMeta, Known]:
    """A whole file of answers. Raises `BadInput`, naming the line, for one that is none."""
    try:
        meta, known, sound = _read(Path(path))
        if sound.trouble:
            raise ValueError(sound.trouble)
    except OSError as error:
        raise BadInput(f"answers: {path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise BadInput(f"answers: {path}, {error}; name a file that a run kept.") from error
    return meta, known


def answers_for(
    job: ScoringJob, checked: CheckedPair, stack: Stack, tokenizer: Any, tasks: Sequence[TaskTokens],
    path: Path | None = None, processes: ProcessGroup | None = None, start: StartProgress = no_progress,
) -> list[TaskTokens]:  # fmt: skip
    """`tasks` with the expert's answers to their scoring prompts, as long as the job says; `stack` is the expert.

    path       the file where they are kept as they come, and found again; None: nowhere
    processes  share the prompts; the first keeps the file
    Tasks that have answers stay as they are (`given_answers`), as all do where the job wants none. Raises `BadInput` as
    `generate_answers`, and for a file of another kind at `path`.
    """
    if not job.answer_tokens or all(task.answers for task in tasks):
        return list(tasks)
    rules = answer_rules(job, checked, stack, tokenizer)

    def generate(prompts: Tokens, tick: Tick, keep: Callable[[Found], object]) -> object:
        return generate_answers(stack, rules, prompts, tick, keep)

    return made_answers(job, checked, rules, stack.dtype, stack.device, tasks, generate, path, processes, start)


def answer_rules(job: ScoringJob, checked: CheckedPair, stack: Stack, tokenizer: Any) -> Greedy:
    """How the expert `stack` answers: up to its end tokens, in tokens that both models read."""
    rules = Greedy.of([stack.model], tokenizer, job.answer_tokens, job.batch_size)
    return replace(rules, vocabulary=min(rules.vocabulary, checked.vocabulary), context=checked.context_limit)


Generate = Callable[[Tokens, Tick, Callable[[Found], object]], object]
"""Answers prompts: tells of tokens as `generate_answers` does, and hands on answers as soon as they are known."""


def made_answers(
    job: ScoringJob, checked: CheckedPair, rules: Greedy, dtype: torch.dtype, device: torch.device,
    tasks: Sequence[TaskTokens], generate: Generate, path: Path | None, processes: ProcessGroup | None = None,
    start: StartProgress = no_progress,
) -> list[TaskTokens]:  # fmt: skip
    """`tasks` with answers, those that `path` keeps and, by `generate` on `device` in `dtype`, the others.

    Raises as `answers_for`.
    """
    processes = processes or ProcessGroup()
    meta = AnswersMeta(
        FORMAT, ModelId.of(job.expert, checked.expert_print), rules.max_tokens, rules.vocabulary,
        str(dtype).removeprefix("torch."), str(device), versions(), now(), checked.expert_print.files,
    )  # fmt: skip
    kept = AnswerFile(path if processes.first else None, meta)
    known: Known = processes.tell(kept.known)
    task_of = {tuple(prompt): task.task for task in reversed(tasks) for prompt in task.scoring}
    if new := [list(prompt) for prompt in task_of if prompt not in known]:
        if len(new) < len(task_of):
            LOG.info("Going on after %d answers.", len(task_of) - len(new))
        mine, tick = processes.share(new), start(len(new) * rules.max_tokens, "Answers", "token")
        made: list[AnswerRow] = []

        def keep(found: Found) -> None:
            rows = [AnswerRow(task_of[tuple(mine[i])], mine[i], a, rules.text(mine[i], a)) for i, a in found.items()]
            kept.add(rows)
            made.extend(rows)

        generate(mine, processes.ticking(tick), keep)
        every = processes.gather(made)
        kept.add([row for row in every if tuple(row.prompt) not in kept.known])
        known |= {tuple(row.prompt): row.answer for row in every}
    return _with(tasks, known)


def _with(tasks: Sequence[TaskTokens], known: Known) -> list[TaskTokens]:
    return [replace(task, answers=[known[tuple(prompt)] for prompt in task.scoring]) for task in tasks]


class AnswerFile:
    """The answers at `path` (None: nowhere) that belong to `meta`; `known` are those that were there, or were added.

    A file with answers of another model, or by other rules, is begun anew; what a kill cut off is cut away. Raises
    `BadInput` where a file of another kind lies, or none can be written.
    """

    def __init__(self, path: Path | None, meta: AnswersMeta):
        self.path, self.known = path, Known()
        if path is None:
            return
        if os.path.lexists(path):
            try:
                said, known, sound = _read(path)
            except (OSError, ValueError) as error:
                raise BadInput(
                    f"{path}: there is a file of this name that is none of answers, which belong there; move it away, "
                    "or name another output."
                ) from error
            if said.goes_on(meta):
                self.known = known
                if sound.trouble:
                    LOG.warning("%s, %s; from there on, prompts are answered again.", path, sound.trouble)
                with _writing(path), open(path, "r+b") as stream:
                    stream.truncate(sound.nbytes)
                    stream.seek(-1, os.SEEK_END)
                    if stream.read() != b"\n":
                        stream.write(b"\n")
                return
        write_text(path, json.dumps(asdict(meta)) + "\n")

    def add(self, rows: Sequence[AnswerRow]) -> None:
        """Keep some more."""
        self.known |= {tuple(row.prompt): row.answer for row in rows}
        if self.path is not None and rows:
            with _writing(self.path), open(self.path, "ab") as stream:
                stream.write("".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        with explained(path):
            yield
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error}); name another output.") from error


@dataclass(frozen=True)
class _Sound:
    """How far a file can be read, and what is wrong with the line after that; empty: all of it can."""

    nbytes: int
    trouble: str = ""


def _read(path: Path) -> tuple[AnswersMeta, Known, _Sound]:
    """What a file of answers says. Raises OSError, or ValueError, a clause, where its first line is not that of one."""
    known: Known = {}
    with open_file(path) as stream:
        sound = 0
        for number, line in enumerate(iter(lambda: stream.readline(_MOST_LINE), b""), start=1):
            try:
                if number == 1:
                    meta = read_record(AnswersMeta, _parse(line))
                    if meta.wp_answers != FORMAT:
                        raise ValueError(f"format version {meta.wp_answers}, this program reads {FORMAT}")
                else:
                    row = read_record(AnswerRow, _parse(line))
                    if len(row.answer) > meta.max_tokens:
                        raise ValueError(f"an answer of {len(row.answer)} tokens, by line 1 at most {meta.max_tokens}")
                    known[tuple(row.prompt)] = row.answer
            except ValueError as error:
                if number == 1:
                    raise ValueError(f"line 1: {error}") from error
                return meta, known, _Sound(sound, f"line {number}: {error}")
            sound += len(line)
    if not sound:
        raise ValueError("line 1: there is none")
    return meta, known, _Sound(sound)


def _parse(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        what = "not valid JSON" if line.endswith(b"\n") else "cut short"
        raise ValueError(f"it is {what} ({error})") from error
