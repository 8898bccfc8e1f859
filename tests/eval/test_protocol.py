"""Answers found in worked steps, in the ways models write them, and how they are compared."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_wp.eval.protocol.answers import final_answer, first_number, gsm8k_results, math_results, same


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        # Minerva's phrase wins over all others, wherever it stands.
        ("Final Answer: The final answer is $\\frac{2}{3}$. I hope it is correct.\n\nThe answer is 7", "\\frac{2}{3}"),
        ("The final answer is $\\boxed{4}$. I hope it is correct.", "4"),
        # The last box, whatever it holds.
        ("So \\boxed{3} ... no, we forgot one: \\boxed{4}. The answer is 3.", "4"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("$\\boxed{\\left\\{ x : \\frac{a}{b} \\right\\}}$ holds", "\\left\\{ x : \\frac{a}{b} \\right\\}"),
        ("$x = \\boxed{-5}$", "-5"),
        ("Thus $\\boxed 7$.", "7"),
        # A box that is cut off counts for nothing.
        ("The answer is 12, so \\boxed{1", "12, so \\boxed{1"),
        ("3 and 4 make \\boxed{", "4"),
        # WizardMath's phrase, the last one.
        ("Step 1: 3 + 4 = 7.\nThe answer is: 7", "7"),
        ("The answer is: 7.\nWait. The answer is: 8.", "8"),
        ("The answer is: $1,200.", "$1,200"),
        ("The answer is: $\\frac{3}{4}$.", "\\frac{3}{4}"),
        ("The answer is: \\frac{3}{4}.", "\\frac{3}{4}"),
        ("The answer is: $$\n(2, 3)\n$$", "(2, 3)"),
        ("The answer is:\n\\[ x^2 + 1 \\]", "x^2 + 1"),
        ("The answer is \\(-2\\), as said.", "-2"),
        ("So the answer is **42**.", "42"),
        ("the answer is 3.5. That is all.", "3.5"),
        ("The answer is: 12 apples\nHe has 12 apples and 3 pears.", "12 apples"),
        ("The answer is: (-\\infty, 3]", "(-\\infty, 3]"),
        ("The final answer is 9.", "9"),
        # Else the last number.
        ("We have 3 + 4 = 7 in all.", "7"),
        ("It costs $1,234,567 in all.", "1234567"),
        ("It falls to -3.5 degrees", "-3.5"),
        ("A share of .25", ".25"),
        ("There is no number.", ""),
        ("", ""),
    ],
)
def test_where_the_answer_is_found(completion: str, answer: str) -> None:
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("72.", 72),
        ("72.0", 72),
        ("$72.50", Fraction(145, 2)),
        ("\\$72", 72),
        ("-$5", -5),
        ("$-5", -5),
        ("−5", -5),
        ("1,200 dollars", 1200),
        ("1{,}200", 1200),
        ("1,\\!200", 1200),
        ("12, 13", 12),
        ("3/4", Fraction(3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("-\\dfrac{3}{4}", Fraction(-3, 4)),
        ("20%", 20),
        ("20\\%", 20),
        ("5 + 3 = 8 apples", 8),
        ("x = -8", -8),
        ("Mia has 29 jars left", 29),
        (".5", Fraction(1, 2)),
        ("5/0", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: Fraction | int | None) -> None:
    assert first_number(text) == number


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("\\frac{1}{2}", "\\frac12"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("1/2", "\\frac{1}{2}"),
        ("0.5", "\\frac{1}{2}"),
        ("0.75", "\\frac{3}{4}"),
        (".75", "0.75"),
        ("-0.25", "-\\frac{1}{4}"),
        ("5.0", "5"),
        ("1,200", "1200"),
        ("1200", "1,\\!200"),
        ("$1,200", "1,\\!200"),
        ("\\$32", "32"),
        ("90", "90^\\circ"),
        ("90 degrees", "90^\\circ"),
        ("90°", "90^{\\circ}"),
        ("50%", "50\\%"),
        ("50", "50\\%"),
        ("12 cm", "12\\text{ cm}"),
        ("12 square feet", "12"),
        ("12\\text{ cm}^2", "12"),
        ("2\\sqrt{3}\\text{ cm}", "2\\sqrt{3}"),
        ("60 miles per hour", "60"),
        ("x = 5", "5"),
        ("(-2,2)", "(-2, 2)"),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\frac{\\pi}{2})"),
        ("\\text{composite}", "composite"),
        ("even", "\\text{even}"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("4 \\sqrt{2}", "4\\sqrt{2}"),
        ("\\tfrac{x}{3}", "\\frac{x}{3}"),
    ],
)
def test_the_same_answer_in_other_words(answer: str, right: str) -> None:
    assert same(answer, right)
    assert same(right, answer)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("", "5"),
        ("5", "-5"),
        ("1200", "12"),
        ("0.33", "\\frac{1}{3}"),
        ("10000", "10001"),
        ("500", "5"),
        ("12x", "12"),
        ("12\\pi", "12"),
        ("12 pi", "12"),
        ("12 or 13", "12"),
        ("12, 13", "12"),
        ("12 + 1", "12"),
        ("(1, 2)", "(2, 1)"),
        ("[1, 2]", "(1, 2)"),
        ("\\sqrt{3}", "\\sqrt{2}"),
        ("odd", "\\text{even}"),
        ("\\frac{1}{2}", "\\frac{2}{1}"),
    ],
)
def test_another_answer(answer: str, right: str) -> None:
    assert not same(answer, right)
    assert not same(right, answer)


@given(st.integers(-(10**7), 10**7), st.sampled_from(["{}", "{:,}", "${:,}", "{}.00", "**{}**", "${}$", "{} apples"]))
def test_any_number_in_any_dress_is_right_and_its_neighbour_wrong(value: int, dress: str) -> None:
    said = f"First 3 + 4 = 7.\nThe answer is: {dress.format(value)}."
    for offset, score in ((0, 1.0), (1, 0.0)):
        assert gsm8k_results({"answer": f"3 + 4 = 7\n#### {value + offset:,}"}, [said])["exact_match"] == score
        assert math_results({"answer": f"{value + offset}"}, [said])["exact_match"] == score


def test_nothing_is_never_right() -> None:
    assert gsm8k_results({"answer": "#### 0"}, [""])["exact_match"] == 0
    assert math_results({"answer": "0"}, [""])["exact_match"] == 0
