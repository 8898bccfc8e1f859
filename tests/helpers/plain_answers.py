"""Answers by transformers' own generation."""

from __future__ import annotations

import torch
from transformers import GenerationConfig


def alone(model, prompt, eos, tokens):
    """By transformers, one prompt at a time, what it would choose if nothing else were asked of it."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=eos, pad_token_id=0, bos_token_id=1
    )
    row = torch.tensor([prompt])
    return model.generate(row, attention_mask=torch.ones_like(row))[0, len(prompt) :].tolist()
