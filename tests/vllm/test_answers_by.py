"""wp-answers by vLLM and by transformers' layers: the same tokens, but where rounding decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import DEVICE
from transformers import AutoModelForCausalLM
from worlds import NEAR_TIE

from mergekit_wp.eval import backends
from mergekit_wp.eval.greedy_answers import main


def said(world: Path, out: Path, backend: str) -> dict[tuple[int, ...], list[int]]:
    arguments = [
        f"--base={world / 'base'}", f"--expert={world / 'instruction'}", "--dtype=float32", f"--device={DEVICE}",
        f"--pairs={world / 'pairs' / 'instruction.jsonl'}", "--answer-tokens=24", f"--backend={backend}",
        f"--out={out}",
    ]  # fmt: skip
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    first, *rows = map(json.loads, out.read_text().splitlines())
    assert (first["dtype"], first["max_tokens"]) == ("float32", 24)
    return {tuple(row["prompt"]): row["answer"] for row in rows}


@torch.no_grad()
def lead(model: Any, ids: list[int]) -> float:
    first, second = model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
    return float(first - second)


def test_the_answers_are_the_same_but_for_ties(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    silent_bar = backends.silent_bar
    monkeypatch.setattr(
        backends, "silent_bar", lambda answered: silent_bar(lambda ended: (told.append(ended), answered(ended)))
    )
    by_layers, by_vllm = (said(world, tmp_path / f"{name}.jsonl", name) for name in ("hf", "vllm"))
    assert told == [1] * len(by_vllm)  # one after the other, as they ended
    assert by_layers.keys() == by_vllm.keys()
    assert len({len(answer) for answer in by_layers.values()}) > 1  # some end by themselves
    model = AutoModelForCausalLM.from_pretrained(world / "instruction", dtype=torch.float32)
    ties = 0
    for prompt, answer in by_layers.items():
        other = by_vllm[prompt]
        if answer == other:
            continue
        same = next((i for i, pair in enumerate(zip(answer, other, strict=False)) if pair[0] != pair[1]), None)
        assert same is not None, (answer, other)
        assert lead(model, [*prompt, *answer[:same]]) < NEAR_TIE
        ties += 1
    assert ties <= len(by_layers) / 4
