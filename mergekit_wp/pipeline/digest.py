"""What a file, a folder or a model holds, as SHA-256, without reading again what has not been touched.

Content, not dates, decides whether a step is still right. But a merge of 13B models is 26 GB, and reading all of it
to say "nothing to do" would take a minute a model: so the digests of large files are remembered
(`mergekit_wp.digests`), and a file of the Hub's cache is known by its name there, which is its SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit_wp import digests
from mergekit_wp.foreign import echo

_LARGE_BYTES = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What tools leave beside the content: no part of a model, a world or a folder of tasks.
_BESIDE = {"__pycache__", ".cache"}


class Digests:
    """Digests of paths; those of large files are remembered in `memory`, or for this object's life if it is None."""

    def __init__(self, memory: Path | None = None, keep: bool = True) -> None:
        """keep: False reads the memory and leaves it as it is."""
        self._large = digests.Digests(memory, lambda text: echo(text, err=True), keep)

    def keep(self) -> None:
        """From now on what is learnt is written down."""
        self._large.keep = True

    def of(self, path: Path) -> str:
        """SHA-256 of a file's content, or of all files below a folder with their names; "" if there is none.

        Raises `BadInput` for a file that cannot be read.
        """
        if os.path.isdir(path):
            below = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
            kept = [file for file in below if not _BESIDE & set(file.parts)]
            found = self._files([path / file for file in kept])
            return digest_of(f"{file}={value}" for file, value in zip(kept, found, strict=True))
        return self._files([path])[0] if os.path.isfile(path) else ""

    def _files(self, files: Sequence[Path]) -> list[str]:
        """One digest a file; large ones are read several at a time."""
        real = [file.resolve() for file in files]
        named = [file.parent.name == "blobs" and bool(_SHA256.fullmatch(file.name)) for file in real]
        large = [f for f, n in zip(real, named, strict=True) if not n and f.stat().st_size >= _LARGE_BYTES]
        known = self._large(large)
        return [
            file.name if name else known[file] if file in known else hashlib.sha256(file.read_bytes()).hexdigest()
            for file, name in zip(real, named, strict=True)
        ]


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
