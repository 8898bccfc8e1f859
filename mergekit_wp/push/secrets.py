"""The last look before anything leaves: no token in a file, and a word about folders of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergekit_wp.errors import BadInput
from mergekit_wp.push.names import paths_in, without_home
from mergekit_wp.push.retry import first
from mergekit_wp.push.stage import VOCABULARIES
from mergekit_wp.push.upload import UploadFile

_TEXTS = (".json", ".md", ".txt", ".yml", ".yaml", ".jinja", ".py", "")
_NAMING = (".json", ".md", ".yml", ".yaml", ".safetensors")  # programs and licence texts have paths of their own
_SMALL = 50_000_000


def check_secrets(items: Sequence[UploadFile], token: str | None) -> dict[str, str]:
    """The files that name folders of a machine, and which. Raises `BadInput` for one that holds the token."""
    named: dict[str, str] = {}
    for item in items:
        if item.size > _SMALL or item.source.suffix not in (*_TEXTS, ".safetensors"):
            continue
        content = _head(item.source) if item.source.suffix == ".safetensors" else item.source.read_bytes()
        text = content.decode("utf-8", errors="replace")
        if token and token in text:
            raise BadInput(f"{item.source}: holds your Hub token; take it out before you publish this file.")
        if without_home(text) != text:
            named[item.path] = "your home directory"
        elif item.source.suffix in _NAMING and item.source.name not in VOCABULARIES and (found := paths_in(text)):
            named[item.path] = f"the folder {first(found)}"
    return named


def _head(path: Path) -> bytes:
    """The header of a safetensors file, where its metadata is."""
    with open(path, "rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))
