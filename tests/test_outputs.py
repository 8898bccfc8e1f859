"""Where runs write: never onto inputs, alone, clearing what killed runs left, in one sentence on a full disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from waiting import wait_for

from mergekit_wp import console
from mergekit_wp.errors import BadInput
from mergekit_wp.files import atomic_path, disk_trouble, write_text
from mergekit_wp.outputs import check_file, claimed, refuse_inputs, scratch


def tree(root: Path) -> Path:
    (root / "model").mkdir()
    (root / "model/config.json").write_text("{}")
    (root / "pairs.jsonl").write_text("x")
    return root


@pytest.mark.parametrize(
    "spelling", ["model", "./model", "model/.", "other/../model", "link", "link/new", "model/sub", "."]
)
def test_a_folder_that_is_holds_or_lies_inside_an_input_is_refused(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="what is read"):
        refuse_inputs(spelling, [tmp_path / "model"])


@pytest.mark.parametrize("spelling", ["merged", "model2", "modelling/m", "model.push", "model/wp/scores.safetensors"])
def test_what_lies_beside_an_input_is_taken(spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    refuse_inputs(spelling, ["model", "user/model-of-the-hub"])


def test_a_folder_of_tasks_may_hold_the_output(tmp_path: Path) -> None:
    tree(tmp_path)
    refuse_inputs(tmp_path / "model" / "runs", [tmp_path / "model"], inside=False)
    with pytest.raises(BadInput, match="is itself what is read"):
        refuse_inputs(tmp_path / "model" / ".", [tmp_path / "model"], inside=False)


def test_a_hard_link_is_the_same_file(tmp_path: Path) -> None:
    tree(tmp_path)
    os.link(tmp_path / "pairs.jsonl", tmp_path / "out.safetensors")
    with pytest.raises(BadInput, match="itself what is read"):
        check_file(tmp_path / "out.safetensors", "wp", "score", [tmp_path / "pairs.jsonl"])


def test_only_a_file_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for name, about in (("ours", {"wp": "{}"}), ("theirs", {"format": "pt"}), ("bare", None)):
        save_file({"x": torch.zeros(1)}, tmp_path / name, metadata=about)
    (tmp_path / "notes").write_text("x")
    assert check_file(tmp_path / "ours", "wp", "score") == tmp_path / "ours"
    assert check_file(tmp_path / "new", "wp", "score") == tmp_path / "new"
    for name in ("theirs", "bare", "notes"):
        with pytest.raises(BadInput, match="no score file"):
            check_file(tmp_path / name, "wp", "score")
    with pytest.raises(BadInput, match="this is a folder"):
        check_file(tmp_path, "wp", "score")


def test_one_run_at_a_time_and_partials_of_dead_ones_go(tmp_path: Path) -> None:
    out = tmp_path / "m[1]"
    (tmp_path / ".m[1].partial-99").mkdir()
    (tmp_path / ".m[1].partial-99/w").write_bytes(b"x" * 2_000_000)
    (tmp_path / ".m[1].partial-7").write_text("x")
    (tmp_path / ".m.partial-7").write_text("another output's")
    with claimed(out) as left:
        assert left == "Removed what a killed run had left of m[1]: 2.0 MB."
        with pytest.raises(BadInput, match="another run is writing this"), claimed(out):
            raise AssertionError
        with claimed(tmp_path / "other"):
            pass
    with claimed(out) as left:
        assert left == ""
    assert [path.name for path in tmp_path.iterdir()] == [".m.partial-7"]


def test_what_a_killed_run_had_moved_out_of_its_way_is_put_back(tmp_path: Path) -> None:
    work = tmp_path / ".m.partial-9"
    (work / ".replaced").mkdir(parents=True)
    (work / ".replaced/w").write_text("old")
    (work / "m").mkdir()
    with claimed(tmp_path / "m"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m/w").read_text() == "old"


def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path: Path) -> None:
    code = f"from mergekit_wp.outputs import claimed\nimport time\nwith claimed({str(tmp_path / 'out')!r}): "
    code += f"open({str(tmp_path / 'held')!r}, 'w'); time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", code])
    wait_for((tmp_path / "held").exists, "the other run to hold its output")
    with pytest.raises(BadInput, match="another run"), claimed(tmp_path / "out"):
        raise AssertionError
    holder.kill()
    holder.wait()
    with claimed(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["held"]


def test_scratch_of_a_killed_run_goes_and_that_of_a_live_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import sys, tempfile, time\nfrom mergekit_wp.outputs import scratch\ntempfile.tempdir = sys.argv[1]\n"
    code += "with scratch('wp-lora-') as folder:\n    (folder / 'weights').touch()\n    time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    wait_for(lambda: list(tmp_path.glob("*/weights")), "the other run to make its folder")
    with scratch("wp-lora-") as mine:
        assert len(list(tmp_path.glob("wp-lora-*"))) == 2
        assert mine.is_dir()
    holder.kill()
    holder.wait()
    assert len(list(tmp_path.iterdir())) == 1
    with scratch("wp-lora-") as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


LIMITED = "import resource, signal\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"


@pytest.mark.parametrize(
    "write",
    [
        "write_text(out, 'x' * 5000)",
        "write_tensors(out, {'x': torch.zeros(5000)}, 'wp', '{}')",
    ],
)
def test_a_file_that_may_not_grow_is_one_sentence_and_no_file(write: str, tmp_path: Path) -> None:
    code = "import sys, torch\nfrom mergekit_wp.errors import BadInput\nfrom mergekit_wp.files import write_text\n"
    code += f"from mergekit_wp.files import write_tensors\n{LIMITED}out = sys.argv[1]\n"
    code += f"try: {write}\nexcept BadInput as error: sys.exit(error.message)\n"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"{tmp_path / 'out'}: cannot be written (File too large); free some room, or write to another disk.\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's full device")
def test_full_disks_are_told_from_other_troubles(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as caught:
        Path("/dev/full").write_text("x")
    assert disk_trouble(caught.value) == "No space left on device"
    assert disk_trouble(RuntimeError("I/O error: No space left on device (os error 28)")) == "No space left on device"
    assert disk_trouble(OSError(errno.ENOENT, "no such file")) is None
    assert disk_trouble(ValueError("x")) is None
    with pytest.raises(KeyError), atomic_path(tmp_path / "out"):
        raise KeyError
    write_text(tmp_path / "out", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def start(code: str, folder: Path, **how: object) -> subprocess.Popen[str]:
    """A command whose module is `code`, begun the way the console scripts are."""
    (folder / "told.py").write_text(code)
    begin = f"import sys; sys.path.insert(0, {str(folder)!r}); from mergekit_wp import console; console.run('told')"
    return subprocess.Popen(
        [sys.executable, "-c", begin], stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
        **{"stdout": subprocess.PIPE, **how},  # type: ignore[call-overload]
    )  # fmt: skip


SLOW_IMPORT = """
import pathlib, time
pathlib.Path(__file__).with_name("begun").touch()
try:
    time.sleep(30)
except KeyboardInterrupt:
    raise ImportError("half a package")  # as extension modules do
"""
SLOW_COMMAND = """
import pathlib, time, click
@click.command()
def main():
    try:
        pathlib.Path(__file__).with_name("begun").touch()
        time.sleep(30)
    finally:
        pathlib.Path(__file__).with_name("unwound").touch()
"""


@pytest.mark.parametrize(
    ("code", "number", "exit_code", "said"),
    [
        (SLOW_IMPORT, signal.SIGINT, 1, "Aborted!"),
        (SLOW_COMMAND, signal.SIGINT, 1, "Aborted!"),
        (SLOW_COMMAND, signal.SIGTERM, 143, ""),
    ],
)
def test_signals_end_a_command_cleanly(code: str, number: int, exit_code: int, said: str, tmp_path: Path) -> None:
    process = start(code, tmp_path)
    wait_for((tmp_path / "begun").exists, "the command to begin")
    time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (exit_code, said)
    assert (tmp_path / "unwound").exists() == (code is SLOW_COMMAND)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's full device")
def test_full_standard_output_is_one_sentence(tmp_path: Path) -> None:
    talks = "import click\n@click.command()\ndef main(): click.echo('x' * 100_000)\n"
    with open("/dev/full", "w") as full:
        process = start(talks, tmp_path, stdout=full)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        errors == "Error: the output cannot be written (No space left on device); free some room, or write elsewhere.\n"
    )


def test_a_mistake_of_ours_stays_a_traceback(tmp_path: Path) -> None:
    process = start("import click\n@click.command()\ndef main(): 1 / 0\n", tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ZeroDivisionError" in errors


def test_every_console_script_is_known() -> None:
    import tomllib

    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    assert set(project["scripts"]) == set(console.MODULES)
    assert set(project["scripts"].values()) == {"mergekit_wp.console:main"}
