"""Tensors with a JSON document under a metadata key, in one safetensors file: what our own files have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergekit_wp.errors import BadInput
from mergekit_wp.files import atomic_path, open_file


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], key: str, document: str) -> None:
    """Write the file atomically. Raises `BadInput` when the folder cannot be written."""
    with atomic_path(path) as partial:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial, metadata={key: document})


def read_tensors(path: str | Path, key: str, what: str, maker: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The document and the tensors. `what` names the kind of file in errors, `maker` the command that writes it.

    Raises `BadInput` when the file is missing, is not safetensors, or has no document under the key.
    """
    try:
        open_file(path).close()
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(key)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BadInput(f"{path}: no such {what} file; make it with {maker}.") from None
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be read as a safetensors {what} file ({error}).") from error
    if text is None:
        raise BadInput(f"{path}: a safetensors file, but without the `{key}` metadata of a {what} file.")
    return text, tensors
