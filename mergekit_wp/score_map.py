"""The picture of a score file in a notebook (`Scores.plot`): a map of its heads, and one of its neurons, by layer."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from mergekit_wp.geometry import Kind
from mergekit_wp.report import FIGURE_STYLE, integer_ticks

if TYPE_CHECKING:
    from mergekit_wp.scores import Scores


class Picture(Figure):
    """A figure that a notebook shows by itself, with no pyplot set up."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(FIGURE_STYLE):
            self.savefig(buffer, format="png", dpi=80, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def draw_scores(scores: Scores) -> Picture:
    """One panel a kind; each has its own colour scale, since a neuron's score is far below a head's."""
    with matplotlib.rc_context(FIGURE_STYLE):
        height = min(max(2.4, 0.18 * scores.meta.geometry.layers + 1.2), 8.0)
        figure = Picture(figsize=(9.2, height), layout="constrained")
        for axes, kind in zip(figure.subplots(1, 2), Kind, strict=True):
            _draw_map(figure, axes, getattr(scores, kind), kind)
    return figure


def _draw_map(figure: Figure, axes: Axes, table_Ln: torch.Tensor, kind: Kind) -> None:
    """Heads in their order; the neurons of a layer from its highest score to its lowest, on a scale of ranks."""
    layers, width = table_Ln.shape
    first = 0.5 if kind == Kind.NEURONS else -0.5  # ranks count from 1
    if kind == Kind.NEURONS:
        table_Ln = table_Ln.sort(dim=1, descending=True).values
    edges, rows = torch.arange(width + 1) + first, torch.arange(layers + 1) - 0.5
    norm = CenteredNorm(0, halfrange=float(table_Ln.abs().max()) or 1.0)
    mesh = axes.pcolormesh(edges.numpy(), rows.numpy(), table_Ln.numpy(), cmap="PuOr", norm=norm)
    integer_ticks(axes, "y", layers)
    if kind == Kind.NEURONS:
        axes.set(xscale="log", xlabel="rank of the neuron in its layer (1 = highest)", ylabel="layer")
    else:
        integer_ticks(axes, "x", width)
        axes.set(xlabel="head", ylabel="layer")
    figure.colorbar(mesh, ax=axes, label=f"score of the {kind}")
