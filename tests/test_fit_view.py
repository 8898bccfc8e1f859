"""A fit file shown: text, numbers, pictures and page say what is in the file."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import fit_example
import pytest
from click.testing import CliRunner
from made_scores import synthetic_scores

from mergekit_wp.fit_file import Fit, FittedPrompts, Kept, LossAt, write_fit
from mergekit_wp.fit_page import curve_png, curve_svg, weights_svg
from mergekit_wp.geometry import Kind
from mergekit_wp.scores import ModelId, write_scores
from mergekit_wp.scores_cli import main

CELLS = ".//{*}rect[{*}title]"
SVG = "{http://www.w3.org/2000/svg}"


def run(*words):
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.fixture
def fit(tmp_path) -> Fit:
    kept = Kept("neutral.jsonl", FittedPrompts(6, 2), 0.375, 0.125)
    experts = (fit_example.EXPERTS[0], ModelId("$two\x1b<b>", None, "c" * 64, "2" * 64))
    found = fit_example.example(replace(fit_example.meta(experts=experts), keep=kept))
    write_fit(found, tmp_path / "f.safetensors")
    return found


def cells_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_terminal_has_shares_losses_and_mean_weights(tmp_path, fit):
    result = run(tmp_path / "f.safetensors")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    lines = cells_of(result.output)
    weights = [f"{float(tensor[0].mean()):.3f}" for tensor in (fit.heads, fit.neurons, fit.rest)]
    assert ["user/one", "16", "4", "1.000", "0.550", "0.300", *weights] in lines
    assert ["the", "base", "on", "neutral.jsonl", "8", "2", "0.000", "0.375", "0.125"] in lines
    assert ["0", "0.5000", "0.5500"] in lines
    assert ["10", "0.2500", "0.3000", "*"] in lines
    means = [f"{float(t[k, 2].mean()):.3f}" for k in range(2) for t in (fit.heads, fit.neurons)]
    assert ["2", *means] in lines


def test_json_is_the_document_and_the_means(tmp_path, fit):
    said = json.loads(run(f"mine={tmp_path / 'f.safetensors'}", "--json").stdout)["fits"]["mine"]
    assert said["meta"] == json.loads(fit.meta.to_json())
    assert said["mean_weights"]["neurons"][1][2] == pytest.approx(float(fit.neurons[1, 2].mean()), rel=1e-6)
    assert said["mean_weights"]["rest"] == fit.rest.tolist()


def test_cells_of_the_map_are_named_by_what_they_are(fit):
    heads, neurons = (
        {rect.findtext(f"{SVG}title"): float(rect.get("fill-opacity")) for rect in picture.iterfind(CELLS)}
        for picture in (ElementTree.fromstring(weights_svg(fit, kind, "x")) for kind in Kind)
    )
    titles, shape = list(heads), fit.meta.geometry
    assert len(titles) == 2 * shape.layers
    assert titles[0] == f"user/one, heads of layer 0: {float(fit.heads[0, 0].double().mean()):.4g}"
    darkest = max(neurons, key=lambda title: neurons[title])
    means = fit.neurons.double().mean(-1)
    best = divmod(int(means.argmax()), shape.layers)
    assert darkest.endswith(f"of layer {best[1]}: {float(means.max()):.4g}")


@pytest.mark.parametrize("held_out", [True, False])
def test_a_curve_of_one_look_or_without_prompts_held_out_is_drawn(fit, held_out):
    meta = replace(fit.meta, curve=(LossAt(0, 0.5, 0.5 if held_out else None),), best_step=0)
    one = Fit(meta, fit.heads, fit.neurons, fit.rest)
    text = "".join(ElementTree.fromstring(curve_svg(one, "x")).itertext())
    assert "kept: step 0" in text
    assert ("held out" in text) == held_out
    assert curve_png(one).startswith(b"\x89PNG")
    assert curve_png(one) == curve_png(one)


def test_page_and_picture_are_written_and_escaped(tmp_path, fit):
    png, page = tmp_path / "f.png", tmp_path / "f.html"
    result = run(tmp_path / "f.safetensors", "--quiet", "--png", png, "--html", page)
    assert (result.exit_code, result.output) == (0, "")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "<b>" not in text
    assert "the base on neutral.jsonl" in text


def test_refusals(tmp_path, fit):
    file = tmp_path / "f.safetensors"
    write_scores(synthetic_scores(0), tmp_path / "s.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(file.read_bytes()[:-4])
    for words, said in (
        ((file, tmp_path / "s.safetensors"), "show fit files apart from score files"),
        ((file, file), "tell them apart with NAME=FILE"),
        ((file, "--png", file), "f.safetensors"),
        ((tmp_path / "damaged.safetensors",), "cannot be read"),
        ((tmp_path / "none.safetensors",), "no such score file"),
    ):
        result = run(*words)
        assert result.exit_code == 2
        assert said in result.output
    assert file.read_bytes()
