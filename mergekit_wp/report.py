"""What every page and picture of the project shares: frame, style sheet, sections, tables; the look of figures.

Pages hold everything they need: no scripts, no requests to anywhere. `draw_shares` is the picture that reports and
model cards show.

Legend: K experts, L layers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mergekit_wp.foreign import html, one_line

_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{lead}</p></header>
<main>
{body}
</main>
</body>
</html>
"""

PAGE_STYLE = """
:root { --ink: #1f2933; --quiet: #5b6875; --line: #dfe4e9; --paper: #ffffff; --ground: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; padding: 0 clamp(14px, 4vw, 40px) 48px; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 1080px; margin: 0 auto; }
header { padding: 44px 0 12px; }
h1 { margin: 0 0 10px; font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.15; letter-spacing: -.015em; }
header p { margin: 0; max-width: 72ch; color: var(--quiet); }
h2 { margin: 0 0 14px; font-size: 1.25rem; letter-spacing: -.01em; }
h3 { margin: 0 0 4px; font-size: 1rem; }
section { margin-top: 22px; padding: clamp(16px, 3vw, 28px); background: var(--paper);
  border: 1px solid var(--line); border-radius: 10px; }
section p { margin: 0 0 12px; max-width: 78ch; color: var(--quiet); }
article + article { margin-top: 26px; padding-top: 22px; border-top: 1px solid var(--line); }
.dot { display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 50%; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 10px 30px; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin: 6px 0 4px; font-size: .85rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; }
thead th { font-size: .85rem; font-weight: 600; color: var(--quiet); }
tbody th { font-weight: 500; }
tr.merge { background: #eef5fb; }
tr.merge th { font-weight: 650; }
td small { display: inline-block; min-width: 3.6em; margin-left: .3em; font-size: .8rem; color: var(--quiet); }
table.differences thead th + th { padding-right: calc(12px + 3.1rem); }
td small.up { color: #04724d; }
td small.down { color: #b3381b; }
.note { margin: 12px 0 0; font-size: .88rem; }
pre { margin: 0 0 18px; padding: 12px 14px; overflow-x: auto; background: var(--ground);
  border: 1px solid var(--line); border-radius: 8px; font-size: .84rem; line-height: 1.5; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
p code { font-size: .9em; }
@media (max-width: 640px) {
  th, td { padding: 7px 6px; font-size: .92rem; }
  table.differences thead th + th { padding-right: 6px; }
  td small { display: block; min-width: 0; margin: 0; line-height: 1.2; }
}
footer { margin-top: 20px; font-size: .85rem; color: var(--quiet); }
"""


def frame(title: str, lead: str, body: str) -> str:
    """A whole page: `title` and `lead` are text, `body` is HTML."""
    return _FRAME.format(style=PAGE_STYLE, title=html(title), lead=html(lead), body=body)


def section(title: str, body: str) -> str:
    """A section of the page: `title` is text, `body` HTML."""
    return f"<section><h2>{html(title)}</h2>\n{body}</section>"


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A table of text: the first line is the head, the first cell of each other line its name."""
    head = "".join(f"<th>{html(cell)}</th>" for cell in lines[0])
    rows = "".join(
        f"<tr><th>{html(line[0])}</th>{''.join(f'<td>{html(cell)}</td>' for cell in line[1:])}</tr>"
        for line in lines[1:]
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


INK = "#1f2933"
QUIET = "#8592a0"
# One colour an expert, the same in every picture; told apart by people with any colour vision (Okabe-Ito).
EXPERT_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

FIGURE_STYLE: Any = {  # Any: matplotlib types the keys of its rc files one by one
    "svg.fonttype": "none",  # text stays text: sharp, selectable, in the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def expert_colour(index: int) -> str:
    return EXPERT_COLOURS[index % len(EXPERT_COLOURS)]


def draw_shares(axes: Axes, share_KL: np.ndarray, names: Sequence[str], components: str) -> None:
    """How much of each layer of the merge comes from which expert: mean fusion weight, stacked to 1."""
    layers = np.arange(share_KL.shape[1])
    bottom = np.zeros(len(layers))
    for index, (name, share_L) in enumerate(zip(names, share_KL, strict=True)):
        axes.bar(layers, share_L, 0.82, bottom=bottom, color=expert_colour(index), label=label_of(name))
        bottom += share_L
    for boundary in range(1, len(names)):  # where the bars of a plain average would meet
        axes.axhline(boundary / len(names), color="white", linewidth=1.2, linestyle=(0, (3, 3)))
    axes.set(xlabel="layer", ylabel=f"share of its {components}", ylim=(0, 1))
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.set_xlim(-0.6, len(layers) - 0.4)
    integer_ticks(axes, "x", len(layers))


def label_of(name: str) -> str:
    """A name in a legend as it reads: matplotlib takes `$...$` for mathematics and leaves out what begins with `_`."""
    text = one_line(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def integer_ticks(axes: Axes, axis: str, count: int) -> None:
    step = max(1, -(-count // 10))
    getattr(axes, f"set_{axis}ticks")(range(0, count, step))


def shares_png(shares: dict[str, np.ndarray], names: Sequence[str]) -> bytes:
    """A PNG with one panel a kind of component (`heads`, `neurons`), each [K, L]; on white, for any page."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(4.8 * len(shares), 2.9), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(shares)))
        for axes, (components, share_KL) in zip(panels, shares.items(), strict=True):
            draw_shares(axes, share_KL, names, components)
        handles, labels = panels[0].get_legend_handles_labels()
        columns = min(len(names), 3)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, handlelength=1)
        buffer = io.BytesIO()
        # No date and no version in it: the same shares are the same file.
        figure.savefig(buffer, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
