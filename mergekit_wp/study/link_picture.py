"""The picture of a circuit: layers across; sources, heads and neurons that gather, and execution as three rows.

The strongest links and nodes alone are drawn; all are in circuit.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from mergekit_wp.geometry import Kind
from mergekit_wp.palette import QUIET
from mergekit_wp.pictures import FIGURE_STYLE, expert_colour, integer_ticks, titled, to_svg

ROLES = {"execution": "carries the answer", "aggregation": "gathers", "source": "source"}
"""Rows of the picture, lowest last."""
MOST_LINKS, MOST_NODES = 40, 40
"""Links to heads, and as many to neurons; nodes that carry the answer."""
_COLOURS = {Kind.HEAD: 1, Kind.NEURON: 0}


def circuit_svg(circuit: Mapping[str, Any], layers: int, task: str) -> Markup:
    """Node by size of its score, link by its own."""
    kind_of = {node["name"]: node["kind"] for node in circuit["nodes"]}
    links = [
        link for kind in Kind for link in [each for each in circuit["links"] if kind_of[each[1]] == kind][:MOST_LINKS]
    ]
    linked = {name for source, target, _link in links for name in (source, target)}
    nodes = [node for node in circuit["nodes"] if node["role"] != "execution" and node["name"] in linked]
    nodes += [node for node in circuit["nodes"] if node["role"] == "aggregation" and node["name"] not in linked]
    nodes += [node for node in circuit["nodes"] if node["role"] == "execution"][:MOST_NODES]
    places = _places(nodes)
    most = max((abs(link) for _source, _target, link in links), default=0.0) or 1.0
    largest = max((abs(node["score"]) for node in nodes), default=0.0) or 1.0
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained", dpi=72)
        axes = figure.subplots()
        for source, target, link in links:
            (x, y), (to_x, to_y) = places[source], places[target]
            width = 0.3 + 3 * abs(link) / most
            ink = expert_colour(_COLOURS[Kind(kind_of[target])])
            axes.plot([x, to_x], [y, to_y], color=ink, lw=width, alpha=0.3, solid_capstyle="round", zorder=1)
        for kind, colour in _COLOURS.items():
            own = [node for node in nodes if node["kind"] == kind]
            for place, node in enumerate(own):
                size, label = 8 + 60 * abs(node["score"]) / largest, str(kind) if place == 0 else None
                mark = axes.scatter(*places[node["name"]], s=size, color=expert_colour(colour), label=label, zorder=2)
                titled(mark, f"{node['name']}, {ROLES[node['role']]}: {node['score']:.4g}")
        axes.axvline(circuit["anchor_layer"] + 0.5, color=QUIET, lw=0.8, ls=":")
        axes.set_yticks(range(len(ROLES)), list(ROLES.values())[::-1])
        axes.set(xlabel="layer (dotted: the anchor)", xlim=(-0.6, layers - 0.4), ylim=(-0.5, len(ROLES) - 0.5))
        integer_ticks(axes, "x", layers)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return to_svg(figure, f"The circuit of {task}: sources, what gathers them, what carries the answer")


def _places(nodes: list[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Nodes of one layer and row side by side."""
    rows, found = list(ROLES)[::-1], {}
    together: dict[tuple[str, int], list[str]] = {}
    for node in nodes:
        together.setdefault((node["role"], node["layer"]), []).append(node["name"])
    for (role, layer), names in together.items():
        for i, name in enumerate(names):
            aside = 0.0 if len(names) == 1 else 0.7 * (i / (len(names) - 1) - 0.5)
            lift = 0.12 * (i % 3 - 1) if len(names) > 6 else 0.0
            found[name] = layer + aside, rows.index(role) + lift
    return found
