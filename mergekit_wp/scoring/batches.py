"""Tokenised prompts in right-padded batches.

Padding stands on the right and the models are causal, so no real token ever attends to a pad token: the batch
runs without an attention mask, and every prompt's numbers equal those of the prompt alone. Where a rotary embedding
looks at the length of the batch, prompts that it would treat apart are kept apart (`rotary`). The anchor position t_a
of a prompt is its own last token.

Legend: B prompts in a batch, T padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.pairs import TaskPairs

if TYPE_CHECKING:
    from mergekit_wp.scoring.stack import Stack
    from mergekit_wp.scoring.wording import Wording


@dataclass(frozen=True)
class Batch:
    """ids_BT: token ids, zero where padded; last_B: position of each prompt's last token."""

    ids_BT: torch.Tensor
    last_B: torch.Tensor

    def at_anchor(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, D]: the entries at each prompt's own anchor position."""
        return x_BTD[torch.arange(len(self.last_B), device=x_BTD.device), self.last_B]


Tokens = list[list[int]]


@dataclass(frozen=True)
class TaskTokens:
    """Token ids of one task: extraction prompts, their contrasts (None: contrast the models), scoring prompts.

    `checks`: how the answer to each scoring prompt is graded, where pairs say it (see `graders`); empty: nowhere.
    """

    task: str
    extraction: Tokens
    contrasts: Tokens | None
    scoring: Tokens
    checks: list[Mapping[str, Any] | None] = field(default_factory=list)

    @property
    def prompts(self) -> Tokens:
        """All of them, contrasts too."""
        return [*self.extraction, *(self.contrasts or ()), *self.scoring]


def tokenize_tasks(wording: Wording, tasks: Sequence[TaskPairs], limit: int) -> list[TaskTokens]:
    """Tokenise every prompt as `wording` puts it.

    Raises `BadInput` when a prompt has no token, or more than the `limit` positions of the models, or as
    `Wording.ids` does.
    """

    return [
        TaskTokens(
            task.task,
            [_ids(wording, pair.prompt, pair.chat, limit) for pair in task.extraction],
            [_ids(wording, pair.contrast, pair.chat, limit) for pair in task.extraction if pair.contrast] or None,
            [_ids(wording, pair.prompt, pair.chat, limit) for pair in task.scoring],
            [pair.check for pair in task.scoring],
        )
        for task in tasks
    ]


def _ids(wording: Wording, text: str, chat: bool, limit: int) -> list[int]:
    tokens = wording.ids(text, chat)
    if not tokens:
        raise BadInput(f"the prompt {text[:60]!r} gives no token under this tokenizer; remove it from the pairs.")
    if len(tokens) > limit:
        raise BadInput(f"the prompt {text[:60]!r} has {len(tokens)} tokens, the models take {limit}; shorten it.")
    return tokens


def check_rows(prompts: Iterable[Sequence[int]], tokenizer: Any, rows: int) -> None:
    """Refuse a prompt with a token that a model has no embedding for: an id of at least `rows`."""
    for tokens in prompts:
        if (top := max(tokens)) >= rows:
            raise BadInput(
                f"a prompt holds the token {tokenizer.decode([top])!r} (id {top}), for which a model of {rows} "
                "vocabulary rows has none; take that prompt out, or give the model its own tokenizer."
            )


def batches(prompts: Sequence[Sequence[int]], size: int, *stacks: Stack) -> Iterator[Batch]:
    """Cut prompts into batches of at most `size` that all `stacks` may run, on their device.

    Shortest first, so that little is padded; the order is immaterial, since everything computed from prompts is a sum.
    """
    device = stacks[0].device
    lengths = list(map(len, prompts))
    for chosen in together(lengths, size, lambda length: [stack.lengths.group(length) for stack in stacks]):
        rows = [prompts[i] for i in chosen]
        ids_BT = torch.zeros(len(rows), len(rows[-1]), dtype=torch.long)
        for row, tokens in enumerate(rows):
            ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        last_B = torch.tensor([len(tokens) - 1 for tokens in rows])
        yield Batch(ids_BT.to(device), last_B.to(device))


def together(lengths: Sequence[int], size: int, group: Callable[[int], Any]) -> Iterator[list[int]]:
    """Which prompts, by number, go together: at most `size`, shortest first, all of one group of lengths."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _group, members in groupby(order, key=lambda i: group(lengths[i])):
        alike = list(members)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]
