"""What models with exchanged sets answer, against slices copied by hand and transformers' own generation; and the part
`answers` as a command."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import plain_patch
import pytest
import tiny
import torch
import yaml
from answer_world import answer_world, rows_of
from fit_world import geometry_of
from merge_world import tensors_of
from plain_answers import alone
from streamed_world import PROMPTS, resident, streamed
from study_run import goes_on, killed_at, run
from test_set_effects import HEADS, NEURONS, PAIRED, set_of
from transformers import AutoConfig, DynamicCache

from mergekit_wp.scoring.anchor.graders import parse_check
from mergekit_wp.scoring.greedy import Greedy, generate_answers
from mergekit_wp.scoring.models.exchanged import Exchange, ExchangedRows, ExchangedStack
from mergekit_wp.scoring.models.load import ModelPair
from mergekit_wp.scoring.models.streaming import StreamedStack
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.sweep import forward_sweep
from mergekit_wp.study import answer_plan, answer_run
from mergekit_wp.study.answer_run import GradedTask, Speakers

TOKENS = 5


def speakers_of(folders, how=resident, eos=()) -> Speakers:
    base, expert = map(how, folders)
    pair = ModelPair(base, expert, geometry_of(folders[0]), base.device, base.dtype)
    rules = Greedy.of([base.model, expert.model], tiny.tokenizer(), TOKENS, 2)
    return Speakers(SimpleNamespace(), pair, replace(rules, eos=frozenset(eos), vocabulary=97, context=128))


def question_of(until=()) -> GradedTask:
    check = parse_check({"number": "5", "until": list(until)}, "t")
    return GradedTask("t", ["" for _ in PROMPTS], PROMPTS, [check for _ in PROMPTS], True, True)


def by_hand(folder, tensors, eos):
    """The answers of a model of transformers with these tensors, one prompt at a time."""
    config = AutoConfig.from_pretrained(folder)
    model = tiny.auto_class(config).from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(tensors, strict=not config.tie_word_embeddings)
    model.tie_weights()
    return [alone(model, prompt, eos or None, TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", [*PAIRED, "llama-biased"])
def test_answers_are_those_of_slices_copied_by_hand(tmp_path, kind) -> None:
    """Of models that answer one by one, and of several whose rows share batches."""
    folders = tiny.save_pair(tmp_path, kind)
    eos = [by_hand(folders[1], tensors_of(folders[1]), ())[0][2]]
    everything = [(layer, h) for layer in range(4) for h in range(4)], [(la, j) for la in range(4) for j in range(20)]
    sets, heard = [(HEADS, NEURONS), ([], []), (HEADS[:1], NEURONS[1:]), ([], NEURONS[:2])], set()
    sets += [everything] if kind == "llama" else []
    for how in (resident, streamed) if kind in ("gemma2", "llama-biased") else (resident,):
        speakers = speakers_of(folders, how, eos)
        subsets = [set_of(speakers.pair.geometry, *each) for each in sets]
        for removed in (False, True):
            recipient, donor = folders[::-1] if removed else folders
            want = [by_hand(recipient, plain_patch.patched(recipient, donor, *each), eos) for each in sets]
            stack, told = speakers.stack(removed), list[float]()
            one_by_one = [speakers.answer(stack, question_of(), [subset], 2)[0] for subset in subsets]
            together = speakers.answer(stack, question_of(), subsets, 100, told.append)
            assert one_by_one == together == want
            assert sum(told) == pytest.approx(len(sets) * len(PROMPTS))
            heard |= {str(answers) for answers in together}
    assert len(heard) >= 2 * len(sets) - 3, "sets change what is said"
    if kind == "llama":
        other = ExchangedRows(speakers.pair.base, speakers.pair.expert, speakers.pair.geometry)
        of_N = [model for model in range(len(subsets)) for _prompt in PROMPTS]
        other.set_each([Exchange(subset, in_expert=True) for subset in subsets], of_N)
        both = speakers.answer(speakers.stack(True), question_of(), subsets, 100)
        said = generate_answers(other, speakers.rules, PROMPTS * len(subsets))
        assert said == [answer for answers in both for answer in answers], "the expert made from the base, too"


def test_logits_of_rows_are_those_of_the_models_one_by_one(tmp_path) -> None:
    """Whatever the rows' places, and with weights stored in 16 bits, which products in float32 widen."""
    folders = tiny.save_pair(tmp_path, "llama-biased", dtype=torch.bfloat16)
    geometry = geometry_of(folders[0])
    subsets = [set_of(geometry, *each) for each in ((HEADS, NEURONS), ([], []), (HEADS[1:], []), ([], NEURONS[1:]))]
    prompts = [PROMPTS[1]] * 4
    for how in (resident, streamed):
        rows, single = (kind(*map(how, folders), geometry) for kind in (ExchangedRows, ExchangedStack))
        rows.set_each([Exchange(subset) for subset in subsets], [2, 0, 3, 1])
        found = first_logits(rows, prompts, [3, 0, 2, 1])
        for place, number in enumerate((1, 2, 3, 0)):
            single.set(Exchange(subsets[number]))
            (want,) = first_logits(single, prompts[:1], [0])
            torch.testing.assert_close(found[place], want, rtol=1e-5, atol=1e-5)
        assert min(float((one - other).abs().max()) for one, other in itertools.combinations(found, 2)) > 1e-3


def test_passes_are_no_larger_than_was_asked_and_progress_ends_at_all(tmp_path, monkeypatch) -> None:
    """Also where some of the models that answer together had been kept: they are asked again together."""
    sizes, plain = [], ExchangedRows.go_on
    monkeypatch.setattr(
        ExchangedRows, "go_on", lambda self, ids, *rest: sizes.append(len(ids)) or plain(self, ids, *rest)
    )
    speakers = speakers_of(tiny.save_pair(tmp_path, "llama"))
    speakers.inputs.fingerprints = {}
    geometry = speakers.pair.geometry
    sets = [set_of(geometry, *each) for each in ((HEADS, NEURONS), ([], []), (HEADS[1:], []), ([], NEURONS))]
    asked = {model.key: model for model in (answer_plan.Model("top", subset, False) for subset in sets)}

    def run_once() -> list[dict[str, answer_run.Said]]:
        told.clear()
        progress = lambda total, *_words: told.append(-total) or told.append  # noqa: E731
        return answer_run.answered(speakers, [question_of()], [asked], Resume(tmp_path / "out", "run"), progress)

    for rows in (2, 3, 2 * len(PROMPTS)):  # two are asked for, and `rows_worth` is never less
        monkeypatch.setattr(answer_run, "rows_worth", lambda *_about, rows=rows: rows)
        told: list[float] = []
        sizes.clear()
        first = run_once()
        assert max(sizes) == rows
        assert sum(told) == pytest.approx(0)
        (kept,) = (tmp_path / ".out.resume").glob("*/task-0-run-1.safetensors")
        kept.unlink()
        assert run_once() == first
        assert sum(told) == pytest.approx(0)
        shutil.rmtree(tmp_path / ".out.resume")


def test_streamed_weights_are_read_once_a_token_for_all_models(tmp_path, monkeypatch) -> None:
    read = []
    plain = StreamedStack.stored_layers
    monkeypatch.setattr(StreamedStack, "stored_layers", lambda self, order: read.append(self) or plain(self, order))
    speakers = speakers_of(tiny.save_pair(tmp_path, "llama"), streamed)
    subsets = [set_of(speakers.pair.geometry, *each) for each in ((HEADS, NEURONS), ([], []), (HEADS[1:], []))]
    counts = []
    for some in (subsets[:1], subsets):
        read.clear()
        stack = speakers.stack(False)
        speakers.answer(stack, question_of(), some, 100)
        counts.append(len(read))
    assert counts == [2 * TOKENS] * 2, "of base and expert"
    assert not stack._kept, "what was read is let go"


def first_logits(stack, prompts, numbers):
    ids = torch.tensor(prompts)
    start = stack.go_on(ids, torch.ones_like(ids), DynamicCache(config=stack.tower.config), numbers)
    *_below, (_top, (stream,)) = forward_sweep(stack, [start], stack.depth)
    return stack.logits(stream[:, -1], 97)


def test_the_expert_without_a_set_still_ends_by_a_token_of_its_own(tmp_path) -> None:
    base = tiny.random_model("llama", seed=1)
    expert = tiny.add_rows(tiny.fine_tuned(base, seed=2), 2)
    speakers = speakers_of((tiny.save(base, tmp_path / "base"), tiny.save(expert, tmp_path / "expert")), eos=[97])
    stacks = speakers.stack(True), speakers.stack(False)
    subset = set_of(speakers.pair.geometry, HEADS, NEURONS)
    (free,) = speakers.answer(stacks[0], question_of(), [subset], 2)
    assert len(free[0]) == TOKENS
    with torch.no_grad():
        rows = speakers.pair.expert.model.lm_head.weight
        rows[97] = 3 * rows[free[0][1]]
    short = [len(speakers.answer(stack, question_of(), [subset], 2)[0][0]) < TOKENS for stack in stacks]
    assert short == [True, False], "only the expert has the row"


def test_an_answer_ends_at_a_text_of_its_check(tmp_path) -> None:
    speakers = speakers_of(tiny.save_pair(tmp_path, "llama"))
    stack = speakers.stack(False)
    nothing = set_of(speakers.pair.geometry, [], [])
    (free,) = speakers.answer(stack, question_of(), [nothing], 2)
    end = speakers.rules.tokenizer.decode([free[0][1]])
    (cut,) = speakers.answer(stack, question_of([end]), [nothing], 2)
    assert len(cut[0]) == 2
    for one, other in zip(cut, free, strict=True):
        assert one == other[: len(one)]
        assert len(one) == next((i + 1 for i, token in enumerate(other) if token == free[0][1]), TOKENS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return answer_world(tmp_path_factory.mktemp("answers"))


def test_a_killed_run_goes_on_to_the_same_answers(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(answer_plan, "KINDS", {kinds: answer_plan.KINDS[kinds] for kinds in ("neurons", "both")})
    made: list[int] = []
    monkeypatch.setattr(answer_run, "rows_worth", lambda *_about: 18)
    monkeypatch.setattr(answer_run, "generate_answers", killed_at(9, answer_run.generate_answers, made, 2))
    planned = run(world, "--out", tmp_path / "out", "--only", "answers", "--plan")
    out, pieces = goes_on(world, "answers", tmp_path, made, 9)
    assert f"{sum(pieces)} answers of at most 2 tokens, by " in planned
    assert max(pieces) == 18, "two models at a time"
    consented = run(world, "--out", out, "--only", "answers", "--plan", "--allow-code-execution")
    assert consented.startswith("answers: to do (`--allow-code-execution` is another one): ")
    _says_what_was_found(out, yaml.safe_load(world.read_text())["prompts"]["pairs"])


def _says_what_was_found(out, pairs) -> None:
    found, texts = (json.loads((out / f"answers/{name}.json").read_text()) for name in ("answers", "texts"))
    assert found["questions"] == [
        {"task": "a", "prompts": 9, "held_out": False, "known": False},
        {"task": "b", "prompts": 8, "held_out": False, "known": False},
    ]  # fmt: skip
    assert [sentence.partition(";")[0] for sentence in found["left_out"]] == [
        "b: grading 1 of 9 prompts would run code that models wrote", "c: its pairs carry no check",
    ]  # fmt: skip
    rows = {(row["task"], row["prompt"]): row for row in rows_of(pairs)}
    right = {}
    for task, told in texts.items():
        for said in told["said"]:
            checks = [parse_check(rows[task, prompt]["check"], task) for prompt in told["prompts"]]
            passed = [check.passes(text) for check, text in zip(checks, said["answers"], strict=True)]
            assert passed == said["passed"]
            right |= {(task, name): sum(passed) / len(passed) for name in said["models"]}
    assert right["a", "expert"] == right["b", "expert"] == 1
    assert right["a", "base"] < 1
    assert len(set(right.values())) > 2
    kinds = {"heads": "heads", "neurons": "neurons", "both": "heads and neurons"}
    for row in found["curves"]:
        share = "all" if row["share"] == 1 else "top 25 % of"
        whole = "base with" if row["direction"] == "restored" else "expert without"
        name = f"{whole} {share} {kinds[row['kinds']]} ({row['scores']}, {row['task']})"
        assert row["right"] == right[row["task"], name]
        assert row["base"] == right[row["task"], "base"]
        start = right[row["task"], "base" if row["direction"] == "restored" else "expert"]
        assert row["gained"] == pytest.approx(row["right"] - start)
        if row["matched"]:
            matched = right[row["task"], name.replace("top", "matched").replace(")", ", draw 0)")]
            assert row["matched"] == [matched]
            assert row["beyond_matched"] == pytest.approx(row["right"] - matched)
    assert {(row["scores"], row["task"]) for row in found["curves"]} == {
        ("kl", "a"), ("kl", "b"), ("ap", "a"), ("ap + kl", "a"),
    }  # fmt: skip
    lines = list(csv.DictReader((out / "answers/models.csv").open()))
    assert len(lines) == len(found["models"])
    assert all(line["model"] in ("base", "expert", "top", "random", "matched", "all") for line in lines)
    restored, removed = found["across"]
    for row, whole in ((restored, "base with"), (removed, "expert without")):
        for of, rights in zip(row["tasks"], row["right"], strict=True):
            assert rights == [right[t, f"{whole} top 25 % of neurons (kl, {of})"] for t in ("a", "b")]
    page = (out / "study.html").read_text()
    assert "may be the ones that scores were read off" in page
    assert "c: its pairs carry no check" in page


def test_code_is_run_only_where_that_is_allowed(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(answer_plan, "KINDS", {"both": answer_plan.KINDS["both"]})
    ran = []
    monkeypatch.setattr("mergekit_wp.scoring.anchor.graders.call_function", lambda *given: ran.append(given))
    content = yaml.safe_load(world.read_text())
    content |= {"scores": {"kl": content["scores"]["kl"]}, "answers": {"tokens": 1, "shares": [0.5], "draws": 1}}
    content["prompts"]["pairs"] = str(tmp_path / "p.jsonl")
    check = {"python": "f", "kwargs": {"cases": [[1, 2]]}}
    row = {"task": "a", "prompt": "w1 w2", "check": check}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    arguments = (tmp_path / "s.yaml", "--out", tmp_path / "out", "--only", "answers", "--quiet")
    run(*arguments)
    assert not ran
    found = json.loads((tmp_path / "out/answers/answers.json").read_text())
    assert found["left_out"] == [
        "a: grading 1 of 1 prompts would run code that models wrote; --allow-code-execution permits it."
    ]
    assert found["models"] == []
    run(*arguments, "--allow-code-execution")
    assert ran
    found = json.loads((tmp_path / "out/answers/answers.json").read_text())
    assert {row["right"] for row in found["models"]} == {0.0}


def test_a_check_that_no_grader_knows_is_bad_input(world, tmp_path) -> None:
    content = yaml.safe_load(world.read_text())
    content["prompts"]["pairs"] = str(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"task": "a", "prompt": "w1", "check": {"ifeval": "no:such"}}\n')
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    said = run(tmp_path / "s.yaml", "--out", tmp_path / "out", "--only", "answers", code=2)
    assert "task a: IFEval has no type 'no:such'" in said
    assert not (tmp_path / "out/answers").exists()
