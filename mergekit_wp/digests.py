"""SHA-256 of files, remembered: what comes again and finds nothing changed does not read tens of GB again.

A file is known by its path, size, times of modification and of change, and inode. The time of change cannot be set
by copying tools, so a file that was rewritten is read again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mergekit_wp.documents import MOST_JSON_BYTES, parse_json
from mergekit_wp.errors import BadInput
from mergekit_wp.files import open_file, read_text, write_text

_WORTH_A_WORD = 1e9  # bytes


class Digests:
    """The memory at `path`; a missing or broken one is an empty one, and with None it lasts as long as this object."""

    def __init__(self, path: Path | None, say: Callable[[str], None], keep: bool = True) -> None:
        """keep: False reads the memory and leaves it as it is."""
        self._path, self._say, self.keep = path, say, keep
        self._known: dict[str, list[object]] = {}
        try:
            content = parse_json(read_text(path, MOST_JSON_BYTES)) if path is not None else {}
            self._known = {name: entry for name, entry in content.items() if _is_entry(entry)}
        except (OSError, ValueError, AttributeError):
            pass

    def __call__(self, files: Sequence[Path]) -> dict[Path, str]:
        """Hex SHA-256 of every file. Raises `BadInput` naming a file that cannot be read."""
        keys = {file: _key(file) for file in files}
        unknown = [file for file, key in keys.items() if self._known.get(str(file.absolute()), [None])[0] != key]
        if unknown:
            size = sum(file.stat().st_size for file in unknown)
            if size > _WORTH_A_WORD:
                self._say(f"computing the SHA-256 of {len(unknown)} files ({size / 1e9:.1f} GB) ...")
            for file, digest in zip(unknown, sha256_of(unknown), strict=True):
                self._known[str(file.absolute())] = [keys[file], digest]
            self._write()
        return {file: str(self._known[str(file.absolute())][1]) for file in files}

    def remember(self, name: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
        """A digest of several files that is computed another way, under `name`, as long as none of them changes."""
        key = "|".join(self(files)[file] for file in files)
        entry = self._known.get(name)
        if entry is None or entry[0] != key:
            entry = self._known[name] = [key, compute()]
            self._write()
        return str(entry[1])

    def _write(self) -> None:
        if self._path is not None and self.keep:
            write_text(self._path, json.dumps(self._known))


def _is_entry(entry: object) -> bool:
    """What a file was when it was read, and its SHA-256."""
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(part, str) for part in entry)
        and re.fullmatch("[0-9a-f]{64}", entry[1]) is not None
    )


def sha256_of(paths: Sequence[Path]) -> list[str]:
    """Hex SHA-256 of each file, several at a time. Raises `BadInput` naming the file that cannot be read."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    try:
        with open_file(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{path}: cannot read this file ({error.strerror or error}).") from error


def _key(file: Path) -> str:
    try:
        stat = file.stat()
    except OSError as error:
        raise BadInput(f"{file}: cannot read this file ({error.strerror or error}).") from error
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} {stat.st_dev}"
