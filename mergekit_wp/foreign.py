"""Text that came from elsewhere (a file, a card, the Hub, another library) on its way to a terminal, a page or a path.

A name in a results.json or on a card can hold anything: escapes that move a terminal's cursor, marks that turn the
direction of a line, links, `../`. Every such text goes through here; nothing else in the package decides what is safe.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from itertools import count
from typing import Any

import click

_PART_BYTES = 80
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?<!\.)")
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file: devices, whatever follows a dot.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
# What CommonMark, GitHub's tables, its links without marks and its mathematics may take for a mark: in a line, and at
# the beginning of one.
_MARKS = re.compile(r"[\\`*_\[\]<>|~&$#@]|:(?=//)|(?<=www)\.|^\s*[-+=]|(?<=\d)[.)](?=\s)", re.IGNORECASE)


def one_line(text: object) -> str:
    """`text` on one line and in its own order: what does not print is written as Python writes it (`\\x1b`, `\\n`).

    That is control characters, line breaks, marks of direction, other invisible ones and lone surrogates; spaces of
    every kind become one each. A text cleaned once is not changed again.
    """
    return "".join(map(_visible, str(text)))


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return " " if unicodedata.category(character) == "Zs" else repr(character)[1:-1]


def one_line_each(text: str) -> str:
    """A text of several lines, each as cleaned by `one_line` has it."""
    return "\n".join(map(one_line, text.split("\n")))


def echo(text: object, err: bool = False, nl: bool = True, **style: Any) -> None:
    """One line for a terminal, of which any part may be foreign. `style` as `click.style` has it."""
    click.echo(click.style(one_line(text), **style) if style else one_line(text), err=err, nl=nl)  # noqa: TID251


def echo_lines(text: str, err: bool = False) -> None:
    """Several lines, such as a table; whoever put them together has had foreign names cleaned by `one_line`."""
    click.echo(one_line_each(text), err=err)  # noqa: TID251


def logger(name: str) -> logging.Logger:
    """The logger of a module of ours: what it logs is one line, whoever prints it."""
    log = logging.getLogger(name)
    log.addFilter(_one_line)
    return log


def _one_line(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(record.getMessage()), None
    return True


def csv_cell(text: object) -> str:
    """Text in a cell of a CSV: a spreadsheet takes what begins with one of these for a formula, and carries it out."""
    line = one_line(text)
    return f"'{line}" if line.lstrip().startswith(("=", "+", "-", "@")) else line


def html(text: object) -> str:
    """Text of an HTML page, or of an attribute in it."""
    return escape(one_line(text))


def markdown(text: object) -> str:
    """Text in a line of Markdown, a table's cell too: no mark and no link; it reads as it is."""
    return _MARKS.sub(lambda mark: "\\" + mark[0].strip(), one_line(text))


def code(text: object) -> str:
    """Text between backticks in a line of Markdown (no cell of a table, which `|` ends), more than it has in a row."""
    line = one_line(text)
    ticks = _ticks(line, 1)
    return f"{ticks} {line} {ticks}" if "`" in line or not line.strip() else f"{ticks}{line}{ticks}"


def fenced(text: str, language: str) -> str:
    """Lines as a block of code in Markdown, which no line of theirs can end."""
    body = one_line_each(text.strip("\n"))
    fence = _ticks(body, 3)
    return f"{fence}{language}\n{body}\n{fence}"


def _ticks(text: str, least: int) -> str:
    """Backticks, more than `text` has in a row anywhere and at least so many."""
    return "`" * max(least, *(len(run) + 1 for run in re.findall("`+", text)), least)


def file_part(text: str) -> str:
    """`text` as one part of a path: a name on every file system, in no other folder, another one for another text.

    Plain names stay: ASCII letters, digits, `_`, `-` and `.`, no dot or dash first, no dot last, no device of
    Windows, at most 80. All others are cut to that and get `~` and 12 hex digits of their SHA-256.
    """
    if len(text) <= _PART_BYTES and _PLAIN.fullmatch(text) and not _DEVICE.fullmatch(text):
        return text
    kept = re.sub(r"[^A-Za-z0-9_.-]+", "_", unicodedata.normalize("NFKC", text)).strip("._-")
    digest = sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:12]
    head = kept[: _PART_BYTES - 13].rstrip(".") or "_"
    return f"_{head}~{digest}" if _DEVICE.fullmatch(head) else f"{head}~{digest}"


def file_parts(texts: Iterable[str]) -> list[str]:
    """`file_part` of each, a number at the end of those that a file system might take for one before: `a`, `A-2`."""
    taken: set[str] = set()
    parts = []
    for text in texts:
        part = first = file_part(text)
        for number in count(2):
            if part.lower() not in taken:
                break
            part = f"{first}-{number}"
        taken.add(part.lower())
        parts.append(part)
    return parts
