"""Tokenised prompts in right-padded batches.

Padding stands on the right and the models are causal, so no real token ever attends to a pad token: the batch
runs without an attention mask, and every prompt's numbers equal those of the prompt alone. The anchor position
t_a of a prompt is its own last token.

Legend: B prompts in a batch, T padded length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mergekit_wp.errors import BadInput


@dataclass(frozen=True)
class Batch:
    """ids_BT: token ids, zero where padded; last_B: position of each prompt's last token."""

    ids_BT: torch.Tensor
    last_B: torch.Tensor

    def at_anchor(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, D]: the entries at each prompt's own anchor position."""
        return x_BTD[torch.arange(len(self.last_B), device=x_BTD.device), self.last_B]


def tokenize(tokenizer, prompts: Sequence[str], template: str, limit: int) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """Token ids of every prompt in its template.

    Raises `BadInput` when a prompt has no token, or more than the `limit` positions of the model.
    """
    texts = [template.replace("{prompt}", prompt) for prompt in prompts]
    ids = [list(tokenizer(text)["input_ids"]) for text in texts]
    for text, tokens in zip(texts, ids, strict=True):
        if not tokens:
            raise BadInput(f"the prompt {text[:60]!r} gives no token under this tokenizer; remove it from the pairs.")
        if len(tokens) > limit:
            raise BadInput(f"the prompt {text[:60]!r} has {len(tokens)} tokens, the model takes {limit}; shorten it.")
    return ids


def batches(prompts: Sequence[Sequence[int]], size: int, device: torch.device) -> Iterator[Batch]:
    """Cut prompts into batches of at most `size`, shortest first so that little is padded.

    The order of prompts is immaterial: everything computed from them is a sum.
    """
    ordered = sorted(prompts, key=len)
    for start in range(0, len(ordered), size):
        rows = ordered[start : start + size]
        ids_BT = torch.zeros(len(rows), len(rows[-1]), dtype=torch.long)
        for row, tokens in enumerate(rows):
            ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        last_B = torch.tensor([len(tokens) - 1 for tokens in rows])
        yield Batch(ids_BT.to(device), last_B.to(device))
