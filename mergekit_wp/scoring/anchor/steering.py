"""Steering a model along a direction, and batched greedy generation with or without it.

    v^ = v / |v|,   alpha = mean <z_a(x+ | expert), v^>,   z <- z + (alpha - <z, v^>) v^        Eq. 34-37

input-adaptive: whatever z has along v^, it leaves with alpha. By default the whole prompt is steered and the answer
runs free: alpha is what the expert has where an answer is about to begin, and a model held there begins again and
again (`<<<<<<<<` instead of a title). In the miniature world (seed 0, 32 prompts a type) the six instruction types
recover 65 % of the gap so at the best layer, 58 % if the anchor position alone is steered, 10 % if the answer is
steered too. That last way, `all`, is what lm-eval's steered model does with the .pt of `wp-anchor` (a test holds the
two together).

Legend: B prompts, T tokens, D residual width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from mergekit_wp.console import Tick
from mergekit_wp.errors import BadInput, enough_memory, shown
from mergekit_wp.geometry import text_tower
from mergekit_wp.scoring.anchor.graders import cut
from mergekit_wp.scoring.batching import Lengths, together

POSITIONS = ("prompt", "all", "anchor", "answer")


def check_positions(positions: str) -> None:
    """Raises `BadInput` for a word that is none of `POSITIONS`."""
    if positions not in POSITIONS:
        raise BadInput(f"positions: found {shown(positions)}, expected one of {', '.join(POSITIONS)}.")


@dataclass(frozen=True)
class Steering:
    """Clamp the stream above decoder layer `layer` to `alpha` along `v_D` (any length but 0).

    positions  prompt: the prompt's tokens; all: those and everything generated; anchor: the prompt's last token, the
               anchor position; answer: that and everything generated
    """

    layer: int
    v_D: torch.Tensor
    alpha: float
    positions: str = "prompt"

    def __post_init__(self) -> None:
        check_positions(self.positions)

    def clamp(self, z_BTD: torch.Tensor) -> torch.Tensor:
        """Eq. 37 at every position given, in float32; same shape and dtype as `z_BTD`."""
        unit_D = nn.functional.normalize(self.v_D.to(z_BTD.device, torch.float32), dim=-1)
        z = z_BTD.float()
        return (z + (self.alpha - z @ unit_D)[..., None] * unit_D).to(z_BTD.dtype)

    def at(self, z_BTD: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
        """The stream of whole prompts, steered; `last_B` is where each prompt's last token stands."""
        if self.positions in ("all", "prompt"):
            return self.clamp(z_BTD)
        rows_B, steered_BTD = torch.arange(len(z_BTD), device=z_BTD.device), z_BTD.clone()
        steered_BTD[rows_B, last_B] = self.clamp(z_BTD[rows_B, last_B])
        return steered_BTD


@contextmanager
def steered(model: Any, steering: Steering) -> Iterator[None]:
    """Inside the block, `model` (a causal LM of transformers) runs steered.

    A forward pass that finds nothing in its cache (or has none) reads prompts, padded on the left if at all; later ones
    go on from what is in the cache, a generated token each. So any number of answers may be generated.
    """
    reads_prompt = True

    def on_input(_module: nn.Module, _args: Any, call: dict[str, Any]) -> None:
        nonlocal reads_prompt
        cache = call.get("past_key_values")
        reads_prompt = cache is None or not cache.get_seq_length(steering.layer)

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not reads_prompt and steering.positions in ("prompt", "anchor"):
            return None
        z_BTD = output[0] if isinstance(output, tuple) else output
        last_B = torch.full((len(z_BTD),), z_BTD.shape[1] - 1, device=z_BTD.device)
        changed = steering.at(z_BTD, last_B)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    layer = text_tower(model).layers[steering.layer]
    handles = [layer.register_forward_pre_hook(on_input, with_kwargs=True), layer.register_forward_hook(on_output)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Greedy:
    """How answers are generated; `of` reads it off the models.

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

    @torch.no_grad()
    def answers(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        until: Sequence[str] = (),
        steering: Steering | None = None,
        tick: Tick = lambda _n: None,
    ) -> list[str]:
        """The greedy answer to each prompt (token ids), up to an end-of-text id or the first of the texts `until`.

        Raises `BadInput` when a prompt leaves no room for an answer, or a batch no memory.
        """
        found = [""] * len(prompts)
        lengths = Lengths(text_tower(model).config.to_dict())
        sizes = list(map(len, prompts))
        groups = [lengths.group_answered(size, self.max_tokens) for size in sizes]
        for chosen in together(sizes, self.batch_size, groups):
            lengths.forget(model)
            with _plain_greedy(model), nullcontext() if steering is None else steered(model, steering):
                texts = self._batch(model, [prompts[i] for i in chosen], until)
            for i, text in zip(chosen, texts, strict=True):
                found[i] = text
            tick(len(chosen))
        return found

    def _batch(self, model: Any, prompts: Sequence[Sequence[int]], until: Sequence[str]) -> list[str]:
        length = max(map(len, prompts))
        room = min(self.max_tokens, self.context - length)
        if room < 1:
            raise BadInput(f"a prompt of {length} tokens leaves no room to answer in {self.context}; shorten it.")
        pad = min(self.eos, default=0)
        ids_BT = torch.tensor([[pad] * (length - len(row)) + list(row) for row in prompts])
        mask_BT = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts])
        config = GenerationConfig(
            do_sample=False, max_new_tokens=room, eos_token_id=sorted(self.eos) or None, pad_token_id=pad
        )
        ends = [_Until(self.tokenizer, length, until)] if until else []
        too_much = f"batch_size: {len(prompts)} answers of up to {room} tokens do not fit on {model.device}; lower it."
        with enough_memory(too_much):
            output_BT = model.generate(
                input_ids=ids_BT.to(model.device),
                attention_mask=mask_BT.to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList(self._unknown(model)),
                stopping_criteria=StoppingCriteriaList(ends),
            )
        answers = output_BT[:, length:].tolist()
        return [cut(self.text(*both), until) for both in zip(prompts, answers, strict=True)]

    def _unknown(self, model: Any) -> list[Any]:
        """What keeps rows of the output head that the tokenizer does not know from being chosen."""
        rows = self.barred(len(model.get_output_embeddings().weight))
        return [SuppressTokensLogitsProcessor(rows, device=model.device)] if rows else []

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


@contextmanager
def _plain_greedy(model: Any) -> Iterator[None]:
    """Without the model's own generation config: what it sets (a repetition penalty, say) would be mixed in."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Until(StoppingCriteria):
    """Which answers hold one of the texts `until`.

    transformers' StopStringCriteria looks into the prompt too, and makes a table of the whole vocabulary first.
    """

    def __init__(self, tokenizer: Any, length: int, until: Sequence[str]):
        self.tokenizer, self.length, self.until = tokenizer, length, until
        # No token is shorter than a byte, so a text just completed lies within as many tokens.
        self.reach = max(len(end.encode()) for end in until)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_options: Any) -> torch.Tensor:
        tails = input_ids[:, max(self.length, input_ids.shape[1] - self.reach) :].tolist()
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        ended = [any(end in text for end in self.until) for text in texts]
        return torch.tensor(ended, device=input_ids.device)
