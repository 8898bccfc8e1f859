"""What is given as a file and is none: pipes that nobody writes into, devices, circles of links, names too long."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fuzz import not_longer_than

from mergekit_wp.calibrate import read_texts
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.weights import read_header
from mergekit_wp.documents import now
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.measure import read_cache
from mergekit_wp.eval.suite import read_suite
from mergekit_wp.eval.tables import read_results
from mergekit_wp.eval.tasks import task_manager
from mergekit_wp.files import check_writable_parent
from mergekit_wp.hashing import FileDigests
from mergekit_wp.merge.activations import read_activations
from mergekit_wp.merge.recipe import read_recipe
from mergekit_wp.outputs import check_file, claimed, refuse_busy
from mergekit_wp.pipeline.spec import read_pipeline
from mergekit_wp.records import csv_lines, json_lines, json_values, parquet_rows
from mergekit_wp.scores import read_scores
from mergekit_wp.scoring.config import load_job
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.pairs import read_pairs

READERS: dict[str, Callable[[Path], Any]] = {
    "pairs": read_pairs,
    "rows": lambda path: list(json_lines(path)),
    "json": lambda path: list(json_values(path)),
    "csv": lambda path: list(csv_lines(path)),
    "parquet": lambda path: list(parquet_rows(path)),
    "texts": lambda path: list(read_texts(str(path))),
    "scores": read_scores,
    "activations": read_activations,
    "suite": read_suite,
    "recipe": lambda path: read_recipe(str(path)),
    "pipeline": read_pipeline,
    "results": read_results,
    "job": lambda path: load_job(str(path), {}),
    "weights": read_header,
    "digest": lambda path: FileDigests(None, print)([path]),
    "output": lambda path: check_file(path, "wp", "score"),
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "circle").symlink_to("circle")
    return {
        "pipe": tmp_path / "pipe.jsonl", "device": Path("/dev/zero"), "circle": tmp_path / "circle",
        "long": tmp_path / ("x" * 300),
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such files")
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_for_what_is_no_file(reader: str, places: dict[str, Path]) -> None:
    for name, path in places.items():
        with not_longer_than(20), pytest.raises(BadInput) as caught:
            READERS[reader](path)
        assert "where a file is wanted" in caught.value.message or name in ("circle", "long") or reader == "output"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such files")
def test_a_pipe_in_a_folder_that_other_libraries_read(places: dict[str, Path], tmp_path: Path) -> None:
    tiny.save(tiny.random_model("llama", seed=3), tmp_path / "base", torch.float32)
    os.mkfifo(tmp_path / "base/added_tokens.json")  # transformers would open it
    with pytest.raises(BadInput, match=r"added_tokens\.json: a pipe, a socket or a device in a model's folder"):
        Checkpoint.open(str(tmp_path / "base"))
    (tmp_path / "tasks/deeper").mkdir(parents=True)
    os.mkfifo(tmp_path / "tasks/deeper/a.yaml")  # and so would lm-eval
    with (
        not_longer_than(20),
        pytest.raises(BadInput, match=r"a\.yaml: a pipe, .* in the tasks' folder"),
    ):
        task_manager([], tmp_path / "tasks")
    with not_longer_than(20):
        assert read_cache(places["pipe"]) == {}


@pytest.mark.parametrize("out", ["x" * 250, "x" * 300, "/"])
def test_an_output_beside_which_nothing_can_be_made(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 250 letters, the name itself could be."""
    monkeypatch.chdir(tmp_path)
    for check in (check_writable_parent, refuse_busy):
        with pytest.raises(BadInput, match="cannot write there"):
            check(out)
    with pytest.raises(BadInput, match="cannot write there"), claimed(out):
        raise AssertionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["soon", "-1", "9" * 5000, "999999999999", "\u0663", "1.5"])
def test_a_number_of_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(BadInput, match="the environment variable SOURCE_DATE_EPOCH is"):
        now()
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(BadInput, match="the environment variable WORLD_SIZE is"):
        ProcessGroup.join()


def test_a_line_longer_than_any_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_wp.records.MOST_JSON_BYTES", 100)
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a"}\n{"text": "' + "b" * 200 + '"}\n')
    with pytest.raises(BadInput, match=r"texts\.jsonl, line 2: longer than 100 characters"):
        list(read_texts(str(file)))
