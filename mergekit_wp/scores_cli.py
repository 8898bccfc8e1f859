"""wp-scores: score files as tables, pictures, a page or JSON; several compared; fit files likewise. Light until it has
files to read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mergekit_wp import __version__
from mergekit_wp.console import json_option, quiet_option
from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import echo_lines

_EPILOG = """\b
Examples:
  wp-scores scores/maths.safetensors
  wp-scores scores/*.safetensors --html scores.html
  wp-scores writeback.safetensors exact.safetensors
  wp-scores maths=scores/m.safetensors code=scores/c.safetensors --json
  wp-scores fit.safetensors --html fit.html
"""

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog=_EPILOG)
@click.argument("files", metavar="[NAME=]FILE...", nargs=-1, required=True)
@click.option(
    "--top", default=10, show_default=True, type=click.IntRange(1), metavar="N", help="Of each task and kind."
)
@click.option("--any-base", is_flag=True, help="Compare files of different bases too, if their shapes agree.")
@click.option(
    "--png",
    type=_FILE,
    metavar="FILE",
    help="Write the maps, and of a fit its loss, as a picture.",
)
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
    Spearman's rank correlation, by task and kind. Of fit files of wp-fit: what the merge leaves open, the loss by step,
    and what it takes of each expert by layer.
    """
    from mergekit_wp.files import atomic_path, write_text
    from mergekit_wp.outputs import check_file

    views = _views(_named(files), top, any_base)
    for path in (png, html):
        if path is not None:
            check_file(
                path, None, "picture", [text if os.path.exists(text) else text.partition("=")[2] for text in files]
            )
    if as_json:
        echo_lines(json.dumps(views.data(), indent=2))
    elif not quiet:
        echo_lines(views.text())
    if png is not None:
        with atomic_path(png) as partial:
            partial.write_bytes(views.png())
    if html is not None:
        write_text(html, views.page())


@dataclass(frozen=True)
class _Views:
    """The ways in which files are shown, each made when it is asked for."""

    text: Callable[[], str]
    data: Callable[[], dict[str, Any]]
    png: Callable[[], bytes]
    page: Callable[[], str]


def _views(paths: Mapping[str, str], top: int, any_base: bool) -> _Views:
    """Of score files or of fit files, by name. Raises `BadInput` for files of both kinds."""
    from mergekit_wp.fit_file import is_fit

    fitted = [name for name, path in paths.items() if is_fit(path)]
    if others := [name for name in paths if fitted and name not in fitted]:
        raise BadInput(f"{fitted[0]} is a fit file and {others[0]} is none; show fit files apart from score files.")
    return _views_of_fits(paths) if fitted else _views_of_scores(paths, top, any_base)


def _views_of_scores(paths: Mapping[str, str], top: int, any_base: bool) -> _Views:
    from mergekit_wp.ranking import check_comparable
    from mergekit_wp.score_tables import as_data, as_text
    from mergekit_wp.scores import read_scores

    found = {name: read_scores(path) for name, path in paths.items()}
    check_comparable(found, any_base)

    def png() -> bytes:
        from mergekit_wp.pictures import maps_png

        return maps_png(found)

    def page() -> str:
        from mergekit_wp.score_page import score_page

        return score_page(found, top)

    return _Views(lambda: as_text(found, top), lambda: as_data(found, top), png, page)


def _views_of_fits(paths: Mapping[str, str]) -> _Views:
    from mergekit_wp.fit_file import read_fit
    from mergekit_wp.fit_tables import as_data, as_text

    found = {name: read_fit(path) for name, path in paths.items()}

    def png() -> bytes:
        from mergekit_wp.fit_page import fits_png

        return fits_png(found)

    def page() -> str:
        from mergekit_wp.fit_page import fit_page

        return fit_page(found)

    return _Views(lambda: as_text(found), lambda: as_data(found), png, page)


def _named(files: tuple[str, ...]) -> dict[str, str]:
    """Paths by NAME, or by themselves. Raises `BadInput` for two of one name."""
    found: dict[str, str] = {}
    for text in files:
        name, equals, path = text.partition("=")
        if not equals or os.path.exists(text):
            name = path = text
        if name in found:
            raise BadInput(f"two files are named {name!r}; tell them apart with NAME=FILE.")
        found[name] = path
    return found


if __name__ == "__main__":
    main()
