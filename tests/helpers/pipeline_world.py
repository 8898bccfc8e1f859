"""Tiny models with prompts, tasks and a suite, a pipeline file about them, and wp-run as a command."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import yaml
from eval_world import write_suite, write_tasks
from warm import WP_RUN, warm


def build(root: Path) -> Path:
    """root/base, one, two (models); one.jsonl, two.jsonl; tasks, suite.yaml; job.yaml, the scoring job of `two`."""
    base = tiny.random_model("llama", seed=1)
    tiny.save(base, root / "base")
    rows = [{"task": "t", "prompt": f"w{i} w{i + 1} w5", "contrast": f"w{i} w{i + 1}"} for i in range(8)]
    for k, name in enumerate(("one", "two")):
        tiny.save(tiny.fine_tuned(base, seed=2 + k, size=0.3), root / name)
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[k:])))
    write_tasks(root / "tasks", right=root / "one")
    write_suite(root / "suite.yaml")
    (root / "job.yaml").write_text(yaml.safe_dump({"base": "x", "expert": "two", "pairs": "two.jsonl", "layer": 1}))
    return root


def content(out: str = "out") -> dict:
    return {
        "out": out,
        "base": "base",
        "experts": {"one": {"model": "one", "scoring": {"pairs": "one.jsonl"}}, "two": {"scoring": "job.yaml"}},
        "merges": {
            "linear": {
                "merge_method": "linear",
                "expert_parameters": {"weight": 1.0},
                "base_parameters": {"weight": 0.0},
            },
            "wp": {"parameters": {"scale": 1.5}},
        },
        "evaluate": {"suite": "suite.yaml", "baseline": "linear", "models": ["base", "linear", "wp"]},
        "score": {"flags": ["--device", "cpu", "--batch-size", 4]},
    }


def pipeline_of(world: Path, out: str = "out", **changes: object) -> Path:
    found = {**content(out), **changes}
    path = world / f"{out}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in found.items() if value is not None}))
    return path


def wp_run(world: Path, *arguments: object, code: int = 0, **variables: str) -> str:
    """The command in a process of its own, as its steps are, from the world's folder; what it printed."""
    done = warm().run(WP_RUN, *arguments, cwd=world, **variables)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
