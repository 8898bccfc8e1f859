"""Find the answer in worked steps and compare it, for `wp_math` and `wp_gsm8k`.

Looked for as AIM does (EvalUtils/MathUtils/parser.py): Minerva's phrase, else the last \\boxed{}, else what follows
the last "he answer is" (WizardMath ends with "The answer is: N"), else "final answer is", else the last number. A
statement is read to the end of its formula or sentence, as WIDEN does; AIM reads all that follows, so that an answer
with a remark after it is wrong there.

Compared by lm-eval's own `is_equiv` (Hendrycks et al., the equivalence that WIDEN uses) or as exact numbers, units
aside. AIM further asks sympy whether two formulas are equal, and takes numbers within 0.01 % and 100 times too large
or too small for right; that adds a few points to MATH, is not done here, and needs three more packages.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, process_docs, remove_boxed

_MINERVA = re.compile(r"final answer is \$(.*?)\$\. I hope", re.DOTALL)
_PHRASES = ("he answer is", "final answer is")
_LAST_NUMBER = re.compile(r"-?\d*\.?\d+")
_MATHS = re.compile(r"(?:\$\$(.+?)\$\$|\$(.+?)\$|\\\[(.+?)\\\]|\\\((.+?)\\\))", re.DOTALL)
_SENTENCE_END = re.compile(r"\n|\.\s")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mbox|mathrm)\{([^{}]*)\}")
_AMOUNT = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")
# One word of two letters or more, "square feet", "miles per hour", "cm^2", a percent or degree sign.
_UNIT = re.compile(
    r"\s*(?:%|°|\^\{?\\circ\}?)"
    r"|\s+(?:(?:square|cubic|sq|cu)\.?\s+)?(?!(?:pi|or|and|mod|to)\b)[A-Za-z]{2,}\.?"
    r"(?:\^\{?[23]\}?)?(?:\s+(?:per|an?)\s+[A-Za-z]+)?"
)

math_docs = process_docs


def gsm8k_results(doc: dict[str, Any], completions: list[str]) -> dict[str, float]:
    """Whether the first number of the answer is the one after "####" in `doc["answer"]`."""
    right = Fraction(doc["answer"].split("####")[-1].strip().replace(",", ""))
    return {"exact_match": float(first_number(final_answer(completions[0])) == right)}


def math_results(doc: dict[str, Any], completions: list[str]) -> dict[str, float]:
    """Whether the answer is equivalent to `doc["answer"]`, the boxed one of the solution."""
    return {"exact_match": float(same(final_answer(completions[0]), doc["answer"]))}


def final_answer(completion: str) -> str:
    """The text of the answer, without delimiters, colon and full stop; empty when there is none."""
    if found := _MINERVA.search(completion):
        return _boxed(found[1]) or found[1].strip()
    if boxed := _boxed(completion):
        return boxed
    for phrase in _PHRASES:
        if phrase in completion:
            return _statement(completion.rpartition(phrase)[2])
    numbers = _LAST_NUMBER.findall(completion.replace(",", ""))
    return numbers[-1] if numbers else ""


def _boxed(text: str) -> str | None:
    """What the last box holds; None when there is none or it is never closed."""
    if "boxed" not in text:
        return None
    try:
        return remove_boxed(last_boxed_only_string(text)).strip()
    except (AssertionError, TypeError):  # lm-eval's answer to a box that is cut off
        return None


def _statement(text: str) -> str:
    """What is stated after "the answer is": the formula it begins with, or the rest of its sentence."""
    text = text.lstrip(" \t\n:*`")
    if formula := _MATHS.match(text):
        return next(group for group in formula.groups() if group is not None).strip()
    return _SENTENCE_END.split(text, maxsplit=1)[0].strip(" \t*`").rstrip("./ *`")


def first_number(text: str) -> Fraction | None:
    """The first number, or the first after the last "=", of text such as "$1,200", "3/4" or "a + b = -5 dollars"."""
    found = _AMOUNT.search(_plain(text).rpartition("=")[2])
    return _fraction(found[0]) if found else None


def same(answer: str, right: str) -> bool:
    """Whether two answers to a MATH problem are the same."""
    if is_equiv(answer, right) or is_equiv(_plain(answer), _plain(right)):
        return True
    number = _number_with_unit(answer)
    return number is not None and number == _number_with_unit(right)


def _plain(text: str) -> str:
    """Without dollars, separators of thousands and LaTeX around words; simple fractions as a/b."""
    text = text.replace("−", "-").replace("\\$", "").replace("$", "").replace("\\%", "%")
    text = text.replace("\\!", "").replace("{,}", ",")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = _FRACTION.sub(r"\1/\2", _TEXT.sub(r"\1", text))
    return text.strip()


def _number_with_unit(text: str) -> Fraction | None:
    """The number that the whole text is, but for a unit after it."""
    plain = _plain(text)
    found = _AMOUNT.match(plain)
    if found is None or (plain[found.end() :].strip() and not _UNIT.fullmatch(plain, found.end())):
        return None
    return _fraction(found[0])


def _fraction(text: str) -> Fraction | None:
    above, _, below = text.partition("/")
    return None if below and not int(below) else Fraction(above) / int(below or 1)
