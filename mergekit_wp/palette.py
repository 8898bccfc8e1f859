"""The colours of pictures, on light and on dark: a picture is drawn in those of the light page, which the page has as
CSS variables, so that it follows the reader's choice. A file of a picture alone stays as it was drawn.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Colour(NamedTuple):
    """One colour, on a light and on a dark page."""

    light: str
    dark: str


INK = "#1f2933"
QUIET = "#8592a0"
MESH = "#eef1f4"  # between cells
NEGATIVE, UNKNOWN = "#6b7280", "#f0e9da"
# One colour an expert, the same in every picture; told apart by people with any colour vision (Okabe-Ito).
EXPERT_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_EXPERTS_ON_DARK = ("#4aa8e0", "#f08a45", "#35c79b", "#e29fc4", "#f0b840", "#8fd0f5")

PALETTE = {
    "ink": Colour(INK, "#e4e9ee"),
    "axis": Colour(QUIET, "#8996a5"),
    "mesh": Colour(MESH, "#2a343f"),
    "negative": Colour(NEGATIVE, "#a9b1bd"),
    "unknown": Colour(UNKNOWN, "#4a4130"),
    **{
        f"expert-{place}": Colour(*both)
        for place, both in enumerate(zip(EXPERT_COLOURS, _EXPERTS_ON_DARK, strict=True))
    },
}
"""By the names of the CSS variables."""

_BY_LIGHT = {colour.light: name for name, colour in PALETTE.items()} | {"#000000": "ink"}
_SVG = re.compile(r"(?<=<svg)([^>]*>)(.*?)(?=</svg>)", re.DOTALL)
_TAG = re.compile(r"<[a-z][^>]*>", re.IGNORECASE)
_PAINT = re.compile(r"((?:fill|stroke): ?|(?:fill|stroke|stop-color)=\")(#[0-9a-f]{6})\b")


def variables() -> str:
    """The palette as rules of CSS; on paper it is the light one."""
    light, dark = ("".join(f"--{name}: {colour[on]}; " for name, colour in PALETTE.items()) for on in (0, 1))
    return f":root {{ {light}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"


def themed(page: str) -> str:
    """Every `<svg>` of a page with variables in the place of the palette's colours. Text is left as it is."""
    return _SVG.sub(lambda svg: svg[1] + _TAG.sub(lambda tag: _PAINT.sub(_variable, tag[0]), svg[2]), page)


def _variable(paint: re.Match[str]) -> str:
    name = _BY_LIGHT.get(paint[2])
    return paint[0] if name is None else f"{paint[1]}var(--{name})"
