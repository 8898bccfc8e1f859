"""Answers under a Llama-style tokenizer keep the space that they begin with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from eval_world import QUESTIONS, make_model, results, wp_eval, write_suite, write_tasks
from tiny import random_model, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mergekit_wp.eval.measure import keep_first_space


def llama_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Tokens such as `▁w7`, and Llama's own decoder; 97 tokens, with four special ones first."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [f"▁w{i}" for i in range(60)] + ["▁", "▁return", *(f"x{i}" for i in range(31))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class LM:
    """As much of lm-eval's class as decoding takes."""

    def __init__(self, own: transformers.PreTrainedTokenizerFast) -> None:
        self.tokenizer = own

    def tok_decode(self, tokens, skip_special_tokens=True) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)


def test_an_answer_keeps_its_indentation() -> None:
    lm = LM(llama_tokenizer())
    answer = lm.tokenizer.convert_tokens_to_ids(["▁", "▁", "▁", "▁return", "▁w7", "x3"])
    assert lm.tok_decode(answer) == "   return w7x3"
    keep_first_space(lm)
    assert lm.tok_decode(answer) == "    return w7x3"
    assert lm.tok_decode(lm.tokenizer.convert_tokens_to_ids(["x3", "▁w7"])) == "x3 w7"
    assert lm.tok_decode([]) == ""
    assert lm.tok_decode([*answer, 2]) == "    return w7x3"
    assert lm.tok_decode(2, skip_special_tokens=False) == "</s>"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_other_tokenizers_are_left_alone(kind: str) -> None:
    """Words joined by spaces, and byte-level BPE, which writes its spaces in full."""
    lm = LM(tokenizer(kind))
    before = lm.tok_decode
    keep_first_space(lm)
    assert lm.tok_decode == before


@torch.no_grad()
def test_what_wp_eval_grades_begins_with_its_space(tmp_path: Path) -> None:
    model = random_model("llama", 1)
    model.save_pretrained(tmp_path / "model")
    own = llama_tokenizer()
    own.save_pretrained(tmp_path / "model")
    write_tasks(tmp_path / "tasks", right=make_model(tmp_path / "other", 2))
    task = {"task": "tiny_gen", "column": "Gen", "metric": "exact_match,none"}
    suite = write_suite(tmp_path / "suite.yaml", tasks=[task])
    outcome = wp_eval(suite, tmp_path / "model", "--log-samples", "--out", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    log = tmp_path / "out" / results(tmp_path / "out")["rows"][0]["measured"]["Gen"]["samples_file"]
    said = [json.loads(line)["filtered_resps"][0] for line in log.read_text().splitlines()]
    for question, answer in zip(QUESTIONS, said, strict=True):
        ids = own(question)["input_ids"]
        whole = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0].tolist()
        continued = own.decode(whole, skip_special_tokens=True).removeprefix(own.decode(ids, skip_special_tokens=True))
        assert answer == continued
    assert any(answer.startswith(" ") for answer in said)
