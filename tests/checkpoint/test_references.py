"""What the name of a model means: one answer, and the same from mergekit once it has our mapping."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_wp.checkpoint.references import is_hub_name, read_reference, recipe_models
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.models import name_models, takes_long
from mergekit_wp.merge.recipe import read_recipe


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working directory with these folders."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "expert", "expert@step100", "math+code", "lora", "lora+v2", "a", "a+b", "b", "b+c", "c", "with space=1", "x/y",
        "old@1",
    ):  # fmt: skip
        Path(name).mkdir(parents=True)
    Path("linked").symlink_to("expert@step100")
    Path("dangling").symlink_to("nowhere")
    Path("file.safetensors").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "model", "lora"),
    [
        ("expert", ("folder", "expert", None), None),
        ("expert@step100", ("folder", "expert@step100", None), None),
        ("expert@step100/", ("folder", "expert@step100/", None), None),
        ("./expert@step100", ("folder", "./expert@step100", None), None),
        ("linked", ("folder", "linked", None), None),
        ("math+code", ("folder", "math+code", None), None),
        ("math+code+lora", ("folder", "math+code", None), ("folder", "lora", None)),
        ("expert+lora+v2", ("folder", "expert", None), ("folder", "lora+v2", None)),
        ("expert@step100+lora", ("folder", "expert@step100", None), ("folder", "lora", None)),
        ("a+b", ("folder", "a+b", None), None),
        ("a+b+c", ("folder", "a+b", None), ("folder", "c", None)),
        ("with space=1", ("folder", "with space=1", None), None),
        ("x/y", ("folder", "x/y", None), None),
        ("user/model", ("hub", "user/model", None), None),
        ("user/model@main", ("hub", "user/model", "main"), None),
        ("user/model@refs/pr/3", ("hub", "user/model", "refs/pr/3"), None),
        ("hf://user/model@v1", ("hub", "user/model", "v1"), None),
        ("user/model@v1+x/lora@v2", ("hub", "user/model", "v1"), ("hub", "x/lora", "v2")),
        ("user/model+lora+v2", ("hub", "user/model", None), ("folder", "lora+v2", None)),
        ("expert+x/lora", ("folder", "expert", None), ("hub", "x/lora", None)),
    ],
)
def test_what_a_name_means(folders, text, model, lora):
    meaning = read_reference(text)
    meaning.check()
    assert [(s.kind, s.path, s.revision) for s in meaning.sources] == [model, *([lora] if lora else [])]
    assert takes_long(text) == (model[0] == "hub" or lora is not None)
    assert is_hub_name(text) == (model[0] == "hub" and lora is None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("nowhere", "no such model folder"),
        ("./user/model", "no such model folder"),
        ("user/model/", "no such model folder"),
        ("a/b/c", "no such model folder"),
        ("user/mo del", "no such model folder"),
        ("user/mod--el", "no such model folder"),
        ("expert@main", "only models on the Hub have revisions"),
        ("x/y@main", "only models on the Hub have revisions"),
        ("file.safetensors", "a file"),
        ("dangling", "link to nowhere"),
        ("https://huggingface.co/user/model/tree/main", "write user/model"),
        ("expert+missing", "LoRA missing"),
        ("missing+lora", "model missing"),
        ("expert+lora+missing", r"LoRA lora\+missing"),
        ("+lora", "no such model folder"),
        ("x\0y", "no such model folder"),
        ("x" * 5000, "no such model folder"),
    ],
)
def test_what_is_not_there(folders, text, words):
    with pytest.raises(BadInput, match=words):
        read_reference(text).check()


def test_home(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders))
    meaning = read_reference("~/expert+~/lora")
    assert [source.path for source in meaning.sources] == [f"{folders}/expert", f"{folders}/lora"]


@pytest.mark.parametrize("text", ["expert@step100", "math+code", "a+b+c", "user/model@v1+x/lora", "with space=1"])
def test_mergekit_reads_the_mapping_as_we_read_the_text(folders, text):
    from mergekit.common import ModelReference

    from mergekit_wp.merge.plan import meaning_of

    meaning = read_reference(text)
    read = ModelReference.model_validate(meaning.for_mergekit())
    assert read.model.path == (os.path.abspath(meaning.model.path) if meaning.model.kind == "folder" else "user/model")
    assert [s.kind for s in meaning_of(read).sources] == [s.kind for s in meaning.sources]
    assert [s.revision for s in meaning_of(read).sources] == [s.revision for s in meaning.sources]


def test_every_spelling_of_a_recipe(folders):
    """Texts and mappings, with a LoRA in either form, and tokens taken from a model."""
    recipe = {
        "merge_method": "linear",
        "base_model": "expert@step100",
        "models": [
            {"model": "math+code", "parameters": {"weight": 1}},
            {"model": {"model": {"path": "a+b"}, "override_architecture": "X"}},
            {"model": {"model": "expert", "lora": {"path": "lora+v2"}}},
        ],
        "tokenizer": {
            "source": "base",
            "tokens": {
                "<a>": {"source": "a+b"},
                "<b>": {"source": {"kind": "model_token", "model": "b", "token": "x"}},
            },
        },
    }
    assert [[source.path for source in model.sources] for model in recipe_models(recipe)] == [
        ["expert@step100"], ["math+code"], ["a+b"], ["expert", "lora+v2"], ["b"],
    ]  # fmt: skip
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    content = read_recipe("r.yaml").content

    def at(name):
        return {"path": str(folders / name)}

    assert content["base_model"] == {"model": at("expert@step100")}
    assert [entry["model"] for entry in content["models"]] == [
        {"model": at("math+code")},
        {"model": at("a+b"), "override_architecture": "X"},
        {"model": at("expert"), "lora": at("lora+v2")},
    ]
    assert content["tokenizer"]["source"] == "base"
    assert content["tokenizer"]["tokens"]["<a>"]["source"] == {"model": at("a+b")}
    assert content["tokenizer"]["tokens"]["<b>"]["source"]["model"] == {"model": at("b")}


def test_row_names(folders):
    assert name_models(("with space=1", "row=expert@step100", "r=with space=1", "math+code+lora")) == {
        "with space=1": "with space=1",
        "row": "expert@step100",
        "r": "with space=1",
        "math+code+lora": "math+code+lora",
    }


NAMES = st.text("ab@+. =-", min_size=1, max_size=6).filter(lambda name: name.strip() and name.strip(".") == name)


@settings(max_examples=200, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=3, unique=True), asked=NAMES)
def test_an_existing_folder_is_always_what_its_name_means(tmp_path_factory, names, asked):
    """And where none has the name, the parts are folders whose names make up the text."""
    root = tmp_path_factory.mktemp("names")
    here = os.getcwd()
    os.chdir(root)
    try:
        for name in names:
            Path(name).mkdir()
        for name in names:
            meaning = read_reference(name)
            assert (meaning.model.path, meaning.model.kind, meaning.lora) == (name, "folder", None)
        meaning = read_reference(asked)
        if asked not in names and all(source.kind == "folder" for source in meaning.sources):
            assert [source.path in names for source in meaning.sources] == [True, True]
            assert "+".join(source.path for source in meaning.sources) == asked
            longer = [n for n in names if len(n) > len(meaning.model.path) and asked.startswith(n + "+")]
            assert all(asked[len(n) + 1 :] not in names for n in longer)
    finally:
        os.chdir(here)
