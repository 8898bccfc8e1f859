"""Pictures of scores and of a merge, each a pure function from tensors to an inline SVG.

Legend: K experts, L layers, n components of a layer (heads or neurons).
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, LinearSegmentedColormap
from matplotlib.figure import Figure

from mergekit_wp.scoring.curve import RecoveryCurve

INK = "#1f2933"
_QUIET = "#8592a0"
_NEGATIVE = "#6b7280"
# One colour an expert, the same in every picture; told apart by people with any colour vision (Okabe-Ito).
EXPERT_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

_STYLE: Any = {  # Any: matplotlib types the keys of its rc files one by one
    "svg.fonttype": "none",  # text stays text: sharp, selectable, in the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": _QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def expert_colour(index: int) -> str:
    return EXPERT_COLOURS[index % len(EXPERT_COLOURS)]


def head_map(scores_LH: torch.Tensor, anchor_layer: int, colour: str) -> str:
    """Layers by heads; white is 0, `colour` is positive, grey is negative."""
    values = scores_LH.double().numpy()
    edges = np.arange(values.shape[1] + 1) - 0.5
    return _score_map(values, edges, _layer_share(scores_LH), "head", anchor_layer, colour)


def neuron_map(scores_LF: torch.Tensor, anchor_layer: int, colour: str) -> str:
    """Layers by neurons sorted within each layer, strongest first.

    A neuron's index means nothing and few matter, so the axis is the rank, on a logarithmic scale: each cell
    is the mean score of the ranks that it covers.
    """
    ranked = scores_LF.double().sort(dim=1, descending=True).values.numpy()
    edges = rank_edges(ranked.shape[1])
    values = np.stack([ranked[:, start:stop].mean(axis=1) for start, stop in pairwise(edges)], axis=1)
    ranks = np.asarray(edges, dtype=float) + 1  # rank 1 is the strongest
    return _score_map(values, ranks, _layer_share(scores_LF), "neuron", anchor_layer, colour)


def rank_edges(count: int, cells: int = 40) -> list[int]:
    """0 = first edge < ... < last edge = count, about `cells` steps that grow by a constant factor."""
    edges = np.unique(np.round(np.geomspace(1, count + 1, cells + 1)).astype(int)) - 1
    return [int(edge) for edge in edges]


def share_bars(alpha_KLn: torch.Tensor, names: Sequence[str], components: str) -> str:
    """How much of each layer of the merge comes from which expert: mean fusion weight, stacked to 1."""
    share_KL = alpha_KLn.double().mean(dim=2).numpy()
    layers = np.arange(share_KL.shape[1])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        bottom = np.zeros(len(layers))
        for index, (name, share_L) in enumerate(zip(names, share_KL, strict=True)):
            axes.bar(layers, share_L, 0.82, bottom=bottom, color=expert_colour(index), label=name)
            bottom += share_L
        for boundary in range(1, len(names)):  # where the bars of a plain average would meet
            axes.axhline(boundary / len(names), color="white", linewidth=1.2, linestyle=(0, (3, 3)))
        axes.set(xlabel="layer", ylabel=f"share of its {components}", ylim=(0, 1))
        axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        axes.set_xlim(-0.6, len(layers) - 0.4)
        _integer_ticks(axes, "x", len(layers))
        figure.legend(loc="outside upper center", ncols=len(names), frameon=False, handlelength=1)
    return to_svg(figure, f"Mean fusion weight of each expert in each layer's {components}")


def recovery_lines(curve: RecoveryCurve, colour: str) -> str:
    """Recovery by the layer that is steered: a thin line a task, their mean in `colour`, the chosen layer dashed.

    A task that was judged by the next token has a dotted line; what lies below -100 % is drawn there.
    """
    graded = {name: task for name, task in curve.tasks.items() if task.grading != "none"}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color=_QUIET, linewidth=0.8)
        axes.axvline(curve.chosen, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        for (name, task), marker in zip(graded.items(), itertools.cycle("osD^vPX*"), strict=False):
            line = ":" if task.grading == "kl" else "-"
            values = np.clip(task.recovery, -1, None)
            axes.plot(curve.layers, values, line, marker=marker, ms=4, lw=0.9, color=_QUIET, label=name)
        if len(graded) > 1:
            axes.plot(curve.layers, curve.mean, marker="o", ms=5, lw=2.4, color=colour, label="mean")
        else:
            axes.lines[-1].set(color=colour, linewidth=2.4)
        axes.set(xlabel="layer after which the base is steered", ylabel="recovery")
        axes.set_xticks(curve.layers[:: max(1, -(-len(curve.layers) // 12))])
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        figure.legend(loc="outside right center", frameon=False, handlelength=2)
    return to_svg(figure, f"How much of the expert's capability steering recovers, by layer; chosen: {curve.chosen}")


def _score_map(
    values: np.ndarray, edges: np.ndarray, share_L: np.ndarray, component: str, anchor_layer: int, colour: str
) -> str:
    layers, ranked = len(values), component == "neuron"
    norm = CenteredNorm(0, halfrange=float(np.abs(values).max()) or 1.0)
    colours = LinearSegmentedColormap.from_list("score", [_NEGATIVE, "white", colour])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, min(max(2.5, 0.2 * layers + 1.1), 7.5)), layout="constrained")
        axes, side = figure.subplots(1, 2, width_ratios=[5, 1], sharey=True)
        rows = np.arange(layers + 1) - 0.5
        mesh = axes.pcolormesh(edges, rows, values, cmap=colours, norm=norm, edgecolors="#eef1f4", lw=0.4)
        axes.set_ylabel("layer")
        _integer_ticks(axes, "y", layers)
        if ranked:
            axes.set_xscale("log")
            axes.set_xlabel("rank of the neuron in its layer (1 = strongest)")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_xlabel("head")
            _integer_ticks(axes, "x", values.shape[1])
        axes.axhline(anchor_layer + 0.5, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        side.barh(np.arange(layers), share_L, 0.78, color=colour)
        side.axhline(anchor_layer + 0.5, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        side.set_xlabel("% of all\nscore")
        side.tick_params(left=False)
        bar = figure.colorbar(mesh, ax=side, fraction=0.5, aspect=18, pad=0.15)
        bar.outline.set_visible(False)
        bar.set_label("mean score" if ranked else "score")
        bar.ax.tick_params(labelsize=8)
    return to_svg(figure, f"Scores of the {component}s by layer; the dashed line is above the anchor layer")


def _layer_share(scores_Ln: torch.Tensor) -> np.ndarray:
    """Percent of all positive score that lies in each layer."""
    positive_L = scores_Ln.double().clamp(min=0).sum(dim=1)
    return (100 * positive_L / positive_L.sum().clamp(min=1e-300)).numpy()


def _integer_ticks(axes: Axes, axis: str, count: int) -> None:
    step = max(1, -(-count // 10))
    getattr(axes, f"set_{axis}ticks")(range(0, count, step))


def to_svg(figure: Figure, description: str) -> str:
    """The figure as an `<svg>` element that fills the width of its box."""
    buffer = io.StringIO()
    # The salt keeps the ids of several pictures on one page apart, and the same from run to run.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": description + str(id(figure))}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    head, _, body = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return f'{head} role="img" aria-label="{description}">{body}'
