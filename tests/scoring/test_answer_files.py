"""An expert's answers: as transformers generates them, whatever the batch; kept, gone on with, and read from a file."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace

import pytest
import tiny
import torch
from plain_answers import alone
from score_commands import refused, run
from score_jobs import job_for
from streamed_world import resident, streamed
from test_rotary import ROPES, rope_model
from transformers import AutoModelForCausalLM

import mergekit_wp
from mergekit_wp.errors import BadInput
from mergekit_wp.push.card import scores_section
from mergekit_wp.ranking import about
from mergekit_wp.score_page import score_page
from mergekit_wp.scores import read_scores
from mergekit_wp.scoring import greedy, whole_answers
from mergekit_wp.scoring.greedy import Greedy, generate_answers
from mergekit_wp.scoring.score import score

_DRAW = random.Random(0)
PROMPTS = [[_DRAW.randrange(3, 97) for _ in range(length)] for length in (3, 7, 1, 2, 5, 9, 12, 4)]
TOKENS = 6


def rules_of(stack, batch_size=2, eos=(), tokens=TOKENS):
    found = Greedy.of([stack.model], tiny.tokenizer(), tokens, batch_size)
    return replace(found, eos=frozenset(eos), vocabulary=97, context=128)


@pytest.mark.parametrize("kind", [*tiny.VARIANTS, *tiny.FAMILIES, "gemma3-wrapper"])
def test_answers_are_those_that_transformers_generates(tmp_path, kind):
    folder = tiny.save(tiny.random_model(kind, seed=4), tmp_path / "m")
    stack = resident(folder)
    free = [alone(stack.model, prompt, None, TOKENS) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in free}) > 2
    eos = [free[0][2], free[1][1]]  # so that some end early, and the first token of one is none
    wanted = [alone(stack.model, prompt, eos, TOKENS) for prompt in PROMPTS]
    assert len(set(map(len, wanted))) > 1
    for each, size in ((stack, 8), (streamed(folder), 3)):
        told, kept = [], {}
        assert generate_answers(each, rules_of(each, size, eos), PROMPTS, told.append, kept.update) == wanted
        assert sum(told) == TOKENS * len(PROMPTS)
        assert [kept[i] for i in range(len(PROMPTS))] == wanted


@pytest.mark.parametrize("name", ROPES)
def test_answers_pass_the_lengths_at_which_rotary_embeddings_change(tmp_path, name):
    folder = tiny.save(rope_model(name), tmp_path / "m")
    wanted = [alone(rope_model(name), prompt, None, tokens=12) for prompt in PROMPTS]
    for stack in (resident(folder), streamed(folder)):
        assert generate_answers(stack, rules_of(stack, 8, tokens=12), PROMPTS) == wanted


def test_a_token_that_only_the_expert_has_is_never_said_but_may_end_an_answer(tmp_path):
    model = tiny.add_rows(tiny.random_model("llama", seed=4), 2)
    model.lm_head.weight.data[97:] = 3 * model.lm_head.weight.data[20:22]
    stack = resident(tiny.save(model, tmp_path / "m"))
    assert any(token >= 97 for prompt in PROMPTS for token in alone(stack.model, prompt, None, TOKENS))
    never = generate_answers(stack, rules_of(stack), PROMPTS)
    assert max(map(max, never)) < 97
    ending = generate_answers(stack, rules_of(stack, eos=[97]), PROMPTS)
    cut = 0
    for one, other in zip(ending, never, strict=True):
        assert one == other[: len(one)] or one == [97]  # there must be something to read
        cut += len(one) < TOKENS
    assert cut


@pytest.mark.parametrize("offload", ["none", "stream"])
def test_the_end_is_where_the_experts_own_generation_config_says(tmp_path, offload):
    job = job_for(tmp_path, "llama", utility="kl", answer_tokens=TOKENS, offload=offload)
    first = {tuple(row["prompt"]): row["answer"] for row in kept(job, tmp_path)}
    end = next(iter(first.values()))[1]
    config = json.loads((tmp_path / "expert" / "generation_config.json").read_text())
    (tmp_path / "expert" / "generation_config.json").write_text(
        json.dumps({**config, "eos_token_id": [2, end], "do_sample": True, "repetition_penalty": 5.0})
    )
    for row in kept(job, tmp_path):
        whole = first[tuple(row["prompt"])]
        assert row["answer"] == (whole[: whole.index(end) + 1] if end in whole else whole)
        assert row["text"].split() == [f"w{i - 4}" for i in row["answer"] if i not in (2, end)]


def kept(job, folder, out="kept.jsonl"):
    """The answers that a run keeps, in the order of the file."""
    (folder / out).unlink(missing_ok=True)
    score(job, answers=folder / out)
    return [json.loads(line) for line in (folder / out).read_text().splitlines()[1:]]


@pytest.fixture
def world(tmp_path):
    """A pair and six prompts, one of them in both tasks."""
    tiny.save_pair(tmp_path, "llama")
    rows = [("a", "w1 w2 w3"), ("a", "w4"), ("a", "w5 w6"), ("b", "w7 w8"), ("b", "w4"), ("b", "w9 w1 w2 w3 w4")]
    lines = [json.dumps({"task": task, "prompt": prompt}) for task, prompt in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path


FLAGS = {"answer_tokens": 4, "gap_floor": 0, "batch_size": 2, "dtype": "float32"}


def tables(path):
    return read_scores(path).tensors()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_answers_are_kept_once_a_prompt_and_read_from_a_file_to_the_same_scores(world):
    result, path = run(world, **FLAGS)
    assert result.exit_code == 0, result.output
    assert read_scores(path).meta.answer_tokens == 4
    file = world / "out.answers.jsonl"
    first, *rows = map(json.loads, file.read_text().splitlines())
    assert first["wp_answers"] == 1
    assert first["expert"]["name"] == str(world / "expert")
    assert len(rows) == 5
    model = AutoModelForCausalLM.from_pretrained(world / "expert", dtype=torch.float32)
    for row in rows:
        assert row["answer"] == alone(model, row["prompt"], 2, tokens=4)
    said = read_scores(path)
    assert about(said)["answers"] == "up to 4 tokens"
    assert "the prediction of each token of the expert" in score_page({"a": said}, 3)
    assert "kl, answers of up to 4 tokens" in scores_section([("s", said.meta)])
    before = file.read_bytes()
    again, other = run(world, out="other.safetensors", answers=file, **FLAGS)
    assert again.exit_code == 0, again.output
    assert same(tables(other), tables(path))
    assert file.read_bytes() == before
    assert not (world / "other.answers.jsonl").exists()
    # Shorter ones are the beginnings of longer ones.
    for name, given in (("made", None), ("cut", file)):
        done, _path = run(world, out=f"{name}.safetensors", **{**FLAGS, "answer_tokens": 2, "answers": given})
        assert done.exit_code == 0, done.output
    assert same(tables(world / "made.safetensors"), tables(world / "cut.safetensors"))
    assert not same(tables(world / "cut.safetensors"), tables(path))


def test_models_in_memory_answer_as_those_of_their_folders(world):
    _result, path = run(world, **FLAGS)
    base, expert = (
        AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float32) for name in ("base", "expert")
    )
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    found = mergekit_wp.score(base, expert, rows, out=world / "m.safetensors", progress=False, **FLAGS)
    assert same(found.tensors(), tables(path))
    kept = [(world / f"{name}.answers.jsonl").read_text().splitlines()[1:] for name in ("m", "out")]
    assert kept[0] == kept[1]


def test_without_answers_the_document_is_that_of_before(world):
    _result, path = run(world, **{**FLAGS, "answer_tokens": 0})
    assert "answer_tokens" not in json.loads(read_scores(path).meta.to_json())
    assert not (world / "out.answers.jsonl").exists()


def asked_again(world, monkeypatch, out="out.safetensors"):
    """The prompts that another run has answered."""
    asked = []

    def generate(stack, rules, prompts, *rest):
        asked.extend(prompts)
        return generate_answers(stack, rules, prompts, *rest)

    monkeypatch.setattr(whole_answers, "generate_answers", generate)
    result, _path = run(world, out=out, **FLAGS)
    assert result.exit_code == 0, result.output
    return asked


def test_an_expert_that_was_written_anew_answers_anew(world, monkeypatch):
    """Its fingerprint, which samples, may be the one of before."""
    run(world, **FLAGS)
    assert asked_again(world, monkeypatch) == []
    shard = sorted((world / "expert").glob("*.safetensors"))[1]
    os.utime(shard, ns=(1, 1))
    assert len(asked_again(world, monkeypatch)) == 5


@pytest.mark.parametrize(
    ("left", "answered"),
    [
        (lambda lines: lines, 0),
        (lambda lines: lines[:3], 3),
        (lambda lines: [*lines[:3], lines[3][:20]], 3),  # killed while it wrote
        (lambda lines: [*lines[:3], lines[3][:-1]], 2),
        (lambda lines: [*lines[:2], b"{}\n", *lines[2:]], 4),
        (lambda lines: [lines[0].replace(b'"max_tokens": 4', b'"max_tokens": 5'), *lines[1:]], 5),
        (lambda lines: [lines[0].replace(b'"float32"', b'"bfloat16"'), *lines[1:]], 5),
        (lambda lines: lines[:1], 5),
    ],
    ids=["whole", "killed", "cut", "cut late", "damaged", "longer", "dtype", "begun"],
)
def test_a_run_goes_on_with_the_answers_that_are_there(world, monkeypatch, left, answered):
    _result, path = run(world, **FLAGS)
    wanted, file = tables(path), world / "out.answers.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(left(lines)))
    assert len(asked_again(world, monkeypatch)) == answered
    assert same(tables(path), wanted)
    assert sorted(file.read_bytes().splitlines()[1:]) == sorted(line.rstrip() for line in lines[1:])


def first(**changes):
    """The first line with other values."""
    return lambda lines: [json.dumps(json.loads(lines[0]) | changes).encode() + b"\n", *lines[1:]]


def last(**changes):
    return lambda lines: [*lines[:-1], json.dumps(json.loads(lines[-1]) | changes).encode() + b"\n"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _lines: [b"hello\n"], "line 1: it is not valid JSON"),
        (lambda _lines: [], "line 1: there is none"),
        (lambda lines: lines[1:], "line 1: the field wp_answers is missing"),
        (first(wp_answers=2), "line 1: format version 2, this program reads 1"),
        (first(max_tokens=0), "line 1: max_tokens: found 0"),
        (first(max_tokens=3), "line 2: an answer of 4 tokens, by line 1 at most 3"),
        (first(expert={"name": "x", "revision": None, "config": "0" * 64, "tensors": "1" * 64}), "answers of x, whose"),
        (lambda lines: [*lines[:-1], lines[-1][:-9]], "line 6: it is cut short"),
        (lambda lines: lines[:-1], "has none to 1 of 6 prompts"),
        (last(answer=[]), "line 6: the whole: the answer has no token"),
        (last(answer=[5, -1]), "line 6: answer.1: found -1"),
        (last(answer="w1"), "line 6: answer: found 'w1'"),
        (last(more=1), "line 6: unknown field more"),
        (last(answer=[97, 5]), "up to id 97"),
    ],
)
def test_a_file_of_answers_that_cannot_be_used_is_refused(world, change, said):
    run(world, **FLAGS)
    file = world / "given.jsonl"
    lines = (world / "out.answers.jsonl").read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(change(lines)))
    refused(*run(world, out="new.safetensors", answers=file, **FLAGS), "answers: ", str(file), said)


def test_other_refusals(world):
    refused(*run(world, out="n.safetensors", answers=world / "none.jsonl", **FLAGS), "answers: ", "No such file")
    refused(*run(world, answers=world / "pairs.jsonl"), "answers: are read only with answer_tokens")
    refused(*run(world, **FLAGS, utility="anchor"), "answer_tokens: the anchor utility reads the prompt's last token")
    refused(*run(world, **{**FLAGS, "answer_tokens": -1}), "answer_tokens: found -1")
    mine = world / "out.answers.jsonl"
    mine.write_text("my notes")
    refused(*run(world, **FLAGS), str(mine), "is none of answers")
    assert mine.read_text() == "my notes"
    (world / "p.answers.jsonl").write_bytes((world / "pairs.jsonl").read_bytes())
    refused(*run(world, out="p.safetensors", pairs=world / "p.answers.jsonl", **FLAGS), "is itself what is read")


def test_a_long_prompt_is_answered_as_far_as_the_context_goes(world):
    words = " ".join(["w1"] * 126)
    rows = [json.dumps({"task": "a", "prompt": prompt}) for prompt in (words, f"{words} w2")]
    (world / "pairs.jsonl").write_text("\n".join(rows))
    result, _path = run(world, **FLAGS)
    assert result.exit_code == 0, result.output
    rows = map(json.loads, (world / "out.answers.jsonl").read_text().splitlines()[1:])
    assert sorted((len(row["prompt"]), len(row["answer"])) for row in rows) == [(126, 3), (127, 2)]


def test_rows_of_a_pass_are_as_many_as_are_worth_it_and_fit(tmp_path, monkeypatch):
    folder = tiny.save(tiny.random_model("llama", seed=4), tmp_path / "m")
    stack = resident(folder)
    rules = rules_of(stack, 3)
    assert greedy.rows_worth(stack, rules, 12) == 1024, "a layer of so small a model is calls"
    wide = 2 * sum(parameter.numel() for parameter in stack.tower.layers[0].parameters())
    monkeypatch.setattr(greedy, "_WORTH_OPERATIONS", 100 * wide)
    assert greedy.rows_worth(stack, rules, 12) == 100
    assert greedy.rows_worth(streamed(folder), rules, 12) == 1024, "reading is what costs there"
    few = greedy._bytes(stack, rules, [12])
    monkeypatch.setattr(greedy, "free_memory", lambda _device: 4 * 50 * few)
    assert 3 < greedy.rows_worth(stack, rules, 12) < 50
    monkeypatch.setattr(greedy, "free_memory", lambda _device: 0)
    assert greedy.rows_worth(stack, rules, 12) == 3, "what was asked for"


def test_without_memory_for_the_rows_that_seemed_to_fit_nobody_is_told_to_lower_batch_size(tmp_path, monkeypatch):
    stack = resident(tiny.save(tiny.random_model("llama", seed=4), tmp_path / "m"))

    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(greedy, "_answer_together", full)
    with pytest.raises(BadInput, match=r"batch_size: 3 prompts do not fit on .* lower it"):
        generate_answers(stack, rules_of(stack, 3), [[5, 6]] * 9)
    with pytest.raises(BadInput, match=r"7 prompts at a time, as many as seemed to fit, .* shorter answers"):
        generate_answers(stack, rules_of(stack, 3), [[5, 6]] * 9, rows=7)
