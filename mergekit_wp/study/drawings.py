"""Pictures that several parts of a study draw, as SVG in the style of `pictures`; numbers come from the parts.

Legend: L layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mergekit_wp.geometry import Component, Kind
from mergekit_wp.palette import INK, MESH, QUIET
from mergekit_wp.pictures import (
    FIGURE_STYLE,
    CellMap,
    CellRects,
    colour_bar,
    draw_cells,
    expert_colour,
    integer_ticks,
    label_of,
    legend_above,
    of_task,
    shades,
    titled,
    to_svg,
)

_ACROSS = 3  # panels side by side
_LINES = ("-", "--", ":")


class Shown(NamedTuple):
    """A picture as a section has it: its file, without ending; of which task and score file alone it is, if so."""

    file: str
    caption: str
    picture: Markup
    task: str = ""
    scores: str = ""


def layer_bars(
    panels: Mapping[str, Mapping[str, Sequence[int]]], what: str, description: str, by_task: bool = False
) -> Markup:
    """A panel a name, which is a task's if so; in it, stacked by layer [L], counts of each label."""
    with matplotlib.rc_context(FIGURE_STYLE):
        down = -(-len(panels) // _ACROSS)
        figure = Figure(figsize=(9.6, 0.5 + 2.2 * down), layout="constrained", dpi=72)
        axes = figure.subplots(down, min(len(panels), _ACROSS), squeeze=False, sharey=True).flatten()
        for each, (name, stacks) in zip(axes, panels.items(), strict=False):
            layers = len(next(iter(stacks.values())))
            bottom = np.zeros(layers)
            for place, (label, count_L) in enumerate(stacks.items()):
                each.bar(np.arange(layers), count_L, 0.82, bottom, color=expert_colour(place), label=label_of(label))
                bottom += np.asarray(count_L)
            each.set_title(label_of(name), fontsize=10)
            if by_task:
                of_task(each, name)
            each.set_xlabel("layer")
            integer_ticks(each, "x", layers)
        for each in axes[len(panels) :]:
            each.set_visible(False)
        axes[0].set_ylabel(what)
        handles, labels = axes[0].get_legend_handles_labels()
        if len(labels) > 1:
            legend_above(figure, handles, labels)
    return to_svg(figure, description)


def heads_svg(value_LH: np.ndarray, what: str, description: str) -> Markup:
    """A map of the heads' values of at least 0, layers upwards; every cell says whose it is."""
    layers, width = value_LH.shape
    labels = [
        [f"{Component(Kind.HEAD, layer, head).name}: {value_LH[layer, head]:.4g}" for head in range(width)]
        for layer in range(layers)
    ]
    cells = CellMap(Kind.HEAD, np.where(np.isfinite(value_LH), value_LH, np.nan), np.arange(width + 1) - 0.5, labels)
    most = float(np.nanmax(cells.values)) if np.isfinite(cells.values).any() else 0.0
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(5.6, min(max(2.5, 0.2 * layers + 1.1), 7.5)), layout="constrained", dpi=72)
        axes = figure.subplots()
        mapping = ScalarMappable(Normalize(0, most or 1.0), shades(expert_colour(0)))
        draw_cells(axes, cells, mapping, mesh=False)
        integer_ticks(axes, "x", width)
        integer_ticks(axes, "y", layers)
        axes.set(xlabel="head", ylabel="layer")
        colour_bar(figure, mapping, axes, what, mesh=False, fraction=0.06, aspect=18)
    return to_svg(figure, description, CellRects(axes, cells, mapping))


def matrix_svg(panels: Mapping[str, np.ndarray], names: Sequence[str], description: str) -> Markup:
    """A panel a name: a square of whole numbers, each written into its cell, shaded by its share of the largest."""
    with matplotlib.rc_context(FIGURE_STYLE):
        labels = [label_of(name) for name in names]
        size = min(max(2.2, 0.55 * len(names) + 0.7 + 0.07 * max(map(len, labels))), 8.5)  # inches
        figure = Figure(figsize=(size * len(panels) + 0.4, size), layout="constrained", dpi=72)
        for axes, (title, count_TT) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
            share_TT = count_TT / max(1, count_TT.max())
            axes.pcolormesh(share_TT, cmap=shades(expert_colour(0)), vmin=0, vmax=1, edgecolors=MESH, lw=0.6)
            for (row, column), count in np.ndenumerate(count_TT):
                ink = "white" if share_TT[row, column] > 0.6 else INK
                axes.text(column + 0.5, row + 0.5, f"{int(count)}", ha="center", va="center", color=ink, fontsize=9)
            ticks = np.arange(len(names)) + 0.5
            axes.set_xticks(ticks, labels, rotation=60, ha="right")
            axes.set_yticks(ticks, labels)
            axes.invert_yaxis()
            axes.tick_params(length=0)
            axes.set_title(label_of(title), fontsize=10)
    return to_svg(figure, description)


def against_chance(panels: Mapping[str, tuple[Sequence[int], Sequence[float]]], description: str) -> Markup:
    """A panel a name: bars of how many components are in exactly 1, 2, ... sets, and a mark each for chance."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 2.6), layout="constrained", dpi=72)
        for axes, (title, (found, chance)) in zip(
            np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True
        ):
            sets = np.arange(1, len(found) + 1)
            axes.bar(sets, found, 0.7, color=expert_colour(0), label="found")
            axes.plot(sets, chance, "_", ms=18, mew=2, color=expert_colour(1), label="by chance")
            axes.set(xlabel="in exactly so many tasks' top sets", title=label_of(title))
            axes.title.set_fontsize(10)
            axes.set_yscale("symlog", linthresh=1)
            axes.set_xticks(sets)
            axes.legend(frameon=False)
    return to_svg(figure, description)


def bars(rows: Sequence[tuple[str, float]], what: str, description: str) -> Markup:
    """A bar a row, the first on top."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(6.6, 0.9 + 0.3 * max(1, len(rows))), layout="constrained", dpi=72)
        axes = figure.subplots()
        axes.barh(range(len(rows)), [value for _name, value in rows], 0.7, color=expert_colour(0))
        axes.set_yticks(range(len(rows)), [label_of(name) for name, _value in rows])
        axes.invert_yaxis()
        axes.set_xlabel(what)
    return to_svg(figure, description)


def module_lines(measures: Mapping[str, Mapping[str, Sequence[float | None]]], words: Mapping[str, str]) -> Markup:
    """A panel a measure; a line a module over the layers."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained", dpi=72)
        panels = np.atleast_1d(figure.subplots(1, len(measures)))
        for axes, (measure, modules) in zip(panels, measures.items(), strict=True):
            for place, (module, value_L) in enumerate(modules.items()):
                line = np.array([np.nan if value is None else value for value in value_L])
                style: dict[str, Any] = {"color": expert_colour(place), "ls": _LINES[place // 6]}
                axes.plot(np.arange(len(line)), line, marker=".", label=module, **style)
            axes.set(xlabel="layer", ylabel=words[measure])
            axes.set_ylim(bottom=0)
            integer_ticks(axes, "x", len(line))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
    return to_svg(figure, "Change by layer and module: " + " and ".join(words[measure] for measure in measures))


def intervals(rows: Sequence[tuple[str, float, float, float]], what: str, description: str) -> Markup:
    """A line a row: a dot at its value, and an interval, its own or that of its control, as a bar."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(6.6, 0.9 + 0.3 * max(1, len(rows))), layout="constrained", dpi=72)
        axes = figure.subplots()
        axes.axvline(0, color=QUIET, linewidth=0.8)
        for place, (label, value, low, high) in enumerate(rows):
            axes.plot([low, high], [place, place], color=QUIET, lw=6, alpha=0.5, solid_capstyle="butt")
            (dot,) = axes.plot(value, place, "o", color=expert_colour(0))
            titled(dot, f"{label}: {value:.4g} ({low:.4g} to {high:.4g})")
        axes.set_yticks(range(len(rows)), [label_of(row[0]) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(what)
    return to_svg(figure, description)


def dots(
    panels: Mapping[str, Sequence[tuple[str, Mapping[str, float], float, float]]], what: str, description: str
) -> Markup:
    """A panel a name; in it a line a row, ratios on a logarithmic scale: a dot each value, its control as a bar."""
    with matplotlib.rc_context(FIGURE_STYLE):
        most = max(1, *(len(rows) for rows in panels.values()))
        figure = Figure(figsize=(9.6, 1.3 + 0.3 * most), layout="constrained", dpi=72)
        for axes, (title, rows) in zip(
            np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels.items(), strict=True
        ):
            axes.set_xscale("log")
            axes.axvline(1, color=QUIET, linewidth=0.8)
            for place, (_label, values, low, high) in enumerate(rows):
                axes.plot([low, high], [place, place], color=QUIET, lw=6, alpha=0.5, solid_capstyle="butt")
                for colour, (name, value) in enumerate(values.items()):
                    axes.plot(value, place, "o", color=expert_colour(colour), label=name if place == 0 else None)
            axes.set_yticks(range(len(rows)), [label_of(row[0]) for row in rows])
            axes.set_ylim(most - 0.5, -0.5)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda _value, _: "")
            axes.set_xlabel(what)
            axes.set_title(title, fontsize=10)
        legend_above(figure, *figure.axes[0].get_legend_handles_labels())
    return to_svg(figure, description)


def layer_lines(
    lines: Mapping[str, Sequence[float | None]],
    control: Mapping[str, Sequence[float | None]],
    band: tuple[float, float],
    what: str,
    description: str,
) -> Markup:
    """A line a name over the layers, its control of the same name dotted, and the interval of another as a band."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained", dpi=72)
        axes = figure.subplots()
        axes.axhspan(*band, color=QUIET, alpha=0.3, lw=0)
        for place, name in enumerate(lines):
            for values, style, label in ((lines, "-", label_of(name)), (control, ":", None)):
                value_L = np.array([np.nan if value is None else value for value in values[name]])
                axes.plot(
                    np.arange(len(value_L)), value_L, ls=style, marker=".", color=expert_colour(place), label=label
                )
        integer_ticks(axes, "x", len(next(iter(lines.values()))))
        axes.set(xlabel="layer", ylabel=what)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return to_svg(figure, description)


def word_bars(panels: Mapping[str, Sequence[tuple[str, float, float, float]]], description: str) -> Markup:
    """A panel a name: a bar a word, the largest on top; marks for its size in the base and among others."""
    with matplotlib.rc_context(FIGURE_STYLE), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph"
        )  # the page's fonts draw the text; matplotlib's need not have them all
        down = -(-len(panels) // _ACROSS)
        words = max(len(rows) for rows in panels.values())
        figure = Figure(figsize=(9.6, 0.6 + (0.5 + 0.22 * words) * down), layout="constrained", dpi=72)
        axes = figure.subplots(down, min(len(panels), _ACROSS), squeeze=False).flatten()
        for each, (name, rows) in zip(axes, panels.items(), strict=False):
            places = np.arange(len(rows))
            each.barh(places, [row[1] for row in rows], 0.7, color=expert_colour(0), label="expert")
            for place, label in ((2, "base"), (3, "other neurons")):
                style: dict[str, Any] = {"ms": 9, "mew": 2, "color": expert_colour(place - 1), "label": label}
                each.plot([row[place] for row in rows], places, "|", **style)
            each.set_yticks(places, [label_of(row[0]) for row in rows])
            each.invert_yaxis()
            each.set_title(label_of(name), fontsize=10)
            of_task(each, name)
        for each in axes[len(panels) :]:
            each.set_visible(False)
        legend_above(figure, *axes[0].get_legend_handles_labels())
        return to_svg(figure, description)


@dataclass(frozen=True)
class Curve:
    """Effects over sizes in percent of what is ranked. band: between which bounds each may lie, where that is known."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    style: str = "-"
    band: tuple[Sequence[float], Sequence[float]] | None = None


def set_curves(panels: Mapping[tuple[str, str], Sequence[Curve]], description: str) -> Markup:
    """A panel for every (row, column): curves of effects over the size of a set, on a logarithmic scale."""
    rows, columns = (list(dict.fromkeys(place[axis] for place in panels)) for axis in (0, 1))
    with matplotlib.rc_context(FIGURE_STYLE):
        size = (max(4.4, 0.8 + 2.9 * len(columns)), 0.7 + 2.4 * len(rows))
        figure = Figure(figsize=size, layout="constrained", dpi=72)
        grid = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True)
        for (row, column), curves in panels.items():
            axes = grid[rows.index(row)][columns.index(column)]
            axes.axhline(0, color=QUIET, lw=0.8)
            axes.axhline(1, color=QUIET, lw=0.8, ls=":")
            for curve in curves:
                axes.plot(curve.x, curve.y, curve.style, color=curve.colour, marker=".", label=curve.label)
                if curve.band is not None:
                    axes.fill_between(curve.x, *curve.band, color=curve.colour, alpha=0.2, lw=0)
            axes.set_xscale("log")
            ticks = [tick for tick in (0.5, 1, 2, 5, 10, 30, 100) if tick >= 0.9 * min(min(c.x) for c in curves)]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            if row == rows[0]:
                axes.set_title(label_of(column), fontsize=10)
            if row == rows[-1]:
                axes.set_xlabel("components in the set, %")
            if column == columns[0]:
                axes.set_ylabel(label_of(row))
        legend_above(figure, *grid[0][0].get_legend_handles_labels())
    return to_svg(figure, description)


def radar(panels: Mapping[str, Mapping[str, Sequence[float]]], axes_of: Sequence[str], description: str) -> Markup:
    """A panel a name; in it a polygon a model, of shares from 0 to 1 along an axis each. The first and the last are the
    ends between which the others lie."""
    angles = np.linspace(0, 2 * np.pi, len(axes_of), endpoint=False)
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(4.2 * len(panels), 4.0), layout="constrained", dpi=72)
        grid = figure.subplots(1, len(panels), squeeze=False, subplot_kw={"projection": "polar"})[0]
        for axes, (title, polygons) in zip(grid, panels.items(), strict=True):
            last = len(polygons) - 1
            for place, (label, values) in enumerate(polygons.items()):
                ends = place in (0, last)
                style: dict[str, Any] = {"color": INK if ends else expert_colour(place - 1), "lw": 1.4}
                style["ls"] = ":" if place == 0 else "--" if ends else "-"
                axes.plot([*angles, angles[0]], [*values, values[0]], marker=".", label=label, **style)
            axes.set_theta_zero_location("N")
            # Long names would leave no room for the circle.
            names = [name if len(name) <= 10 else name.replace("_", "_\n") for name in map(label_of, axes_of)]
            axes.set_xticks(angles, names, fontsize=8)
            for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
                side = round(float(np.sin(angle)), 6)  # angles go against the clock from the top
                label.set_horizontalalignment("center" if side == 0 else "right" if side > 0 else "left")
            axes.set_ylim(0, 1)
            axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "50 %", "", ""], fontsize=8)
            axes.set_title(label_of(title), fontsize=10)
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        return to_svg(figure, description)
