"""Killed with -9 at any moment, no stage leaves a wrong output under its final name; the next run clears up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from warm import warm

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills forks")


@pytest.mark.parametrize(
    "stage", ["pairs", "score", "fit", "aim", "merge", "patch", "push", "evaluate", "study", "run"]
)
def test_twenty_kills(stage: str, tmp_path: Path) -> None:
    done = warm().run("import kill_at_moments; kill_at_moments.main()", stage, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == 0
    assert found["same"], "the run after the kills wrote something else than an undisturbed one"
    kept = {
        "run": ["one.txt", "two.txt", ".steps"],
        "evaluate": ["cache"],
        "score": ["s.answers.jsonl"],
        "fit": ["f.expert1.answers.jsonl", "f.expert2.answers.jsonl"],
    }
    left = sorted(kept.get(stage, []))
    assert sorted(found["left"]) == left, "killed runs left something that the next did not clear"
    assert found["kills"] >= 10  # a run that goes on from finished parts has fewer moments
