"""Rows of data files, against the plain libraries; what cannot be read is one sentence with its place."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_wp import records
from mergekit_wp.errors import BadInput
from mergekit_wp.records import csv_lines, read_records

NAMES = st.text("abc_ ", min_size=1, max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3) | st.floats(-9, 9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
# Everything that UTF-8 has, and what CSV quotes.
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\ufeff\0") | st.sampled_from('",\n\r'), max_size=4)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path: Path) -> list[Any]:
    return [row for _, row in read_records(path)]


@settings(max_examples=40)
@given(st.lists(VALUES, max_size=4), st.sampled_from([None, 1]))
def test_json_is_what_json_says(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None
) -> None:
    """As a list, one after the other on lines, and one after the other however they are laid out."""
    folder = tmp_path_factory.mktemp("json")
    one_by_one = "\n".join(json.dumps(value, indent=indent) for value in values)
    assert rows(written(folder, "a.json", json.dumps(values, indent=indent))) == values
    assert rows(written(folder, "a.jsonl", "\n\n".join(map(json.dumps, values)))) == values
    if not values or not isinstance(values[0], list):
        assert rows(written(folder, "b.json", one_by_one)) == values


@settings(max_examples=40)
@given(st.lists(st.tuples(CELLS, CELLS), max_size=4))
def test_csv_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("a", "b"), *lines])
    path = written(tmp_path_factory.mktemp("csv"), "a.csv", "\ufeff" + text.getvalue())
    assert rows(path) == [{"a": a, "b": b} for a, b in lines]
    assert [cells for _, cells in csv_lines(path)] == [["a", "b"], *map(list, lines)]


def test_parquet_is_what_was_written(tmp_path: Path) -> None:
    values = [{"q": f"text {i}", "chat": [{"role": "user", "content": "x"}], "n": None} for i in range(3000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet", row_group_size=700)
    assert rows(tmp_path / "a.parquet") == values
    where, _ = list(read_records(tmp_path / "a.parquet"))[2999]
    assert where.endswith("a.parquet, row 3000")


def test_rows_say_where_they_stand(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'a,b\r\n"two\r\nlines",x\r\n\r\n3,y\r\n')
    assert [(where.rpartition(", ")[2], row["b"]) for where, row in read_records(path)] == [
        ("line 2", "x"),
        ("line 5", "y"),
    ]
    path = written(tmp_path, "a.jsonl", "{}\n\n{}\n")
    assert [where.rpartition(", ")[2] for where, _ in read_records(path)] == ["line 1", "line 3"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"a": 1, "a": 2}\n', "line 1: not valid JSON (the key `a` stands twice"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl: cannot be read ('utf-8' codec"),
        ("a.json", '[{"a": 1}, {"a": NaN}]', "a.json, row 2: not valid JSON (NaN is no number of JSON)"),
        ("a.json", "[1, 2", "row 3: not valid JSON (expected a comma, or the end of the list)"),
        ("a.json", "[1, 2,", "row 3: not valid JSON (the list has no end)"),
        ("a.json", "[", "row 1: not valid JSON (the list has no end)"),
        ("a.json", "[1, 2] 3", "row 3: not valid JSON (more follows the end of the list)"),
        ("a.json", "[1, ]", "row 2: not valid JSON (a comma before the end of the list)"),
        ("a.json", "[1 2]", "row 2: not valid JSON (expected a comma"),
        ("a.json", '{"a": 1} nonsense', "row 2: not valid JSON"),
        ("a.json", "[" * 100_000, "row 1: not valid JSON (it nests too deeply)"),
        ("a.csv", "a,b\n1\n", "a.csv, line 2: 1 cells, and the head of the file names 2 columns"),
        ("a.csv", "a,a\n1,2\n", "a.csv, line 1: two columns are named 'a'"),
        ("a.csv", 'a,b\n1,"2\n', "a.csv, line 2: not valid CSV"),
        ("a.csv", b"a,b\n\xff,2\n", "a.csv: cannot be read"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: cannot be read"),
        ("a.txt", "a", "a.txt: expected a name that ends in .jsonl, .json, .csv, .parquet"),
    ],
)
def test_what_cannot_be_read(name: str, content: str | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        rows(written(tmp_path, name, content))
    assert said in caught.value.message


def test_a_parquet_file_that_unpacks_to_more_than_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x" * 100] * 1000}), tmp_path / "a.parquet", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    monkeypatch.setattr(records, "_MOST_BYTES", 50_000)
    with pytest.raises(BadInput, match=r"its columns unpack to 10\d,\d\d\d bytes, more than 50,000; cut it up"):
        rows(tmp_path / "a.parquet")
