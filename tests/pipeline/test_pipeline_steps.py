"""Steps and digests: what is done, what is due and why, and that nothing outlives a run that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import click
import pytest

from mergekit_wp import hashing as digests_module
from mergekit_wp.execute import Stamps, Step, code_digest, die_with
from mergekit_wp.hashing import Digests, digest

COPY = "import sys; open(sys.argv[2], 'w').write(open(sys.argv[1]).read().upper())"


def copy_step(folder: Path) -> Step:
    source, target = folder / "in.txt", folder / "out.txt"
    command = ("python", "-c", COPY, str(source), str(target))
    return Step("copy", "score", "Copy", command, (source,), (target,), ("demo",))


def why(step: Step, folder: Path, **options: bool) -> str | None:
    """As a new process would find it."""
    return Stamps.below(folder / ".steps", **options).why_not_done(step)


def test_a_step_is_skipped_while_inputs_and_outputs_keep_their_content(tmp_path: Path) -> None:
    step, stamps = copy_step(tmp_path), Stamps.below(tmp_path / ".steps")
    (tmp_path / "in.txt").write_text("abc")
    assert why(step, tmp_path) == "not run yet"
    stamps.run(step)
    assert (tmp_path / "out.txt").read_text() == "ABC"
    assert why(step, tmp_path) is None
    (tmp_path / "in.txt").touch()
    assert why(step, tmp_path) is None
    (tmp_path / "out.txt").write_text("tampered")
    assert why(step, tmp_path) == f"{tmp_path / 'out.txt'} is not what this step wrote"
    stamps.run(step)
    (tmp_path / "in.txt").write_text("abcd")
    assert why(step, tmp_path) == f"{tmp_path / 'in.txt'} has changed"
    stamps.run(step)
    assert why(step, tmp_path) is None
    (tmp_path / "out.txt").unlink()
    assert why(step, tmp_path) == f"{tmp_path / 'out.txt'} is missing"


def test_another_command_is_another_step(tmp_path: Path) -> None:
    step = copy_step(tmp_path)
    (tmp_path / "in.txt").write_text("abc")
    Stamps.below(tmp_path / ".steps").run(step)
    leave = dict.fromkeys(("--allow-code-execution", "--overwrite"))
    for word, found in {"more": "its command is another one", **leave}.items():
        other = Step(step.name, step.stage, step.title, (*step.command, word), step.inputs, step.outputs, step.code)
        assert why(other, tmp_path) == found


def test_code_counts_only_where_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = copy_step(tmp_path)
    (tmp_path / "in.txt").write_text("abc")
    Stamps.below(tmp_path / ".steps").run(step)
    assert why(step, tmp_path, code_counts=True) is None
    assert code_digest(("demo",)) != code_digest(("scoring",))
    monkeypatch.setattr("mergekit_wp.execute.code_digest", lambda _: "another")
    assert why(step, tmp_path) is None
    assert why(step, tmp_path, code_counts=True) == "the code behind it has changed"


@pytest.mark.parametrize("stamp", ["", "[]", "{", '{"inputs": 3, "outputs": {}}'])
def test_a_damaged_stamp_is_no_stamp(tmp_path: Path, stamp: str) -> None:
    step = copy_step(tmp_path)
    (tmp_path / ".steps").mkdir()
    (tmp_path / ".steps" / "copy.json").write_text(stamp)
    (tmp_path / ".steps" / "digests.json").write_text(stamp)
    assert why(step, tmp_path) == "not run yet"


def test_a_failing_step_stops_and_says_what_to_do(tmp_path: Path) -> None:
    step = copy_step(tmp_path)
    with pytest.raises(click.ClickException, match=r"failed \(exit code 1\).*run the same command again"):
        Stamps.below(tmp_path / ".steps").run(step)
    assert why(step, tmp_path) == "not run yet"


def test_a_step_that_fails_leaves_the_folder_that_was_there(tmp_path: Path) -> None:
    """A merge by hand under the name of one of the pipeline's, too."""
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "model.safetensors").write_text("by hand")
    command = ("wp-merge", str(tmp_path / "no-recipe.yaml"), str(merged), "--overwrite")
    with pytest.raises(click.ClickException, match=r"failed \(exit code 2\)"):
        Stamps.below(tmp_path / ".steps").run(Step("m", "merge", "Merge", command, (), (merged,), ()), quiet=True)
    assert (merged / "model.safetensors").read_text() == "by hand"


@pytest.mark.parametrize(("platform", "asks"), [("linux", True), ("darwin", False), ("win32", False)])
def test_only_linux_is_given_something_to_call_before_a_command(platform, asks, monkeypatch) -> None:
    """Popen refuses any on Windows."""
    monkeypatch.setattr("sys.platform", platform)
    assert (die_with(os.getpid()) is not None) == asks


def test_a_step_that_writes_nothing_failed(tmp_path: Path) -> None:
    step = Step("idle", "merge", "Idle", ("python", "-c", "pass"), (), (tmp_path / "out.txt",), ())
    with pytest.raises(click.ClickException, match=r"out\.txt missing"):
        Stamps.below(tmp_path / ".steps").run(step)


def test_a_digest_is_of_names_and_content(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "model"
    folder.mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")
    before = digest(folder)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "c.pyc").write_text("3")
    assert digest(folder) == before
    (folder / "a").write_text("2")
    (folder / "b").write_text("1")
    swapped = digest(folder)
    assert swapped != before
    (folder / "b").rename(folder / "c")
    assert digest(folder) not in (before, swapped)
    assert digest(tmp_path / "absent") == ""


def test_a_large_file_is_read_once_and_again_when_it_was_touched(tmp_path: Path, monkeypatch) -> None:
    large, memory = tmp_path / "large", tmp_path / "digests.json"
    large.write_bytes(bytes(2**20))
    read = []
    hashed = digests_module.hashlib.file_digest
    monkeypatch.setattr(digests_module.hashlib, "file_digest", lambda *a: read.append(1) or hashed(*a))

    def of() -> str:
        return Digests(memory).of(large)

    before = of()
    assert [of(), of()] == [before, before]
    assert len(read) == 1
    content = bytearray(2**20)
    content[5] = 1  # the same size, the same name
    large.write_bytes(content)
    os.utime(large, ns=(large.stat().st_atime_ns, large.stat().st_mtime_ns + 1))
    assert of() != before
    assert len(read) == 2


def test_a_file_of_the_hubs_cache_goes_by_its_name(tmp_path: Path) -> None:
    name = "5" * 64
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(bytes(2**20))
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert Digests().of(tmp_path / "snapshots" / "model.safetensors") == name


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_command_behind_and_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    """The first step sleeps while a file says so; killed in it, run again, both steps are done and right."""
    slow = textwrap.dedent(
        f"""
        import os, pathlib, sys, time
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
        while pathlib.Path({str(tmp_path / "wait")!r}).exists():
            time.sleep(0.05)
        pathlib.Path(sys.argv[1]).write_text("done")
        """
    )
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent(
            f"""
            from pathlib import Path
            from mergekit_wp.pipeline.cli import run_steps
            from mergekit_wp.execute import Stamps, Step

            if __name__ == "__main__":
                here = Path({str(tmp_path)!r})
                run_steps(
                    [
                        Step("slow", "score", "Slow", ("python", "-c", {slow!r}, str(here / "a")), (),
                             (here / "a",), ()),
                        Step("next", "merge", "Next", ("python", "-c", {COPY!r}, str(here / "a"), str(here / "b")),
                             (here / "a",), (here / "b",), ()),
                    ],
                    Stamps.below(here / ".steps"),
                )
            """
        )
    )
    (tmp_path / "wait").touch()
    run = subprocess.Popen([sys.executable, str(driver)], start_new_session=True)
    _until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    run.send_signal(how)
    assert run.wait() != 0
    child = int((tmp_path / "pid").read_text())
    _until(lambda: not _runs(child))
    assert not (tmp_path / "a").exists()
    (tmp_path / "wait").unlink()
    assert subprocess.run([sys.executable, str(driver)], check=False).returncode == 0
    assert (tmp_path / "b").read_text() == "DONE"


def _until(happened) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
