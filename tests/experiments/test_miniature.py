"""The miniature capabilities: disjoint splits, an exact tokenizer, graders that tell right from careless."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from experiments.miniature import corpus, grading, instructions, programs, sums
from experiments.miniature.items import CAPABILITIES, split_of
from experiments.miniature.lm_eval_tasks import MAX_ANSWER_TOKENS
from experiments.miniature.tokenizer import PAD, UNKNOWN, build_tokenizer, vocabulary
from experiments.miniature.train import Muon, encode
from experiments.miniature.training import Schedule
from experiments.miniature.world import WorldConfig
from mergekit_wp.errors import BadInput

MAKERS = {
    "instruction": instructions.random_item,
    "maths": sums.random_item,
    "code": programs.random_item,
}


def _graded(capability: str, split: str, seed: int, count: int = 120) -> list:
    return corpus.graded_items(capability, split, count, seed)


def _prompts_in_training(seed: int) -> set[str]:
    shares = dict.fromkeys(CAPABILITIES, 1 / 3)
    texts = corpus.training_texts(shares, dict.fromkeys(CAPABILITIES, 0.5), 0.2, 6000, corpus.stream(seed))
    return {text.prompt for text in texts}


def test_no_graded_or_scored_prompt_is_in_training_or_in_another_split() -> None:
    """Across seeds too: one world's test items are never another world's training texts."""
    seen: dict[str, set[str]] = {"train": set().union(*(_prompts_in_training(seed) for seed in (0, 1)))}
    keys: dict[str, set[str]] = {}
    for split in ("test", "validation", "pairs"):
        items = [item for c in CAPABILITIES for seed in (0, 1) for item in _graded(c, split, seed, 60)]
        seen[split] = {item.prompt for item in items} | {item.contrast for item in items if item.contrast}
        keys[split] = {item.key for item in items}
    for one, other in itertools.combinations(seen, 2):
        assert not seen[one] & seen[other]
    for one, other in itertools.combinations(keys, 2):
        assert not keys[one] & keys[other]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_item_is_in_the_split_its_key_says(capability: str) -> None:
    for split in ("test", "validation", "pairs"):
        items = _graded(capability, split, 3, 60)
        assert {split_of(item.key) for item in items} == {split}
        assert len({(item.task, item.key) for item in items}) == len(items)


def test_every_split_gets_its_share_of_keys() -> None:
    counts = {
        split: sum(split_of(str(i)) == split for i in range(10_000))
        for split in ("test", "validation", "pairs", "train")
    }
    assert counts["train"] > 6500
    assert min(counts.values()) > 800


def test_the_same_sum_turned_round_is_in_the_same_split() -> None:
    assert sums.sum_item("+", 27, 48, 0, "Ann", "maps").key == sums.sum_item("+", 48, 27, 1, "Ben", "hats").key


def test_items_come_from_the_seed_alone() -> None:
    for capability in CAPABILITIES:
        random.seed(1)
        first = _graded(capability, "test", 5, 30)
        random.seed(2)
        assert first == _graded(capability, "test", 5, 30)
        assert first != _graded(capability, "test", 6, 30)


def test_instruction_items_are_shared_out_evenly_and_have_a_contrast() -> None:
    items = _graded("instruction", "test", 0, 240)
    for name in instructions.TYPES:
        assert sum(item.task == name for item in items) == 40
    assert all(item.contrast and item.contrast != item.prompt for item in items)
    assert all(item.prompt.endswith("Answer:\n") for item in items)


def test_pairs_have_the_tasks_and_numbers_asked_for() -> None:
    assert len(corpus.scoring_items("instruction", 10, 0)) == 60
    assert len(corpus.scoring_items("code", 10, 0)) == 10
    assert all(item.contrast is None for item in corpus.scoring_items("maths", 10, 0))


def test_an_unknown_capability_is_refused() -> None:
    with pytest.raises(ValueError, match="poetry"):
        corpus.graded_items("poetry", "test", 6, 0)


# Tokenizer


def test_every_generated_text_comes_back_exactly() -> None:
    tokenizer = build_tokenizer()
    rng = random.Random(7)
    for make in MAKERS.values():
        for _ in range(400):
            item = make(rng)
            for text in (item.prompt, item.contrast or "", item.right, item.careless):
                ids = tokenizer(text)["input_ids"]
                assert ids[0] == tokenizer.bos_token_id
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_answer_alone_comes_back_with_its_indentation() -> None:
    """lm-eval decodes only what was generated, so a leading space or break must not be lost."""
    tokenizer = build_tokenizer()
    for text in ("\n    return x", "\n    x = x[1:]\n    return x", " Ann"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_prompt_and_answer_share_no_token() -> None:
    """So the last token of the prompt alone is the anchor position at evaluation, too."""
    tokenizer = build_tokenizer()
    rng = random.Random(8)
    for make in MAKERS.values():
        for _ in range(100):
            item = make(rng)
            row = encode([corpus.Text(item.prompt, item.right)], tokenizer)[0]
            assert row.ids[:-1] == tokenizer(item.prompt + item.right)["input_ids"]
            assert row.ids[-1] == tokenizer.eos_token_id


def test_no_right_answer_is_longer_than_the_tokens_allowed() -> None:
    tokenizer = build_tokenizer()
    for make, rng in itertools.product(MAKERS.values(), (random.Random(9),)):
        for _ in range(400):
            assert len(tokenizer(make(rng).right)["input_ids"]) < MAX_ANSWER_TOKENS


def test_digits_are_single_tokens_and_the_pad_token_is_one_row_more() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("75 + 8") == ["7", "5", " +", " 8"]
    padded = build_tokenizer(with_pad=True)
    assert len(padded) == len(tokenizer) + 1 == len(vocabulary()) + 1
    assert padded.pad_token == PAD
    assert tokenizer.pad_token is None
    assert tokenizer.convert_ids_to_tokens(0) == UNKNOWN


# Graders


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_right_answers_pass_and_careless_ones_fail(capability: str) -> None:
    count = 30 if capability == "code" else 120
    for item in _graded(capability, "test", 0, count):
        assert grading.grade(capability, item.right, item.grading), item
        if item.right != item.careless:
            assert not grading.grade(capability, item.careless, item.grading), item


def test_few_graded_sums_are_right_by_luck() -> None:
    items = _graded("maths", "test", 0, 240)
    assert sum(item.right == item.careless for item in items) == 24


def test_instructions_are_not_followed_by_saying_nothing_or_something_else() -> None:
    for item in _graded("instruction", "test", 0, 60):
        assert not grading.grade("instruction", "", item.grading)
        assert not grading.grade("instruction", "MAPS", item.grading)


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [
        ("english_capital", "ANN RAN, AND FELL.", "ANN ran, AND FELL."),
        ("title", "<<A run>>\nAnn ran, and fell.", "Ann ran, and fell. <<A run>>"),
        ("title", "<<A run>> Ann ran, and fell.", "<<>>\nAnn ran, and fell."),
        ("multiple_sections", "SECTION 1\nAnn ran,\nSECTION 2\nand fell.", "SECTION 1\nAnn ran, and fell."),
        ("quotation", '"Ann ran, and fell."', '"Ann ran," and fell.'),
        ("number_highlighted_sections", "*Ann* *ran*, and fell.", "*Ann* ran, and fell."),
        ("no_comma", "Ann ran and fell.", "Ann ran, and fell."),
    ],
)
def test_each_instruction_has_its_checker(task: str, right: str, wrong: str) -> None:
    plain = "Ann ran, and fell."
    assert grading.grade_instruction(right, task, 2, plain)
    assert not grading.grade_instruction(wrong, task, 2, plain)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The answer is: 75", True),
        ("The answer is: 65\nThe answer is: 75", True),
        ("75", False),
        ("The answer is: 751", False),
        ("The answer is:", False),
    ],
)
def test_sums_are_graded_on_the_final_number(text: str, right: bool) -> None:
    assert grading.grade_maths(text, 75) is right


def test_our_own_callables_do_what_the_python_says() -> None:
    """Expected results are computed here, answers are run there: every step must agree."""
    for kind in programs.KINDS:
        steps = programs.STEPS[kind]
        for i, first in enumerate(steps):
            result = programs.RESULTS[kind][i % len(programs.RESULTS[kind])]
            item = programs.program_item(kind, first, steps[(i + 1) % len(steps)], result)
            if item is not None:
                assert grading.grade("code", item.right, item.grading), item.right


# Configuration


def test_the_hash_changes_with_any_field() -> None:
    variants = [
        WorldConfig(),
        WorldConfig(seed=1),
        WorldConfig(layers=4),
        WorldConfig(latent=(0.3, 0.3, 0.3)),
        WorldConfig(expert=Schedule(steps=1, batch_size=1, learning_rate=1e-4)),
        WorldConfig.smoke(),
        WorldConfig.smoke(seed=1),
    ]
    assert len({config.hash12 for config in variants}) == len(variants)
    assert WorldConfig().hash12 == WorldConfig().hash12


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": 0},
        {"heads": 3},
        {"kv_heads": 3},
        {"test_items": 5},
        {"shares": (1.0, 0.0, 0.0)},
        {"latent": (0.3, 1.5, 0.3)},
        {"plain_share": 1.0},
        {"seed": -1},
    ],
)
def test_a_configuration_without_sense_is_refused(fields: dict) -> None:
    with pytest.raises(BadInput, match="World"):
        WorldConfig(**fields)


def test_a_schedule_without_steps_is_refused() -> None:
    with pytest.raises(BadInput, match="steps"):
        Schedule(steps=0, batch_size=1, learning_rate=1e-3)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    schedule = Schedule(steps=100, batch_size=1, learning_rate=1.0)
    rates = [schedule.rate_at(step) for step in range(100)]
    assert rates[4] == max(rates) == 1.0
    assert rates[0] == pytest.approx(0.2)
    assert rates[-1] < 0.01


def test_muon_is_torchs_in_bfloat16_and_near_it_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((32, 80), (80, 32), (16, 16))]
    gradients = [[torch.randn(x.shape, generator=generator) for x in start] for _step in range(5)]

    def trained(optimizer: type, **settings: object) -> list[torch.Tensor]:
        matrices = [torch.nn.Parameter(x.clone()) for x in start]
        muon = optimizer(matrices, lr=1e-2, **settings)
        for step in gradients:
            for matrix, gradient in zip(matrices, step, strict=True):
                matrix.grad = gradient.clone()
            muon.step()
        return [matrix.detach() for matrix in matrices]

    torchs = trained(torch.optim.Muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for ours, theirs in zip(trained(Muon, dtype=torch.bfloat16), torchs, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs, before in zip(trained(Muon, dtype=torch.float32), torchs, start, strict=True):
        # An update rounds to 8 bits there (measured: 1.0 % of the way that five updates went).
        assert (ours - theirs).norm() < 0.03 * (theirs - before).norm()
