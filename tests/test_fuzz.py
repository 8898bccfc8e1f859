"""A few damaged files of every format, always the same; `make fuzz` reads 10,000 of each."""

from __future__ import annotations

import logging

import pytest
from fuzz import Format, check, formats, mutant

MUTANTS = 60
NAMES = (
    "score", "fit", "activations", "patch", "header", "index", "config", "job", "suite", "recipe", "pipeline", "mark",
    "results", "pairs", "answers", "chats", "ifeval", "table", "texts", "cache", "digests", "resume",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Format]:
    return {form.name: form for form in formats(tmp_path_factory.mktemp("fuzz") / "files")}


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_one_sentence_or_what_it_says(
    made: dict[str, Format], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    form = made[name]
    taken, failures = zip(*(check(form, number) for number in range(MUTANTS)), strict=True)
    form.path.write_bytes(form.valid)
    assert [failure for failure in failures if failure] == []
    assert taken[0], "the valid file is refused"


def test_every_format_is_here(made: dict[str, Format]) -> None:
    assert set(NAMES) == set(made)
    score = made["score"]
    assert mutant(score, 5) == mutant(score, 5) != score.valid


def test_the_judges_see_a_wrong_value(made: dict[str, Format]) -> None:
    """A reader that took everything would not pass."""
    for name in ("score", "fit", "activations", "patch", "results", "job", "mark"):
        form = made[name]
        form.path.write_bytes(form.valid)
        value, caught = form.read(form.path), 0
        for number in range(1, 40):
            try:
                caught += form.judge(mutant(form, number), value) is not None
            except Exception:  # what cannot even be parsed
                caught += 1
        assert caught > 15, name
