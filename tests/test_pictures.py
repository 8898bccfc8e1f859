"""Pictures of scores: valid on their own and beside one another, on one scale, and every cell by its right name."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from made_scores import synthetic_scores
from matplotlib.figure import Figure

from mergekit_wp.geometry import Geometry, Kind
from mergekit_wp.merge.kernel import component_weights
from mergekit_wp.pictures import (
    LONGEST,
    draw_shares,
    label_of,
    map_svg,
    maps_png,
    rank_edges,
    scale_of,
    score_map,
    shares_svg,
)
from mergekit_wp.scores import Scores, TaskScores
from mergekit_wp.study.drawings import matrix_svg

SVG = "{http://www.w3.org/2000/svg}"


def made(heads_LH: torch.Tensor, neurons_LF: torch.Tensor, scored: dict | None = None) -> Scores:
    whole = synthetic_scores(0)
    layers = len(heads_LH)
    geometry = Geometry("LlamaForCausalLM", layers, heads_LH.shape[1], 1, 16, neurons_LF.shape[1], 128, 110)
    meta = replace(whole.meta, geometry=geometry, anchor_layer=layers - 1)
    return Scores.from_tasks(meta, {"one": TaskScores(heads_LH, neurons_LF, torch.zeros(128))}, scored)


@pytest.mark.parametrize(("layers", "heads", "neurons"), [(1, 1, 1), (2, 3, 7), (40, 40, 2000)])
def test_pictures_of_any_size_are_valid_xml_without_a_fixed_width(layers, heads, neurons) -> None:
    torch.manual_seed(0)
    files = [
        made(torch.randn(layers, heads), torch.randn(layers, neurons)),
        made(torch.zeros(layers, heads), torch.zeros(layers, neurons)),
    ]
    pictures = [map_svg(scores, kind, 1.0, "#0072b2", f"x{i}") for i, scores in enumerate(files) for kind in Kind]
    shares = {str(kind): component_weights([getattr(s, kind) for s in files]).mean(-1).numpy() for kind in Kind}
    pictures.append(shares_svg(shares, ["a", "b"], {}, "wp"))
    ids = []
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("width") is None
        assert root.get("viewBox")
        own = {element.get("id") for element in root.iter()} - {None}
        referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', picture))
        assert referred <= own
        ids += own
    assert len(ids) == len(set(ids)), "pictures on one page share no id"


def test_weights_of_a_fit_are_drawn_to_their_height() -> None:
    """They need not sum to 1, so nothing is cut off, and they are not called shares."""
    for weights, top, label, ticks in (
        ([[0.25, 0.6], [0.75, 0.4]], 1.0, "share of its heads", 3),
        ([[0.25, 0.1], [0.25, 0.2]], 1.0, "weight of its heads", 3),
        ([[1.5, 0.5], [1.0, 0.25]], 2.6, "weight of its heads", 3),
    ):
        axes = Figure().add_subplot()
        draw_shares(axes, np.array(weights), ["a", "b"], "heads")
        ends = [bar.get_y() + bar.get_height() for bars in axes.containers[1:] for bar in bars]
        assert ends == pytest.approx(np.sum(weights, 0))
        assert axes.get_ylim() == pytest.approx((0, top))
        assert axes.get_ylabel() == label
        assert len(axes.get_yticks()) == ticks


def test_cells_are_named_and_lie_where_the_scores_are() -> None:
    heads, neurons = torch.zeros(3, 4), torch.zeros(3, 10)
    heads[1, 2], neurons[2, 7], neurons[2, 3] = -0.25, 0.5, 0.125
    svg = ElementTree.fromstring(map_svg(made(heads, neurons), Kind.HEAD, 0.5, "#0072b2", "x"))
    cells = [(rect, rect.findtext(f"{SVG}title")) for rect in svg.iter(f"{SVG}rect")]
    assert [title for _, title in cells][:5] == ["L0H0: 0", "L0H1: 0", "L0H2: 0", "L0H3: 0", "L1H0: 0"]
    (found,) = [rect for rect, title in cells if title == "L1H2: -0.25"]
    (below,) = [rect for rect, title in cells if title == "L0H2: 0"]
    assert found.get("x") == below.get("x")
    assert float(found.get("y")) < float(below.get("y"))  # layer 0 is at the bottom
    assert below.get("fill-opacity") == "0"
    assert (found.get("fill"), found.get("fill-opacity")) == ("#6b7280", "0.5")  # half of the way to grey
    labels = score_map(made(heads, neurons), Kind.NEURON).labels
    assert labels[2][:2] == ["L2N7: 0.5", "L2N3: 0.125"]


def test_a_cell_of_many_neurons_says_so_and_what_was_not_scored() -> None:
    neurons = torch.arange(5000.0).flip(0)[None] / 5000
    cells = score_map(made(torch.zeros(1, 2), neurons), Kind.NEURON)
    assert cells.labels[0][-1].startswith("L0N")
    assert " more: mean " in cells.labels[0][-1]
    mask = torch.zeros(1, 2)
    mask[0, 1] = 1
    cells = score_map(made(torch.zeros(1, 2), neurons, {"heads": mask, "neurons": torch.zeros(1, 5000)}), Kind.HEAD)
    assert cells.labels == [["not scored", "L0H1: 0"]]
    assert np.isnan(cells.values).tolist() == [[True, False]]


def test_maps_share_a_scale() -> None:
    small, large = made(torch.full((2, 2), 0.1), torch.zeros(2, 3)), made(torch.full((2, 2), -0.4), torch.zeros(2, 3))
    maps = [score_map(scores, Kind.HEAD) for scores in (small, large)]
    assert scale_of(maps) == pytest.approx(0.4)
    assert scale_of([score_map(small, Kind.NEURON)]) == 1
    svg = map_svg(small, Kind.HEAD, 0.4, "#0072b2", "x")
    assert 'fill="#0072b2" fill-opacity="0.25"' in svg  # a quarter of the way


def test_faint_layers_are_pale() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    draw_shares(axes, np.full((2, 3), 0.5), ["a", "b"], "heads", np.array([False, True, False]))
    bars = [bar for container in axes.containers for bar in container]
    assert [bar.get_alpha() for bar in bars] == [None, 0.25, None] * 2
    assert axes.get_legend_handles_labels()[1] == ["a", "b"]


def test_a_png_of_several_files() -> None:
    files = {"a": synthetic_scores(0), "b $": synthetic_scores(1)}
    assert maps_png(files).startswith(b"\x89PNG")
    assert maps_png(files) == maps_png(files)


@pytest.mark.parametrize("count", [1, 2, 10, 384, 13824])
def test_ranks_are_each_in_one_cell(count: int) -> None:
    edges = rank_edges(count)
    assert edges[0] == 0
    assert edges[-1] == count
    assert all(b > a for a, b in pairwise(edges))
    assert len(edges) <= 41


@pytest.mark.filterwarnings("error:constrained_layout not applied")
@pytest.mark.parametrize("count", [2, 12])
def test_a_long_name_loses_its_middle_and_leaves_room_for_what_it_names(count) -> None:
    names = [f"{number}: {'length_constraints/' * 9}sentences" for number in range(count)]
    labels = [label_of(name) for name in names]
    assert len(set(labels)) == count
    assert all(len(label) == LONGEST and label.endswith("sentences") for label in labels)
    assert label_of("length_constraints:number_sentences") == "length_constraints:number_sentences"
    picture = matrix_svg({"heads": np.eye(count), "neurons": np.eye(count)}, names, "shared")
    assert "…" in picture
