"""The demo's steps, pictures and page, on synthetic scores; the demo itself is run by `make demo` and CI."""

from __future__ import annotations

import re
import shlex
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import click
import pytest
import torch
import yaml

from experiments.demo.build_report import Command, Report, wrapped
from experiments.demo.demo_pipeline import EXPERTS, MERGES, demo_steps, write_pipeline
from experiments.demo.pictures import head_map, neuron_map, rank_edges, share_bars
from experiments.demo.template import JUDGED
from experiments.demo.world_choice import WorldChoice
from mergekit_wp.choices import UTILITIES
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.rows import Cell, Row
from mergekit_wp.eval.suite import Suite, SuiteTask
from mergekit_wp.eval.tables import Table, read_results, to_json
from mergekit_wp.geometry import Geometry
from mergekit_wp.hashing import digest
from mergekit_wp.merge.kernel import component_weights
from mergekit_wp.scores import ModelId, ScoreMeta, Scores, TaskMeta, TaskScores, UtilityStats

LAYERS, HEADS, NEURONS, WIDTH = 6, 8, 384, 128


def synthetic_scores(seed: int) -> Scores:
    """Sparse heavy-tailed scores with a few negative ones, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(LAYERS, HEADS, generator=generator).abs() ** 3 * 0.05 - 0.01
    neurons = torch.randn(LAYERS, NEURONS, generator=generator).abs() ** 5 * 0.002 - 0.0003
    model = ModelId("runs/demo/world/base", None, "c" * 64, "a" * 64)
    used = UtilityStats(used=32, dropped=1, mean_gap=0.4)
    meta = ScoreMeta(
        base=model, expert=model,
        geometry=Geometry(
            architecture="LlamaForCausalLM", layers=LAYERS, heads=HEADS, kv_heads=4, head_dim=16,
            neurons=NEURONS, d_model=WIDTH, vocabulary=110,
        ),
        tasks={"one": TaskMeta(extraction=32, scoring=33, utilities={"anchor": used})},
        method="writeback", utility="staged", gap="mean", split="half", anchor_layer=3, dtype="float32",
        device="cpu", seed=0, versions={"torch": "2"}, date="2026-11-21T00:00:00+00:00",
    )  # fmt: skip
    return Scores.from_tasks(meta, {"one": TaskScores(heads, neurons, torch.zeros(WIDTH))})


def synthetic_table() -> Table:
    tasks = tuple(SuiteTask(task=f"mini_{name}", column=name, metric="acc,none") for name in EXPERTS)
    values = {
        "base": (0.11, 0.12, 0.13), "instruction": (0.9, 0.1, 0.1), "maths": (0.1, 0.9, 0.1),
        "code": (0.1, 0.1, 0.9), "linear": (0.5, 0.4, 0.3), "wp": (0.6, 0.35, 0.3),
    }  # fmt: skip
    rows = []
    for name, row in values.items():
        cells = {column: Cell(value, 0.02, 200) for column, value in zip(EXPERTS, row, strict=True)}
        rows.append(Row(EvalModel(name, f"runs/{name}", Path(f"runs/{name}"), "f" * 64), cells, {}))
    return Table(Suite("miniature", tasks), rows, "linear", None)


def synthetic_page() -> str:
    scores = {name: synthetic_scores(seed) for seed, name in enumerate(EXPERTS)}
    commands = [Command("Score <it>", "wp-score --base a --expert b")]
    return Report(synthetic_table(), scores, MERGES, commands).html()


class Outline(HTMLParser):
    """Tags with their attributes, in order, and whether every one that opens also closes."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_nobody_for_anything() -> None:
    page = synthetic_page()
    outline = Outline(page)
    assert outline.open == []
    names = [tag for tag, _ in outline.tags]
    assert "script" not in names
    assert names.count("svg") == 2 * len(EXPERTS) + 2
    for _, attributes in outline.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "@import" not in page
    assert "url(http" not in page
    ids = re.findall(r' id="([^"]+)"', page)
    clips = [i for i in ids if re.fullmatch(r"p[0-9a-f]{10}", i)]
    assert len(clips) == len(set(clips)), "pictures on one page must not share clip paths"


def test_the_table_marks_the_best_merge_only() -> None:
    page = synthetic_page()
    assert re.findall(r"<strong>([\d.]+)</strong>", page) == ["40.0", "30.0", "60.0", "30.0", "41.7"]
    assert '<small class="up">+10.0</small>' in page
    assert '<small class="down">-5.0</small>' in page
    assert "Score &lt;it&gt;" in page


def test_results_json_reads_back_as_the_same_table(tmp_path: Path) -> None:
    table = synthetic_table()
    path = tmp_path / "results.json"
    path.write_text(to_json(table, {"suite_content": {"name": "miniature"}}))
    again = read_results(path)
    assert [(row.model, row.cells) for row in again.rows] == [(row.model, row.cells) for row in table.rows]
    assert again.baseline == "linear"
    path.write_text("{}")
    with pytest.raises(click.ClickException, match="evaluate again"):
        read_results(path)


@pytest.mark.parametrize(("layers", "heads", "neurons"), [(1, 1, 1), (2, 3, 7), (40, 40, 2000)])
def test_pictures_of_any_size_are_valid_xml_without_a_fixed_width(layers, heads, neurons) -> None:
    torch.manual_seed(0)
    scores = [torch.randn(layers, heads), torch.zeros(layers, heads)]
    pictures = [
        *(head_map(score, layers - 1, "#0072b2") for score in scores),
        neuron_map(torch.randn(layers, neurons), 0, "#d55e00"),
        neuron_map(torch.randn(layers, neurons), None, "#d55e00"),
        share_bars(component_weights(scores), ["a", "b"], "heads"),
    ]
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("width") is None
        assert root.get("viewBox")


@pytest.mark.parametrize(("utility", "metrics", "read_at"), [
    ("kl", ("kl",), None), ("projection", ("projection",), None),
    ("anchor", ("anchor",), 3), ("staged", ("anchor", "kl"), 3),
])  # fmt: skip
def test_the_anchor_is_drawn_only_where_scores_were_read_there(utility, metrics, read_at) -> None:
    scores = synthetic_scores(0)
    task = replace(scores.meta.tasks["one"], utilities=dict.fromkeys(metrics, UtilityStats(32, 0, 0.4)))
    scores = replace(scores, meta=replace(scores.meta, utility=utility, tasks={"one": task}))
    assert scores.meta.read_at == read_at
    page = Report(synthetic_table(), {"code": scores}, (), []).html()
    assert ("above the anchor layer" in page) == ("anchor layer 3" in page) == (read_at is not None)
    assert JUDGED[utility] in page
    assert set(JUDGED) == set(UTILITIES)


@pytest.mark.parametrize("count", [1, 2, 10, 384, 13824])
def test_ranks_are_each_in_one_cell(count: int) -> None:
    edges = rank_edges(count)
    assert edges[0] == 0
    assert edges[-1] == count
    assert all(b > a for a, b in pairwise(edges))
    assert len(edges) <= 41


def test_the_plan_makes_every_input_before_it_is_read(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path)
    made: set[Path] = set()
    for step in demo_steps(pipeline, WorldChoice(tmp_path / "worlds")):
        for path in step.inputs:
            assert path.exists() or path in made or tmp_path / "world" in path.parents, f"{step.name} reads {path}"
        made |= set(step.outputs)
    assert tmp_path / "report.html" in made


def test_the_pipeline_file_is_written_the_same_again(tmp_path: Path) -> None:
    first = write_pipeline(tmp_path)
    before = digest(tmp_path)
    assert write_pipeline(tmp_path) == first
    assert digest(tmp_path) == before
    wp = yaml.safe_load((tmp_path / "recipes" / "wp.yaml").read_text())
    assert [list(model["parameters"]) for model in wp["models"]] == [["scores"]] * 3


def test_a_wrapped_command_is_the_same_command() -> None:
    words = ["wp-score", "--base", "a" * 40, "--expert", "b c" * 20, "--quiet", "x=" + "y" * 60]
    text = wrapped(words)
    assert shlex.split(text.replace("\\\n", "")) == words  # as a shell joins lines
    assert len(text.splitlines()) > 1
    assert not any(line.rstrip(" \\").endswith(("--base", "--expert")) for line in text.splitlines())
