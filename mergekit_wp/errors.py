"""The errors that users are meant to see, and how they quote what was found."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from mergekit_wp.foreign import one_line

_MOST_SHOWN = 80  # characters of a value
_MOST_SAID = 2000  # characters of a sentence


class OneSentence(click.ClickException):
    """An error as one line for a terminal, whatever is in the names that it quotes; exit code 1, no traceback."""

    def __init__(self, message: str) -> None:
        line = one_line(message)
        super().__init__(line if len(line) <= _MOST_SAID else f"{line[:_MOST_SAID]} ... (cut)")


class BadInput(OneSentence):
    """Something the person at the keyboard can mend: exit code 2, one sentence, no traceback.

    The sentence names the file or field, what was found, what was expected and what to do. Being a
    `click.ClickException`, it also comes out clean from inside the stock `mergekit-yaml`, which is a click
    command and would otherwise print a traceback.
    """

    exit_code = 2


class _Short(reprlib.Repr):
    """Like `repr`, which escapes what a terminal cannot show, but of bounded length and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _MOST_SHOWN
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 4, 6, 6

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out an int of many digits, and takes long for it.
        return repr(x) if x.bit_length() < 250 else f"a number of about {int(x.bit_length() * 0.30103)} digits"


def shown(value: Any) -> str:
    """A value of a file as a sentence quotes it: like `repr`, in at most some 80 characters, printable."""
    text = _Short().repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def reason_of(error: BaseException, most: int = 200, *, typed: bool = False) -> str:
    """What an error of another library says, for brackets in a sentence of ours: one line, `most` characters at most.

    With its type where the words are not a sentence by themselves (a KeyError says a key), or there are none; with
    `typed` in any case.
    """
    said, kind = " ".join(str(error).split()).rstrip("."), type(error).__name__
    if typed or not isinstance(error, OSError | ValueError | RuntimeError | ImportError):
        said = f"{kind}: {said}" if said else kind
    said = said or kind
    return said if len(said) <= most else f"{said[:most]}..."


def out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left, of a GPU or of the machine; torch says so in several ways."""
    # By name, since torch takes seconds to import and most commands of ours have not.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(words in said for words in ("out of memory", "can't allocate memory", "_alloc_failed"))


@contextmanager
def enough_memory(sentence: str) -> Iterator[None]:
    """Inside the block, running out of memory is a `BadInput` of this sentence, which says of what and what to do."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise BadInput(sentence) from error


class NotFinite(BadInput):
    """A merged tensor holds a NaN or an infinity."""
