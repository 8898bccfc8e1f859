"""wp-eval's process a model: killed, interrupted, out of memory; what it keeps, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from eval_world import cells, make_model, ran, results, wp_eval, write_held_tasks, write_suite, write_tasks
from tiny import random_model, save
from waiting import is_gone, wait_for
from warm import COMMAND, Fork, warm

from mergekit_wp.eval import process
from mergekit_wp.eval.models import open_model
from mergekit_wp.eval.rows import Settings, evaluate_model
from mergekit_wp.eval.suite import read_suite
from mergekit_wp.eval.tasks import ready_tasks

GONE_S = 20  # "soon", on a busy machine


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """model/, tasks/ (held_a, held_b), marks/ and suite.yaml."""
    make_model(tmp_path / "model", seed=1)
    write_suite(tmp_path / "suite.yaml", tasks=write_held_tasks(tmp_path / "tasks", tmp_path / "model"))
    return tmp_path


def arguments(held: Path, out: str = "out") -> list[object]:
    return [held / "suite.yaml", f"m={held / 'model'}", "--out", held / out]


def pids_at(held: Path, place: str) -> list[int]:
    """The evaluating process and one that it started, once they are at this place."""
    mark = held / "marks" / f"at-{place}"
    wait_for(mark.exists, str(mark))
    return [int(pid) for pid in mark.read_text().split()]


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread while wp-eval runs in this one."""
    thread = threading.Thread(target=act)
    thread.start()
    yield
    thread.join()


def without_times(content: dict) -> dict:
    """results.json less what may differ between two runs of the same, into two folders."""
    assert "--out" in content.pop("command")
    for row in content["rows"]:
        for about in row["measured"].values():
            assert about.pop("seconds") >= 0
            assert about.pop("date")
    return content


def test_when_wp_eval_is_killed_its_child_goes_and_the_rerun_does_what_is_missing(held: Path) -> None:
    for place in ("start", "middle"):
        kill_at(held, place)
    again = wp_eval(*arguments(held))
    assert again.exit_code == 0, again.output
    assert ran(again) == ["held_b"]
    whole = wp_eval(*arguments(held, "other"))
    assert ran(whole) == ["held_a", "held_b"]
    assert without_times(results(held / "out")) == without_times(results(held / "other"))


def kill_at(held: Path, place: str) -> None:
    """Kill wp-eval where its child waits; the child and its helper must go, and nothing be written."""
    (held / "marks" / f"hold-{place}").touch()
    if place == "start":  # an interpreter of its own; the other is a fork, which has its imports behind it
        command = [sys.executable, "-m", "mergekit_wp.eval.cli", *map(str, arguments(held))]
        parent: subprocess.Popen[bytes] | Fork = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    else:
        parent = warm().start(COMMAND.format("mergekit_wp.eval.cli"), *arguments(held))
    try:
        pids = pids_at(held, place)
        assert not any(map(is_gone, pids))
    finally:
        parent.send_signal(signal.SIGKILL)  # nobody can tidy up
        parent.wait()
    wait_for(lambda: all(map(is_gone, pids)), "the child and its helper to end", GONE_S)
    assert not (held / "out" / "results.json").exists()
    (held / "marks" / f"hold-{place}").unlink()


def test_when_the_child_is_killed_one_sentence_says_so_and_finished_tasks_are_kept(held: Path) -> None:
    (held / "marks" / "hold-middle").touch()
    with meanwhile(lambda: os.kill(pids_at(held, "middle")[0], signal.SIGKILL)):
        outcome = wp_eval(*arguments(held))
    assert outcome.exit_code == 2
    sentence = outcome.output.rstrip("\n").rsplit("Error: ", 1)[1]
    assert len(sentence.splitlines()) == 1
    assert "killed by signal 9 (SIGKILL) (at `m: held_b ...`)" in sentence
    assert "out of memory" in sentence
    wait_for(lambda: all(map(is_gone, pids_at(held, "middle"))), "the child's helper to end", GONE_S)
    (held / "marks" / "hold-middle").unlink()
    assert ran(wp_eval(*arguments(held))) == ["held_b"]


def test_ctrl_c_ends_everything(held: Path) -> None:
    (held / "marks" / "hold-middle").touch()

    def interrupt() -> None:
        pids_at(held, "middle")
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(interrupt):
        outcome = wp_eval(*arguments(held))
    assert outcome.exit_code == 1
    assert outcome.output.rstrip().endswith("Aborted!")
    assert "Traceback" not in outcome.output
    assert all(map(is_gone, pids_at(held, "middle")))  # by the time that wp-eval returns
    assert not (held / "out" / "results.json").exists()


def test_an_error_in_a_task_is_one_sentence_and_its_traceback_is_shown(held: Path) -> None:
    glue = held / "tasks" / "glue.py"
    glue.write_text(glue.read_text().replace("def grade_b(doc, results):", "def grade_b(doc, results):\n    1 / 0"))
    outcome = wp_eval(*arguments(held))
    assert outcome.exit_code == 1
    assert "evaluating it failed (ZeroDivisionError: division by zero)" in outcome.output
    assert 'glue.py", line' in outcome.output
    assert ran(wp_eval(*arguments(held))) == ["held_b"]


def test_a_child_sees_the_environment_of_now_and_works_where_its_parent_does(held: Path, monkeypatch) -> None:
    spec = {"task": "held_a", "column": "Said", "metric": "said,none"}
    write_suite(held / "suite.yaml", tasks=[spec])
    process.start_importing()  # the fork server has the environment of before
    monkeypatch.setenv("WP_TEST_WORD", "hello")
    monkeypatch.chdir(held)
    outcome = wp_eval("suite.yaml", "model", "--out", "out")
    assert outcome.exit_code == 0, outcome.output
    assert cells(held / "out", "model")["Said"]["value"] == 1.0


def test_a_child_says_the_same_as_this_very_process(held: Path) -> None:
    assert wp_eval(*arguments(held)).exit_code == 0
    suite = read_suite(held / "suite.yaml")
    settings = Settings(
        device="cpu", dtype="auto", batch_size=4, limit=None, allow_code=False, trust_remote_code=False,
        progress_bars=False,
    )  # fmt: skip
    tasks = ready_tasks(suite, suite.include_path, False)
    model = open_model("m", str(held / "model"), False)
    row = evaluate_model(model, tasks, settings, held / "here", lambda _: None)
    (ours,), (theirs,) = (
        [json.loads(path.read_text())["tasks"] for path in folder.glob("*.json")]
        for folder in (held / "here", held / "out" / "cache")
    )
    for entry in [*ours.values(), *theirs.values()]:
        del entry["seconds"], entry["date"]
    assert ours == theirs
    assert row.cells["A"].value == 5 / 8


def test_no_model_is_ever_in_the_parents_memory(tmp_path: Path) -> None:
    """Two models of 240 MB, one after the other, against the parent's memory at its highest."""
    write_tasks(tmp_path / "tasks", make_model(tmp_path / "tiny", 1))
    task = {"task": "tiny_choice", "column": "Choice", "metric": "acc,none"}
    suite = write_suite(tmp_path / "suite.yaml", tasks=[task])
    for seed, name in enumerate(("one", "two")):
        large = random_model("llama", seed, intermediate_size=1_000_000, num_hidden_layers=1, hidden_size=20)
        save(large, tmp_path / name, max_shard_size="1GB")
    del large
    size = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert size > 200e6
    me, seen, done = psutil.Process(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(me.memory_info().rss)

    def run() -> None:
        outcome = wp_eval(suite, tmp_path / "one", tmp_path / "two", "--out", tmp_path / "out", "--limit", 1)
        assert outcome.exit_code == 0, outcome.output
        assert ran(outcome) == ["tiny_choice"] * 2

    wp_eval(suite, tmp_path / "tiny", "--out", tmp_path / "out")  # imports are paid
    before = me.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    assert max(seen) - before < size / 2
