"""Prompts in one row: what they all begin with (a chat template's system prompt, examples) is run once, and nothing is
padded.

    padded   p p p a1 a2 .      packed   p p p a1 a2 | b1 b2 b3      one row: the prefix, then each prompt's own tokens
             p p p b1 b2 b3

A token's position is the one that it has in its own prompt, and it attends to the prefix and to its own prompt alone,
so every activation is that of the prompt by itself. The gradient at the prefix is the sum over the prompts, which is
what scores sum anyway; so a packed batch serves where no gradient is kept apart by prompt.

The row costs one thing: attention is a dense product over all of it. `pack` compares operations a layer, and packs
where that saves a tenth or more, up to rows of `_LONGEST` tokens, whose mask is small. It leaves batches as they are
where a layer's attention or positions depend on more than the order of a prompt's own tokens: a sliding window that a
prompt is longer than, rotary embeddings that look at the length, and attention kernels that take no mask.

Legend: B prompts in a batch, T padded length, A positions read of each, S length of the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mergekit_wp.scoring.batching import Batch

if TYPE_CHECKING:
    from mergekit_wp.scoring.models.layerwise import Stack

_MASKED = ("sdpa", "eager")  # attention of transformers that any mask can be given to
_WORTH = 0.9
_LONGEST = 1 << 12


@dataclass(frozen=True)
class PackedBatch(Batch):
    """As `Batch`, but ids_BT is one row [1, S], and last_B are places in it.

    positions_S   of each token in its own prompt
    prompt_S      the number of its prompt in the batch; -1 in the prefix
    """

    positions_S: torch.Tensor
    prompt_S: torch.Tensor

    @cached_property
    def allowed_SS(self) -> torch.Tensor:
        """Which token attends to which, bool: to the prefix and its own prompt, up to itself."""
        of_S1, position_S1 = self.prompt_S[:, None], self.positions_S[:, None]
        return ((self.prompt_S == -1) | (self.prompt_S == of_S1)) & (self.positions_S <= position_S1)

    def options(self, attention: str) -> dict[str, Any]:
        """Positions, and the mask as `attention` takes it: bool, or what is added to its logits."""
        mask_SS = self.allowed_SS
        if attention == "eager":
            mask_SS = torch.zeros_like(mask_SS, dtype=torch.float32).masked_fill(
                ~mask_SS, torch.finfo(torch.float32).min
            )
        return {"attention_mask": mask_SS[None, None], "position_ids": self.positions_S[None]}


def pack(batch: Batch, *stacks: Stack) -> Batch:
    """`batch`, packed if all stacks may run it so and it takes fewer operations, else as it is."""
    own_B = batch.last_B + int(batch.answer_B.max())  # tokens of each prompt, with room for the longest answer
    alike_T = (batch.ids_BT == batch.ids_BT[:1]).all(0).long().cumprod(0)
    # Each prompt keeps one token of its own, its last: where it is read is never in the prefix.
    prefix = min(int(alike_T.sum()), int(batch.last_B.min()))
    row = prefix + int((own_B - prefix).sum())
    if row > _LONGEST or not all(_may(stack, int(own_B.max())) and _pays(stack, batch, row) for stack in stacks):
        return batch
    return _packed(batch, prefix, own_B.tolist())


def _may(stack: Stack, longest: int) -> bool:
    config = stack.tower.config
    window = getattr(config, "sliding_window", None)
    return config._attn_implementation in _MASKED and stack.lengths.fixed and (window is None or longest <= window)


def _pays(stack: Stack, batch: Batch, row: int) -> bool:
    """Whether the row takes fewer operations in a layer: those of its weights, and attention over all of it."""
    prompts, padded = batch.ids_BT.shape
    layer = stack.tower.layers[0]
    weights = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    # Multiplications of a token with one that it attends to: twice what all heads read.
    attended = 2 * layer.self_attn.o_proj.weight.shape[1]
    cost = row * (weights + row * attended)
    return cost < _WORTH * prompts * padded * (weights + padded * attended)


def _packed(batch: Batch, prefix: int, own_B: list[int]) -> PackedBatch:
    device = batch.ids_BT.device
    parts = [batch.ids_BT[0, :prefix], *(row[prefix:end] for row, end in zip(batch.ids_BT, own_B, strict=True))]
    positions = [torch.arange(prefix), *(torch.arange(prefix, end) for end in own_B)]
    lengths = torch.tensor([len(part) for part in parts])
    prompt_S = torch.arange(-1, len(own_B)).repeat_interleave(lengths)
    # Where a prompt begins in the row, less where it begins in itself.
    moved_B = lengths.cumsum(0)[:-1] - prefix
    return PackedBatch(
        torch.cat(parts)[None], batch.last_B + moved_B.to(device), batch.answer_B,
        torch.cat(positions).to(device), prompt_S.to(device),
    )  # fmt: skip
