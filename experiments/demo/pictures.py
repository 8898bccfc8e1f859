"""Pictures of scores and of a merge, each a pure function from tensors to an inline SVG.

Legend: K experts, L layers, n components of a layer (heads or neurons).
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from itertools import pairwise

import matplotlib
import numpy as np
import torch
from matplotlib.colors import CenteredNorm, LinearSegmentedColormap
from matplotlib.figure import Figure

from mergekit_wp.recovery import RecoveryCurve
from mergekit_wp.report import FIGURE_STYLE, INK, QUIET, draw_shares, expert_colour, integer_ticks, label_of

__all__ = ["INK", "expert_colour", "head_map", "neuron_map", "rank_edges", "recovery_lines", "share_bars", "to_svg"]

_NEGATIVE = "#6b7280"


def head_map(scores_LH: torch.Tensor, anchor_layer: int | None, colour: str) -> str:
    """Layers by heads; white is 0, `colour` is positive, grey is negative; a dashed line above the anchor layer."""
    values = scores_LH.double().numpy()
    edges = np.arange(values.shape[1] + 1) - 0.5
    return _score_map(values, edges, _layer_share(scores_LH), "head", anchor_layer, colour)


def neuron_map(scores_LF: torch.Tensor, anchor_layer: int | None, colour: str) -> str:
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
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        draw_shares(figure.add_subplot(), share_KL, names, components)
        figure.legend(loc="outside upper center", ncols=len(names), frameon=False, handlelength=1)
    return to_svg(figure, f"Mean fusion weight of each expert in each layer's {components}")


def recovery_lines(curve: RecoveryCurve, colour: str) -> str:
    """Recovery by the layer that is steered: a thin line a task, their mean in `colour`, the chosen layer dashed.

    A task that was judged by the next token has a dotted line; what lies below -100 % is drawn there.
    """
    graded = {name: task for name, task in curve.tasks.items() if task.grading != "none"}
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(6.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.axvline(curve.chosen, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        for (name, task), marker in zip(graded.items(), itertools.cycle("osD^vPX*"), strict=False):
            line = ":" if task.grading == "kl" else "-"
            values = np.clip(task.recovery, -1, None)
            axes.plot(curve.layers, values, line, marker=marker, ms=4, lw=0.9, color=QUIET, label=label_of(name))
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
    values: np.ndarray, edges: np.ndarray, share_L: np.ndarray, component: str, anchor_layer: int | None, colour: str
) -> str:
    layers, ranked = len(values), component == "neuron"
    norm = CenteredNorm(0, halfrange=float(np.abs(values).max()) or 1.0)
    colours = LinearSegmentedColormap.from_list("score", [_NEGATIVE, "white", colour])
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(5.2, min(max(2.5, 0.2 * layers + 1.1), 7.5)), layout="constrained")
        axes, side = figure.subplots(1, 2, width_ratios=[5, 1], sharey=True)
        rows = np.arange(layers + 1) - 0.5
        mesh = axes.pcolormesh(edges, rows, values, cmap=colours, norm=norm, edgecolors="#eef1f4", lw=0.4)
        axes.set_ylabel("layer")
        integer_ticks(axes, "y", layers)
        if ranked:
            axes.set_xscale("log")
            axes.set_xlabel("rank of the neuron in its layer (1 = strongest)")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_xlabel("head")
            integer_ticks(axes, "x", values.shape[1])
        side.barh(np.arange(layers), share_L, 0.78, color=colour)
        if anchor_layer is not None:
            for panel in (axes, side):
                panel.axhline(anchor_layer + 0.5, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        side.set_xlabel("% of all\nscore")
        side.tick_params(left=False)
        bar = figure.colorbar(mesh, ax=side, fraction=0.5, aspect=18, pad=0.15)
        bar.outline.set_visible(False)
        bar.set_label("mean score" if ranked else "score")
        bar.ax.tick_params(labelsize=8)
    above = "" if anchor_layer is None else "; the dashed line is above the anchor layer"
    return to_svg(figure, f"Scores of the {component}s by layer{above}")


def _layer_share(scores_Ln: torch.Tensor) -> np.ndarray:
    """Percent of all positive score that lies in each layer."""
    positive_L = scores_Ln.double().clamp(min=0).sum(dim=1)
    return (100 * positive_L / positive_L.sum().clamp(min=1e-300)).numpy()


def to_svg(figure: Figure, description: str) -> str:
    """The figure as an `<svg>` element that fills the width of its box."""
    buffer = io.StringIO()
    # The salt keeps the ids of several pictures on one page apart, and the same from run to run.
    with matplotlib.rc_context({**FIGURE_STYLE, "svg.hashsalt": description + str(id(figure))}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    head, _, body = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return f'{head} role="img" aria-label="{description}">{body}'
