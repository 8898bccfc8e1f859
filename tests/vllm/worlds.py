"""A trained miniature whose heads vLLM's CPU attention has, its tasks and two more, and where its answers are sure.

The demo's own world has heads of 20 dimensions, which that attention has not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.miniature.lm_eval_tasks import ANSWER_END, MAX_ANSWER_TOKENS, SUITE
from experiments.miniature.training import Schedule, WorldConfig
from experiments.miniature.world import build_world

MODELS = ("base", "instruction", "maths", "code")
CONTEXT = 256
# Between float32 sums in another order logits differ by some 1e-5; below this lead over the second-best token we
# do not ask two programs to agree on the best.
NEAR_TIE = 1e-3
# Trained for half a minute, so that answers have a lead, end by themselves and are right now and then.
CONFIG = WorldConfig(
    hidden_size=64, layers=2, heads=2, kv_heads=1, mlp_size=128,
    base=Schedule(steps=600, batch_size=16, learning_rate=2.5e-3, muon=True),
    expert=Schedule(steps=120, batch_size=16, learning_rate=1e-3),
    test_items=24, validation_items=6, scoring_prompts=4,
)  # fmt: skip


def build(root: Path) -> Path:
    """The world's folder, with `mini_choice` and `mini_long` among its tasks and a suite.yaml of all five.

    The instruction expert asks for a repetition penalty, as Qwen2.5's models do; greedy answers are without. The
    base says a special token for every comma; texts are without.
    """
    world = build_world(CONFIG, root, quiet=True)
    _say_unknown_for_commas(world / "base")
    settings = world / "instruction" / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "repetition_penalty": 1.3}))
    tasks = world / "tasks"
    items = [json.loads(line) for line in (tasks / "data" / "mini_maths.jsonl").read_text().splitlines()]
    # Which of four worked answers: some are long, and all begin alike.
    choices = [
        {
            "q": item["prompt"],
            "choices": [items[(i - i % 4 + j) % len(items)]["target"] for j in range(4)],
            "gold": i % 4,
        }
        for i, item in enumerate(items)
    ]
    # Longer than the context; the request that counts comes last.
    long = [{**item, "prompt": item["prompt"] * 20} for item in items[:8]]
    for name, rows in (("mini_choice", choices), ("mini_long", long)):
        (tasks / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    common = {"test_split": "test", "num_fewshot": 0, "dataset_path": "json"}
    _write_task(
        tasks, "mini_choice", **common, output_type="multiple_choice", doc_to_text="{{q}}", doc_to_target="gold",
        doc_to_choice="{{choices}}", target_delimiter="", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    _write_task(
        tasks, "mini_long", **common, output_type="generate_until", doc_to_text="{{prompt}}",
        doc_to_target="{{target}}",
        generation_kwargs={"until": [ANSWER_END], "do_sample": False, "max_gen_toks": MAX_ANSWER_TOKENS},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    suite = yaml.safe_load(SUITE.read_text())
    suite |= {"include_path": str(tasks), "dtype": "float32"}
    suite["tasks"] += [
        {"task": "mini_choice", "column": "Choice", "metric": "acc,none"},
        {"task": "mini_long", "column": "Long", "metric": "exact_match,none"},
    ]
    (world / "suite.yaml").write_text(yaml.safe_dump(suite))
    return world


def _say_unknown_for_commas(folder: Path) -> None:
    """<unk> reads like a comma and is a little likelier."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    unknown, comma = tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids(",")
    with torch.no_grad():
        model.model.embed_tokens.weight[unknown] = model.model.embed_tokens.weight[comma]
        model.lm_head.weight[unknown] = 1.1 * model.lm_head.weight[comma]
    model.save_pretrained(folder, max_shard_size=model.num_parameters())  # the same shards


def _write_task(folder: Path, name: str, **content: object) -> None:
    source = {"data_files": {"test": str(folder / f"{name}.json")}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "dataset_kwargs": source, **content}))


@dataclass(frozen=True)
class Sure:
    """A model's greedy answer as far as no near tie decides it; `whole` when none does.

    `special` is whether there are special tokens in it, which the text leaves out, before its end.
    """

    text: str
    whole: bool
    special: bool


class Oracle:
    """Greedy answers by transformers alone, one prompt at a time, without lm-eval."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def answer(self, prompt: str) -> Sure:
        ids = self.tokenizer(prompt)["input_ids"][-(CONTEXT - MAX_ANSWER_TOKENS) :]
        end = self.tokenizer.eos_token_id
        row = self.model.generate(
            torch.tensor([ids]),
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=end,
            repetition_penalty=1.0,
        )
        best = self.model(row).logits[0, len(ids) - 1 : -1].topk(2).values  # [answer tokens, 2]
        sure = ((best[:, 0] - best[:, 1]) >= NEAR_TIE).tolist()
        until = sure.index(False) if False in sure else len(sure)
        said = row[0, len(ids) : len(ids) + until]
        text = self.tokenizer.decode(said, skip_special_tokens=True)
        special = self.tokenizer.unk_token_id in said
        return Sure(text.split(ANSWER_END)[0], until == len(sure) or ANSWER_END in text, special)
