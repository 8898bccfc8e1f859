"""What is taken of a repository on the Hub, against a Hub on loopback; and what is said when it cannot be had."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants
from loopback_hub import Fault, LoopbackHub, regular
from safetensors.numpy import save, save_file
from score_example import example

from mergekit_wp.checkpoint import hub as models
from mergekit_wp.checkpoint.references import Source
from mergekit_wp.errors import BadInput
from mergekit_wp.scores import read_scores, write_scores

TOKEN = "hf_loopback_token"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tools.jinja", "vocab.txt",
    "qwen.tiktoken", "chat_template.json",
)  # fmt: skip
OF_THE_MODEL = ("config.json", "generation_config.json", "wp/scores.safetensors", *TOKENIZER)
OTHERS = (
    "README.md", "LICENSE", "consolidated.safetensors", "consolidated.safetensors.index.json", "params.json",
    "checkpoint-100/model.safetensors", "checkpoint-100/config.json", "original/consolidated.00.pth",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors", "trainer_state.json",
    "onnx/model.onnx", "onnx/config.json", "model.gguf", "modeling_x.py", "wp/results/s.json",
)  # fmt: skip
WEIGHTS = save({"model.norm.weight": np.zeros(2, np.float32)})
INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """`put(name, files)` makes a repository, `get(text)` its snapshot's files."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # The client waits a second and more between its tries.
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))

    class World:
        def __init__(self, loopback):
            self.hub, self.cache = loopback, tmp_path / "cache"

        def put(self, name, files):
            self.hub.add_repo(name).commit({path: regular(content) for path, content in files.items()}, "files")

        def get(self, path, revision=None, offline=False):
            source = Source(path, revision, "hub")
            folder = models._download(source, str(self.cache), self.hub.url, offline)
            models._download.cache_clear()
            return folder, {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}

        def refused(self, *args, **options):
            with pytest.raises(BadInput) as caught:
                self.get(*args, **options)
            assert TOKEN not in caught.value.message
            return caught.value.message

    with LoopbackHub() as loopback:
        loopback.add_user("u", TOKEN)
        yield World(loopback)


def small(*names):
    return dict.fromkeys(names, b"{}")


def test_only_the_files_of_the_model_are_taken(world):
    shards = {"model-1.safetensors": WEIGHTS, "model-2.safetensors": WEIGHTS}
    wanted = {**small(*OF_THE_MODEL), "model.safetensors.index.json": INDEX, **shards}
    world.put("u/sharded", {**wanted, **small(*OTHERS), "model-9.safetensors": WEIGHTS})
    assert world.get("u/sharded")[1] == set(wanted)
    world.put("u/single", {**small(*OF_THE_MODEL, *OTHERS), "model.safetensors": WEIGHTS})
    assert world.get("u/single")[1] == {*OF_THE_MODEL, "model.safetensors"}
    world.put(
        "u/lora", {**small("adapter_config.json", "tokenizer.json", *OTHERS), "adapter_model.safetensors": WEIGHTS}
    )
    assert world.get("u/lora")[1] == {"adapter_config.json", "tokenizer.json", "adapter_model.safetensors"}


def test_what_cannot_be_taken_is_refused_before_a_weight_is(world):
    both = {**small("config.json"), "model.safetensors.index.json": INDEX, "model.safetensors": WEIGHTS}
    world.put("u/stale", both)
    assert "left over" in world.refused("u/stale")
    world.put("u/both", {**both, "model-1.safetensors": WEIGHTS, "model-2.safetensors": WEIGHTS})
    assert "two sets of weights" in world.refused("u/both")
    world.put("u/pickled", small("config.json", "pytorch_model.bin"))
    assert "pickled" in world.refused("u/pickled")
    world.put("u/nothing", small("config.json", "model.gguf"))
    assert "neither model.safetensors" in world.refused("u/nothing")
    index = json.dumps({"metadata": {}, "weight_map": {"a": "../../x.safetensors"}}).encode()
    world.put("u/escape", {**small("config.json"), "model.safetensors.index.json": index})
    assert "name of a file in this folder" in world.refused("u/escape")
    assert not [request for request in world.hub.requests if "resolve" in request and ".safetensors" in request[-13:]]


def test_what_is_not_there(world):
    world.put("u/model", {**small("config.json"), "model.safetensors": WEIGHTS})
    assert "no model of this name" in world.refused("u/other")
    world.hub.faults.append(Fault("GET /api/models/u/model", "status", times=9, status=503))
    assert "no such folder here" in world.refused("u/model")
    world.hub.faults.clear()
    assert world.get("u/model")[1] == {"config.json", "model.safetensors"}


def test_a_gated_model_and_a_missing_revision(world):
    """As the client reports them: the loopback Hub has neither."""
    import httpx2 as httpx
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    def answer(kind, status):
        return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "http://x")))

    source = Source("u/m", "v9", "hub")
    gated = models.explain(source, answer(GatedRepoError, 403), "https://hub").message
    assert "gated" in gated
    assert "https://hub/u/m" in gated
    missing = models.explain(source, answer(RevisionNotFoundError, 404), "https://hub").message
    assert "no revision v9" in missing


def test_without_a_network_the_cache_serves_if_it_is_complete(world, monkeypatch):
    shards = {"model-1.safetensors": WEIGHTS, "model-2.safetensors": WEIGHTS}
    world.put("u/model", {**small("config.json", "tokenizer.json"), "model.safetensors.index.json": INDEX, **shards})
    folder, files = world.get("u/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert world.get("u/model", offline=True) == (folder, files)
    assert "HF_HUB_OFFLINE is set" in world.refused("u/another", offline=True)
    (folder / "model-2.safetensors").unlink()
    message = world.refused("u/model", offline=True)
    assert "without model-2.safetensors, and HF_HUB_OFFLINE is set" in message
    (folder / "model.safetensors.index.json").unlink()
    assert "without model.safetensors," in world.refused("u/model", offline=True)
    save_file({"a": np.zeros(1, np.float32)}, folder / "model.safetensors")
    assert world.get("u/model", offline=True)[0] == folder


def test_without_a_network_and_without_the_flag(world):
    world.put("u/model", {**small("config.json"), "model.safetensors": WEIGHTS})
    folder, _ = world.get("u/model")
    world.hub.faults.append(Fault(".", "drop", times=99))
    assert world.get("u/model")[0] == folder
    (folder / "model.safetensors").unlink()
    assert "without model.safetensors, and the Hub does not give it now" in world.refused("u/model")
    shutil.rmtree(world.cache)
    assert "nor is it in the Hub's cache" in world.refused("u/model")


@pytest.fixture
def scores_of(world, monkeypatch):
    """`read_scores` of a name, against the loopback Hub and its own cache."""
    download = models._score_file
    here = str(world.cache), world.hub.url
    monkeypatch.setattr(models, "_score_file", lambda source, file, *_there: download(source, file, *here))
    return read_scores


def score_bytes(tmp_path, seed):
    write_scores(example(("a", f"task-{seed}")), tmp_path / "s.safetensors")
    return (tmp_path / "s.safetensors").read_bytes()


def test_score_files_of_the_hub(world, scores_of, tmp_path, monkeypatch):
    """By repository where it has one, by file where it has several; from the cache when the Hub is gone."""
    one, two = score_bytes(tmp_path, 1), score_bytes(tmp_path, 2)
    world.put("u/expert", {"wp/scores.safetensors": one, "wp/scores/x.safetensors": two})
    world.put("u/merge", {"wp/scores/maths.safetensors": two, "wp/results/r.json": b"{}"})
    world.put("u/many", {"wp/scores/maths.safetensors": one, "wp/scores/code.safetensors": two})
    for name, task in [
        ("u/expert", "task-1"), ("hf://u/expert", "task-1"), ("u/expert@main", "task-1"), ("u/merge", "task-2"),
        ("hf://u/many/wp/scores/code.safetensors", "task-2"), ("hf://u/many@main/wp/scores/maths.safetensors", "task-1")
    ]:  # fmt: skip
        assert task in scores_of(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "task-1" in scores_of("u/expert")
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE is set"):
        scores_of("hf://u/many/wp/scores/none.safetensors")
    assert "task-2" in scores_of("hf://u/many/wp/scores/code.safetensors")


def test_score_files_that_the_hub_does_not_have(world, scores_of, tmp_path):
    world.put("u/none", {"config.json": b"{}"})
    world.put("u/many", {f"wp/scores/{n}.safetensors": score_bytes(tmp_path, n) for n in (1, 2)})
    world.put("u/bad", {"wp/scores.safetensors": WEIGHTS})
    for name, said in [
        ("u/none", "u/none: has no score file, neither wp/scores.safetensors nor one in wp/scores"),
        ("u/many", "has the score files wp/scores/1.safetensors, wp/scores/2.safetensors; name one, as hf://"),
        ("hf://u/many/wp/scores/3.safetensors", "u/many: the repository has no file wp/scores/3.safetensors"),
        ("u/nobody", "the Hub has no model of this name"),
        ("u/bad", "without the `wp` metadata of a score file"),
        ("hf://alone", "expected hf://USER/NAME"),
        ("scores/none.safetensors", "no such score file"),
    ]:
        with pytest.raises(BadInput) as caught:
            scores_of(name)
        assert said in caught.value.message
        assert TOKEN not in caught.value.message
