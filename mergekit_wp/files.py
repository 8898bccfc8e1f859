"""Files that appear whole or not at all, and the YAML that ships with the package.

Outputs are written beside their final name and renamed at the end, so a killed run never leaves a half file
under a name that a later stage would trust.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mergekit_wp.errors import BadInput

_PACKAGE = Path(__file__).resolve().parent


def check_writable_parent(path: str | os.PathLike[str]) -> Path:
    """The absolute path, after making its parent folder and proving that a file can be made there.

    Raises `BadInput` when the folder cannot be made or written, so that a long job stops before it starts.
    """
    target = Path(path).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".wp-probe-"):
            pass
    except OSError as error:
        raise BadInput(
            f"{target.parent}: cannot write there ({error.strerror or error}); choose another output folder."
        ) from error
    return target


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any error."""
    target = check_writable_parent(path)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield partial
        if partial.is_file():
            # Some writers make private files; outputs get the permissions that the user's umask gives.
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o666 & ~umask)
        os.replace(partial, target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_yaml_mapping(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """A YAML file that must hold a mapping; `what` names it in errors ("scoring job", "suite").

    Raises `BadInput` when the file is missing, is not YAML, or is not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except OSError as error:
        raise BadInput(f"{path}: cannot read this {what} ({error.strerror or error}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: this {what} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: a {what} must be a YAML mapping of fields, found {type(content).__name__}.")
    return content


Stamp = tuple[str, int, int]
"""A path with what tells a rewritten file apart: nanoseconds of modification, bytes."""


def stamp(path: str, what: str, remedy: str) -> Stamp:
    """The key of a file for a cache. Raises `BadInput` ("cannot read this `what` ...; `remedy`.") if there is none."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise BadInput(
            f"{path}: cannot read this {what} ({error.strerror or error}; relative paths start at {os.getcwd()}); "
            f"{remedy}."
        ) from error
    return path, stat.st_mtime_ns, stat.st_size


def shipped(name: str) -> Path:
    """A YAML that travels with the project, such as `eval/miniature.yaml`, in a checkout or in the wheel."""
    for root in (_PACKAGE / "shipped", _PACKAGE.parent):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(name)
