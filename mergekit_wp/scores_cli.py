"""wp-scores: score files as tables, pictures, a page or JSON; several compared. Light until it has files to read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_wp import __version__
from mergekit_wp.console import json_option, quiet_option
from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import echo_lines

if TYPE_CHECKING:
    from mergekit_wp.scores import Scores

_EPILOG = """\b
Examples:
  wp-scores scores/maths.safetensors
  wp-scores scores/*.safetensors --html scores.html
  wp-scores writeback.safetensors exact.safetensors
  wp-scores maths=scores/m.safetensors code=scores/c.safetensors --json
"""

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog=_EPILOG)
@click.argument("files", metavar="[NAME=]FILE...", nargs=-1, required=True)
@click.option(
    "--top", default=10, show_default=True, type=click.IntRange(1), metavar="N", help="Of each task and kind."
)
@click.option("--any-base", is_flag=True, help="Compare files of different bases too, if their shapes agree.")
@click.option("--png", type=_FILE, metavar="FILE", help="Write the maps of heads and neurons as a picture.")
@click.option("--html", type=_FILE, metavar="FILE", help="Write findings, maps and tables as one page.")
@json_option("Print all of it as JSON instead.")
@quiet_option()
@click.version_option(__version__)
def main(
    files: tuple[str, ...],
    top: int,
    any_base: bool,
    png: Path | None,
    html: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show score files of wp-score: what they are of, the strongest components, where the score lies.

    Two or more are compared: how many of their 20 strongest components, and of their strongest 1 %, are the same, and
    Spearman's rank correlation, by task and kind.
    """
    from mergekit_wp.files import atomic_path, write_text
    from mergekit_wp.outputs import check_file
    from mergekit_wp.ranking import check_comparable
    from mergekit_wp.score_tables import as_data, as_text

    found = _read(files)
    check_comparable(found, any_base)
    for path in (png, html):
        if path is not None:
            check_file(
                path, None, "picture", [text if os.path.exists(text) else text.partition("=")[2] for text in files]
            )
    if as_json:
        echo_lines(json.dumps(as_data(found, top), indent=2))
    elif not quiet:
        echo_lines(as_text(found, top))
    if png is not None:
        from mergekit_wp.pictures import maps_png

        with atomic_path(png) as partial:
            partial.write_bytes(maps_png(found))
    if html is not None:
        from mergekit_wp.score_page import score_page

        write_text(html, score_page(found, top))


def _read(files: tuple[str, ...]) -> dict[str, Scores]:
    """Score files by NAME, or by their path. Raises `BadInput` for two of one name."""
    from mergekit_wp.scores import read_scores

    found: dict[str, Scores] = {}
    for text in files:
        name, equals, path = text.partition("=")
        if not equals or os.path.exists(text):
            name = path = text
        if name in found:
            raise BadInput(f"two files are named {name!r}; tell them apart with NAME=FILE.")
        found[name] = read_scores(path)
    return found


if __name__ == "__main__":
    main()
