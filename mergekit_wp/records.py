"""The rows of a data set's file, as it was published or exported: JSON lines, JSON, CSV or Parquet, by the name's
ending.

Rows come one by one, each with where it stands (`FILE, line 3`), for errors. Values are the file's own: text, numbers,
lists and objects of JSON and Parquet, text alone of CSV. Anything that cannot be read is a `BadInput` that names the
place.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import Any

from mergekit_wp.documents import MOST_JSON_BYTES, parse_json
from mergekit_wp.errors import BadInput, reason_of, shown
from mergekit_wp.files import open_file, read_text

_MOST_BYTES = 1 << 30  # of a file that is read as a whole, and of a Parquet file's columns unpacked
_SPACE = re.compile(r"[ \n\r\t]*")  # JSON's
_BOM = "\ufeff"  # spreadsheets put it before their CSV

Records = Iterator[tuple[str, Any]]
"""(where a row stands, the row), in the file's order."""


def read_records(path: Path) -> Records:
    """The rows of a file; those of CSV and Parquet are objects by column. Raises `BadInput`, naming file and place."""
    kind = path.suffix.lower()
    if kind not in READERS:
        raise BadInput(f"{path}: expected a name that ends in {', '.join(READERS)}; convert the file to one of these.")
    return READERS[kind](path)


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, from 1; the file may be larger than the memory, none of the lines may be.

    Raises OSError, UnicodeDecodeError, and `BadInput` for a line that is too long.
    """
    with TextIOWrapper(open_file(path), encoding="utf-8") as stream:
        for number in count(1):
            line = stream.readline(MOST_JSON_BYTES + 1)
            if not line:
                return
            if len(line) > MOST_JSON_BYTES:
                raise BadInput(f"{path}, line {number}: longer than {MOST_JSON_BYTES:,} characters; cut it up.")
            yield number, line


def _unreadable(path: Path, error: Exception) -> BadInput:
    return BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', None) or reason_of(error)}).")


def json_lines(path: Path) -> Records:
    """One JSON value a line; blank lines are skipped."""
    try:
        for number, line in numbered_lines(path):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, parse_json(line)
                except ValueError as error:
                    raise BadInput(f"{where}: not valid JSON ({error}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def json_values(path: Path) -> Records:
    """The elements of a JSON list, or JSON values one after the other."""
    try:
        text = read_text(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    rows = enumerate(_values(text), start=1)
    number = 0
    while True:
        try:
            number, value = next(rows)
        except StopIteration:
            return
        except ValueError as error:
            raise BadInput(f"{path}, row {number + 1}: not valid JSON ({error}).") from error
        yield f"{path}, row {number}", value


def _values(text: str) -> Iterator[Any]:
    """One value after the other, each strictly parsed: a list of all at once may be larger than one document may be."""
    decoder, at = json.JSONDecoder(), _past_space(text, 0)
    listed = text[at : at + 1] == "["
    at = _past_space(text, at + listed)
    while at < len(text) and not (listed and text[at] == "]"):
        try:
            _, end = decoder.raw_decode(text, at)
        except RecursionError as error:
            raise ValueError("it nests too deeply") from error
        yield parse_json(text[at:end])
        at = _past_space(text, end)
        if listed and text[at : at + 1] == ",":
            at = _past_space(text, at + 1)
            if text[at : at + 1] == "]":
                raise ValueError("a comma before the end of the list")
        elif listed and text[at : at + 1] != "]":
            raise ValueError("expected a comma, or the end of the list")
    if listed and (at >= len(text) or text[at + 1 :].strip()):
        raise ValueError("the list has no end" if at >= len(text) else "more follows the end of the list")


def _past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # it may be empty
    return found.end()


def csv_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The lines of a CSV as lists of texts, its head too; blank ones are skipped."""
    try:
        with TextIOWrapper(open_file(path), encoding="utf-8", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            before = 0
            for cells in reader:
                if before == 0 and cells:
                    cells[0] = cells[0].removeprefix(_BOM)
                if cells:
                    yield f"{path}, line {before + 1}", cells
                before = reader.line_num
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    except csv.Error as error:
        raise BadInput(f"{path}, line {before + 1}: not valid CSV ({error}).") from error


def csv_records(path: Path) -> Records:
    """The lines of a CSV below its head."""
    lines = csv_lines(path)
    where, head = next(lines, ("", []))
    if twice := next((name for name in head if head.count(name) > 1), None):
        raise BadInput(f"{where}: two columns are named {shown(twice)}; give each a name of its own.")
    for where, cells in lines:
        if len(cells) != len(head):
            raise BadInput(f"{where}: {len(cells)} cells, and the head of the file names {len(head)} columns.")
        yield where, dict(zip(head, cells, strict=True))


def parquet_rows(path: Path) -> Records:
    """The rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(path) as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            meta = file.metadata
            size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            if size > _MOST_BYTES:
                raise BadInput(f"{path}: its columns unpack to {size:,} bytes, more than {_MOST_BYTES:,}; cut it up.")
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}, row {number}", row
    except (OSError, ValueError, OverflowError, MemoryError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": json_lines,
    ".json": json_values,
    ".csv": csv_records,
    ".parquet": parquet_rows,
}
"""By the ending of a file's name."""
