"""From experts to a pushed model in one command: the real stages on tiny models, onto the loopback Hub."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import psutil
import pytest
from loopback_hub import Fault, LoopbackHub
from pipeline_world import build, pipeline_of, wp_run
from push_world import TOKEN, front_matter, licence
from waiting import is_gone, wait_for
from warm import WP_RUN, warm

REPO = "alice/merged"
PARENTS = {name: f"alice/{name}" for name in ("base", "one", "two")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build(tmp_path_factory.mktemp("hub"))
    for name in ("base", "one", "two"):
        licence(root / name, "apache-2.0")
    return root


def test_one_run_scores_merges_grades_and_pushes(world: Path) -> None:
    """Killed in the middle of the upload, run again; then once more, which must send and commit nothing."""
    file = pipeline_of(world, "all", push={"merge": "wp", "to": REPO, "private": True, "parents": PARENTS})
    with LoopbackHub() as hub:
        hub.add_user("alice", TOKEN)
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        hold = Fault("PUT /", "hold", after=1000)
        hub.faults.append(hold)
        run = warm().start(WP_RUN, file.name, cwd=world, **variables)
        assert hold.reached.wait(240), run.said()
        steps = psutil.Process(run.pid).children(recursive=True)
        assert steps
        run.send_signal(signal.SIGKILL)
        run.wait()
        said = run.said()
        hold.release.set()
        # What it started dies with it, and only then lets go of what it was writing.
        wait_for(lambda: all(map(is_gone, steps)), "the step to end")
        assert not hub.repos[REPO].files.keys() & {"README.md", "config.json"}

        said += wp_run(world, file.name, **variables)
        assert said.count("done before") == 6  # of the second run: two scores, two merges, the table, the report
        repo = hub.repos[REPO]
        assert repo.private
        merged = world / "all/merges/wp"
        weights = [path for path in sorted(merged.iterdir()) if path.suffix == ".safetensors"]
        assert weights
        for path in weights:
            sent = hashlib.sha256(hub.content(REPO, path.name)).hexdigest()
            assert sent == hashlib.sha256(path.read_bytes()).hexdigest()
        card = hub.content(REPO, "README.md").decode()
        about = front_matter(card)
        assert (about["base_model_relation"], sorted(about["base_model"])) == ("merge", sorted(PARENTS.values()))
        assert "| wp |" in card.replace("**", "")
        commits, sent_before = len(repo.commits), hub.bytes_sent()

        wp_run(world, file.name, "--redo", "push", **variables)
        assert (len(repo.commits), hub.bytes_sent()) == (commits, sent_before)
        assert wp_run(world, file.name, **variables).count("done before") == 7
        assert TOKEN not in said
        assert not [p for p in (world / "all").rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
        assert not hub.troubles
