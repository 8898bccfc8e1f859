"""Vocabulary rows that base and expert do not share, and ids that mean different tokens."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import tiny
import torch
from aim_inputs import recipe as aim
from aim_inputs import write_random_activations
from merge_checks import assert_merged, edit_config, refused, rewrite, run, written_config
from merge_world import World, merge, reference, tensors_of
from transformers import AutoTokenizer

from mergekit_wp.checkpoint.vocabulary import align_rows, differences
from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.score import score

ENDS = ("model.embed_tokens.weight", "lm_head.weight")
V = tiny.SHAPE["vocab_size"]


def test_align_rows():
    base, expert = torch.arange(4.0)[:, None], -torch.arange(6.0)[:, None]
    assert align_rows(expert, base).flatten().tolist() == [0, -1, -2, -3]
    assert align_rows(expert[:2], base).flatten().tolist() == [0, -1, 2, 3]
    assert align_rows(expert[:2].half(), base.bfloat16()).dtype == torch.float32  # nothing is rounded


@pytest.fixture
def world(tmp_path):
    """One expert whose last rows were cut off, and one with added rows."""
    world = World(tmp_path / "w", "qwen3", experts=2, extra_rows=[-30, 2]).build()
    write_random_activations(world)
    return world


def complete(world, k):
    """Give an expert the base's rows where it has none, on disk."""
    base = tensors_of(world.base)

    def change(tensors):
        return {n: torch.cat([t, base[n][len(t) :]]) if n in ENDS else t for n, t in tensors.items()}

    rewrite(world.expert(k), change)
    edit_config(world.expert(k), vocab_size=V)


@pytest.mark.parametrize("method", ["wp", "widen", "aim"])
def test_rows_that_an_expert_lacks_are_the_bases(world, method):
    """Through wp-merge, whose audit recomputes slices on its own."""
    config = {"wp": world.config(), "widen": world.widen(), "aim": aim(world)}[method]
    out = world.root / "out"
    assert "generates a token" in run(world.recipe(config), out)
    assert written_config(out)["vocab_size"] == V
    complete(world, 0)
    if method == "wp":
        assert_merged(tensors_of(out), reference(world))
    else:
        assert_merged(tensors_of(out), tensors_of(merge(world, config, "completed")))


def test_mergekits_truncation_is_refused_where_it_would_cut_the_base(world):
    message = refused(world, world.config(), unsafe_truncate_embeddings=True)
    assert "67 rows, fewer than the 97" in message


def write_job(root, **changes):
    lines = [{"task": "t", "prompt": f"w{i} w{i + 1} w5", "contrast": f"w{i} w{i + 1}"} for i in range(6)]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return ScoringJob(base=str(root / "base"), expert=str(root / "e0"), pairs=str(root / "pairs.jsonl"), **changes)


@pytest.mark.parametrize("rows", [-30, 31], ids=["cut", "padded"])
def test_scores_are_read_off_the_rows_that_both_have(tmp_path, rows):
    """The gap is transformers' own KL over those rows."""
    base = tiny.random_model("llama", seed=1)
    expert = tiny.add_rows(tiny.fine_tuned(base, seed=2, size=0.3), rows)
    tiny.save(base, tmp_path / "base")
    tiny.save(expert, tmp_path / "e0")
    job = write_job(tmp_path, split="shared")
    resident, streamed = (score(replace(job, offload=offload)) for offload in ("none", "stream"))
    tokenizer, shared, gaps = AutoTokenizer.from_pretrained(tmp_path / "base"), min(V, V + rows), []
    for line in (tmp_path / "pairs.jsonl").read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["prompt"])["input_ids"]])
        with torch.no_grad():
            theirs, ours = (m(ids).logits[0, -1, :shared].double().log_softmax(-1) for m in (expert, base))
        gaps.append(float((theirs.exp() * (theirs - ours)).sum()))
    for scores in (resident, streamed):
        assert scores.meta.tasks["t"].utilities["kl"].mean_gap == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)
    torch.testing.assert_close(streamed.neurons, resident.neurons, rtol=1e-3, atol=1e-5)


def test_a_prompt_with_a_token_that_a_model_has_no_row_for(tmp_path):
    """A tokenizer whose added token was never given a row, or an expert cut too far."""
    base = tiny.random_model("llama", seed=1)
    tiny.save(tiny.add_rows(tiny.fine_tuned(base, seed=2), -89), tmp_path / "e0")
    tiny.save(base, tmp_path / "base")
    with pytest.raises(BadInput, match=r"holds the token 'w\d' \(id \d+\).* 8 vocabulary rows"):
        score(write_job(tmp_path))


def retokenize(folder, change):
    """`change` maps the vocabulary (token -> id) of a folder's tokenizer to another."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = change(content["model"]["vocab"])
    path.write_text(json.dumps(content))


def swapped(vocabulary):
    return {**vocabulary, "w5": vocabulary["w6"], "w6": vocabulary["w5"]}


def renamed(vocabulary):
    return {"chat" if token == "w90" else token: index for token, index in vocabulary.items()}


class TestIds:
    @pytest.fixture
    def world(self, tmp_path):
        return World(tmp_path / "w", "llama").build()

    def test_moved_tokens_are_not_mixed(self, world):
        retokenize(world.expert(1), swapped)
        message = refused(world)
        assert "e1: its tokenizer gives 2 tokens other ids" in message
        assert "('w5': 10 against 9)" in message
        # The way out that it names: rows follow their tokens.
        out = tensors_of(merge(world, world.config(tokenizer={"source": "base"})))
        first, second = (tensors_of(world.expert(k))[ENDS[0]].double() for k in (0, 1))
        torch.testing.assert_close(out[ENDS[0]][9].double(), (first[9] + second[10]) / 2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out[ENDS[0]][11].double(), (first[11] + second[11]) / 2, rtol=1e-5, atol=1e-6)

    def test_renamed_and_added_tokens_are_said(self, world, caplog):
        retokenize(world.expert(0), renamed)
        retokenize(world.expert(1), lambda vocabulary: {**vocabulary, "<a>": V, "<b>": V + 1})
        with caplog.at_level(logging.WARNING):
            merge(world)
        assert "e0: 1 ids stand for other tokens" in caplog.text
        assert "(94: 'chat' against 'w90')" in caplog.text
        assert "e1: 2 tokens of its own ('<a>', '<b>') are left out" in caplog.text

    def test_prompts_that_the_expert_would_cut_otherwise(self, world, caplog):
        job = write_job(world.root)
        with caplog.at_level(logging.WARNING):
            retokenize(world.expert(0), renamed)  # of a token that no prompt holds
            score(job)
            assert "other ids" not in caplog.text
            retokenize(world.expert(0), swapped)
            score(job)
        assert "gives other ids than the base's to 6 of 6 prompts" in caplog.text

    def test_nothing_to_compare(self, world):
        assert differences(world.base, world.expert(0), V) is None
        for file in world.expert(0).glob("tokenizer*"):
            file.unlink()
        assert differences(world.base, world.expert(0), V) is None
        retokenize(world.expert(1), swapped)
        assert differences(world.base, world.expert(1), 9).moved == {}  # both ids lie above the rows that both have
