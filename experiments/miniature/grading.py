"""Is an answer right? One grader for each capability, on the generated text alone.

An instruction counts as followed only if the answer still answers: most of the words of the plain answer must
be there. Without that, a broken model that says nothing would follow "do not use commas".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from experiments.miniature import sandbox

_SHARE_OF_PLAIN_WORDS = 0.6


def _is_capital(text: str, number: int) -> bool:
    return text.isupper()


def _has_title(text: str, number: int) -> bool:
    return re.match(r"<<[^\n<>]+>>\s*\S", text) is not None


def _has_sections(text: str, number: int) -> bool:
    return re.fullmatch(r"SECTION 1\s+(?!SECTION).+\nSECTION 2\s+(?!SECTION).+", text, re.DOTALL) is not None


def _is_quoted(text: str, number: int) -> bool:
    return len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]


def _has_highlights(text: str, number: int) -> bool:
    return len(re.findall(r"\*[^\s*][^\n*]*\*", text)) >= number


def _has_no_comma(text: str, number: int) -> bool:
    return "," not in text


_CHECKERS: dict[str, Callable[[str, int], bool]] = {
    "english_capital": _is_capital,
    "title": _has_title,
    "multiple_sections": _has_sections,
    "quotation": _is_quoted,
    "number_highlighted_sections": _has_highlights,
    "no_comma": _has_no_comma,
}


def _answers(text: str, plain: str) -> bool:
    wanted = set(re.findall(r"[a-z]+", plain.lower()))
    found = set(re.findall(r"[a-z]+", text.lower()))
    return len(wanted & found) >= _SHARE_OF_PLAIN_WORDS * len(wanted)


def grade_instruction(text: str, task: str, number: int, plain: str) -> bool:
    """Whether `text` follows the instruction `task` (its count being `number`) and still gives the answer."""
    text = text.strip()
    return _CHECKERS[task](text, number) and _answers(text, plain)


def grade_maths(text: str, answer: int) -> bool:
    """Whether the final number, after "The answer is:", is `answer`."""
    found = re.findall(r"The answer is: *(-?\d+)", text)
    return bool(found) and int(found[-1]) == answer


def grade_code(text: str, function: str, cases: list[list[Any]]) -> bool:
    """Whether the function that `text` defines returns the right result in every case; runs it in the sandbox."""
    return sandbox.passes(text, function, cases)


_GRADERS: dict[str, Callable[..., bool]] = {
    "instruction": grade_instruction,
    "maths": grade_maths,
    "code": grade_code,
}


def grade(capability: str, text: str, grading: dict[str, Any]) -> bool:
    """Grade `text` with what its item says in `grading`."""
    return _GRADERS[capability](text, **grading)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval's hook: one row of a task file and the generated text to {"acc": 0 or 1}.

    An instruction also counts for the accuracy of its own type, such as "acc_title".
    """
    right = float(grade(doc["capability"], results[0], json.loads(doc["grading"])))
    if doc["capability"] == "instruction":
        return {"acc": right, f"acc_{doc['task']}": right}
    return {"acc": right}
