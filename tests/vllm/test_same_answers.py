"""The same model through transformers and through vLLM, in float32: the same answers, the same scores.

The rule where a token leads the next-best by less than `worlds.NEAR_TIE`: rounding may decide it, so answers are
compared up to there. That must be rare, or the comparison would say little.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import DEVICE
from worlds import MODELS, Oracle, Sure

GENERATED = {"Instruction": "mini_instruction", "Maths": "mini_maths", "Code": "mini_code", "Long": "mini_long"}


@pytest.fixture(scope="session")
def sure(outs: dict[str, Path], world: Path) -> dict[tuple[str, str], list[Sure]]:
    """(model, column) -> what the model surely says to each item."""
    return {
        (model, column): [oracle.answer(item["doc"]["prompt"]) for item in log(outs["hf"], model, column)]
        for model, oracle in ((name, Oracle(world / name)) for name in MODELS)
        for column in GENERATED
    }


def row(out: Path, model: str) -> dict[str, Any]:
    return next(row for row in json.loads((out / "results.json").read_text())["rows"] if row["name"] == model)


def log(out: Path, model: str, column: str) -> list[dict[str, Any]]:
    """Logged items in the order of the task."""
    file = out / row(out, model)["measured"][column]["samples_file"]
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda item: item["doc_id"])


def test_it_was_vllm_and_float32(outs: dict[str, Path]) -> None:
    for backend, out in outs.items():
        for about in row(out, "base")["measured"].values():
            assert about["backend"] == backend
            assert about["dtype"] == "float32"
            assert about["device"] == DEVICE
            assert about["max_length"] == 256
            assert about["versions"].get("vllm", "").startswith("0.32.0") == (backend == "vllm")


@pytest.mark.parametrize("column", GENERATED)
@pytest.mark.parametrize("model", MODELS)
def test_the_greedy_answers_are_the_same(outs, sure, model: str, column: str) -> None:
    logs = [log(outs[backend], model, column) for backend in ("hf", "vllm")]
    assert len(logs[0]) == len(logs[1]) == len(sure[model, column])
    for by_hf, by_vllm, known in zip(*logs, sure[model, column], strict=True):
        answers = [item["resps"][0][0] for item in (by_hf, by_vllm)]
        if known.whole:
            assert answers == [known.text, known.text]
        else:
            assert all(answer.startswith(known.text) for answer in answers), (answers, known)


@pytest.mark.parametrize("column", GENERATED)
def test_the_scores_are_the_same(outs, sure, column: str) -> None:
    """Every metric; an item that a near tie decides may count for one and not for the other."""
    for model in MODELS:
        known = sure[model, column]
        unsure = sum(not item.whole for item in known)
        cells = [row(outs[backend], model)["cells"][column] for backend in ("hf", "vllm")]
        assert cells[0]["samples"] == cells[1]["samples"] == len(known)
        assert cells[0]["value"] == pytest.approx(cells[1]["value"], abs=unsure / len(known) + 1e-12)
        if not unsure:
            assert cells[0]["stderr"] == cells[1]["stderr"]


def test_the_answers_say_something(outs, sure) -> None:
    """Or equality would be cheap: near ties are rare, answers differ from item to item, an expert is often right."""
    everything = [item for found in sure.values() for item in found]
    assert sum(item.whole for item in everything) >= 0.95 * len(everything)
    assert sum(item.special for item in sure["base", "Instruction"]) > 3
    for model in ("instruction", "maths", "code"):
        texts = [item["resps"][0][0] for item in log(outs["vllm"], model, model.capitalize())]
        assert len(set(texts)) > len(texts) / 2
    assert row(outs["vllm"], "instruction")["cells"]["Instruction"]["value"] >= 0.5
    assert row(outs["vllm"], "base")["cells"]["Instruction"]["value"] < 0.5


@pytest.mark.parametrize("model", MODELS)
def test_choices_are_weighed_alike(outs, model: str) -> None:
    """Log-probabilities of whole worked answers; which one is taken, where it leads."""
    logs = [log(outs[backend], model, "Choice") for backend in ("hf", "vllm")]
    unsure = 0
    for by_hf, by_vllm in zip(*logs, strict=True):
        first, second = ([float(reply[0][0]) for reply in item["resps"]] for item in (by_hf, by_vllm))
        assert len(first) == 4
        assert max(first) < 0
        assert second == pytest.approx(first, abs=1e-3)
        top = sorted(first)
        unsure += top[-1] - top[-2] < 2e-3
    values = [row(outs[backend], model)["cells"]["Choice"]["value"] for backend in ("hf", "vllm")]
    assert values[0] == pytest.approx(values[1], abs=unsure / len(logs[0]) + 1e-12)
    assert unsure < 3


def test_a_prompt_longer_than_the_context_is_cut_alike_and_counted(outs) -> None:
    for backend, out in outs.items():
        for model in MODELS:
            measured = row(out, model)["measured"]
            assert measured["Long"]["cut_prompts"] == 8, backend
            assert measured["Maths"]["cut_prompts"] == 0, backend
