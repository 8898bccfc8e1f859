"""Tokenised prompts in right-padded batches.

Padding stands on the right and the models are causal, so no real token ever attends to a pad token: the batch
runs without an attention mask, and every prompt's numbers equal those of the prompt alone. Where a rotary embedding
looks at the length of the batch, prompts that it would treat apart are kept apart (`together`). The anchor position t_a
of a prompt is its own last token.

Rotary embeddings whose angles depend on how long the sequence is: transformers takes the length of a batch for that of
each of its rows: `longrope` has one set of frequencies up to the length of the original training and another above it,
`dynamic` (NTK) has other frequencies for every length past the context, and keeps those of the longest batch seen. A
prompt's numbers must be those of the prompt alone, so only prompts of one `group` share a batch, and every batch starts
from what the config says.

Legend: B prompts in a batch, T padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.pairs import TaskPairs

if TYPE_CHECKING:
    from mergekit_wp.scoring.models.layerwise import Stack
    from mergekit_wp.scoring.prompt_format import PromptFormat


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
    `scoring_contrasts`: the contrasts of the scoring prompts, in their order; empty where pairs have none.
    """

    task: str
    extraction: Tokens
    contrasts: Tokens | None
    scoring: Tokens
    checks: list[Mapping[str, Any] | None] = field(default_factory=list)
    scoring_contrasts: Tokens = field(default_factory=list)

    @property
    def prompts(self) -> Tokens:
        """All of them, contrasts too."""
        return [*self.extraction, *(self.contrasts or ()), *self.scoring, *self.scoring_contrasts]


def tokenize_tasks(prompt_format: PromptFormat, tasks: Sequence[TaskPairs], limit: int) -> list[TaskTokens]:
    """Tokenise every prompt as `prompt_format` puts it.

    Raises `BadInput` when a prompt has no token, or more than the `limit` positions of the models, or as
    `PromptFormat.ids` does.
    """

    return [
        TaskTokens(
            task.task,
            [_ids(prompt_format, pair.prompt, pair.chat, limit) for pair in task.extraction],
            [_ids(prompt_format, pair.contrast, pair.chat, limit) for pair in task.extraction if pair.contrast] or None,
            [_ids(prompt_format, pair.prompt, pair.chat, limit) for pair in task.scoring],
            [pair.check for pair in task.scoring],
            [_ids(prompt_format, pair.contrast, pair.chat, limit) for pair in task.scoring if pair.contrast],
        )
        for task in tasks
    ]


def _ids(prompt_format: PromptFormat, text: str, chat: bool, limit: int) -> list[int]:
    tokens = prompt_format.ids(text, chat)
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
    yield from (batch for _chosen, batch in numbered_batches(prompts, size, *stacks))


def numbered_batches(prompts: Sequence[Sequence[int]], size: int, *stacks: Stack) -> Iterator[tuple[list[int], Batch]]:
    """As `batches`, each with the numbers of its prompts."""
    device = stacks[0].device
    lengths = list(map(len, prompts))
    for chosen in together(lengths, size, lambda length: [stack.lengths.group(length) for stack in stacks]):
        rows = [prompts[i] for i in chosen]
        ids_BT = torch.zeros(len(rows), len(rows[-1]), dtype=torch.long)
        for row, tokens in enumerate(rows):
            ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        last_B = torch.tensor([len(tokens) - 1 for tokens in rows])
        yield chosen, Batch(ids_BT.to(device), last_B.to(device))


def together(lengths: Sequence[int], size: int, group: Callable[[int], Any]) -> Iterator[list[int]]:
    """Which prompts, by number, go together: at most `size`, shortest first, all of one group of lengths."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _group, members in groupby(order, key=lambda i: group(lengths[i])):
        alike = list(members)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


_FIXED = ("default", "linear", "yarn", "llama3", "proportional")  # of transformers' types, those blind to the length
_LONGROPE = ("longrope", "su")  # Phi-3's first configs call it su


class Lengths:
    """What a model's rotary embedding makes of a sequence's length.

    `config` is the model's as a mapping; of a multimodal one, what it says of the text decoder counts.
    """

    def __init__(self, config: Mapping[str, Any]):
        config = {**config, **(config.get("text_config") or {})}
        self._context: int = config.get("max_position_embeddings") or 10**9
        self._settings = _settings(config)
        self._original = config.get("original_max_position_embeddings")

    @property
    def limit(self) -> int:
        """Positions that the model takes: `max_position_embeddings`, which `dynamic` stretches by its factor."""
        factors = [float(rope.get("factor") or 1) for rope in self._settings if "dynamic" in _kind(rope)]
        return int(self._context * min(factors, default=1.0))

    def group(self, length: int) -> tuple[int, ...]:
        """Sequences of equal groups get the same angles, whatever the longest of them."""
        return tuple(self._side(rope, length) for rope in self._settings)

    def _side(self, rope: Mapping[str, Any], length: int) -> int:
        kind = _kind(rope)
        if kind in _FIXED:
            return 0
        if kind in _LONGROPE:
            return int(length > (self._original or rope.get("original_max_position_embeddings") or self._context))
        if "dynamic" in kind and length <= self._context:
            return 0
        return length  # dynamic, and what is not known here

    def group_answered(self, length: int, answer: int) -> tuple[int, ...]:
        """Likewise for a prompt that up to `answer` tokens are added to: a prompt that may change sides on the way
        shares its batch with prompts of its own length alone, since that is when they all do."""
        group = self.group(length)
        return group if group == self.group(length + answer) else (*group, length)


def forget_lengths(model: nn.Module) -> None:
    """Give back the frequencies that `model` began with, which a longer batch may have replaced."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                setattr(module, name.replace("original_", ""), buffer)
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)


def _settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config's rotary settings, one for all layers or one a kind of layer (full, sliding)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or [rope]


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
