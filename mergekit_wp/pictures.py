"""Pictures of scores and of a merge: inline SVG for pages, PNG for elsewhere.

Maps of one kind share a colour scale, so that experts can be compared (`scale_of`); every cell of an SVG names its
head or neurons where the pointer rests on it.

Legend: K experts, L layers, H heads, F neurons, n components of a layer.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import CenteredNorm, Colormap, LinearSegmentedColormap, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mergekit_wp.foreign import html, one_line
from mergekit_wp.geometry import Component, Kind
from mergekit_wp.palette import EXPERT_COLOURS, INK, MESH, NEGATIVE, QUIET, UNKNOWN
from mergekit_wp.ranking import layer_shares_of
from mergekit_wp.recovery import RecoveryCurve

if TYPE_CHECKING:
    from mergekit_wp.scores import Scores

_FAINT = 0.25  # opacity
_MOST_NAMES = 4
LONGEST = 36  # characters of a name in a picture
_CELLS = "cells"  # id of the group that the cells take the place of
_SHADES = "shades"  # id of what the colours of a bar take the place of
_MARK, _PANEL = "mark:", "panel:"  # what the ids begin with of what `titled` and `of_task` name

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


@dataclass(frozen=True)
class CellMap:
    """Cells of a map: `values` [L, cells], NaN where nothing is known; `edges` [cells + 1]; `labels` [L][cells]."""

    kind: Kind
    values: np.ndarray
    edges: np.ndarray
    labels: list[list[str]]


def score_map(scores: Scores, kind: Kind) -> CellMap:
    """Layers by heads, or by neurons sorted within each layer, strongest first.

    A neuron's index means nothing and few matter, so the axis is the rank, on a logarithmic scale: each cell is the
    mean score of the ranks that it covers.
    """
    table: torch.Tensor = getattr(scores, kind)
    known_Ln = table.double().masked_fill(~scores.seen(kind), -torch.inf)
    places_Ln = torch.arange(table.shape[1]).expand_as(table)
    if kind == Kind.NEURON:
        known_Ln, places_Ln = known_Ln.sort(dim=1, descending=True, stable=True)
        starts = rank_edges(table.shape[1])
        edges = np.asarray(starts, dtype=float) + 1  # rank 1 is the strongest
    else:
        starts = list(range(table.shape[1] + 1))
        edges = np.asarray(starts, dtype=float) - 0.5
    values = np.full((len(table), len(starts) - 1), np.nan)
    labels: list[list[str]] = []
    for layer, (known_n, places_n) in enumerate(zip(known_Ln.numpy(), places_Ln.tolist(), strict=True)):
        labels.append([])
        for cell, (start, stop) in enumerate(pairwise(starts)):
            own = known_n[start:stop][np.isfinite(known_n[start:stop])]
            values[layer, cell] = own.mean() if len(own) else np.nan
            names = [Component(kind, layer, place).name for place in places_n[start : start + _MOST_NAMES][: len(own)]]
            labels[-1].append(_label(names, own))
    return CellMap(kind, values, edges, labels)


def _label(names: list[str], own: np.ndarray) -> str:
    if not names:
        return "not scored"
    more = f" and {len(own) - len(names)} more" if len(own) > len(names) else ""
    return f"{', '.join(names)}{more}: {'mean ' if len(own) > 1 else ''}{own.mean():.4g}"


def rank_edges(count: int, cells: int = 40) -> list[int]:
    """0 = first edge < ... < last edge = count, about `cells` steps that grow by a constant factor."""
    edges = np.unique(np.round(np.geomspace(1, count + 1, cells + 1)).astype(int)) - 1
    return [int(edge) for edge in edges]


def scale_of(maps: Sequence[CellMap]) -> float:
    """The largest size of any cell: where the colours of all these maps end. 1 where all are 0."""
    return max((float(np.nanmax(np.abs(m.values))) for m in maps if np.isfinite(m.values).any()), default=0.0) or 1.0


def map_svg(scores: Scores, kind: Kind, scale: float, colour: str, name: str) -> Markup:
    """White is 0, `colour` is positive, grey is negative; a dashed line above the anchor layer; `name`: whose it is."""
    cells = score_map(scores, kind)
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(5.2, _height(cells)), layout="constrained", dpi=72)  # an SVG's points
        panels = figure.subplots(1, 2, width_ratios=[5, 1], sharey=True)
        mapping = _draw_map(figure, panels, cells, scores, scale, colour, mesh=False)
    above = "" if scores.meta.read_at is None else "; the dashed line is above the anchor layer"
    return to_svg(figure, f"Scores of the {kind} of {name} by layer{above}", CellRects(panels[0], cells, mapping))


class Picture(Figure):
    """A figure that a notebook shows by itself, with no pyplot set up."""

    def _repr_png_(self) -> bytes:
        with matplotlib.rc_context(FIGURE_STYLE):
            return to_png(self, 80)


def maps_figure(files: Mapping[str, Scores]) -> Picture:
    """A row a file, by name: its map of heads and its map of neurons, as `map_svg` has them."""
    maps = {kind: [score_map(scores, kind) for scores in files.values()] for kind in Kind}
    height = sum(_height(cells) + 0.3 for cells in maps[Kind.HEAD])
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Picture(figsize=(11, height), layout="constrained")
        rows = figure.subfigures(len(files), 1, squeeze=False)[:, 0]
        for place, (name, scores) in enumerate(files.items()):
            rows[place].suptitle(label_of(name), fontsize=11)
            panels = rows[place].subplots(1, 4, width_ratios=[5, 1, 5, 1], sharey=True)
            for kind, pair in zip(Kind, (panels[:2], panels[2:]), strict=True):
                cells, scale = maps[kind][place], scale_of(maps[kind])
                _draw_map(rows[place], pair, cells, scores, scale, expert_colour(place), mesh=True)
    return figure


def maps_png(files: Mapping[str, Scores]) -> bytes:
    """`maps_figure` as a PNG."""
    figure = maps_figure(files)
    with matplotlib.rc_context(FIGURE_STYLE):
        return to_png(figure)


def _height(cells: CellMap) -> float:
    return min(max(2.5, 0.2 * len(cells.values) + 1.1), 7.5)


def _draw_map(
    figure: Any, panels: Sequence[Axes], cells: CellMap, scores: Scores, scale: float, colour: str, mesh: bool
) -> ScalarMappable:
    axes, side = panels
    layers, ranked = len(cells.values), cells.kind == Kind.NEURON
    mapping = ScalarMappable(CenteredNorm(0, halfrange=scale), shades(colour, NEGATIVE))
    if ranked:
        axes.set_xscale("log")
        axes.set_xlabel("rank of the neuron in its layer (1 = strongest)")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_xlabel("head")
    draw_cells(axes, cells, mapping, mesh)
    if not ranked:
        integer_ticks(axes, "x", cells.values.shape[1])
    axes.set_ylabel("layer")
    integer_ticks(axes, "y", layers)
    share_L = 100 * layer_shares_of(scores)[cells.kind].numpy()
    side.barh(np.arange(layers), share_L, 0.78, color=colour)
    if scores.meta.read_at is not None:
        for panel in (axes, side):
            panel.axhline(scores.meta.read_at + 0.5, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
    side.set_xlabel("% of all\nscore")
    side.tick_params(left=False)
    what = "mean score" if ranked else "score"
    bar = colour_bar(figure, mapping, side, what, mesh, fraction=0.5, aspect=18, pad=0.15)
    bar.ax.tick_params(labelsize=8)
    return mapping


def draw_cells(axes: Axes, cells: CellMap, mapping: ScalarMappable, mesh: bool) -> None:
    """Layer 0 at the bottom; without `mesh` the place alone, which `CellRects` fills once the figure is an SVG."""
    layers = len(cells.values)
    if mesh:
        rows, values = np.arange(layers + 1) - 0.5, np.ma.masked_invalid(cells.values)
        norm: Any = mapping.norm
        axes.pcolormesh(cells.edges, rows, values, cmap=mapping.cmap, norm=norm, edgecolors=MESH, lw=0.4)
        return
    corner, size = (cells.edges[0], -0.5), (cells.edges[-1] - cells.edges[0], layers)
    axes.add_patch(Rectangle(corner, *size, facecolor="none", gid=_CELLS))
    axes.set(xlim=(cells.edges[0], cells.edges[-1]), ylim=(-0.5, layers - 0.5))


def colour_bar(figure: Any, mapping: ScalarMappable, axes: Axes, what: str, mesh: bool, **shape: Any) -> Colorbar:
    """What the colours of a map mean; `mesh` as in `draw_cells`."""
    bar: Colorbar = figure.colorbar(mapping, ax=axes, **shape)
    bar.outline.set_visible(False)
    bar.set_label(what)
    if not mesh:
        assert bar.solids is not None
        bar.solids.set_visible(False)
        bar.ax.add_patch(Rectangle((0, 0), 1, 1, transform=bar.ax.transAxes, facecolor="none", gid=_SHADES))
    return bar


@dataclass(frozen=True)
class CellRects:
    """The cells of a map as rectangles with a title each, in the coordinates of the figure's SVG."""

    axes: Axes
    cells: CellMap
    mapping: ScalarMappable

    def svg(self, height: float) -> str:
        """To be called once the figure is laid out; `height` in points, from where an SVG counts downwards."""
        at = self.axes.transData.transform
        colours = self.mapping.to_rgba(np.ma.masked_invalid(self.cells.values))
        parts = []
        for layer, labels in enumerate(self.cells.labels):
            for cell, (left, right) in enumerate(pairwise(self.cells.edges)):
                (x0, y0), (x1, y1) = at((left, layer - 0.5)), at((right, layer + 0.5))
                where = f'x="{x0:.1f}" y="{height - y1:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
                fill = f'fill="{to_hex(colours[layer, cell])}" fill-opacity="{colours[layer, cell][3]:.3g}"'
                parts.append(f"<rect {where} {fill}><title>{html(labels[cell])}</title></rect>")
        return f'<g class="cells" stroke="{MESH}" stroke-width=".4">{"".join(parts)}</g>'

    def bar_svg(self, path: str) -> str:
        """The colours of the bar, from its lower end up."""
        stops = []
        for at in (0.0, 0.498, 0.502, 1.0):  # negative and positive meet where both are nothing
            colour = self.mapping.cmap(at)
            stops.append(f'<stop offset="{at}" stop-color="{to_hex(colour)}" stop-opacity="{colour[3]:.3g}"/>')
        gradient = f'<linearGradient id="{_SHADES}" x1="0" y1="1" x2="0" y2="0">{"".join(stops)}</linearGradient>'
        return f'<defs>{gradient}</defs><path d="{path}" fill="url(#{_SHADES})"/>'


def shares_svg(
    shares: Mapping[str, np.ndarray], names: Sequence[str], faint: Mapping[str, np.ndarray], of: str
) -> Markup:
    """`shares_png` for a page; `faint` [L] of each kind: layers whose shares say little; `of`: the merge's name."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained", dpi=72)
        _draw_panels(figure, shares, names, faint)
    return to_svg(figure, f"Mean fusion weight of each expert in each layer's heads and neurons, in {of}")


def shares_png(shares: Mapping[str, np.ndarray], names: Sequence[str]) -> bytes:
    """A PNG with one panel a kind of component (`heads`, `neurons`), each [K, L]; on white, for any page."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(4.8 * len(shares), 2.9), layout="constrained")
        _draw_panels(figure, shares, names, {})
        return to_png(figure)


def _draw_panels(
    figure: Figure, shares: Mapping[str, np.ndarray], names: Sequence[str], faint: Mapping[str, np.ndarray]
) -> None:
    panels = np.atleast_1d(figure.subplots(1, len(shares)))
    for axes, (components, share_KL) in zip(panels, shares.items(), strict=True):
        draw_shares(axes, share_KL, names, components, faint.get(components))
    legend_above(figure, *panels[0].get_legend_handles_labels(), handlelength=1)


def are_shares(weight_KL: np.ndarray) -> bool:
    """Whether weights sum to 1 in every layer, as scores give them and a fit need not; they have four digits."""
    return bool(np.allclose(weight_KL.sum(0), 1, atol=0.01))


def draw_shares(
    axes: Axes, share_KL: np.ndarray, names: Sequence[str], components: str, faint_L: np.ndarray | None = None
) -> None:
    """How much of each layer of the merge comes from which expert: mean fusion weight, stacked; shares end at 1."""
    layers = np.arange(share_KL.shape[1])
    bottom = np.zeros(len(layers))
    for index, (name, share_L) in enumerate(zip(names, share_KL, strict=True)):
        bars = axes.bar(layers, share_L, 0.82, bottom=bottom, color=expert_colour(index))
        for bar, faint in zip(bars, np.zeros(len(layers)) if faint_L is None else faint_L, strict=True):
            bar.set_alpha(_FAINT if faint else None)
        axes.add_patch(Rectangle((0, 0), 0, 0, color=expert_colour(index), label=label_of(name)))  # in the legend alone
        bottom += share_L
    for boundary in range(1, len(names)):  # where the bars of a plain average would meet
        axes.axhline(boundary / len(names), color="white", linewidth=1.2, linestyle=(0, (3, 3)))
    shared = are_shares(share_KL)
    top = 1 if shared else max(1, 1.04 * bottom.max())
    axes.set(xlabel="layer", ylabel=f"{'share' if shared else 'weight'} of its {components}", ylim=(0, top))
    ticks = np.arange(0, top + 1e-6, 0.5 if top < 2 else 1)
    axes.set_yticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks])
    axes.set_xlim(-0.6, len(layers) - 0.4)
    integer_ticks(axes, "x", len(layers))


def recovery_lines(curve: RecoveryCurve, colour: str, name: str) -> Markup:
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
    return to_svg(figure, f"How much of the capability of {name} steering recovers, by layer; chosen: {curve.chosen}")


def legend_above(figure: Figure, handles: Sequence[Any], labels: Sequence[str], **style: Any) -> None:
    """A legend over the panels, in as many columns as the picture is wide enough for."""
    for columns in range(max(1, len(labels)), 0, -1):
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, **style)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def label_of(name: str) -> str:
    """A name in a picture as it reads: matplotlib takes `$...$` for mathematics and leaves out what begins with `_`.

    Of a name longer than `LONGEST` the middle is left out: it would leave no room for what it names.
    """
    text = one_line(name)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}…{text[-(LONGEST // 2 - 1) :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def titled(artist: Artist, title: str) -> None:
    """What an SVG says of a mark where the pointer rests on it."""
    artist.set_gid(f"{_MARK}{one_line(title)}")


def of_task(panel: Axes, task: str) -> None:
    """Whose panel it is, for a page that shows one task."""
    panel.set_gid(f"{_PANEL}{one_line(task)}")


def shades(colour: str, negative: str | None = None) -> Colormap:
    """0 is nothing at all, so that the page shows; the most is `colour`, and, if so, the least is `negative`."""
    up = [(*to_rgba(colour)[:3], alpha) for alpha in (0.0, 1.0)]
    if negative is None:
        found = LinearSegmentedColormap.from_list("up", up)
    else:
        down = [(*to_rgba(negative)[:3], alpha) for alpha in (1.0, 0.0)]
        found = LinearSegmentedColormap.from_list("both", list(zip((0, 0.5, 0.5, 1), [*down, *up], strict=True)), N=257)
    return found.with_extremes(bad=UNKNOWN)


def integer_ticks(axes: Axes, axis: str, count: int) -> None:
    step = max(1, -(-count // 10))
    getattr(axes, f"set_{axis}ticks")(range(0, count, step))


def to_png(figure: Figure, dpi: int = 144) -> bytes:
    """No date and no version in it: the same picture is the same file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, description: str, cells: CellRects | None = None) -> Markup:
    """The figure as an `<svg>` that fills the width of its box; `description` tells it from others of a page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**FIGURE_STYLE, "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    head, _, body = svg[svg.index("<svg") :].partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(rf'<g id="{_MARK}([^"]*)">', r'<g class="mark"><title>\1</title>', body)
    body = re.sub(rf'<g id="{_PANEL}([^"]*)">', r'<g data-task="\1">', body)
    if cells is not None:
        drawn = cells.svg(figure.get_figheight() * 72)
        body = re.sub(rf'<g id="{_CELLS}">.*?</g>', lambda _: drawn, body, flags=re.DOTALL)
        bar = re.compile(rf'<g id="{_SHADES}">\s*<path d="([^"]*)".*?</g>', re.DOTALL)
        body = bar.sub(lambda found: cells.bar_svg(found[1]), body)
    width = f"--width: {figure.get_figwidth() * 72:.0f}px"
    return Markup(f'{head} style="{width}" role="img" aria-label="{html(description)}">{_own_ids(body, description)}')


def _own_ids(svg: str, salt: str) -> str:
    """Without the ids that nothing refers to (figure_1 of every picture), the others told apart by `salt`."""
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    prefix = f"i{sha256(salt.encode('utf-8', errors='replace')).hexdigest()[:10]}-"
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r'(url\(#|href="#)([^")]+)', lambda m: f"{m[1]}{prefix}{m[2]}", svg)
