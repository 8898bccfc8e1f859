"""What a file, a folder or a model holds, as SHA-256, without reading again what has not been touched.

Content, not dates, decides whether a step is still right. But a merge of 13B models is 26 GB, and reading all of it
to say "nothing to do" would take a minute a model. So the digest of a large file is remembered with its size, its
modification time and its inode, as git's index does; and a file of the Hub's cache is named by its SHA-256 there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from mergekit_wp.files import write_text

_LARGE_BYTES = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What tools leave beside the content: no part of a model, a world or a folder of tasks.
_BESIDE = {"__pycache__", ".cache"}


class Digests:
    """Digests of paths; those of large files are remembered in `file`, or for this object's life if it is None."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.known = _read(file)
        self.before = dict(self.known)

    def of(self, path: Path) -> str:
        """SHA-256 of a file's content, or of all files below a folder with their names; "" if there is none."""
        if path.is_dir():
            below = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
            return digest_of(f"{file}={self.of(path / file)}" for file in below if not _BESIDE & set(file.parts))
        if not path.is_file():
            return ""
        stat = path.stat()
        if stat.st_size < _LARGE_BYTES:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        real = path.resolve()
        if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
            return real.name
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self.known.get(str(real))
        if known is None or known[:3] != mark:
            with real.open("rb") as stream:
                known = [*mark, hashlib.file_digest(stream, "sha256").hexdigest()]
            self.known[str(real)] = known
        return str(known[3])

    def save(self) -> None:
        """Write down what was learnt, for the next run."""
        if self.file is not None and self.known != self.before:
            write_text(self.file, json.dumps(self.known, indent=0) + "\n")
            self.before = dict(self.known)


def digest(path: Path) -> str:
    """The digest of one path, with nothing remembered."""
    return Digests().of(path)


def digest_of(parts: Iterable[str]) -> str:
    """SHA-256 of some lines."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def readable(path: Path) -> Path:
    """The path relative to the working directory where it lies below it, as a person would type it."""
    relative = Path(os.path.relpath(path))
    return path if relative.parts[:1] == ("..",) else relative


def _read(file: Path | None) -> dict[str, list[int | str]]:
    """What was remembered; a file that is missing or damaged only costs the time to read the models again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
        return {key: value for key, value in content.items() if isinstance(value, list) and len(value) == 4}
    except (OSError, ValueError, AttributeError):
        return {}
