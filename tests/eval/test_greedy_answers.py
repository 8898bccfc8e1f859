"""wp-answers: the file is the one that wp-score keeps and reads; what it refuses. By vLLM itself: tests/vllm."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tiny
from click.testing import CliRunner
from merge_checks import make_lora
from score_commands import refused
from score_commands import run as wp_score

from mergekit_wp.eval import backends, greedy_answers
from mergekit_wp.eval.greedy_answers import main

FLAGS = {"batch_size": 2, "dtype": "float32"}


@pytest.fixture
def world(tmp_path):
    """A pair, the expert with two rows more, and four prompts."""
    tiny.save_pair(tmp_path, "llama", extra_rows=2)
    prompts = ["w1 w2 w3", "w4", "w5 w6", "w9 w1 w2 w3 w4"]
    lines = [json.dumps({"task": "a", "prompt": prompt}) for prompt in prompts]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(world, *arguments, out="said.jsonl", **changes):
    flags = {"base": world / "base", "expert": world / "expert", "pairs": world / "pairs.jsonl", "device": "cpu"}
    options = [f"--{k.replace('_', '-')}={v}" for k, v in {**flags, **changes}.items() if v is not None]
    return CliRunner().invoke(main, [*map(str, arguments), *options, "--out", str(world / out)]), world / out


def rows(path):
    return sorted(path.read_text().splitlines()[1:])


def test_the_file_is_the_one_that_wp_score_keeps_and_reads(world):
    kept, _scores = wp_score(world, answer_tokens=4, gap_floor=0, **FLAGS)
    assert kept.exit_code == 0, kept.output
    result, path = run(world, answer_tokens=4, **FLAGS)
    assert result.exit_code == 0, result.output
    assert "backend hf: no GPU is used (device cpu)" in result.output
    assert rows(path) == rows(world / "out.answers.jsonl")
    taken, _other = wp_score(world, answer_tokens=4, gap_floor=0, answers=path, out="other.safetensors", **FLAGS)
    assert taken.exit_code == 0, taken.output
    # Again, it does nothing; a longer answer is another file's.
    before = path.read_bytes()
    assert run(world, answer_tokens=4, **FLAGS)[0].exit_code == 0
    assert path.read_bytes() == before


def test_by_default_answers_are_as_long_as_those_of_a_fit(world):
    result, path = run(world, **FLAGS)
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text().splitlines()[0])["max_tokens"] == 32


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out": "said.txt"}, ["said.txt", ".jsonl"]),
        ({"backend": "vllm"}, ["vLLM is not installed", "--backend hf"]),
        ({"expert": None}, ["expert"]),
        ({"out": "pairs.jsonl"}, ["pairs.jsonl", "is itself what is read"]),
    ],
)
def test_bad_input(world, monkeypatch, changes, said):
    monkeypatch.setattr(backends, "vllm_version", lambda: None)
    before = (world / "pairs.jsonl").read_bytes()
    result, path = run(world, **{"answer_tokens": 4, **FLAGS, **changes})
    if path.name == "pairs.jsonl":
        assert path.read_bytes() == before
        path = world / "never.jsonl"
    refused(result, path, *said)


def test_a_job_that_names_answers(world):
    (world / "job.yaml").write_text("{answer_tokens: 4, answers: mine.jsonl}")
    result, path = run(world, world / "job.yaml", **FLAGS)
    refused(result, path, "answers: this makes them")


def test_a_file_of_another_kind_is_left_alone(world):
    (world / "said.jsonl").write_text("mine\n")
    result, path = run(world, answer_tokens=4, **FLAGS)
    assert result.exit_code == 2
    assert "none of answers" in result.output
    assert path.read_text() == "mine\n"


class Engine:
    """Stands in for vLLM: keeps what it was asked, and says the token after the prompt's last, twice."""

    max_length = 16

    def __init__(self):
        self.model, self.asked = self, []

    def generate(self, prompts, how, use_tqdm):
        self.asked += list(zip([each["prompt_token_ids"] for each in prompts], how, strict=True))
        ids = [[each["prompt_token_ids"][-1] + 1] * 2 for each in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=each)]) for each in ids]


@pytest.fixture
def engine(monkeypatch):
    found = Engine()
    vllm = ModuleType("vllm")
    vllm.SamplingParams = lambda **how: SimpleNamespace(**how)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(backends, "vllm_version", lambda: "0.32.0+cpu")
    monkeypatch.setattr(backends, "load", lambda *_args, **_options: found)
    return found


def test_what_vllm_is_asked(world, engine, monkeypatch):
    monkeypatch.setattr(greedy_answers, "_AT_ONCE", 3)
    result, path = run(world, answer_tokens=12, backend="vllm", **FLAGS)
    assert result.exit_code == 0, result.output
    assert len(engine.asked) == 4
    for prompt, how in engine.asked:
        assert how.temperature == 0
        assert how.stop_token_ids == [2]
        assert how.max_tokens == min(12, 16 - len(prompt))
        assert set(how.logit_bias) == {97, 98}  # rows that only the expert has
    for row in map(json.loads, rows(path)):
        assert row["answer"] == [row["prompt"][-1] + 1] * 2


def test_a_lora_is_not_for_vllm(world, engine):
    make_lora(world / "base", world / "lora", seed=1)
    result, path = run(world, answer_tokens=4, backend="vllm", expert=f"{world / 'base'}+{world / 'lora'}", **FLAGS)
    refused(result, path, "is a LoRA", "--backend hf")
    assert not engine.asked


def test_a_prompt_that_leaves_vllm_no_room(world, engine):
    engine.max_length = 5
    result, path = run(world, answer_tokens=4, backend="vllm", **FLAGS)
    assert result.exit_code == 2
    assert "a prompt of 5 tokens leaves vLLM no room to answer in 5" in result.output
    assert rows(path) == []
