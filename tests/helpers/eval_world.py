"""Tiny models, local lm-eval tasks and suites for the tests of wp-eval, and what the right values are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml
from click.testing import CliRunner, Result
from tiny import random_model, save
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_wp.eval.cli import main

QUESTIONS = [" ".join(f"w{(7 * i + 3 * j) % 28}" for j in range(3 + i % 3)) for i in range(8)]


def make_model(folder: Path, seed: int) -> Path:
    return save(random_model("llama", seed), folder)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@torch.no_grad()
def greedy(folder: Path, question: str, length: int = 3) -> str:
    """The model's greedy continuation, one full forward pass a token."""
    model, tokenizer = load(folder)
    ids = tokenizer(question)["input_ids"]
    start = len(ids)
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@torch.no_grad()
def best_choice(folder: Path, question: str, choices: list[str]) -> int:
    """Index of the one-word continuation with the highest log-probability."""
    model, tokenizer = load(folder)
    logits = model(torch.tensor([tokenizer(question)["input_ids"]])).logits[0, -1]
    return max(range(len(choices)), key=lambda i: float(logits[tokenizer.convert_tokens_to_ids(choices[i])]))


def choices_of(i: int) -> list[str]:
    return [f"w{(i + 5 * j) % 28}" for j in range(4)]


def write_tasks(folder: Path, right: Path) -> Path:
    """tiny_gen (5 of 8 answers are what the model `right` says), tiny_choice, a group, a tag ..."""
    folder.mkdir()
    generated = [{"q": q, "a": greedy(right, q) if i < 5 else "never said"} for i, q in enumerate(QUESTIONS)]
    chosen = [{"q": q, "choices": choices_of(i), "gold": i % 4} for i, q in enumerate(QUESTIONS)]
    for name, rows in (("gen", generated), ("choice", chosen)):
        (folder / f"{name}.json").write_text("\n".join(json.dumps(row) for row in rows))

    def task(name: str, data: str, **more: object) -> None:
        source = {"data_files": {"test": str(folder / f"{data}.json")}}
        content = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test",
                   "doc_to_text": "{{q}}", **more}  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))

    metric = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    generation = {"until": ["</s>"], "max_gen_toks": 3, "do_sample": False}
    said = {"output_type": "generate_until", "doc_to_target": "{{a}}", "generation_kwargs": generation,
            "metric_list": metric}  # fmt: skip
    task("tiny_gen", "gen", **said)
    task("tiny_unsafe", "gen", unsafe_code=True, **said)
    task("tiny_tagged", "gen", tag="tiny_tag", **said)
    task("tiny_choice", "choice", output_type="multiple_choice", doc_to_target="gold",
         doc_to_choice="{{choices}}", metric_list=[{"metric": "acc"}])  # fmt: skip
    task("tiny_nodata", "absent", **said)
    group = {"group": "tiny_group", "task": ["tiny_gen"],
             "aggregate_metric_list": [{"metric": "exact_match", "weight_by_size": True}]}  # fmt: skip
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    return folder


def build(root: Path) -> Path:
    """root/one and two (models), tasks/, suite.yaml."""
    make_model(root / "one", seed=1)
    make_model(root / "two", seed=2)
    write_tasks(root / "tasks", right=root / "one")
    write_suite(root / "suite.yaml")
    return root


TASKS = [
    {"task": "tiny_gen", "column": "Gen", "metric": "exact_match,none"},
    {"task": "tiny_choice", "column": "Choice", "metric": "acc,none"},
]


def write_suite(path: Path, **changes: object) -> Path:
    content = {"name": "tiny", "include_path": "tasks", "batch_size": 4, "tasks": TASKS, **changes}
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


def wp_eval(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ran(outcome: Result) -> list[str]:
    """Names of the tasks that were really run, in order, by what wp-eval said."""
    return re.findall(r"^\[\d+/\d+\] .*: (\S+) \.\.\.$", outcome.output, re.MULTILINE)


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def cells(out: Path, name: str) -> dict:
    return next(row["cells"] for row in results(out)["rows"] if row["name"] == name)


GLUE = """
import os
import subprocess
import time
from pathlib import Path

from datasets import Dataset

HERE = Path(__file__).parent


def rows(**_):
    return {"test": Dataset.from_json(str(HERE / "gen.json"))}


def _held(place):
    \"\"\"While there is a file `hold-PLACE`: stay, after saying who is here (`at-PLACE`).\"\"\"
    marks = HERE.parent / "marks"  # beside the tasks' folder: what lies in it is part of the tasks
    if (marks / f"hold-{place}").exists() and not (marks / f"at-{place}").exists():
        helper = subprocess.Popen(["sleep", "600"])  # as an engine has processes of its own
        (marks / "partial").write_text(f"{os.getpid()} {helper.pid}")
        (marks / "partial").rename(marks / f"at-{place}")
    while (marks / f"hold-{place}").exists():
        time.sleep(0.02)


def ask_b(doc):
    if (HERE.parent / "marks" / "a-is-graded").exists():  # lm-eval also asks when it loads a task
        _held("start")
    return doc["q"]


def grade_a(doc, results):
    (HERE.parent / "marks" / "a-is-graded").touch()
    return {"acc": float(results[0] == doc["a"]), "said": os.environ.get("WP_TEST_WORD"), "share": (1.0, 3.0)}


def grade_b(doc, results):
    _held("middle")
    return {"acc": float(results[0] == doc["a"])}


def any_of(words):
    return float(any(word == "hello" for word in words))


def ratio(pairs):
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs)
"""


def write_held_tasks(folder: Path, right: Path) -> list[dict]:
    """held_a, and held_b, which can be stopped before it asks (`hold-start`) and while it grades (`hold-middle`)."""
    write_tasks(folder, right)
    (folder.parent / "marks").mkdir()
    (folder / "glue.py").write_text(GLUE)
    common = (
        "custom_dataset: !function glue.rows\ntest_split: test\ndoc_to_target: a\noutput_type: generate_until\n"
        "generation_kwargs: {until: ['</s>'], max_gen_toks: 3, do_sample: false}\n"
    )
    (folder / "held_a.yaml").write_text(
        f"task: held_a\n{common}doc_to_text: q\nprocess_results: !function glue.grade_a\nmetric_list:\n"
        "  - {metric: acc, aggregation: mean}\n"
        "  - {metric: said, aggregation: !function glue.any_of}\n"
        "  - {metric: share, aggregation: !function glue.ratio}\n"
    )
    (folder / "held_b.yaml").write_text(
        f"task: held_b\n{common}doc_to_text: !function glue.ask_b\nprocess_results: !function glue.grade_b\n"
        "metric_list: [{metric: acc, aggregation: mean}]\n"
    )
    return [{"task": f"held_{x}", "column": x.upper(), "metric": "acc,none"} for x in "ab"]
