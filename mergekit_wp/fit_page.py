"""Pictures of a fit file, and the page that has them: the loss by step, and what the merge takes of each expert where.

Legend: K experts, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mergekit_wp.fit_file import Fit
from mergekit_wp.fit_tables import about, mean_weights, of_curve, of_layers, of_teachers
from mergekit_wp.geometry import Kind
from mergekit_wp.page import frame, grid, render
from mergekit_wp.palette import INK, QUIET
from mergekit_wp.pictures import (
    FIGURE_STYLE,
    CellMap,
    CellRects,
    colour_bar,
    draw_cells,
    expert_colour,
    integer_ticks,
    label_of,
    shades,
    to_png,
    to_svg,
)

_MOST_NAME = 18  # characters of an expert below its column


def fit_page(found: Mapping[str, Fit]) -> str:
    """A page of its own about some fit files, by name."""
    fits = [
        {
            "name": name,
            "facts": about(fit),
            "teachers": grid(of_teachers(fit)),
            "curve": curve_svg(fit, name),
            "maps": [(kind, weights_svg(fit, kind, name)) for kind in Kind],
            "steps": grid(of_curve(fit)),
            "layers": grid(of_layers(fit)),
        }
        for name, fit in found.items()
    ]
    return frame("Weights of a merge, learnt from its experts' answers", "", render("fit.html", fits=fits))


def fits_png(found: Mapping[str, Fit]) -> bytes:
    """A row a file: the loss by step, and the maps of mean weights."""
    heights = [_height(fit) for fit in found.values()]
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(13, sum(heights) + 0.3 * len(heights)), layout="constrained")
        rows = figure.subfigures(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
        for row, (name, fit) in zip(rows, found.items(), strict=True):
            row.suptitle(label_of(name), fontsize=11)
            axes, *maps = row.subplots(1, 3, width_ratios=[3, 2, 2])
            _draw_curve(axes, fit)
            for kind, panel in zip(Kind, maps, strict=True):
                _draw_weights(row, panel, fit, kind, mesh=True)
        return to_png(figure)


def curve_png(fit: Fit) -> bytes:
    """The loss by step alone."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(6.6, 2.9), layout="constrained")
        _draw_curve(figure.add_subplot(), fit)
        return to_png(figure)


def curve_svg(fit: Fit, name: str) -> Markup:
    """The same for a page."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(6.6, 2.9), layout="constrained", dpi=72)
        _draw_curve(figure.add_subplot(), fit)
    return to_svg(figure, f"The loss of {name} by step; the dashed line is the step whose weights are in the file")


def weights_svg(fit: Fit, kind: Kind, name: str) -> Markup:
    """Mean weight of every expert in every layer's heads, or neurons: white is 0."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(5.2, _height(fit)), layout="constrained", dpi=72)
        axes = figure.add_subplot()
        cells, mapping = _draw_weights(figure, axes, fit, kind, mesh=False)
    described = f"Mean weight of each expert in each layer's {kind}, in {name}"
    return to_svg(figure, described, CellRects(axes, cells, mapping))


def _draw_curve(axes: Axes, fit: Fit) -> None:
    curve, best = fit.meta.curve, fit.meta.best_step
    steps = [point.step for point in curve]
    axes.plot(steps, [point.fitted for point in curve], marker="o", ms=4, lw=1.2, color=QUIET, label="fitted")
    held_out = [(point.step, point.held_out) for point in curve if point.held_out is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", ms=4, lw=2.2, color=expert_colour(0), label="held out")
    axes.axvline(best, color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label=f"kept: step {best}")
    axes.set(xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, handlelength=2)


def weights_map(fit: Fit, kind: Kind) -> CellMap:
    """Layers by experts: the mean weight of the layer's heads, or neurons."""
    mean_LK = mean_weights(fit, kind).T.numpy()
    names = [expert.name for expert in fit.meta.experts]
    labels = [
        [f"{name}, {kind} of layer {layer}: {value:.4g}" for name, value in zip(names, row, strict=True)]
        for layer, row in enumerate(mean_LK)
    ]
    return CellMap(kind, mean_LK, np.arange(len(names) + 1) - 0.5, labels)


def _draw_weights(figure: Any, axes: Axes, fit: Fit, kind: Kind, mesh: bool) -> tuple[CellMap, ScalarMappable]:
    cells = weights_map(fit, kind)
    # One scale for all of a file's maps, which ends at 1, an update taken whole, or at what is larger.
    most = max(1.0, *(float(mean_weights(fit, each).max()) for each in Kind))
    mapping = ScalarMappable(Normalize(0, most), shades(expert_colour(0)))
    draw_cells(axes, cells, mapping, mesh)
    names = [label_of(_end_of(expert.name)) for expert in fit.meta.experts]
    axes.set_xticks(range(len(names)), names)
    for label in axes.get_xticklabels() if len(names) > 2 else ():
        label.set(rotation=20, ha="right")
    axes.set(ylabel="layer", title=str(kind))
    axes.tick_params(bottom=False)
    integer_ticks(axes, "y", len(cells.values))
    colour_bar(figure, mapping, axes, "mean weight", mesh, fraction=0.08, aspect=24)
    return cells, mapping


def _end_of(name: str) -> str:
    """A model's name without what it begins with, where it is long."""
    return name if len(name) <= _MOST_NAME else f"…{name[1 - _MOST_NAME :]}"


def _height(fit: Fit) -> float:
    return min(max(2.9, 0.16 * fit.meta.geometry.layers + 1.3), 7.5)
