"""Whole answers: what a model says greedily to prompts, made once and kept in a file.

`generate_answers` makes them, `answers_for` keeps them beside the score file as they come, so that a run that was
killed goes on and the next one finds them, and `given_answers` reads those that another machine made. The file is JSON
lines. The first says whose answers they are:

    {"wp_answers": 1, "expert": {...}, "max_tokens": 32, "vocabulary": 32000, "dtype": ..., "device": ..., "versions":
     {...}, "date": ...}

expert: name and fingerprint, as in a score file; vocabulary: ids from there on were not to be chosen. Every other line
is one prompt's, token ids and the answer as text, in any order:

    {"task": "maths", "prompt": [1, 415, 6], "answer": [306, 2], "text": "I"}

An answer has at least one token and at most `max_tokens`. Its last is the end token where the model came to an end.

Generation goes through the layers as scores do: a layer at a time, and where layers are streamed many batches with
each, so that weights are read once a token; keys and values are in a cache of transformers'. Padding stands on the left
here, under a mask, so that every row goes on at the same place.

Legend: B prompts in a batch, T new tokens of each, S those and all before, V vocabulary rows.
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
from transformers import DynamicCache

from mergekit_wp.checkpoint.folder import Fingerprint
from mergekit_wp.console import StartProgress, Tick, no_progress
from mergekit_wp.documents import Count, Date, Positive, Text, Versions, now, parse_json, read_record, strict, versions
from mergekit_wp.errors import BadInput, enough_memory
from mergekit_wp.files import explained, open_file, write_text
from mergekit_wp.foreign import logger
from mergekit_wp.memory import free_memory
from mergekit_wp.outputs import refuse_inputs
from mergekit_wp.scores import ModelId
from mergekit_wp.scoring.anchor.steering import Greedy
from mergekit_wp.scoring.batching import TaskTokens, Tokens, together
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.models.load import CheckedPair
from mergekit_wp.scoring.sweep import forward_sweep, portions

LOG = logger(__name__)
FORMAT = 1
_MOST_BYTES = 1 << 30  # a million answers
_MOST_LINE = 1 << 22
_MOST_ROWS, _MOST_ROW_BYTES = 1024, 1 << 31
_WIDTHS = 12  # of the stream, that a token takes while it is in a layer
_WORTH_OPERATIONS = 600_000_000  # some 6 ms of products, where the calls of a layer take one

Found = dict[int, list[int]]
"""Answers by the number of their prompt."""
Ended = Callable[[int, Sequence[int]], bool]
"""Told of the number of a prompt and its answer so far, at every token."""


@torch.no_grad()
def generate_answers(
    stack: Stack, rules: Greedy, prompts: Tokens, tick: Tick = lambda _n: None, keep: Callable[[Found], object] = len,
    ended: Ended = lambda _i, _answer: False,
) -> Tokens:  # fmt: skip
    """The greedy answer to each prompt: 1 to `rules.max_tokens` token ids, the end token among them.

    Equal to the answer to the prompt alone, whatever it shares a batch with. tick: told of tokens, `max_tokens` of each
    prompt in all; keep: told of answers as soon as they are known; ended: whether one is long enough without an end
    token. Raises `BadInput` where memory does not suffice.
    """
    found: Found = {}
    sizes = list(map(len, prompts))
    groups = [stack.lengths.group_answered(size, rules.max_tokens) for size in sizes]
    numbers = list(together(sizes, rules.batch_size, groups))
    too_much = f"batch_size: {rules.batch_size} prompts do not fit on {stack.device} with their answers; lower it."
    for group in portions(numbers, lambda chosen: _bytes(stack, rules, [sizes[i] for i in chosen]), _room(stack)):
        with enough_memory(too_much):
            new = _answer_together(stack, rules, prompts, group, tick, ended)
        keep(new)
        found |= new
    return [found[i] for i in range(len(prompts))]


def _room(stack: Stack) -> int:
    """Bytes that batches may take which go through the layers together: one at a time where nothing is read for it."""
    return free_memory(stack.device) // 2 if stack.streamed else 0


def _bytes(stack: Stack, rules: Greedy, sizes: Sequence[int]) -> int:
    """Of a batch: keys and values of all layers, and its streams."""
    keys = int(stack.tower.layers[0].self_attn.k_proj.weight.shape[0])
    return 4 * len(sizes) * (max(sizes) + rules.max_tokens) * (2 * stack.depth * keys + 3 * stack.width)


def rows_worth(stack: Stack, rules: Greedy, size: int) -> int:
    """How many rows of `size` tokens at most a pass should have where there are enough: until, on a CPU, a layer's
    products outweigh what its calls cost, and within 2 GB or a quarter of what is free; never fewer than
    `batch_size`."""
    of_row = _bytes(stack, rules, [size]) + 4 * (2 * stack.vocabulary + _WIDTHS * stack.width * size)
    rows = min(_MOST_ROWS, min(_MOST_ROW_BYTES, free_memory(stack.device) // 4) // of_row)
    if stack.device.type == "cpu" and not stack.streamed:
        operations = 2 * sum(parameter.numel() for parameter in stack.tower.layers[0].parameters())
        rows = min(rows, _WORTH_OPERATIONS // operations)
    return max(rules.batch_size, rows)


@dataclass
class _Growing:
    """One batch of prompts while their answers grow: numbers of the prompts, what is fed next, how many tokens each may
    still have; and all answers, by number."""

    numbers: list[int]
    ids_BT: torch.Tensor
    mask_BS: torch.Tensor
    cache: DynamicCache
    room: list[int]
    answers: Found

    @classmethod
    def of(cls, stack: Stack, rules: Greedy, prompts: Tokens, numbers: list[int]) -> _Growing:
        rows = [prompts[i] for i in numbers]
        length = max(map(len, rows))
        ids_BT, mask_BS = (
            torch.tensor([[0] * (length - len(row)) + of(row) for row in rows], device=stack.device)
            for of in (list, lambda row: [1] * len(row))
        )
        # The last token of an answer is never fed.
        room = [min(rules.max_tokens, rules.context - len(row) + 1) for row in rows]
        return cls(numbers, ids_BT, mask_BS, DynamicCache(config=stack.tower.config), room, {i: [] for i in numbers})

    def take(self, next_B: torch.Tensor, rules: Greedy, ended: Ended) -> int:
        """One token more of each that is open; how many of `max_tokens` a prompt that makes in progress."""
        progress = 0
        for row, token in enumerate(next_B.tolist()):
            if self.room[row]:
                answer = self.answers[self.numbers[row]]
                answer.append(token)
                stop = token in rules.eos or ended(self.numbers[row], answer)
                self.room[row] = 0 if stop else self.room[row] - 1
                progress += 1 if self.room[row] else rules.max_tokens - len(answer) + 1
        self.ids_BT = next_B[:, None]
        self.mask_BS = torch.cat([self.mask_BS, self.mask_BS.new_ones(len(next_B), 1)], 1)
        self._narrow()
        return progress

    def _narrow(self) -> None:
        """Go on without the rows that are done, once they are a quarter of all: one answer without an end would have
        all others carried along."""
        going = [row for row, room in enumerate(self.room) if room]
        if not going or 4 * len(going) > 3 * len(self.room):
            return
        rows = torch.tensor(going, device=self.ids_BT.device)
        self.cache.batch_select_indices(rows)
        self.ids_BT, self.mask_BS = self.ids_BT[rows], self.mask_BS[rows]
        self.numbers, self.room = [self.numbers[row] for row in going], [self.room[row] for row in going]


def _answer_together(
    stack: Stack, rules: Greedy, prompts: Tokens, group: Sequence[list[int]], tick: Tick, ended: Ended
) -> Found:
    """The answers to batches that go through the layers together."""
    every = [_Growing.of(stack, rules, prompts, numbers) for numbers in group]
    barred = torch.tensor(rules.barred(stack.vocabulary), dtype=torch.long, device=stack.device)
    while growing := [batch for batch in every if any(batch.room)]:
        starts = [stack.go_on(batch.ids_BT, batch.mask_BS, batch.cache, batch.numbers) for batch in growing]
        ends = [torch.full_like(batch.ids_BT[:, :1], batch.ids_BT.shape[1] - 1) for batch in growing]
        *_below, (_top, streams) = forward_sweep(stack, starts, stack.depth, at=ends)
        for batch, stream_BTD in zip(growing, streams, strict=True):
            logits_BV = stack.logits(stream_BTD[:, -1], stack.vocabulary)
            logits_BV[:, barred] = -torch.inf
            tick(batch.take(logits_BV.argmax(-1), rules, ended))
    return {i: rules.sayable(answer) for batch in every for i, answer in batch.answers.items()}


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

    def goes_on(self, other: AnswersMeta) -> bool:
        """Whether `other` would have the same answers."""
        return self.same_expert(other.expert) and all(
            getattr(self, name) == getattr(other, name) for name in ("max_tokens", "vocabulary", "dtype", "wp_answers")
        )

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
        str(dtype).removeprefix("torch."), str(device), versions(), now(),
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
