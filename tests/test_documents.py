"""The YAML and JSON readers: what is refused in one printable clause, what is read as the libraries do."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_wp.documents import MOST_JSON_BYTES, MOST_LEVELS, MOST_VALUES, MOST_YAML_BYTES, parse_json, parse_yaml
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.eval.suite import read_suite
from mergekit_wp.files import read_json_mapping, read_yaml_mapping
from mergekit_wp.merge.recipe import read_recipe
from mergekit_wp.pipeline.spec import read_pipeline
from mergekit_wp.scoring.job import load_job
from mergekit_wp.scoring.pairs import read_pairs

LAUGHS = "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(8))
MERGES = "".join(f"a{i + 1}: &a{i + 1} {{<<: [{','.join([f'*a{i}'] * 9)}]}}\n" for i in range(8))
TALL = "".join(f"a{i + 1}: &a{i + 1} {'[' * 40}*a{i}{']' * 40}\n" for i in range(3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 20_000, f"nests more than {MOST_LEVELS} levels"),
        ("a: 0x_", "'0x_' cannot be read as int; put it in quotes"),
        ("a: 2001-99-99", "'2001-99-99' cannot be read as timestamp"),
        ("a: 2001-09-09", "'2001-09-09' is read as a date; put it in quotes"),
        ("a: !!int x", "cannot be read as int"),
        ("a: !!bool x", "cannot be read as bool"),
        ("a: !!float x", "cannot be read as float"),
        ("a: !!timestamp x", "cannot be read as timestamp"),
        ("a: !!binary eA==", "is read as a bytes"),
        ("a: !!set {b}", "is read as a set"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: " + "9" * 5000, "cannot be read as int"),
        ("a: " + "9" * 30, "too large a number"),
        ("a: .nan", "nan is no number"),
        ("a: -.inf", "-inf is no number"),
        ("a: 1\nb:\n  c: 1\n  'c': 2", "line 4, column 3: the key `c` stands twice, first in line 3"),
        ("a: &a {<<: {}, <<: {}}", "`<<` stands twice"),
        ("no: 1", "the key 'no' is read as False; put it in quotes"),
        ("? [a]\n: 1", "a list or a mapping cannot be a key"),
        ("a: &a [*a]", "the alias *a stands within what it refers to"),
        ("a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + LAUGHS, f"more than {MOST_VALUES:,} values"),
        ("a0: &a0 {x: 1}\n" + MERGES, f"more than {MOST_VALUES:,} values"),
        ("a0: &a0 x\n" + TALL, f"nests more than {MOST_LEVELS} levels"),
        ('a: "\\ud800"', "which cannot be printed"),
        ('a: "\\0"', "which cannot be printed"),
        ("a: \x00", "special characters are not allowed"),
        ("'" + "k" * 600 + "': 1", "cannot be a key"),
        ("- 1\n---\n- 2", "a single document"),
        ("#" * (MOST_YAML_BYTES + 1), "larger than"),
        ("*" + "c" * 10_000, "found undefined alias"),
    ],
)
def test_yaml_that_nobody_means_is_one_clause(text: str, said: str) -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"^.*$") as error:
        parse_yaml(text)
    assert said in str(error.value)
    assert len(str(error.value)) < 400
    str(error.value).encode()
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, f"nests more than {MOST_LEVELS} levels"),
        ("[" * 65 + "]" * 65, f"nests more than {MOST_LEVELS} levels"),
        ('[{"a": 1, "b": 2, "a": 1}]', "the key `a` stands twice in one object"),
        ('{"\\u0000": 1}', "'\\x00' cannot be a key"),
        ('["\\ud800"]', "which cannot be printed"),
        ('["\x01"]', "control character"),
        ("[NaN]", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ("[1e999]", "inf is no number"),
        ("[" + "9" * 400 + "]", "too large a number"),
        ("[" + "9" * 5000 + "]", "thousands of digits"),
        ("\ufeff{}", "BOM"),
        ("", "Expecting value"),
        (b"\xff\xfe", "codec can't decode"),
    ],
)
def test_json_that_nobody_means_is_one_clause(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=r"^.*$") as error:
        parse_json(text)
    assert said in str(error.value)
    assert len(str(error.value)) < 400
    str(error.value).encode()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc xyz-_.", max_size=8), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_what_is_read_is_what_was_written(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True)) == value


def test_anchors_and_merge_keys_are_read_as_mergekit_reads_them() -> None:
    text = "p: &p {weight: 1, density: 0.5}\nmodels:\n- {model: a, parameters: *p}\n- {model: b, <<: *p, weight: 2}\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml(text)["models"][1] == {"model": "b", "density": 0.5, "weight": 2}
    # A mapping that is written into another one keeps its own keys, and may be used again.
    text = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\n"
    assert parse_yaml(text) == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}}


def test_two_equal_keys_are_refused_by_every_reader(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("merge_method: wp\nparameters: {scale: 1}\nmodels: []\nparameters: {scale: 2}\n")
    readers = (lambda p: load_job(p, {}), read_suite, read_recipe, read_pipeline)
    for read in readers:
        with pytest.raises(BadInput, match=r"file\.yaml: .*line 4, .*`parameters` stands twice, first in line 2"):
            read(str(file))


def test_a_file_is_named_and_never_read_without_end(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("[1]")
    with pytest.raises(BadInput, match=r"a\.json: not a state, which is a JSON object; found list"):
        read_json_mapping(file, "state")
    with open(tmp_path / "sparse.yaml", "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(BadInput, match="larger than"):
        read_yaml_mapping(tmp_path / "sparse.yaml", "suite")
    file.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(BadInput, match="byte 7 is not UTF-8"):
        read_json_mapping(file, "state")
    with file.open("w") as stream:
        stream.truncate(MOST_JSON_BYTES + 1)
    with pytest.raises(BadInput, match="larger than"):
        read_json_mapping(file, "state")
    file.write_text("[" * 100_000)
    with pytest.raises(BadInput, match="line 1: not valid JSON"):
        read_pairs(file)


def test_what_is_quoted_is_short_and_printable() -> None:
    assert shown("a") == "'a'"
    assert shown(None) == "None"
    assert shown({"device": "cpu"}) == "{'device': 'cpu'}"
    bomb: list = ["x"] * 9
    for _ in range(30):
        bomb = [bomb] * 9
    for value in ("x" * 10**6, 10**100_000, bomb, {f"k{i}": bomb for i in range(99)}, "\x1b[31m\u202e\ud800\n"):
        text = shown(value)
        assert len(text) <= 80
        assert text.isprintable()
    assert len(BadInput("x" * 10**6).format_message()) < 3000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("trust_remote_code", "no"),
        ("allow_code_execution", 1),
        ("parts", None),
        ("layers", [1, 2]),
        ("anchor_layers", True),
        ("device", 0),
        ("gap_floor", float("nan")),
        ("gap_floor", float("inf")),
        ("gap_floor", True),
    ],
)
def test_a_job_takes_no_value_of_another_kind(field: str, value: object) -> None:
    with pytest.raises(BadInput, match=f"^{field}: found"):
        load_job(None, {"base": "a", "expert": "b", "pairs": "c", field: value})
