"""The last look before anything leaves: no token in a file, and a word about folders of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergekit_wp.errors import BadInput
from mergekit_wp.push.names import paths_in, without_home
from mergekit_wp.push.retry import first
from mergekit_wp.push.stage import VOCABULARIES
from mergekit_wp.push.upload import UploadFile

_NAMING = (".json", ".md", ".yml", ".yaml", ".safetensors")  # programs and licence texts have paths of their own
_SMALL = 50_000_000  # bytes of what is read as one text
_CHUNK = 1 << 20
# As the Hub makes them: hf_ and 34 letters and digits; that of another account, or of another day, is one too.
_TOKEN = re.compile(rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{30,}")
_TOKEN_BYTES = 33


def check_secrets(items: Sequence[UploadFile], token: str | None) -> dict[str, str]:
    """The files that name folders of a machine, and which. Raises `BadInput` for one that holds the token, or another.

    Every file is looked through, of safetensors the header, where their metadata is.
    """
    named: dict[str, str] = {}
    for item in items:
        if found := _token_in(item.source, (token or "").encode()):
            raise BadInput(f"{item.source}: holds {found}; take it out before you publish this file.")
        text = _text(item.source)
        if without_home(text) != text:
            named[item.path] = "your home directory"
        elif item.source.suffix in _NAMING and item.source.name not in VOCABULARIES and (places := paths_in(text)):
            named[item.path] = f"the folder {first(places)}"
    return named


def _token_in(path: Path, own: bytes) -> str:
    """In words, the token that a file holds; empty for none. It may lie across the border of two chunks."""
    before = b""
    for chunk in _chunks(path):
        content = before + chunk
        if own and own in content:
            return "your Hub token"
        # What begins a later content whole was seen with the byte before it, which may say that it is no token.
        if _TOKEN.search(content, 1 if before else 0):
            return "what looks like a Hub token (hf_...)"
        before = content[-max(len(own), _TOKEN_BYTES) - 1 :]
    return ""


def _text(path: Path) -> str:
    """What is looked at, as a text; nothing of what is too large to be one."""
    content = b""
    for chunk in _chunks(path):
        content += chunk
        if len(content) > _SMALL:
            return ""
    return content.decode("utf-8", errors="replace")


def _chunks(path: Path) -> Iterator[bytes]:
    """The content of a file, and of a safetensors file its header."""
    with open(path, "rb") as stream:
        left = path.stat().st_size
        if path.suffix == ".safetensors":
            left = int.from_bytes(stream.read(8), "little")
        while left > 0 and (chunk := stream.read(min(left, _CHUNK))):
            yield chunk
            left -= len(chunk)
