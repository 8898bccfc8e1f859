"""Write the world's lm-eval tasks: a YAML and a JSON-lines file each, and one small Python file they share.

The data are found beside that Python file (`custom_dataset`), not through an absolute path in the YAML, so a
world may be moved, and nothing goes through the cache of `datasets`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.miniature.instructions import TYPES
from experiments.miniature.items import Item

# Longer than any right answer (a test compares), so that an answer is cut only when it is already wrong.
SUITE = Path(__file__).with_name("suite.yaml")
MAX_ANSWER_TOKENS = 64
# Where an answer is over if the model does not say so: at the next request.
ANSWER_END = "Request:"

_YAML = """\
task: {name}
custom_dataset: !function grading.{name}
test_split: test
num_fewshot: 0
output_type: generate_until
doc_to_text: prompt
doc_to_target: target
generation_kwargs:
  until: {until}
  do_sample: false
  temperature: 0.0
  max_gen_toks: {tokens}
process_results: !function grading.process_results
metric_list:
{metrics}{unsafe}metadata:
  version: 1.0
"""

_METRIC = """\
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""

_SHIM = '''\
"""Data and graders of the lm-eval tasks in this folder; written by experiments.miniature.lm_eval_tasks.

What models write is run by mergekit_wp.sandbox.
"""

import json
from pathlib import Path

from datasets import Dataset

from {grading} import process_results as process_results


def _rows(name):
    lines = (Path(__file__).parent / "data" / (name + ".jsonl")).read_text(encoding="utf-8").splitlines()
    return dict(test=Dataset.from_list([json.loads(line) for line in lines]))
'''

_SHIM_TASK = """

def {name}(**_):
    return _rows("{name}")
"""


@dataclass(frozen=True)
class TaskForm:
    """What the tasks of a world have in common.

    prefix   of their names
    grading  the module whose `process_results` grades an answer
    until    texts at which an answer ends, besides the model's own end
    tokens   of the longest answer
    types    kinds of instruction, each with an accuracy of its own
    """

    prefix: str = "mini"
    grading: str = "experiments.miniature.grading"
    until: tuple[str, ...] = (ANSWER_END,)
    tokens: int = MAX_ANSWER_TOKENS
    types: tuple[str, ...] = tuple(TYPES)


MINIATURE = TaskForm()


def task_name(capability: str, split: str, prefix: str = MINIATURE.prefix) -> str:
    """`mini_code` for the test split, `mini_code_val` for validation."""
    return f"{prefix}_{capability}" + ("_val" if split == "validation" else "")


def row(item: Item) -> dict[str, str]:
    """One line of a task's data. What the grader needs is JSON text: table columns cannot hold mixed types."""
    return {
        "capability": item.capability,
        "task": item.task,
        "prompt": item.prompt,
        "target": item.right,
        "grading": json.dumps(item.grading),
    }


def _yaml(name: str, capability: str, form: TaskForm) -> str:
    metrics = ["acc"]
    if capability == "instruction":
        metrics += [f"acc_{type_name}" for type_name in form.types]
    return _YAML.format(
        name=name,
        until=json.dumps(form.until),
        tokens=form.tokens,
        metrics="".join(_METRIC.format(metric=metric) for metric in metrics),
        unsafe="unsafe_code: true\n" if capability == "code" else "",
    )


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tasks(folder: Path, items: dict[tuple[str, str], list[Item]], form: TaskForm = MINIATURE) -> None:
    """Write the tasks for `items`, keyed by (capability, split), into `folder`."""
    shim = _SHIM.format(grading=form.grading)
    for (capability, split), graded in items.items():
        name = task_name(capability, split, form.prefix)
        write_jsonl(folder / "data" / f"{name}.jsonl", [row(item) for item in graded])
        (folder / f"{name}.yaml").write_text(_yaml(name, capability, form), encoding="utf-8")
        shim += _SHIM_TASK.format(name=name)
    (folder / "grading.py").write_text(shim, encoding="utf-8")
