"""The pretrained world's items, training and files, without the pretrained model: a tiny one stands for it."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from experiments.miniature.corpus import Text
from experiments.miniature.items import CAPABILITIES, split_of
from experiments.miniature.training import Schedule
from experiments.real import fine_tuning, pretrained
from experiments.real.constraints import CONSTRAINTS, instructed
from experiments.real.problems import FUNCTIONS, PROBLEMS, small_function, word_problem
from experiments.real.real_config import RealConfig, data_digests
from experiments.real.real_grading import right
from experiments.real.real_items import (
    graded_items,
    pairs_row,
    plain_answer,
    training_requests,
    training_texts,
)
from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.pairs import read_pairs

ANSWER = "Honey is a sweet, sticky food made by bees. It is used in tea, bread and cakes. People like it very much."
OWN = dict.fromkeys(training_requests(), ANSWER)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_what_an_expert_learns_passes_the_check_of_ifeval_and_the_plain_answer_does_not(name: str) -> None:
    rng = random.Random(0)
    for answer in (
        ANSWER,
        "Bread is good and cheap food for a great many people.",
        "A map shows the people who read it, in most places, the way.",
    ):
        for _ in range(4):
            item = instructed("Tell me about honey.", name, rng, answer)
            assert right("instruction", item.right, item.grading), item
            if name != "no_comma" or "," in answer:
                assert not right("instruction", answer, item.grading), item


def test_an_answer_that_says_nothing_follows_nothing() -> None:
    item = instructed("Tell me about honey.", "no_comma", random.Random(0))
    assert not right("instruction", "Ok.", item.grading)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_worked_steps_of_a_problem_are_true_and_end_in_its_answer(name: str) -> None:
    rng = random.Random(name)
    for _ in range(20):
        item = word_problem(rng, name)
        steps = re.findall(r"(\d+ [-+*] \d+) = (-?\d+)", item.right)
        assert len(steps) == len(PROBLEMS[name].steps)
        assert all(eval(expression) == int(value) for expression, value in steps)
        assert item.right.endswith(f"#### {steps[-1][1]}")
        assert right("maths", item.right, item.grading)
        assert not right("maths", item.right + "1", item.grading)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_function_that_is_learnt_is_the_one_asked_for(kind: str) -> None:
    item = small_function(random.Random(kind), kind)
    assert right("code", f"Here you are:\n```python\n{item.right}\n```\nIt does what you asked.", item.grading)
    broken = item.right.replace("return ", "return 1 if True else ")
    assert not right("code", broken, item.grading)


@pytest.mark.parametrize("config", [RealConfig(), RealConfig.far(), RealConfig.smoke()])
def test_there_are_as_many_items_as_a_world_asks_for(config: RealConfig) -> None:
    uses = {"test": config.test_items, "validation": config.validation_items, "pairs": config.scoring_prompts}
    for capability in CAPABILITIES:
        for split, count in uses.items():
            found = graded_items(capability, split, count, config.seed)
            assert len({item.prompt for item in found}) == count
            kinds = Counter(item.task for item in found)
            assert max(kinds.values()) - min(kinds.values()) <= 1


def test_more_items_than_there_are_is_a_sentence() -> None:
    with pytest.raises(BadInput, match=r"code: found .* test items and no further of the kind"):
        graded_items("code", "test", 3000, 0)


def test_nothing_that_is_tested_chosen_by_or_scored_with_is_trained_on() -> None:
    for name in CAPABILITIES:
        uses = {split: graded_items(name, split, 60, 0) for split in ("test", "validation", "pairs")}
        trained = {example.prompt for example in training_texts(name, 400, 0, OWN, None)}
        assert len(trained) > 100
        seen = trained
        for split, items in uses.items():
            assert {split_of(item.key) for item in items} == {split}
            prompts = {item.prompt for item in items}
            assert len(prompts) == len(items)
            assert not seen & prompts
            seen = seen | prompts
    plain = {item.contrast for item in graded_items("instruction", "test", 60, 0)}
    assert not plain & set(training_requests())


def test_of_the_official_files_training_rows_alone_are_learnt(tmp_path: Path) -> None:
    gsm = [{"question": f"Question {i}?", "answer": f"<<1+{i}={1 + i}>>It is {1 + i}.\n#### {1 + i}"} for i in range(9)]
    mbpp = [
        {"task_id": i, "text": f"Task {i}.", "code": f"def f():\r\n\treturn {i}", "test_list": [f"assert f() == {i}"]}
        for i in (1, 11, 510, 511, 600, 601, 974)
    ]
    write(tmp_path / "gsm8k-train.jsonl", gsm)
    write(tmp_path / "mbpp.jsonl", mbpp)
    assert [name for name, _digest in data_digests(tmp_path)] == ["gsm8k-train.jsonl", "mbpp.jsonl"]
    maths = [e for e in training_texts("maths", 200, 0, OWN, tmp_path) if e.prompt.startswith("Question")]
    assert 20 < len(maths) < 90
    assert maths[0].answer.startswith("It is ")
    code = [e for e in training_texts("code", 200, 0, OWN, tmp_path) if e.prompt.startswith("Task ")]
    assert {e.prompt.split(".")[0] for e in code} == {"Task 601", "Task 974"}
    assert code[0].answer.startswith("def f():\n    return ")


def test_official_files_that_are_not_as_published_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=re.escape("lacks gsm8k-train.jsonl")):
        data_digests(tmp_path)
    write(tmp_path / "gsm8k-train.jsonl", [{"q": "?"}])
    with pytest.raises(BadInput, match="cannot read its rows"):
        training_texts("maths", 1, 0, OWN, tmp_path)


def test_a_plain_answer_is_whole_sentences_of_one_paragraph() -> None:
    assert plain_answer("**Bread** is good. It is\nold. And so\n\nNext.") == "Bread is good. It is old."
    assert plain_answer("No end") == ""
    assert len(plain_answer("Five words are in here. " * 20).split()) == 45


def test_the_prompts_are_pairs_that_score_can_read(tmp_path: Path) -> None:
    for name in CAPABILITIES:
        write(tmp_path / "pairs.jsonl", [pairs_row(item) for item in graded_items(name, "pairs", 30, 0)])
        pairs = read_pairs(tmp_path / "pairs.jsonl")
        assert all(pair.chat and pair.check for pair in pairs)
        assert {pair.task for pair in pairs} == (set(CONSTRAINTS) if name == "instruction" else {name})
        assert all((pair.contrast is None) == (name != "instruction") for pair in pairs)


def test_answers_that_were_kept_are_not_made_again_and_a_cut_line_is(tmp_path: Path) -> None:
    base, file, asked = chat_model(tmp_path / "base"), tmp_path / "answers.jsonl", ["w1 w2", "w3", "w4 w5 w6"]
    whole = pretrained.answers(base, asked, file)
    assert list(whole) == asked
    lines = file.read_text().splitlines(keepends=True)
    changed = json.dumps([json.loads(lines[0])[0], "kept"]) + "\n"
    file.write_text(changed + lines[1] + lines[2][:-4])
    told: list[int] = []
    again = pretrained.answers(base, asked, file, told.append)
    assert told == [2, 1]
    assert again == whole | {json.loads(lines[0])[0]: "kept"}
    assert pretrained.answers(tmp_path / "nowhere", asked, file) == again


def test_the_answer_alone_is_learnt(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model(tmp_path / "base"))
    for answer in ("w3", "w3 w4 w5"):
        (row,) = fine_tuning.encoded([Text("w1 w2", answer)], tokenizer, 1, 0)
        assert tokenizer.decode(row["input_ids"]) == f"w90 w1 w2 w91 {answer} </s>"
        learnt = [label for label in row["labels"] if label != -100]
        assert learnt == row["input_ids"][-len(learnt) :]
        assert tokenizer.decode(learnt) == f"{answer} </s>"


def test_every_text_is_learnt_once_beside_texts_of_like_length(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model(tmp_path / "base"))
    lengths = [1 + 7 * i % 16 for i in range(16)]  # 1 to 16, mixed
    texts = [Text("w1", " ".join(["w2"] * length)) for length in lengths]
    rows = [len(row["input_ids"]) for row in fine_tuning.encoded(texts, tokenizer, 4, seed=0)]
    found = [sorted(rows[i : i + 4]) for i in range(0, 16, 4)]
    assert sorted(found) == [list(range(first, first + 4)) for first in range(min(rows), min(rows) + 16, 4)]
    assert rows != [len(row["input_ids"]) for row in fine_tuning.encoded(texts, tokenizer, 4, seed=1)]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bfloat16: bool
) -> None:
    monkeypatch.setattr(fine_tuning, "has_fast_bfloat16", lambda: bfloat16)  # on whatever CPU this runs
    base, schedule = chat_model(tmp_path / "base"), Schedule(4, 2, 1e-3)
    texts = [Text(f"w1 w2 w{i}", f"w3 w{i} w{i}"[: 2 + 3 * (i % 3)]) for i in range(8)]
    trainer, taken, made = fine_tuning.Trainer, [], []

    class StoppedError(Exception):
        pass

    class Watch(TrainerCallback):
        def __init__(self, stop_at: int) -> None:
            self.stop_at = stop_at

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            taken.append(state.global_step)
            if state.global_step == self.stop_at:
                raise StoppedError

    def train(name: str, stop_at: int = 0) -> list[int]:
        taken.clear()

        def watched(**given: Any) -> Any:
            made.append(trainer(**given, callbacks=[Watch(stop_at)]))
            return made[-1]

        monkeypatch.setattr(fine_tuning, "Trainer", watched)
        fine_tuning.fine_tune(base, texts, schedule, 0, tmp_path / name, tmp_path / "work")
        return taken

    assert train("whole") == [1, 2, 3, 4]
    rows = fine_tuning.encoded(texts, AutoTokenizer.from_pretrained(base), 2, seed=0)
    learnt = [row[row != -100].tolist() for batch in made[0].get_train_dataloader() for row in batch["labels"]]
    assert learnt == [[label for label in row["labels"] if label != -100] for row in rows], "in the order of `encoded`"
    assert not (tmp_path / "work").exists()
    with pytest.raises(StoppedError):
        train("stopped", stop_at=3)
    assert not (tmp_path / "stopped").exists()
    assert train("stopped") == [3, 4]
    whole, stopped, before = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped", "base")
    )
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
    assert any(not torch.equal(tensor, before[name].half()) for name, tensor in whole.items())
    assert {tensor.dtype for tensor in whole.values()} == {torch.float16}


def test_a_configuration_is_named_by_all_that_decides_it() -> None:
    found = {c.hash12 for c in (RealConfig(), RealConfig(1), RealConfig.far(), RealConfig.smoke())}
    found.add(RealConfig(data=(("mbpp.jsonl", "0"),)).hash12)
    assert len(found) == 5
    with pytest.raises(BadInput, match="learning_rate"):
        Schedule(1, 1, 0.0)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def chat_model(folder: Path) -> Path:
    """A tiny model whose chat template puts words before and after the message."""
    tiny.save(tiny.random_model("llama"), folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}w90 {{ m['content'] }} w91 {% endfor %}")
    return folder
