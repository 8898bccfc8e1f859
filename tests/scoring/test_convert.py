"""wp-pairs: what becomes of IFEval's rows, of columns and of chats; all of it is read by wp-score's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result
from official_world import FOLLOWED, IFEVAL, IGNORED

from mergekit_wp.scoring.anchor.graders import parse_check, preflight
from mergekit_wp.scoring.convert import main
from mergekit_wp.scoring.pairs import Pair, read_pairs


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def wp_pairs(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def made(folder: Path, rows: list[Any], *words: object, name: str = "rows.jsonl") -> tuple[list[Pair], str]:
    """The pairs that were written, and what was said."""
    source = lines(folder / name, rows)
    done = wp_pairs(source, *words, "--out", folder / "pairs.jsonl")
    assert done.exit_code == 0, done.output
    return read_pairs(folder / "pairs.jsonl"), done.stderr


def refused(folder: Path, rows: list[Any], *words: object) -> str:
    done = wp_pairs(lines(folder / "rows.jsonl", rows), *words, "--out", folder / "pairs.jsonl")
    assert done.exit_code == 2, done.output
    assert not (folder / "pairs.jsonl").exists()
    (line,) = done.stderr.strip().splitlines()[-1:]
    return line


SINGLE = [row for row in IFEVAL if len(row["instruction_id_list"]) == 1]


def test_ifevals_rows_bring_their_graders(tmp_path: Path) -> None:
    """Answers that follow pass, others fail, by lm-eval's own code; the Hub's null arguments are left out."""
    rows = [{**row, "prompt_without_instruction": f"Describe {row['key']}."} for row in SINGLE]
    pairs, said = made(tmp_path, rows)
    assert [pair.task for pair in pairs] == [row["instruction_id_list"][0] for row in SINGLE]
    assert [(pair.prompt, pair.contrast) for pair in pairs] == [
        (row["prompt"], row["prompt_without_instruction"]) for row in rows
    ]
    assert all(pair.chat for pair in pairs)
    for pair, row in zip(pairs, rows, strict=True):
        check = parse_check(pair.check, "row")
        if pair.task not in ("length_constraints:number_sentences", "change_case:capital_word_frequency"):  # punkt
            preflight([check], pair.task)
            assert (check.passes(FOLLOWED[row["key"]]), check.passes(IGNORED[row["key"]])) == (True, False)
    assert "  punctuation:no_comma: 1 with contrast, 1 with a check" in said
    assert "3 rows of " in said


def test_several_instructions_are_one_task_only_where_it_is_named(tmp_path: Path) -> None:
    pairs, said = made(tmp_path, IFEVAL)
    assert len(pairs) == len(SINGLE)
    assert "2 rows left out: it has several instructions or none, so no one type names its task; --task takes" in said
    assert "Without a contrast, kl (the default) needs none" in said
    pairs, said = made(tmp_path, IFEVAL, "--task", "instructions", "--no-chat")
    assert [(pair.task, pair.check is None, pair.chat) for pair in pairs] == [
        ("instructions", len(row["instruction_id_list"]) > 1, False) for row in IFEVAL
    ]
    assert "2 rows have several instructions or none; their pairs carry no check." in said


@pytest.mark.parametrize(
    ("kind", "given", "why"),
    [
        ("punctuation:no_semicolon", {}, "IFEval has no type 'punctuation:no_semicolon'"),
        ("keywords:existence", {}, "takes the kwargs ['keywords'], found []"),
        ("keywords:existence", {"keywords": []}, "takes no empty keywords, found []"),
        (
            "keywords:letter_frequency",
            {"letter": "ab", "let_frequency": 2, "let_relation": "at least"},
            "takes no letter 'ab'; lm-eval would draw another",
        ),
        ("length_constraints:number_words", {"num_words": 9, "relation": "about"}, "does not take"),
    ],
)
def test_a_check_that_cannot_grade_is_left_out(kind: str, given: dict[str, Any], why: str, tmp_path: Path) -> None:
    row = {"prompt": "p", "instruction_id_list": [kind], "kwargs": [given]}
    pairs, said = made(tmp_path, [row])
    assert [(pair.task, pair.check) for pair in pairs] == [(kind, None)]
    assert "1 rows make pairs without a check: " in said
    assert why in said


def test_columns(tmp_path: Path) -> None:
    rows = [{"ask": f"q{i}", "plain": f"p{i}", "kind": ["maths/sums", 7][i % 2], "more": [1]} for i in range(4)]
    pairs, _ = made(tmp_path, rows, "--prompt", "ask", "--contrast", "plain", "--task", "kind")
    assert pairs == [Pair(["maths-sums", "7"][i % 2], f"q{i}", f"p{i}") for i in range(4)]
    pairs, said = made(tmp_path, rows, "--prompt", "ask", "--task", "maths", "--chat", name="again.jsonl")
    assert pairs == [Pair("maths", f"q{i}", chat=True) for i in range(4)]
    assert "Without a contrast" in said
    pairs, _ = made(tmp_path, rows, "--prompt", "ask", name="named by its file.jsonl")
    assert {pair.task for pair in pairs} == {"named by its file"}


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_every_kind_of_file_makes_the_same_pairs(name: str, tmp_path: Path) -> None:
    rows = [{"q": 'Say "hi",\nplease', "c": "Say hi"}, {"q": "Übung, 2 + 2 = ", "c": "2 + 2"}]
    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text('q,c\n"Say ""hi"",\nplease",Say hi\n"Übung, 2 + 2 = ",2 + 2\n')
    else:
        path.write_text(json.dumps(rows, indent=2))
    done = wp_pairs(path, "--prompt", "q", "--contrast", "c", "--task", "t", "--out", tmp_path / "p.jsonl")
    assert done.exit_code == 0, done.output
    assert read_pairs(tmp_path / "p.jsonl") == [Pair("t", row["q"], row["c"]) for row in rows]


def test_chats(tmp_path: Path) -> None:
    """Both spellings, whole rows too; the user's first message, and what is left of the rest is said."""
    chats: list[Any] = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"},
                      {"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}]},
        {"conversations": [{"from": "human", "value": "two"}, {"from": "gpt", "value": "b"}]},
        [{"role": "User", "content": "three"}],
        {"messages": [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "four"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": []},
        {"messages": ["five"]},
        {"messages": [{"text": "six"}]},
        {"messages": "seven"},
        7,
    ]  # fmt: skip
    pairs, said = made(tmp_path, [chats[0], *chats[2:]], "--task", "chat")
    assert pairs == [Pair("chat", "one", chat=True), Pair("chat", "three", chat=True)]
    for line in (
        "2 rows left out: its chat does not begin with a message of the user (",
        "1 rows left out: its prompt is no text (",
        "1 rows left out: its chat has a message that is no object (",
        "1 rows left out: its chat has a message without role and content, or from and value (",
        "1 rows left out: a row must be an object by column, or a chat (",
        "1 rows left out: its messages are no list of messages (",
        "1 chats have a system prompt, which is left out; wp-score --system",
        "1 chats have further messages of the user, which are left out.",
    ):
        assert line in said, said
    pairs, _ = made(tmp_path, chats[1:2], "--no-chat", name="sharegpt.jsonl")
    assert pairs == [Pair("sharegpt", "two")]
    both = [{"chosen": chats[0]["messages"], "plain": chats[2]}]
    pairs, _ = made(tmp_path, both, "--prompt", "chosen", "--contrast", "plain", "--task", "t")
    assert pairs == [Pair("t", "one", "three", chat=True)]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    rows = [
        {"q": "one", "c": "1", "t": "a"}, {"q": "one", "c": "2", "t": "a"}, {"q": "one", "c": "1", "t": "b"},
        {"q": "two", "c": None, "t": "a"}, {"q": "three", "c": "three", "t": "a"}, {"q": " ", "c": "x", "t": "a"},
        {"c": "x", "t": "a"}, {"q": 5, "c": "x", "t": "a"}, {"q": "four", "c": "x", "t": None},
        {"q": "five", "c": "x", "t": "a\nb"}, {"q": "six", "c": "", "t": "c"},
    ]  # fmt: skip
    pairs, said = made(tmp_path, rows, "--prompt", "q", "--contrast", "c", "--task", "t")
    assert pairs == [Pair("a", "one", "1"), Pair("b", "one", "1"), Pair("c", "six")]
    for line in (
        "1 rows left out: their task has the same prompt before.",
        f"1 rows left out: it has no contrast, and others of its task have one ({tmp_path}/rows.jsonl, line 4).",
        "1 rows left out: its contrast is the prompt itself (",
        "1 rows left out: its prompt is empty (",
        "1 rows left out: it has no prompt (",
        "1 rows left out: its prompt is no text (",
        "1 rows left out: its task is no name (",
        "1 rows left out: the task name 'a\\nb' will name tensors",
        f"11 rows of {tmp_path}/rows.jsonl, 3 pairs; written: {tmp_path}/pairs.jsonl",
    ):
        assert line in said, said


def test_a_draw(tmp_path: Path) -> None:
    """As many of each task, the same by the same seed, in the file's order, whatever other tasks there are."""
    rows = [{"q": f"q{i}", "t": "ab"[i % 3 == 0]} for i in range(30)]
    words = ("--prompt", "q", "--task", "t", "--limit", 5)
    pairs, said = made(tmp_path, rows, *words)
    assert "Drawn out of 30." in said
    assert [pair.task for pair in pairs].count("a") == [pair.task for pair in pairs].count("b") == 5
    order = [int(pair.prompt[1:]) for pair in pairs]
    assert order == sorted(order)
    assert made(tmp_path, rows, *words)[0] == pairs
    assert made(tmp_path, rows, *words, "--seed", 1)[0] != pairs
    alone = made(tmp_path, [row for row in rows if row["t"] == "a"], *words)[0]
    assert alone == [pair for pair in pairs if pair.task == "a"]
    assert len(made(tmp_path, rows, *words[:-1], 500)[0]) == 30


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        ([], (), "there are no rows in this file"),
        (
            [{"q": "x", "a": "y"}],
            (),
            "neither rows of IFEval nor chats; name a column by --prompt (the columns are 'q', 'a')",
        ),
        ([{"q": "x"}], ("--prompt", "p"), "there is no column 'p', which --prompt names; the columns are 'q'"),
        ([{"q": "x"}], ("--prompt", "q", "--contrast", "c"), "there is no column 'c', which --contrast names"),
        (
            [{"q": ""}, {"q": " "}],
            ("--prompt", "q"),
            "none of its rows can be a pair: 2 rows left out: its prompt is empty",
        ),
        ([{"q": "x"}], ("--prompt", "q", "--task", "a/b"), "the task name 'a/b' must not contain a slash"),
    ],
)
def test_bad_input_is_one_sentence(rows: list[Any], words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, rows, *words)


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", [{"q": "x"}])
    (tmp_path / "notes.txt").write_text("mine")
    for out, said in (
        (source, "is itself what is read"),
        (tmp_path, "this is a folder; name a file, such as"),
        (tmp_path / "notes.txt", "there is a file of this name that is no file of pairs"),
        (tmp_path / "new.csv", "new.csv: pairs are JSON lines; name a file such as"),
    ):
        done = wp_pairs(source, "--prompt", "q", "--out", out)
        assert (done.exit_code, said in done.stderr) == (2, True), done.output
    assert (tmp_path / "notes.txt").read_text() == "mine"
    missing = wp_pairs(tmp_path / "nothing.jsonl", "--out", tmp_path / "p.jsonl")
    assert (missing.exit_code, "nothing.jsonl: cannot be read (No such file" in missing.stderr) == (2, True)
    quiet = wp_pairs(source, "--prompt", "q", "--out", tmp_path / "p.jsonl", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")
