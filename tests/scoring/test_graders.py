"""Checks: their JSON, IFEval's own graders on the built-in instructions, and what is refused before a run."""

from __future__ import annotations

import itertools
import json

import pytest

from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.anchor.graders import Check, parse_check, preflight
from mergekit_wp.scoring.batching import tokenize_tasks
from mergekit_wp.scoring.pairs import builtin_words, instruction_pairs, load_pairs, read_pairs, split_pairs
from mergekit_wp.scoring.prompt_format import PromptFormat

PLAIN = "The harbour is quiet this morning, and the boats are still asleep, waiting for the tide."
FOLLOWED = {
    "english_capital": PLAIN.upper(),
    "title": f"<<A quiet harbour>>\n{PLAIN}",
    "multiple_sections": "".join(f"SECTION {i}\n{PLAIN}\n" for i in (1, 2, 3, 4)),
    "quotation": f'"{PLAIN}"',
    "number_highlighted_sections": "*The* harbour is *quiet* this *morning* and the *boats* sleep.",
    "no_comma": PLAIN.replace(",", ""),
}


@pytest.mark.parametrize("task", FOLLOWED)
def test_built_in_instructions_are_graded_by_ifeval(task):
    pairs = [pair for pair in instruction_pairs(len(builtin_words()["requests"]), seed=0) if pair.task == task]
    checks = [parse_check(pair.check, "pair") for pair in pairs]
    preflight(checks, task)
    for check in checks:
        assert check.grader == "ifeval"
        assert check.passes(FOLLOWED[task])
        assert not check.passes(PLAIN)
        assert not check.passes("")


@pytest.mark.parametrize("task", ["multiple_sections", "number_highlighted_sections"])
def test_the_number_in_the_wording_is_the_number_that_is_checked(task):
    """One fewer than asked for fails; the wordings say it in figures or in letters."""
    said = {"two": 2, "three": 3, "four": 4} | {str(i): i for i in range(2, 5)}
    kind = builtin_words()["instructions"][task]
    for entry in kind["wordings"]:
        wording, arguments = entry["text"], entry["kwargs"]
        count = next(value for key, value in arguments.items() if key.startswith("num"))
        listed = "SECTION 1, SECTION 2 and SECTION 3" in wording
        asked = 3 if listed else next(said[w] for w in wording.replace(".", " ").split() if w in said)
        # "4 sections that begin with SECTION 1": the first number is the one that is asked for.
        assert count == asked, wording
        check = Check("ifeval", kind["ifeval"], arguments)
        part = "SECTION {}\ntext\n" if task == "multiple_sections" else "*word{}* "
        pieces = [part.format(i) for i in itertools.chain(range(1, count + 1))]
        assert check.passes("".join(pieces))
        assert not check.passes("".join(pieces[:-1]))


def test_prefix_and_until_belong_to_the_answer():
    check = parse_check({"number": "12", "prefix": "The answer", "until": ["Request:"]}, "row")
    assert check.passes(" is: 12")
    assert not check.passes(" is: 13")
    assert check.passes(" is: 12\nRequest: 1 + 1\nThe answer is: 2")
    assert not check.runs_code
    assert parse_check({"python": "f", "kwargs": {"cases": [[1, 2]]}}, "row").runs_code


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("97", True),
        ("It is $97.", True),
        ("1,097 less 1,000 are 97", True),
        ("97.0", True),
        ("-97", False),
        ("97 of 100", False),
        ("ninety-seven", False),
        ("970", False),
        (".97", False),
        ("3.97", False),
    ],
)
def test_the_last_number_counts(answer, right):
    assert parse_check({"number": "97"}, "row").passes(answer) is right


def test_thousands_are_read_with_and_without_their_separator():
    assert parse_check({"number": "1,200"}, "row").passes("1200")
    assert parse_check({"number": "-1200.5"}, "row").passes("-1,200.5 in all")


def test_a_fraction_needs_no_nought():
    check = parse_check({"number": "0.5"}, "row")
    assert check.passes("It is .5.")
    assert not check.passes("It is 5.")
    assert not parse_check({"number": "5"}, "row").passes("It is .5")
    assert parse_check({"number": "-.5"}, "row").passes("-0.5")
    assert parse_check({"number": "7"}, "row").passes("and so on...7")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("def f(x):\n    return 2 * x", True),
        ("def f(x):\n    return 2.0 * x", False),
        ("def f(x):\n    return 4", False),
        ("def g(x):\n    return 2 * x", False),
        ("raise SystemExit", False),
    ],
)
def test_a_function_is_judged_by_what_it_returns(answer, right):
    check = parse_check({"python": "f", "kwargs": {"cases": [[2, 4], [-1, -2]]}}, "row")
    preflight([check], "code")
    assert check.passes(answer) is right


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ("title", "must be an object"),
        ({}, "must name one grader"),
        ({"ifeval": "a", "number": "1"}, "must name one grader"),
        ({"ifeval": 3}, "must name one grader"),
        ({"ifeval": "a", "args": {}}, "unknown field 'args'"),
        ({"ifeval": "a", "kwargs": [1]}, "kwargs of check"),
        ({"ifeval": "a", "prefix": 1}, "prefix of check"),
        ({"ifeval": "a", "until": "x"}, "until of check"),
        ({"ifeval": "a", "until": [""]}, "until of check"),
    ],
)
def test_malformed_checks_are_refused_with_their_line(tmp_path, check, message):
    path = tmp_path / "pairs.jsonl"
    rows = [{"task": "t", "prompt": "p"}, {"task": "t", "prompt": "q", "check": check}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match=message) as error:
        read_pairs(path)
    assert "line 2" in error.value.message


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"ifeval": "detectable_format:titel"}, "IFEval has no type"),
        ({"ifeval": "detectable_format:multiple_sections"}, "takes the kwargs"),
        ({"ifeval": "punctuation:no_comma", "kwargs": {"count": 3}}, "takes the kwargs"),
        ({"ifeval": "keywords:existence", "kwargs": {"keywords": []}}, "takes no empty keywords"),
        (
            {"ifeval": "length_constraints:number_words", "kwargs": {"num_words": 9, "relation": "about"}},
            "does not take the kwargs",
        ),
        ({"number": "twelve"}, "takes a text such as '97'"),
        ({"number": "12", "kwargs": {"total": 3}}, "no kwargs"),
        ({"python": "f(x)", "kwargs": {"cases": [[1, 2]]}}, "the name of a function"),
        ({"python": "f"}, "the name of a function and kwargs"),
        ({"python": "f", "kwargs": {"cases": [[1]]}}, "the name of a function and kwargs"),
    ],
)
def test_checks_that_cannot_run_are_refused_before_anything_is_generated(check, message):
    with pytest.raises(BadInput, match=message):
        preflight([parse_check(check, "row")], "title")


def test_nltk_data_is_asked_for_by_the_types_that_need_it_alone(monkeypatch):
    import nltk

    def absent(name, *_args):
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", absent)
    preflight([Check("ifeval", "punctuation:no_comma")], "no_comma")
    counted = {"num_sentences": 3, "relation": "at least"}
    with pytest.raises(BadInput, match="punkt_tab"):
        preflight([Check("ifeval", "length_constraints:number_sentences", counted)], "sentences")


def test_checks_travel_from_the_file_to_the_tokens(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"task": "t", "prompt": f"p{i}", "contrast": "c", "check": {"ifeval": f"x:{i}"}} for i in range(6)]
    rows.append({"task": "t", "prompt": "p6", "contrast": "c"})
    path.write_text("\n".join(map(json.dumps, rows)))
    (task,) = split_pairs(load_pairs(str(path), None, 0), "half", 0)

    class Letters:
        def __call__(self, text, **_how):
            return {"input_ids": [ord(letter) for letter in text]}

    (tokens,) = tokenize_tasks(PromptFormat(Letters()), [task], 10)
    for ids, check in zip(tokens.scoring, tokens.checks, strict=True):
        number = chr(ids[-1])
        assert check == (None if number == "6" else {"ifeval": f"x:{number}"})
