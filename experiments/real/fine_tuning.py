"""An expert of the base: full fine-tuning or a LoRA by transformers' Trainer, which goes on where a kill stopped it.

The loss is that of the answer's tokens alone, as the model's chat template frames them. Weights are trained in float32
(with bfloat16 products where the device has them) and written in float16: an update of 0.2 % of the weights, which is
what a hundred steps make, is near what bfloat16 can tell apart.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from experiments.miniature.corpus import Text
from experiments.miniature.train import batches, encode, has_fast_bfloat16
from experiments.miniature.training import Schedule
from experiments.real.pretrained import chat_text, load, save
from mergekit_wp.files import atomic_path

_IGNORED = -100
_LORA_RANK = 16
_CHECKPOINTS = 6  # of a training; each takes three times the model's own memory on disk


def fine_tune(
    base: Path,
    texts: Sequence[Text],
    schedule: Schedule,
    seed: int,
    folder: Path,
    work: Path,
    lora: bool = False,
) -> None:
    """Train `base` on the texts and write the expert (of `lora`, the adapter) to `folder`, which appears whole.

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
    rows = encoded(texts, tokenizer, schedule.batch_size, seed)
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=_IGNORED)
    trainer = Trainer(model=model, args=_arguments(schedule, seed, work), train_dataset=rows, data_collator=pad)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
    model.config.use_cache = True
    with atomic_path(folder) as partial:
        save(model.half(), tokenizer, partial)
    shutil.rmtree(work, ignore_errors=True)


def _arguments(schedule: Schedule, seed: int, work: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(schedule.warmup_share * schedule.steps)),
        weight_decay=0.0,
        use_cpu=not torch.cuda.is_available(),  # unsaid, bf16 on a CPU is refused
        bf16=torch.cuda.is_available() or has_fast_bfloat16(),
        seed=seed,
        train_sampling_strategy="sequential",  # `encoded` put them in order
        logging_steps=10,
        save_steps=max(1, schedule.steps // _CHECKPOINTS),
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def encoded(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int
) -> list[dict[str, list[int]]]:
    """Token ids of chats of one message and its answer, and which of them are learnt, in the order of the training.

    Texts of like length share a batch, in batches whose order is drawn: as they come, a third of the tokens is padding.
    """
    framed = encode([Text(chat_text(tokenizer, text.prompt), text.answer) for text in texts], tokenizer)
    drawn = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": row.ids, "labels": [_IGNORED] * row.prompt_length + row.ids[row.prompt_length :]}
        for batch in batches(framed, batch_size, drawn)
        for row in batch
    ]
