"""Scoring prompts of the miniature end where the capability decides the next token."""

from __future__ import annotations

import pytest

from experiments.miniature import corpus
from experiments.miniature.tokenizer import build_tokenizer
from experiments.miniature.world import scoring_row
from mergekit_wp.scoring.anchor.graders import parse_check, preflight


@pytest.mark.parametrize("capability", ["maths", "code"])
def test_the_prompt_goes_on_to_where_right_and_careless_part(capability):
    tokenizer = build_tokenizer()
    for item in corpus.scoring_items(capability, 40, seed=3):
        row = scoring_row(item, tokenizer)
        prompt = tokenizer(row["prompt"])["input_ids"]
        right, careless = (
            tokenizer(item.prompt)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]
            for answer in (item.right, item.careless)
        )
        assert "contrast" not in row
        # Tokenised as one text, the prompt is what the model has read when it comes to the next token ...
        assert prompt == right[: len(prompt)] == careless[: len(prompt)]
        # ... which is the first that tells the answers apart.
        assert right[len(prompt)] != careless[len(prompt)]


def test_an_instruction_is_decided_before_the_answer():
    tokenizer = build_tokenizer()
    for item in corpus.scoring_items("instruction", 5, seed=3):
        row = scoring_row(item, tokenizer)
        assert row["prompt"] == item.prompt
        assert row["contrast"] == item.contrast


@pytest.mark.parametrize("capability", ["instruction", "maths", "code"])
def test_the_check_tells_right_from_careless(capability):
    """What is left of each answer, after what the prompt already holds of it."""
    tokenizer = build_tokenizer()
    for item in corpus.scoring_items(capability, 3, seed=3):
        row = scoring_row(item, tokenizer)
        check = parse_check(row["check"], "row")
        preflight([check], item.task)
        right, careless = (answer.removeprefix(check.prefix) for answer in (item.right, item.careless))
        assert item.prompt + check.prefix == row["prompt"]
        assert check.passes(right)
        assert check.passes(right + "\nRequest: What is 1 + 1?\nAnswer:\n")
        assert not check.passes(careless)
