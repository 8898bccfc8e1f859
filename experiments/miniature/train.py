"""A plain training loop for the miniature models, and the greedy answers that validate them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.miniature.corpus import Text
from experiments.miniature.training import Schedule

_IGNORED = -100
_BATCHES_SORTED_TOGETHER = 8


@dataclass(frozen=True)
class Encoded:
    """One training sequence as token ids; the first `prompt_length` of them are not learnt."""

    ids: list[int]
    prompt_length: int


def encode(texts: list[Text], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """<s> prompt answer </s>. The prompt ends in a line break, so it and the answer never share a token."""
    prompts = tokenizer([text.prompt for text in texts])["input_ids"]
    answers = tokenizer([text.answer for text in texts], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [Encoded([*p, *a, end], len(p)) for p, a in zip(prompts, answers, strict=True)]


def padded(rows: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, both [B, T]; padding is on the right, where a causal model never looks."""
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full((len(rows), length), _IGNORED, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.ids)
        ids[i, : len(tokens)] = tokens
        # The target of position t is the token at t + 1.
        targets[i, row.prompt_length - 1 : len(tokens) - 1] = tokens[row.prompt_length :]
    return ids, targets


def batches(rows: list[Encoded], size: int, generator: torch.Generator) -> Iterator[list[Encoded]]:
    """The rows once, in the order given, except that neighbours of like length share a batch."""
    window = size * _BATCHES_SORTED_TOGETHER
    for start in range(0, len(rows), window):
        chunk = sorted(rows[start : start + window], key=lambda row: len(row.ids))
        batches = [chunk[i : i + size] for i in range(0, len(chunk), size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def _optimizers(model: LlamaForCausalLM, schedule: Schedule) -> list[torch.optim.Optimizer]:
    inner = [p for name, p in model.named_parameters() if schedule.muon and p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    rate = schedule.learning_rate
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    ]
    if inner:
        optimizers.append(Muon(inner, rate))
    return optimizers


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon without weight decay, its products in bfloat16 only where the CPU has that.

    An update is the momentum of a matrix's gradient, made near orthogonal, and scaled to the size of AdamW's updates
    so that one learning rate does for both (arXiv 2502.16982). torch's own multiplies in bfloat16 everywhere, which
    without hardware for it took six sevenths of a step (measured on AVX2: 2.0 s, against 0.28 s in float32).
    """

    _MOMENTUM = 0.95
    _STEPS, _COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # Newton-Schulz, as torch and Muon's author have it

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, dtype: torch.dtype | None = None):
        super().__init__(matrices, {"lr": lr})
        self._dtype = dtype or (torch.bfloat16 if has_fast_bfloat16() else torch.float32)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix [out, in] from its gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                momentum = state.setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - self._MOMENTUM)
                update = self._orthogonal(weight.grad.lerp(momentum, self._MOMENTUM))
                weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))

    def _orthogonal(self, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix with its singular values brought near 1, by a quintic iteration on its wide side."""
        a, b, c = self._COEFFICIENTS
        tall = matrix.shape[0] > matrix.shape[1]
        x = (matrix.T if tall else matrix).to(self._dtype)
        x = x / x.norm().clamp(min=1e-7)  # now no singular value is above 1
        for _ in range(self._STEPS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if tall else x


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, training in it would be slower than in float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside the block.

    Two million parameters give a second thread too little to do: on two cores it saves nothing when the machine
    is idle, and waiting for it makes a step many times slower when it is not. And the sums come out the same
    whatever the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(
    model: LlamaForCausalLM,
    rows: list[Encoded],
    schedule: Schedule,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Train `model` in place on `rows`, which are `schedule.steps` batches; the loss is on answers only.

    `on_step` is told the loss of every step. Raises FloatingPointError when the loss is no longer finite.
    """
    model.train()
    optimizers = _optimizers(model, schedule)
    generator = torch.Generator().manual_seed(seed)
    for step, batch in enumerate(batches(rows, schedule.batch_size, generator)):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step)
        ids, targets = padded(batch)
        # A block for each step: autocast keeps its bf16 copies of the weights until its block ends.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bfloat16()):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.float()
        learnt = targets != _IGNORED
        loss = F.cross_entropy(model.lm_head(hidden[learnt]), targets[learnt])
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        on_step(loss.item())
    model.eval()


@torch.no_grad()
def greedy_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_tokens: int
) -> list[str]:
    """The greedy answer to each prompt, special tokens removed, as lm-eval's hf backend would have it."""
    encoded = tokenizer(prompts, padding=False)["input_ids"]
    length = max(map(len, encoded))
    pad = tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in encoded])
    output = model.generate(  # type: ignore[misc]
        input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad
    )
    return [str(tokenizer.decode(row[length:], skip_special_tokens=True)) for row in output]
