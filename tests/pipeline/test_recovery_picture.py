"""The recovery curve in the report."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from made_scores import synthetic_scores

from mergekit_wp.pictures import recovery_lines
from mergekit_wp.pipeline.report import Report
from mergekit_wp.recovery import TaskRecovery
from mergekit_wp.scoring.anchor.search import Search, choose


def curve(depth, tasks):
    layers = tuple(range(depth))
    values = [layer / depth for layer in layers]
    made = {
        f"task {i}": TaskRecovery("kl" if i % 2 else "behaviour", 4, 0.0, 1.0, tuple(values), (-7.0, *values[1:]))
        for i in range(tasks)
    }
    return choose(layers, {**made, "left out": TaskRecovery("none", 4, 0.0, 0.0)}, depth, Search())


@pytest.mark.parametrize(("depth", "tasks"), [(2, 1), (6, 3), (40, 12)])
def test_the_picture_is_valid_and_names_every_graded_task(depth, tasks):
    svg = recovery_lines(curve(depth, tasks), "#0072b2", "maths")
    ElementTree.fromstring(svg)
    assert f"chosen: {depth - 1}" in svg
    assert all(f">task {i}<" in svg for i in range(tasks))
    assert "left out" not in svg


def test_the_report_has_the_section_only_where_a_layer_was_chosen():
    def page(*curves):
        whole = synthetic_scores(0)
        scores = {f"expert {i}": replace(whole, meta=replace(whole.meta, recovery=c)) for i, c in enumerate(curves)}
        return Report(None, scores, (), {}, (), ()).html()

    title = "How each anchor layer was chosen"
    assert title not in page(None, None)
    section = page(None, curve(6, 2)).partition(title)[2]
    assert "expert 1" in section
    assert "expert 0" not in section
