"""A pair of tiny models and prompts whose checks are what the expert says, for the parts that grade answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import tiny
from plain_answers import alone
from score_jobs import write_pairs
from study_world import write_study
from transformers import AutoModelForCausalLM

TOKENS = 2


def rows_of(pairs: str) -> list[dict]:
    return [json.loads(line) for line in Path(pairs).read_text().splitlines()]


def answer_world(folder: Path) -> Path:
    """The study. Task a has checks, of b one asks for code, c has none; the expert passes all that run no code."""
    folders = tiny.save_pair(folder, "llama", num_hidden_layers=3)
    pairs = write_pairs(folder / "pairs.jsonl", contrast=False, tasks=("a", "b", "c"), rows=9)
    rows, tokenizer = rows_of(pairs), tiny.tokenizer()
    expert = AutoModelForCausalLM.from_pretrained(folders[1])
    for row in rows:
        if row["task"] == "b" and row["prompt"].count(" ") == 4:
            row["check"] = {"python": "f", "kwargs": {"cases": [[1, 2]]}}
        elif row["task"] != "c":
            answer = alone(expert, tokenizer(row["prompt"])["input_ids"], [2], TOKENS)
            row["check"] = {"number": re.findall(r"\d+", tokenizer.decode(answer, skip_special_tokens=True))[-1]}
    Path(pairs).write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"kl": {"tasks": ("a", "b", "c")}, "ap": {"tasks": ("a",), "method": "ap", "utility": "staged"}}
    prompts = {"pairs": pairs, "device": "cpu", "batch_size": 16}
    return write_study(folder, files, prompts=prompts, answers={"tokens": TOKENS, "shares": [0.25], "draws": 1})
