"""Build the miniature world: a base and three experts with a real on-disk layout, trained from a seed.

What a capability is, is latent in the base: it has seen it in a minority of its training texts and mostly the
careless answer instead. Fine-tuning therefore moves the weights little, as it does in real language models,
and what the experts share is their base.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from experiments.miniature import corpus, grading
from experiments.miniature import lm_eval_tasks as tasks
from experiments.miniature.items import CAPABILITIES, Item
from experiments.miniature.tokenizer import build_tokenizer
from experiments.miniature.train import (
    encode,
    greedy_answers,
    has_fast_bfloat16,
    one_thread,
    train,
)
from experiments.miniature.training import RECIPE, Schedule, WorldConfig
from mergekit_wp.errors import BadInput
from mergekit_wp.files import atomic_path
from mergekit_wp.scoring.pairs import builtin_words

MODELS = ("base", *CAPABILITIES)
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
# What validating one model on one capability costs, in training steps, for the estimate of the time left.
_VALIDATION_STEPS = 15
# At this size SDPA's backward pass in bfloat16 takes as long as the rest of a step.
_ATTENTION = "eager"


def build_world(config: WorldConfig, root: str | Path, quiet: bool = False) -> Path:
    """The folder `root`/<hash> of this world, trained first if it is not there yet.

    The folder appears whole, by one rename, when everything in it is written. `quiet` hides the progress bar.
    Raises `BadInput` when `root` cannot be written, or when something else is in the folder's place.
    """
    target = Path(root).absolute() / config.hash12
    if (target / "world.json").is_file():
        return target
    if target.exists():
        raise BadInput(f"{target}: holds no world.json, so it is no world of ours; move it away.")
    _remove_abandoned(target)
    try:
        with atomic_path(target) as partial:
            partial.mkdir()
            # Hugging Face draws initial weights from the global generator: it is given back as it was.
            with _without_bars_of_transformers(), one_thread(), torch.random.fork_rng(devices=[]):
                _Builder(config, partial, quiet).build()
    except OSError:
        # Another process may have finished the same world in the meantime.
        if not (target / "world.json").is_file():
            raise
    return target


def _remove_abandoned(target: Path) -> None:
    """Delete what killed builds of this world left; a build still running in another process is let be."""
    for left in target.parent.glob(f".{target.name}.partial-*"):
        try:
            os.kill(int(left.name.rpartition("-")[2]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (OSError, ValueError):
            continue


@contextmanager
def _without_bars_of_transformers() -> Iterator[None]:
    """Loading and saving two million parameters needs no bar of its own inside ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class _Builder:
    """One build, into one folder."""

    def __init__(self, config: WorldConfig, folder: Path, quiet: bool) -> None:
        self.config = config
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.accuracy: dict[str, dict[str, float]] = {}
        self.validation = {
            name: corpus.graded_items(name, "validation", config.validation_items, config.seed) for name in CAPABILITIES
        }
        steps = config.base.steps + len(CAPABILITIES) * config.expert.steps
        steps += len(MODELS) * len(CAPABILITIES) * _VALIDATION_STEPS
        # Into a log file, one line every half minute is enough.
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(total=steps, unit="step", disable=quiet, dynamic_ncols=True, mininterval=interval)

    def build(self) -> None:
        """All phases in order; world.json last."""
        started = time.perf_counter()
        self._phase("data", self._write_data)
        with self.bar:
            parameters = self._phase("base", self._train_base)
            for name in CAPABILITIES:
                self._phase(name, partial(self._train_expert, name))
            for name in MODELS:
                self._phase(f"validate {name}", partial(self._validate, name))
        self.seconds["total"] = round(time.perf_counter() - started, 1)
        found = {"parameters": parameters, "validation_accuracy": self.accuracy, "wall_seconds": self.seconds}
        document = {**self._document(), **found}
        (self.folder / "world.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def _document(self) -> dict[str, Any]:
        """What decides the outcome, for world.json."""
        return {
            "hash": self.config.hash12,
            "recipe": RECIPE,
            "seed": self.config.seed,
            "config": asdict(self.config),
            "precision": "bfloat16" if has_fast_bfloat16() else "float32",
            "packages": {name: version(name) for name in _PACKAGES},
        }

    def _phase(self, name: str, work: Callable[[], Any]) -> Any:
        self.bar.set_description(f"world {self.config.hash12}: {name}", refresh=sys.stderr.isatty())
        started = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - started, 1)
        return result

    def _write_data(self) -> None:
        config = self.config
        graded = {(name, "validation"): items for name, items in self.validation.items()}
        for name in CAPABILITIES:
            graded[name, "test"] = corpus.graded_items(name, "test", config.test_items, config.seed)
        tokenizer = build_tokenizer()
        (self.folder / "tasks").mkdir()
        tasks.write_tasks(self.folder / "tasks", graded)
        for name in CAPABILITIES:
            items = corpus.scoring_items(name, config.scoring_prompts, config.seed)
            rows = [scoring_row(item, tokenizer) for item in items]
            tasks.write_jsonl(self.folder / "pairs" / f"{name}.jsonl", rows)

    def _train_base(self) -> int:
        config, tokenizer = self.config, build_tokenizer()
        if (same := self._same_base()) is not None:
            shutil.copytree(same / "base", self.folder / "base")
            self.bar.update(config.base.steps)
            return int(json.loads((same / "world.json").read_text(encoding="utf-8"))["parameters"])
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(_llama_config(config, len(tokenizer)), attn_implementation=_ATTENTION)
        shares = dict(zip(CAPABILITIES, config.shares, strict=True))
        latent = dict(zip(CAPABILITIES, config.latent, strict=True))
        self._train(model, tokenizer, config.base, "base", shares, latent)
        # Several shards, as large models have them.
        parameters = sum(p.numel() for p in model.parameters())
        _save(model, tokenizer, self.folder / "base", max_shard_bytes=parameters)
        return parameters

    def _same_base(self) -> Path | None:
        """A world beside this one that differs in its experts' training alone; its base is the one to be trained."""
        wanted = _base_of(self._document())
        for file in sorted(self.folder.parent.glob("*/world.json")):
            if _base_of(json.loads(file.read_text(encoding="utf-8"))) == wanted:
                return file.parent
        return None

    def _train_expert(self, name: str) -> None:
        """From the base as saved, in bf16 precision; the instruction expert has one token more."""
        tokenizer = build_tokenizer(with_pad=name == "instruction")
        model = self._load("base")
        if len(tokenizer) != model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            for table in (model.model.embed_tokens.weight.data, model.lm_head.weight.data):
                table[-1] = table[:-1].mean(0)
            model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        self._train(model, tokenizer, self.config.expert, name, {name: 1.0}, {name: 1.0})
        _save(model, tokenizer, self.folder / name)

    def _train(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        schedule: Schedule,
        name: str,
        shares: dict[str, float],
        right: dict[str, float],
    ) -> None:
        rng = corpus.stream(self.config.seed, "train", name)
        count = schedule.steps * schedule.batch_size
        texts = corpus.training_texts(shares, right, self.config.plain_share, count, rng)
        train(model, encode(texts, tokenizer), schedule, self.config.seed, lambda loss: self.bar.update(1))

    def _load(self, name: str) -> LlamaForCausalLM:
        # Eager attention: at this size SDPA's backward pass in bfloat16 takes as long as the rest of a step.
        return LlamaForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32, attn_implementation="eager")

    def _validate(self, name: str) -> None:
        """Greedy accuracy of the saved model on the validation items of every capability."""
        model, tokenizer = self._load(name), build_tokenizer()
        self.accuracy[name] = {}
        for capability, items in self.validation.items():
            prompts = [item.prompt for item in items]
            answers = greedy_answers(model, tokenizer, prompts, tasks.MAX_ANSWER_TOKENS)
            right = [
                grading.grade(capability, answer, item.grading) for answer, item in zip(answers, items, strict=True)
            ]
            self.accuracy[name][capability] = round(sum(right) / len(right), 4)
            self.bar.update(_VALIDATION_STEPS)


def _base_of(document: dict[str, Any]) -> str:
    """What decides the base of a world with this world.json, the same spelling for the same base."""
    config = {name: value for name, value in document.get("config", {}).items() if name != "expert"}
    return json.dumps([config, *(document.get(name) for name in ("recipe", "precision", "packages"))], sort_keys=True)


def scoring_row(item: Item, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """One row of the pairs: a prompt that ends where the capability decides the next token, and its answer's check.

    An instruction is decided before the answer begins, so the prompt is what a graded model reads, and the same
    request without the instruction is its contrast. A sum or a function begins alike with and without the
    capability (a function always with `def`), so the prompt goes on with the worked answer up to the token where
    the right and the careless answer part; the check has that beginning too, so that it grades whole answers.
    """
    check = {**_check(item), "until": [tasks.ANSWER_END]}
    if item.contrast is not None:
        return {"task": item.task, "prompt": item.prompt, "contrast": item.contrast, "check": check}
    right, careless = tokenizer([item.right, item.careless], add_special_tokens=False)["input_ids"]
    alike = next(i for i, (a, b) in enumerate(zip(right, careless, strict=False)) if a != b)
    begun = str(tokenizer.decode(right[:alike]))
    return {"task": item.task, "prompt": item.prompt + begun, "check": {**check, "prefix": begun}}


def _check(item: Item) -> dict[str, Any]:
    """The grader of wp-score that says of an answer what the world's own says.

    Of 720 instructions it takes three right answers for wrong, all in capitals, whose language it does not know, and
    no careless one for right.
    """
    if item.capability == "maths":
        return {"number": str(item.grading["answer"])}
    if item.capability == "code":
        return {"python": item.grading["function"], "kwargs": {"cases": item.grading["cases"]}}
    kind = builtin_words()["instructions"][item.task]
    arguments = {"num_sections": 2, "section_spliter": "SECTION", "num_highlights": item.grading["number"]}
    named = kind["wordings"][0].get("kwargs", {})
    return {"ifeval": kind["ifeval"], "kwargs": {name: arguments[name] for name in named}}


def _llama_config(config: WorldConfig, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        intermediate_size=config.mlp_size,
        max_position_embeddings=256,
        initializer_range=config.initial_deviation,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def _save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    max_shard_bytes: int = 2**30,
) -> None:
    """Weights in bf16, config, generation config and tokenizer."""
    model.bfloat16().save_pretrained(folder, max_shard_size=max_shard_bytes)
    tokenizer.save_pretrained(folder)
