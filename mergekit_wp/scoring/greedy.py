"""Greedy answers: what a model says to prompts, many at a time.

Generation goes through the layers as scores do: a layer at a time, and where layers are streamed many batches with
each, so that weights are read once a token; keys and values are in a cache of transformers'. Padding stands on the left
here, under a mask, so that every row goes on at the same place. Rows may be answered by different models: a stack may
have other components for each (`models.exchanged.ExchangedRows`), and streams may be changed on their way (`Change`).

Legend: B prompts in a batch, T new tokens of each, S those and all before, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from mergekit_wp.console import Tick
from mergekit_wp.errors import BadInput, enough_memory
from mergekit_wp.geometry import text_tower
from mergekit_wp.memory import free_memory
from mergekit_wp.scoring.batching import Lengths, Tokens, together
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.sweep import forward_sweep, portions

_MOST_ROWS, _MOST_ROW_BYTES = 1024, 1 << 31
_WIDTHS = 12  # of the stream, that a token takes while it is in a layer
_WORTH_OPERATIONS = 600_000_000  # some 6 ms of products, where the calls of a layer take one

Found = dict[int, list[int]]
"""Answers by the number of their prompt."""
Ended = Callable[[int, Sequence[int]], bool]
"""Told of the number of a prompt and its answer so far, at every token."""
Change = Callable[[int, Sequence[int], torch.Tensor, bool], object]
"""Told of a layer, the numbers of a batch's prompts, the stream [B, T, D] above the layer, which it may change in
place, and whether the tokens are those of the prompts; of the last layer only the last token is there."""


@dataclass(frozen=True)
class Greedy:
    """The rules by which answers are generated; `of` reads them off the models.

    tokenizer   the base's
    eos         ids that end an answer
    vocabulary  ids at or above it are never chosen: the tokenizer has no token for them
    context     positions that the models take, prompt and answer together
    max_tokens  longest answer
    batch_size  prompts at a time
    """

    tokenizer: Any
    eos: frozenset[int]
    vocabulary: int
    context: int
    max_tokens: int
    batch_size: int

    @classmethod
    def of(cls, models: Sequence[Any], tokenizer: Any, max_tokens: int, batch_size: int) -> Greedy:
        """The same rules for all `models`, so that a steered base ends its answers where the expert does."""
        eos = {tokenizer.eos_token_id}
        for model in models:
            for config in (model.generation_config, model.config, text_tower(model).config):
                ids = getattr(config, "eos_token_id", None)
                eos |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
        # Rows of the embedding that only pad it, or that an expert has added, stand for no text.
        named = max(tokenizer.get_vocab().values()) + 1
        vocabulary = min(named, *(text_tower(model).config.vocab_size for model in models))
        context = min(Lengths(text_tower(model).config.to_dict()).limit for model in models)
        return cls(tokenizer, frozenset(eos - {None}), vocabulary, context, max_tokens, batch_size)

    def barred(self, rows: int) -> list[int]:
        """Those of the `rows` of an output head that are not to be chosen: unknown ones, but where an answer ends."""
        return [i for i in range(self.vocabulary, rows) if i not in self.eos]

    def sayable(self, answer: Sequence[int]) -> list[int]:
        """An answer's tokens without an end token that is unknown, if there are others."""
        return list(answer[:-1] if answer[-1] >= self.vocabulary and len(answer) > 1 else answer)

    def text(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """The answer without what follows its end, decoded after its prompt: alone, it would lose a first space."""
        end = next((i for i, token in enumerate(answer) if token in self.eos), len(answer))
        before, whole = (
            str(self.tokenizer.decode(ids, skip_special_tokens=True))
            for ids in (list(prompt), [*prompt, *answer[:end]])
        )
        return whole[len(before) :]

    def holds(self, answer: Sequence[int], until: Sequence[str]) -> bool:
        """Whether an answer, which is asked about at every token, holds one of the texts `until`."""
        if not until:
            return False
        # No token is shorter than a byte, so a text just completed lies within as many tokens.
        tail = list(answer[-max(len(end.encode()) for end in until) :])
        said = str(self.tokenizer.decode(tail, skip_special_tokens=True))
        return any(end in said for end in until)


@torch.no_grad()
def generate_answers(
    stack: Stack, rules: Greedy, prompts: Tokens, tick: Tick = lambda _n: None, keep: Callable[[Found], object] = len,
    ended: Ended = lambda _i, _answer: False, change: Change = lambda *_told: None, rows: int = 0,
) -> Tokens:  # fmt: skip
    """The greedy answer to each prompt: 1 to `rules.max_tokens` token ids, the end token among them.

    Equal to the answer to the prompt alone, whatever it shares a batch with. tick: told of tokens, `max_tokens` of each
    prompt in all; keep: told of answers as soon as they are known; ended: whether one is long enough without an end
    token; change: what is done to streams, which must not depend on other rows; rows: prompts at a time, where that is
    more than `rules.batch_size` (`rows_worth`). Raises `BadInput` where memory does not suffice, and for a prompt that
    is longer than the context.
    """
    found: Found = {}
    sizes = list(map(len, prompts))
    if max(sizes, default=0) > rules.context:
        raise BadInput(f"a prompt of {max(sizes)} tokens leaves no room to answer in {rules.context}; shorten it.")
    groups = [stack.lengths.group_answered(size, rules.max_tokens) for size in sizes]
    numbers = list(together(sizes, max(rows, rules.batch_size), groups))
    too_much = f"batch_size: {rules.batch_size} prompts do not fit on {stack.device} with their answers; lower it."
    if rows > rules.batch_size:
        too_much = (
            f"{rows} prompts at a time, as many as seemed to fit, do not fit on {stack.device} with answers of up to "
            f"{rules.max_tokens} tokens; make room there, or ask for shorter answers."
        )
    for group in portions(numbers, lambda chosen: _bytes(stack, rules, [sizes[i] for i in chosen]), _room(stack)):
        with enough_memory(too_much):
            new = _answer_together(stack, rules, prompts, group, tick, ended, change)
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
    stack: Stack, rules: Greedy, prompts: Tokens, group: Sequence[list[int]], tick: Tick, ended: Ended, change: Change
) -> Found:
    """The answers to batches that go through the layers together."""
    every = [_Growing.of(stack, rules, prompts, numbers) for numbers in group]
    barred = torch.tensor(rules.barred(stack.vocabulary), dtype=torch.long, device=stack.device)
    while growing := [batch for batch in every if any(batch.room)]:
        starts = [stack.go_on(batch.ids_BT, batch.mask_BS, batch.cache, batch.numbers) for batch in growing]
        ends = [torch.full_like(batch.ids_BT[:, :1], batch.ids_BT.shape[1] - 1) for batch in growing]
        reads_prompt = not growing[0].cache.get_seq_length()  # batches begin together
        for layer, streams in forward_sweep(stack, starts, stack.depth, at=ends):
            for batch, stream_BTD in zip(growing, streams, strict=True):
                change(layer, batch.numbers, stream_BTD, reads_prompt)
        for batch, stream_BTD in zip(growing, streams, strict=True):
            logits_BV = stack.logits(stream_BTD[:, -1], stack.vocabulary)
            logits_BV[:, barred] = -torch.inf
            tick(batch.take(logits_BV.argmax(-1), rules, ended))
    return {i: rules.sayable(answer) for batch in every for i, answer in batch.answers.items()}
