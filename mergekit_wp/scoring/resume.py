"""Finished steps of a long run, such as layers, kept beside its output until that is written.

The folder `.NAME.resume` holds a folder a run, named by the digest of everything the numbers depend on. In it is one
safetensors file for each task and step that is done, and a JSON with the whole digest. A later run with the same
digest goes on from there, and its output is the one that an undisturbed run would have written, to the byte; one with
another digest starts afresh beside it, and leaves the newest of the others alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_wp.documents import MOST_JSON_BYTES, Date, Sha256, parse_json, read_record, strict
from mergekit_wp.errors import BadInput
from mergekit_wp.files import read_tensors, read_text, write_tensors, write_text
from mergekit_wp.foreign import logger

LOG = logger(__name__)
KEPT = 3  # runs with other settings whose finished layers are kept
_DIGEST = "sha256"


class Resume:
    """Reads and writes finished steps of the run that writes `out`; without one it remembers nothing.

    step: what one is, in a word.
    """

    def __init__(self, out: Path | None = None, step: str = "layer"):
        self.step = step
        self.root = None if out is None else out.with_name(f".{out.name}.resume")
        self.folder: Path | None = None
        self.found = 0

    def begin(self, inputs: Mapping[str, Any], date: str) -> str:
        """Look for finished steps of a run with these `inputs`, everything the numbers depend on.

        Returns when that run began: `date`, if there are none.
        """
        if self.root is None:
            return date
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = self.root / digest[:16]
        state = _read_state(self.folder / "run.json")
        if state is not None and state.digest == digest:
            self.found = len(list(self.folder.glob("*.safetensors")))
            return state.date
        shutil.rmtree(self.folder, ignore_errors=True)
        write_text(self.folder / "run.json", json.dumps({"digest": digest, "date": date}))
        return date

    def spare_others(self) -> None:
        """Say that finished steps of runs with other settings are kept, of the newest such runs; drop older ones."""
        if self.root is None or not self.root.is_dir():
            return
        others = [path for path in self.root.iterdir() if path != self.folder]
        runs = sorted((path for path in others if path.is_dir()), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in runs[KEPT:]:
            shutil.rmtree(path, ignore_errors=True)
        for path in others:
            if path.is_file():  # as versions before this kept them, whose digests are no longer made
                path.unlink(missing_ok=True)
        if kept := sum(len(list(path.glob("*.safetensors"))) for path in runs[:KEPT]):
            LOG.info(
                "Kept, %d finished %ss of runs with other settings: %s; remove it if not wanted.",
                kept,
                self.step,
                self.root,
            )

    def forget(self) -> None:
        """Remove the finished steps of this run: the output is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.root is not None and self.root.is_dir() and not any(self.root.iterdir()):
            self.root.rmdir()

    def load(self, task: int, step: int, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """The tensors saved for a task (by its place in the job) and a step; None if it is not done.

        like: tensors of the names, dtypes and shapes that they must have. What is not like them, not finite, or not
        what was saved, counts as not done, and is told.
        """
        if self.folder is None or not (file := self._file(task, step)).exists():
            return None
        try:
            said, tensors = read_tensors(file, _DIGEST, f"finished {self.step}", "wp-score")
            finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
            sound = finite and said == _digest(tensors) and _layout(tensors) == _layout(like)
        except BadInput:
            sound = False
        if not sound:
            LOG.warning("%s: damaged; this %s is computed again.", file, self.step)
            return None
        return tensors

    def save(self, task: int, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        if self.folder is not None:
            write_tensors(self._file(task, step), tensors, _DIGEST, _digest(tensors))

    def _file(self, task: int, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"task-{task}-{self.step}-{step}.safetensors"


def _layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {str(name): (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and values: of a flipped bit, safetensors knows nothing."""
    digest = hashlib.sha256()
    for name in sorted(tensors, key=str):
        digest.update(f"{name}\0".encode() + tensors[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


@strict
@dataclass(frozen=True)
class State:
    """What run.json says: the digest of everything the numbers depend on, and when the run began."""

    digest: Sha256
    date: Date


def _read_state(path: Path) -> State | None:
    """None where there is none, or nothing that this program wrote."""
    try:
        return read_record(State, parse_json(read_text(path, MOST_JSON_BYTES)))
    except (OSError, ValueError):
        return None
