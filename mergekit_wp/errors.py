"""The one error that users are meant to see."""

from __future__ import annotations

import click


class BadInput(click.ClickException):
    """Something the person at the keyboard can mend: exit code 2, one sentence, no traceback.

    The sentence names the file or field, what was found, what was expected and what to do. Being a
    `click.ClickException`, it also comes out clean from inside the stock `mergekit-yaml`, which is a click
    command and would otherwise print a traceback.
    """

    exit_code = 2
