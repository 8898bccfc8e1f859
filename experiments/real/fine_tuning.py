"""An expert of the base: full fine-tuning or a LoRA by transformers' Trainer, which goes on where a kill stopped it.

The loss is that of the answer's tokens alone, as the model's chat template frames them. Weights are trained in float32
(with bfloat16 products where the CPU has them) and written in float16: an update of 0.2 % of the weights, which is what
a hundred steps make, is near what bfloat16 can tell apart.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from experiments.miniature.train import has_fast_bfloat16
from experiments.real.pretrained import chat_text, load, save
from experiments.real.real_config import RealSchedule
from experiments.real.real_items import TrainingText
from mergekit_wp.files import atomic_path

_IGNORED = -100
_LORA_RANK = 16


def fine_tune(
    base: Path,
    examples: Sequence[TrainingText],
    schedule: RealSchedule,
    seed: int,
    folder: Path,
    work: Path,
    lora: bool = False,
) -> None:
    """Train `base` on the examples and write the expert (of `lora`, the adapter) to `folder`, which appears whole.

    work  where checkpoints lie meanwhile, and are found again by a rerun with the same arguments; removed at the end
    """
    if folder.is_dir():
        return
    model, tokenizer = load(base)
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=_LORA_RANK, lora_alpha=2 * _LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    model.config.use_cache = False
    rows = [encoded(example, tokenizer) for example in examples]
    trainer = Trainer(model=model, args=_arguments(schedule, seed, work), train_dataset=rows, data_collator=collate)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
    model.config.use_cache = True
    with atomic_path(folder) as partial:
        save(model.half(), tokenizer, partial)
    shutil.rmtree(work, ignore_errors=True)


def _arguments(schedule: RealSchedule, seed: int, work: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, schedule.steps // 20),
        weight_decay=0.0,
        bf16=has_fast_bfloat16(),
        seed=seed,
        data_seed=seed,
        logging_steps=10,
        save_steps=schedule.save_every,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def encoded(example: TrainingText, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids of a chat of one message and its answer, and which of them are learnt."""
    asked = tokenizer(chat_text(tokenizer, example.prompt), add_special_tokens=False)["input_ids"]
    said = tokenizer(example.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": asked + said, "labels": [_IGNORED] * len(asked) + said}


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right, where a causal model never looks."""
    batch: dict[str, Any] = {}
    for name, filler in (("input_ids", 0), ("labels", _IGNORED)):
        found = [torch.tensor(row[name]) for row in rows]
        batch[name] = pad_sequence(found, batch_first=True, padding_value=filler)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch
