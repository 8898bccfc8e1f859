"""Tokenised prompts, and answers to them, in right-padded batches.

Padding stands on the right and the models are causal, so no real token ever attends to a pad token: the batch
runs without an attention mask, and every prompt's numbers equal those of the prompt alone. Where a rotary embedding
looks at the length of the batch, prompts that it would treat apart are kept apart (`together`). The anchor position t_a
of a prompt is its own last token.

An answer stands behind its prompt, without its own last token: what is read is the prediction of each of its tokens,
the first at the prompt's last token. A prompt without an answer is read there alone, for the next token.

Rotary embeddings whose angles depend on how long the sequence is: transformers takes the length of a batch for that of
each of its rows: `longrope` has one set of frequencies up to the length of the original training and another above it,
`dynamic` (NTK) has other frequencies for every length past the context, and keeps those of the longest batch seen. A
prompt's numbers must be those of the prompt alone, so only prompts of one `group` share a batch, and every batch starts
from what the config says.

Legend: B prompts in a batch, T padded length, A positions read of each, D any width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
    """ids_BT: token ids, zero where padded; last_B: position of each prompt's last token; answer_B: tokens of each
    answer, the positions that are read: 1 where there is none.

    A is the longest of the answers. T leaves room for A positions behind each prompt, whatever its own answer: so the
    positions of a row are all different, and those behind its own answer weigh nothing.
    """

    ids_BT: torch.Tensor
    last_B: torch.Tensor
    answer_B: torch.Tensor

    @cached_property
    def reads_BA(self) -> torch.Tensor:
        """Where each prompt is read: its last token first, then its answer's tokens but the last."""
        return self.last_B[:, None] + self._steps_A

    @cached_property
    def weights_BA(self) -> torch.Tensor:
        """The share of each of these in a mean over the answer, float64; 0 behind it."""
        within_BA = self._steps_A < self.answer_B[:, None]
        return within_BA / self.answer_B[:, None].double()

    @cached_property
    def _steps_A(self) -> torch.Tensor:
        return torch.arange(int(self.answer_B.max()), device=self.answer_B.device)

    def at_anchor(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, D]: the entries at each prompt's own anchor position."""
        return pick(x_BTD, self.last_B[:, None])[:, 0]

    def at_reads(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, A, D]: the entries where each prompt is read."""
        return pick(x_BTD, self.reads_BA)

    def options(self, attention: str) -> dict[str, Any]:
        """What a model's forward pass is told besides the tokens; `attention`: transformers' name of its kernel."""
        return {}


def pick(x_BTD: torch.Tensor, positions_BA: torch.Tensor) -> torch.Tensor:
    """[B, T, D] -> [B, A, D]: the entries at some positions of each row; [1, T, D], of each prompt in the one row."""
    return x_BTD[rows_of(x_BTD, positions_BA), positions_BA]


def rows_of(x_BTD: torch.Tensor, positions_BA: torch.Tensor) -> torch.Tensor:
    """[B, 1]: the row that each row of positions is about; a row of several prompts has as many rows of positions."""
    rows = torch.arange(len(x_BTD), device=x_BTD.device)
    return rows.repeat_interleave(len(positions_BA) // len(x_BTD))[:, None]


Tokens = list[list[int]]


@dataclass(frozen=True)
class TaskTokens:
    """Token ids of one task: extraction prompts, their contrasts (None: contrast the models), scoring prompts.

    `checks`: how the answer to each scoring prompt is graded, where pairs say it (see `graders`); empty: nowhere.
    `scoring_contrasts`: the contrasts of the scoring prompts, in their order; empty where pairs have none.
    `answers`: what the expert answers to each scoring prompt, in their order; empty where the next token alone is read.
    """

    task: str
    extraction: Tokens
    contrasts: Tokens | None
    scoring: Tokens
    checks: list[Mapping[str, Any] | None] = field(default_factory=list)
    scoring_contrasts: Tokens = field(default_factory=list)
    answers: Tokens = field(default_factory=list)

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


def batches(
    prompts: Sequence[Sequence[int]], size: int, *stacks: Stack, answers: Sequence[Sequence[int]] = ()
) -> Iterator[Batch]:
    """Cut prompts, each with its answer where there are `answers`, into batches of at most `size` that all `stacks` may
    run, on their device.

    Shortest first, so that little is padded; the order is immaterial, since everything computed from prompts is a sum.
    """
    yield from (batch for _chosen, batch in numbered_batches(prompts, size, *stacks, answers=answers))


def numbered_batches(
    prompts: Sequence[Sequence[int]], size: int, *stacks: Stack, answers: Sequence[Sequence[int]] = ()
) -> Iterator[tuple[list[int], Batch]]:
    """As `batches`, each with the numbers of its prompts."""
    device = stacks[0].device
    rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers or [()] * len(prompts), strict=True)]
    read = [len(answer) for answer in answers] or [1] * len(prompts)

    def group(i: int) -> tuple[Any, ...]:
        alone, padded = ([s.lengths.group(n) for s in stacks] for n in (len(rows[i]), len(prompts[i]) - 1 + max(read)))
        # A batch may be padded as if each of its answers were the longest; where that would matter, they are as long.
        return (*alone, 0 if alone == padded else read[i])

    for chosen in together(list(map(len, rows)), size, list(map(group, range(len(rows))))):
        last_B, answer_B = (
            torch.tensor(n) for n in zip(*((len(prompts[i]) - 1, read[i]) for i in chosen), strict=True)
        )
        ids_BT = torch.zeros(len(chosen), int(last_B.max() + answer_B.max()), dtype=torch.long)
        for row, i in enumerate(chosen):
            ids_BT[row, : len(rows[i])] = torch.tensor(rows[i])
        yield chosen, Batch(ids_BT.to(device), last_B.to(device), answer_B.to(device))


def together(lengths: Sequence[int], size: int, groups: Sequence[Hashable]) -> Iterator[list[int]]:
    """Which prompts, by number, go together: at most `size`, shortest first, all of one group."""
    found: dict[Hashable, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        found.setdefault(groups[i], []).append(i)
    for alike in found.values():
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

    @property
    def fixed(self) -> bool:
        """Whether no angle depends on the length."""
        return all(_kind(rope) in _FIXED for rope in self._settings)

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

    def forget(self, model: nn.Module) -> None:
        """Give back the frequencies that `model` began with, which a longer batch may have replaced."""
        if self.fixed:  # nothing has; and looking at every module is a tenth of a small model's token, by a profile
            return
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
