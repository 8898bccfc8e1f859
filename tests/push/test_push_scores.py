"""wp-push --scores-only: score files in a repository of their own, and back through `read_scores`."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub, regular
from push_world import TOKEN, front_matter, wp_push
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from score_example import example

from mergekit_wp.checkpoint import hub as hub_files
from mergekit_wp.checkpoint.references import Source
from mergekit_wp.errors import BadInput
from mergekit_wp.push.publish import Request
from mergekit_wp.push.scores_only import prepare_scores
from mergekit_wp.scores import ModelId, ScoredAt, read_scores, write_scores

REPO = "alice/scores"


@pytest.fixture
def folder(tmp_path):
    """Two score files: one of Hub models, one of folders of this machine."""
    (tmp_path / "scores").mkdir()
    one = example()
    write_scores(one, tmp_path / "scores" / "hub.safetensors")
    local = ModelId("/home/bob/models/maths-expert", None, "d" * 64, "e" * 64)
    other = replace(one, meta=replace(one.meta, expert=local))
    write_scores(other, tmp_path / "scores" / "local.safetensors")
    return tmp_path / "scores"


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        hub.add_user("alice", TOKEN)
        yield hub
        assert not hub.troubles


def names_in(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["wp"])["expert"]["name"]


def test_the_merge_that_was_scored_at_is_published_without_its_folders(folder):
    home = "/home/bob/models"
    recipe = {"merge_method": "linear", "models": [{"model": f"{home}/code", "parameters": {"weight": 1.0}}]}
    at = ScoredAt(recipe, "linear", (ModelId(f"{home}/code", None, "d" * 64, "f" * 64),), "0" * 64)
    write_scores(replace(example(), meta=replace(example().meta, at=at)), folder / "local.safetensors")
    text = wp_push(folder, REPO, "--scores-only", "--dry-run", "--license", "cc0-1.0")
    stage = folder.with_name("scores.push")
    public = read_scores(stage / "wp" / "scores" / "local.safetensors").meta.at
    assert public.recipe["models"][0] == {"model": "code", "parameters": {"weight": 1.0}}
    assert [expert.name for expert in public.experts] == ["code"]
    assert public.weights == at.weights
    card = (stage / "README.md").read_text()
    assert "at the linear merge of code" in card
    assert "bob" not in text + card


def test_a_dry_run_writes_the_card_and_no_folder_of_this_machine(folder):
    text = wp_push(folder, REPO, "--scores-only", "--dry-run", "--license", "cc0-1.0")
    assert "nothing was sent" in text
    assert [line.split()[-1] for line in text.splitlines() if re.match(r" +[\d,]+  \S+$", line)] == [
        "README.md", "wp/scores/hub.safetensors", "wp/scores/local.safetensors",
    ]  # fmt: skip
    stage = folder.with_name("scores.push")
    card = (stage / "README.md").read_text()
    assert front_matter(card) == {"license": "cc0-1.0", "tags": ["weight-patching", "interpretability"]}
    assert "](https://huggingface.co/user/expert)" in card
    assert "/home/bob" not in card
    assert names_in(stage / "wp/scores/local.safetensors") == "maths-expert"
    assert names_in(folder / "local.safetensors") == "/home/bob/models/maths-expert"
    given, kept = read_scores(folder / "local.safetensors"), read_scores(stage / "wp/scores/local.safetensors")
    assert all(torch.equal(tensor, kept.tensors()[name]) for name, tensor in given.tensors().items())


def test_what_is_pushed_is_read_back(folder, hub, tmp_path, monkeypatch):
    text = wp_push(folder / "hub.safetensors", REPO, "--scores-only", url=hub.url)
    assert f"{REPO} holds the scores" in text
    assert sorted(hub.repos[REPO].files) == [".gitattributes", "README.md", "wp/scores/hub.safetensors"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = hub_files._score_file(Source(REPO, None, "hub"), "", str(tmp_path / "c"), hub.url)
    assert torch.equal(read_scores(found).neurons, example().neurons)
    wp_push(folder, REPO, "--scores-only", url=hub.url)
    assert "wp/scores/local.safetensors" in hub.repos[REPO].files


def test_a_repository_with_a_model_is_left_alone(folder, hub):
    hub.add_repo("alice/model").commit({"config.json": regular(b"{}"), "README.md": regular(b"# Mine")}, "a model")
    before = dict(hub.repos["alice/model"].files)
    text = wp_push(folder, "alice/model", "--scores-only", url=hub.url, code=2)
    assert "holds more than scores (config.json)" in text
    assert hub.repos["alice/model"].files == before


def test_what_is_no_score_file_and_secrets_stay(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def refused(path, **more):
        with pytest.raises(BadInput) as caught:
            prepare_scores(Request(path, REPO, **more), None, print)
        return caught.value.message

    save_file({"x": torch.zeros(1)}, folder / "weights.safetensors")
    assert "weights.safetensors: a safetensors file, but without" in refused(folder)
    (folder / "weights.safetensors").unlink()
    assert "no score file, nor a folder with one" in refused(tmp_path)
    assert "speak of a merge" in refused(folder, results=[tmp_path])
    assert "go with --license other" in refused(folder, licence_name="Mine")
    path = folder / "hub.safetensors"
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["wp"])
    meta["device"] = f"cpu {TOKEN}"
    save_file(load_file(path), path, metadata={"wp": json.dumps(meta)})
    said = refused(folder)
    assert "holds your Hub token" in said
    assert TOKEN not in said
