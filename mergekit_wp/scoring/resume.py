"""Finished layers of a long run, kept beside its output until that is written.

The folder `.NAME.resume` holds one safetensors file for each task and layer that is done, and a JSON with the
digest of everything the numbers depend on. A later run with the same digest goes on from there, and its output is
the one that an undisturbed run would have written, to the byte; with another digest it starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mergekit_wp.documents import parse_json
from mergekit_wp.files import atomic_path, write_text
from mergekit_wp.foreign import logger

LOG = logger(__name__)


class Resume:
    """Reads and writes finished layers; with no folder (nothing asked for) it remembers nothing."""

    def __init__(self, folder: Path | None, inputs: Mapping[str, Any], date: str):
        """`inputs`: everything the numbers depend on; `date`: when this run began, if it is not resumed."""
        self.folder, self.date, self.found = folder, date, 0
        if folder is None:
            return
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        state = _read_state(folder / "run.json")
        if state.get("digest") == digest:
            self.date, self.found = state["date"], len(list(folder.glob("*.safetensors")))
            return
        if state:
            LOG.warning("Other settings than those of the finished layers in %s: starting afresh.", folder)
        shutil.rmtree(folder, ignore_errors=True)
        write_text(folder / "run.json", json.dumps({"digest": digest, "date": date}))

    def load(self, task: int, layer: int) -> dict[str, torch.Tensor] | None:
        """The tensors saved for a task (by its place in the job) and a layer; None if it is not done."""
        if self.folder is None:
            return None
        try:
            return load_file(self._file(task, layer))
        except (OSError, SafetensorError):
            return None

    def save(self, task: int, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        if self.folder is not None:
            with atomic_path(self._file(task, layer)) as partial:
                save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)

    def _file(self, task: int, layer: int) -> Path:
        assert self.folder is not None
        return self.folder / f"task-{task}-layer-{layer}.safetensors"


def folder_for(out: Path) -> Path:
    """Where the finished layers of the run that writes `out` are kept."""
    return out.with_name(f".{out.name}.resume")


def forget(folder: Path) -> None:
    """Remove the finished layers: the output is written."""
    shutil.rmtree(folder, ignore_errors=True)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
