"""wp-study as a command: what it writes, what it does again, what it refuses."""

from __future__ import annotations

import ast
import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from importlib import import_module
from pathlib import Path

import pytest
import tiny
import yaml
from study_run import run
from study_world import scores, write_study

from mergekit_wp.checkpoint.folder import fingerprint_of
from mergekit_wp.scores import write_scores
from mergekit_wp.study import drift, parts

ONE = {"tasks": ("a",)}
PARTS = ("maps", "certainty", "drift", "words", "attention", "links")


@pytest.fixture(scope="module", autouse=True)
def _without_many_passes():
    """Parts of hundreds of forward passes have tests of their own."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("sets", "answers", "cases"):
            patched.delitem(parts.PARTS, name)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Few pictures, since each takes a third of a second."""
    folder = tmp_path_factory.mktemp("study")
    tiny.save_pair(folder, "llama")
    files = {"anchor": {"utility": "anchor", **ONE}, "ap": {"method": "ap", **ONE}}
    pairs = [
        {"task": "a", "prompt": f"w1 {asked} w5 w6 w2", "contrast": f"w1 {asked} w2"}
        for asked in ("w10 w11", "w12", "w13 w14 w15")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    prompts = {"pairs": str(folder / "pairs.jsonl"), "device": "cpu"}
    return write_study(folder, files, {"code": {"method": "ap", "tasks": ("code",)}}, prompts=prompts)


@pytest.fixture(scope="module")
def small(world) -> dict:
    """A study of one task, without prompts."""
    content = yaml.safe_load(world.read_text())
    del content["prompts"]
    return {**content, "scores": {"ap": content["scores"]["ap"]}, "others": {}}


@pytest.fixture(scope="module")
def out(world) -> Path:
    folder = world.parent / "out"
    said = run(world, "--out", folder).splitlines()
    assert said[: len(PARTS)] == [f"{part}: to do (not done yet)" for part in PARTS]
    assert said[-1] == f"Written: {folder / 'study.html'}"
    return folder


def test_what_is_written(out) -> None:
    assert sorted(path.name for path in out.iterdir()) == sorted([*PARTS, "study.html"])
    for part in PARTS:
        assert json.loads((out / part / f"{part}.json").read_text())
        for table in (out / part).glob("*.csv"):
            lines = list(csv.reader(table.open()))
            assert len(lines) > 1, table
            assert len({len(line) for line in lines}) == 1, table
        for picture in (out / part).glob("*.svg"):
            assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")
    maps = json.loads((out / "maps/maps.json").read_text())
    assert {row["compared"] for row in maps["agreement"]} == {"AP and WP"}
    assert {(row["file"], *row["tasks"]) for row in maps["tasks"]} == {("ap", "a", "code")}
    attention = json.loads((out / "attention/attention.json").read_text())
    assert attention["tasks"]["a"]["tokens"] == {"first": 1, "frame": 1, "instruction": 2, "content": 2}
    assert {(row["scores"], row["heads"]) for row in attention["sets"]} == {("anchor", 3), ("ap", 3)}
    words = json.loads((out / "words/words.json").read_text())
    assert {(row["source"], row["layer"]) for row in words["directions"]} == {
        ("anchor", 1),
        *(("prompts", layer) for layer in range(4)),
    }
    assert {row["kind"] for row in words["rankings"]} == {"heads", "neurons"}
    found = json.loads((out / "drift/drift.json").read_text())
    assert {(row["scores"], row["side"]) for row in found["correlations"]} == {
        (name, side) for name in ("anchor", "ap") for side in ("all", "up", "down")
    } - {("anchor", "down")}  # nobody scored these


def test_the_page_needs_nothing_else(out) -> None:
    page = (out / "study.html").read_text()
    assert re.findall(r'<section id="([a-z]+)">', page) == list(PARTS)
    short = page[page.index("In short") : page.index('<section id="maps">')]
    shown = ["maps-gaps-anchor", "maps-neurons-anchor", "links-circuit-a"]
    assert re.findall(r"<dd>[^<]+[.] <a href=\"#([a-z-]+)\">", short) == shown
    assert short.count("Not measured: needs ") == 2, "sets, and files with single prompts"
    assert re.findall(r"<li>[^<]+[.] <a href=\"#([a-z]+)\">See", short) == ["drift", "words", "attention"]
    refers = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]+)\)""", page)
    assert all(target.startswith(("#", "data:image/png;base64,")) for pair in refers for target in pair if target)
    assert re.findall("<script[^>]*>", page) == ['<script type="application/json" id="page-data">', "<script>"]
    assert "@import" not in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", parts.PARTS.values())
def test_a_part_names_all_code_of_the_study_that_decides_it(name: str) -> None:
    """Else a change there would leave its old result."""
    package, shared = (
        Path(parts.__file__).parents[1],
        {f"study/{x}.py" for x in ("parts", "study_spec", "inputs", "cells")},
    )
    left, found = [name.removeprefix("mergekit_wp.").replace(".", "/") + ".py"], set()
    while left:
        if (file := left.pop()) in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse((package / file).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mergekit_wp.study"):
                inside = node.module.removeprefix("mergekit_wp.").replace(".", "/")
                named = [f"{inside}.py", *(f"{inside}/{each.name}.py" for each in node.names)]
                left += [file for file in named if (package / file).is_file()]
    assert found - shared <= set(import_module(name).PART.code)


def test_only_what_changed_is_done_again(world, out, tmp_path) -> None:
    before = {part: (out / part).stat().st_ino for part in PARTS}
    page = (out / "study.html").read_bytes()
    assert run(world, "--out", out).splitlines()[: len(PARTS)] == [f"{part}: done" for part in PARTS]
    assert {part: (out / part).stat().st_ino for part in before} == before
    assert (out / "study.html").read_bytes() == page
    content = yaml.safe_load(world.read_text())
    other = tmp_path / "other.yaml"

    def plan(**changes: object) -> list[str]:
        other.write_text(yaml.safe_dump({**content, **changes}))
        return run(other, "--out", out, "--plan").splitlines()

    assert plan(seed=1) == ["maps: done"] + [f"{part}: to do (`seed` is another one)" for part in PARTS[1:]]
    assert plan(top={"heads": 4}) == [f"{part}: to do (`top` is another one)" for part in before]
    pairs = world.parent / "pairs.jsonl"
    text = pairs.read_text()
    pairs.write_text(text + "\n")
    assert plan()[-3:] == [f"{part}: to do (the file of prompts is another one)" for part in PARTS[-3:]]
    pairs.write_text(text)
    without = [f"{part}: done" for part in PARTS[:-3]] + ["words: to do (the file of prompts is gone)"]
    assert plan(prompts={}) == [
        *without,
        *(f"{part}: left out (the study has no `prompts`)" for part in PARTS[-2:]),
    ]
    fewer = {name: path for name, path in content["scores"].items() if name != "anchor"}
    assert plan(scores=fewer)[0] == "maps: to do (the score file anchor is gone)"
    assert {part: (out / part).stat().st_ino for part in before} == before, "a plan does nothing"
    table = out / "maps/top.csv"
    whole = table.read_text()
    table.write_text(whole + "x")
    assert run(world, "--out", out, "--plan").startswith(f"maps: to do ({table} is not what was written)")
    table.write_text(whole)


def test_a_run_that_ended_goes_on(small, tmp_path, monkeypatch) -> None:
    folder, file, both = tmp_path / "out", tmp_path / "s.yaml", ["--only", "maps,drift"]
    file.write_text(yaml.safe_dump(small))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(drift, "drift_sums", killed)
        run(file, "--out", folder, *both, code=1)
    assert sorted(path.name for path in folder.iterdir()) == ["maps", "study.html"]
    assert (folder / "study.html").read_text().count("<section id=") == 1
    assert run(file, "--out", folder, *both).splitlines()[:2] == ["maps: done", "drift: to do (not done yet)"]
    assert (folder / "study.html").read_text().count("<section id=") == 2


def test_without_an_instruction_there_is_nothing_to_look_at(small, tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text('{"task": "a", "prompt": "w1 w2"}')
    small = {**small, "prompts": {"pairs": str(tmp_path / "p.jsonl"), "device": "cpu"}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(small))
    run(tmp_path / "s.yaml", "--out", tmp_path / "out", "--only", "attention", "--quiet")
    assert "has contrasts" in (tmp_path / "out/study.html").read_text()
    assert json.loads((tmp_path / "out/attention/attention.json").read_text()) == {"tasks": {}, "sets": []}


def test_maps_need_no_model(small, tmp_path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**small, "base": "./gone", "expert": "./gone-too"}))
    run(tmp_path / "s.yaml", "--out", tmp_path / "out", "--only", "maps", "--quiet")
    page = (tmp_path / "out/study.html").read_text()
    assert page.count("<section id=") == 1
    assert "<title>What the fine-tune gone-too changed</title>" in page
    assert "In its base ./gone, read off ap " in page, "models are called as the study calls them"
    said = run(tmp_path / "s.yaml", "--out", tmp_path / "out", code=2)
    assert "./gone: no such model folder" in said


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        ({"tasks": 1}, [], "unknown field 'tasks'; a study has base, expert, scores, others, top, prompts, answers, s"),
        ({"scores": None}, [], "scores: a study needs this field."),
        ({"scores": {}}, [], "scores: found {}, expected a mapping from names to score files"),
        ({"scores": {"kl": 3}}, [], "scores: found {'kl': 3}, expected a mapping"),
        ({"top": {"heads": 0}}, [], "top: found {'heads': 0}, expected a mapping such as"),
        ({"scores": ["a/x.safetensors", "b/x.safetensors"]}, [], "have one name; write a mapping"),
        ({"prompts": {"samples": 3}}, [], "prompts: found {'samples': 3}, expected a mapping with `pairs`"),
        ({"prompts": {"pairs": "x", "layer": 3}}, [], "prompts: unknown field 'layer'; expected pairs, samples"),
        ({"prompts": {"pairs": "x", "samples": 0}}, [], "prompts: samples: found 0, expected a whole number"),
        ({"answers": {"sizes": [3]}}, [], "answers: unknown field 'sizes'; expected tokens, prompts, shares, draws"),
        ({"answers": {"tokens": 0}}, [], "answers: tokens: found 0, expected a whole number of at least 1."),
        ({"answers": {"shares": [1.0]}}, [], "answers: shares: found [1.0], expected a list of shares between 0 an"),
        ({"answers": {"scores": [{}]}}, [], "answers: scores: found [{}], expected a list of names."),
        ({"answers": {"scores": ["x"]}}, [], "answers: scores: 'x' is none of `scores`: kl."),
        ({"others": {"kl": "x.safetensors"}}, [], "others: the name 'kl' is one of `scores` too"),
        (
            {"scores": {"ap": "no/ap.safetensors"}}, [],
            "`scores.ap`: no such score file: no/ap.safetensors; make it with `wp-score --base BASE --expert EXPERT "
            "--pairs FILE.jsonl --method ap --out no/ap.safetensors`, or name a scoring job (.yaml) in its place.",
        ),
        ({"scores": {"kl": "OTHER"}}, [], "`expert`: the score files are of expert, whose weights are not those of"),
        ({"scores": {"kl": "KL", "x": "OTHER"}}, [], "put files of other experts under `others`"),
        ({"scores": {"kl": "KL", "x": "FAR"}}, [], "which is another model; a study is of one base"),
        ({"others": {"x": "ATTR"}}, [], "`others.x`: scores by attr, utility kl, and none of `scores` was made so"),
        ({"expert": "BASE"}, [], "whose weights are not those of"),
        ({}, ["--only", "maps,charts"], "there is no part 'charts'; there are maps, certainty, drift, words, a"),
        ({}, ["--only", "attention"], "`prompts`: the part attention needs them; give the study `prompts: {pairs: FIL"),
        ({"prompts": {"pairs": "no.jsonl"}}, [], "prompts: no.jsonl: cannot read the pairs"),
        ({}, ["--out", "BASE/out"], "lies inside what is read"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(world, tmp_path, changes, flags, sentence) -> None:
    folder = world.parent
    base, expert = str(folder / "base"), str(folder / "expert")
    of_base = {"base": fingerprint_of(base).tensors}
    kl = str(tmp_path / "kl.safetensors")
    write_scores(scores(**of_base, expert=fingerprint_of(expert).tensors, **ONE), kl)
    made = {"OTHER": {**of_base, "expert": "e" * 64}, "FAR": {"base": "f" * 64}, "ATTR": {**of_base, "method": "attr"}}
    places = {"KL": kl, "BASE": base, "EXPERT": expert}
    for name, how in made.items():
        if name in str(changes):
            places[name] = str(tmp_path / f"{name}.safetensors")
            write_scores(scores(**how), places[name])

    def placed(text: str) -> str:
        return re.sub("|".join(places), lambda found: places[found[0]], text)

    content = {"base": base, "expert": expert, "scores": {"kl": kl}} | yaml.safe_load(placed(yaml.safe_dump(changes)))
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    said = run(tmp_path / "s.yaml", "--out", tmp_path / "out", *map(placed, flags), code=2)
    assert placed(sentence) in said
    assert said.startswith("Error: ")
    assert said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()
