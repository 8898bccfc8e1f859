"""Items of a suite that models were made with: counted, warned of wherever the table is, never refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eval_world import QUESTIONS, build, wp_eval, write_suite
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_wp.eval.seen_items import read_prompts, seen_items
from mergekit_wp.eval.suite import SuiteTask
from mergekit_wp.eval.tables import read_results, to_csv, to_html
from mergekit_wp.eval.tasks import ReadyTask


class Leaf:
    """A task that puts its questions into a frame."""

    def __init__(self, items):
        self.eval_docs = items

    def doc_to_text(self, item):
        return f"Question: {item['q']}\nAnswer:"


def task_of(column, *leaves):
    return ReadyTask(SuiteTask("t", column, "acc,none"), {"tasks": dict(enumerate(leaves))}, "k")


def test_an_item_is_known_by_what_is_asked_or_by_any_text_of_it():
    items = [{"q": f" question {i} ", "choices": ["a", "b"], "gold": i, "title": f"t{i}"} for i in range(5)]
    prompts = {"x/one.jsonl": {"question 0", "Question:  question 1 \nAnswer:", "a", "3"}, "two.jsonl": {"t1", "t2"}}
    found = seen_items([task_of("A", Leaf(items[:3]), Leaf(items[3:])), task_of("B", Leaf(items[3:]))], prompts)
    assert found == {"A": {"files": ["one.jsonl", "two.jsonl"], "seen": 3, "items": 5}}
    assert seen_items([task_of("A", Leaf(items))], {}) == {}


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 19)))
def test_as_many_are_counted_as_there_are(asked, prompts):
    items = [{"q": f"number {i}"} for i in sorted(asked)]
    found = seen_items([task_of("A", Leaf(items))], {"p": {f"number {i}" for i in prompts}})
    both = len(asked & prompts)
    assert found == ({"A": {"files": ["p"], "seen": both, "items": len(asked)}} if both else {})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("seen"))


def pairs_file(path: Path, prompts) -> Path:
    path.write_text("".join(json.dumps({"task": "t", "prompt": prompt}) + "\n" for prompt in prompts))
    return path


def test_the_table_warns_wherever_it_is_shown(world, tmp_path):
    seen = pairs_file(tmp_path / "seen.jsonl", [f" {QUESTIONS[1]} ", QUESTIONS[4], "w1 w1 w1 w1 w1 w1"])
    other = pairs_file(tmp_path / "other.jsonl", ["w2 w2 w2 w2 w2 w2"])
    suite = write_suite(tmp_path / "suite.yaml", include_path=str(world / "tasks"))
    done = wp_eval(suite, world / "one", "--limit", 2, "--prompts", seen, "--prompts", other, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    said = "2 of 8 items of Gen are prompts of seen.jsonl too"
    assert f"WARNING: {said}" in done.output
    table = read_results(tmp_path / "out/results.json")
    assert sum(said in text for text in table.warnings()) == 1
    assert said in to_csv(table)
    assert said in to_html(table, "x")
    assert said in (tmp_path / "out/results.md").read_text()
    again = wp_eval(suite, world / "one", "--limit", 2, "--prompts", other, "--out", tmp_path / "out")
    assert "are prompts of" not in again.output  # what is in the cache knows nothing of prompts


def test_refusals(world, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for file, said in (("bad.jsonl", "line 1"), ("none.jsonl", "cannot read the pairs")):
        done = wp_eval(world / "suite.yaml", world / "one", "--prompts", tmp_path / file, "--out", tmp_path / "out")
        assert done.exit_code == 2
        assert said in done.output
        assert not (tmp_path / "out").exists()


def test_prompts_are_read_without_space_at_their_ends(tmp_path):
    file = str(pairs_file(tmp_path / "p.jsonl", [" a b\n"]))
    assert read_prompts([file]) == {file: {"a b"}}
