"""The look that all pictures share, and the picture that both the demo's report and a model card show.

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

from mergekit_wp.foreign import one_line

INK = "#1f2933"
QUIET = "#8592a0"
# One colour an expert, the same in every picture; told apart by people with any colour vision (Okabe-Ito).
EXPERT_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

STYLE: Any = {  # Any: matplotlib types the keys of its rc files one by one
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
    with matplotlib.rc_context(STYLE):
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
