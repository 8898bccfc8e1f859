"""`merge` from Python: folders as by wp-merge, state dicts and modules to the bit as their folders."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tiny
import torch
import transformers
import yaml
from merge_checks import assert_merged, run
from merge_world import World, reference, tensors_of

from mergekit_wp import merge, read_fit, read_scores
from mergekit_wp.errors import BadInput


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two experts, one of them with an added row, and what wp-merge makes of them at scale 1.5."""
    world = World(tmp_path_factory.mktemp("w"), "llama", experts=2, extra_rows=[0, 1]).build()
    run(world.recipe(world.config([{"weight": 2.0}, {}], parameters={"scale": 1.5})), world.root / "command")
    return world


def models(world, load):
    return load(world.base), {name: load(world.expert(k)) for k, name in enumerate("ab")}


def files(world):
    return [world.score(0), str(world.score(1))]


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert tensor.dtype == other[name].dtype


def test_folders_are_merged_as_by_the_command(world, tmp_path):
    base, experts = models(world, str)
    out = merge(base, experts, files(world), scale=1.5, weight={"b": 1.0, "a": 2.0}, out=tmp_path / "out")
    assert out == tmp_path / "out"
    same(tensors_of(out), tensors_of(world.root / "command"))
    assert "recomputed" in (out / "wp_audit.yml").read_text()
    assert yaml.safe_load((out / "mergekit_config.yml").read_text())["models"][0]["parameters"]["weight"] == 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(BadInput, match="exists and is not empty"):
        merge(base, experts, files(world), out=out)
    merge(base, experts, files(world), out=out, overwrite=True, audit=False)
    assert_merged(tensors_of(out), reference(world))


def test_scores_in_memory_are_kept_beside_the_folder(world, tmp_path):
    base, experts = models(world, str)
    found = [read_scores(file) for file in files(world)]
    options = {"scale": [1.5, 1.5], "weight": [2, 1], "audit": False}
    out = merge(base, experts, dict(zip("ab", found, strict=True)), out=tmp_path / "out", **options)
    same(tensors_of(out), tensors_of(world.root / "command"))
    kept = tmp_path / "out.scores"
    assert torch.equal(read_scores(kept / "a.safetensors").heads, found[0].heads)
    swapped = dict(zip("ab", found[::-1], strict=True))
    with pytest.raises(BadInput, match="these scores were made for the expert"):
        merge(base, experts, swapped, out=tmp_path / "other", audit=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.scores"]


def test_state_dicts_are_merged_to_the_bit_as_their_folders(world):
    base, experts = models(world, tensors_of)
    found = merge(base, experts, files(world), scale=1.5, weight=[2, 1])
    same(found, tensors_of(world.root / "command"))
    assert_merged(merge(base, experts, files(world)), reference(world))
    assert {tensor.dtype for tensor in merge(base, experts, files(world), dtype="bfloat16").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "phi3", "llama-biased", "gemma3-wrapper"])
def test_modules_of_every_kind(kind, tmp_path):
    """Tied heads, fused projections, biases, several towers: what comes back loads into the base."""
    world = World(tmp_path, kind, experts=2).build()

    def load(folder):
        auto = tiny.auto_class(transformers.AutoConfig.from_pretrained(folder))
        return auto.from_pretrained(folder)

    base, experts = models(world, load)
    found = merge(base, experts, files(world))
    base.load_state_dict(found)
    base.save_pretrained(tmp_path / "merged")
    assert_merged(tensors_of(tmp_path / "merged"), reference(world))
    if kind == "gemma3-wrapper":  # names in memory are not those of its files, which a state dict alone does not tell
        return
    states = merge(load(world.base).state_dict(), [e.state_dict() for e in experts.values()], files(world))
    same(states, found)


@pytest.mark.parametrize("in_files", ["base", "a"])
def test_a_tied_head_may_be_there_or_not(in_files, tmp_path):
    """A module's state has it beside the embeddings, its file has not."""
    world = World(tmp_path, "qwen2", experts=2).build()
    base, experts = models(world, transformers.AutoModelForCausalLM.from_pretrained)
    want = merge(base, experts, files(world))
    if in_files == "base":
        base = tensors_of(world.base)
    else:
        experts["a"] = tensors_of(world.expert(0))
    found = merge(base, experts, files(world))
    assert ("lm_head.weight" in found) == (in_files != "base")
    same(found, {name: want[name] for name in found})


def test_a_head_of_its_own_is_refused_where_the_base_ties_it(tmp_path):
    world = World(tmp_path, "qwen2", experts=2).build()
    base, experts = models(world, lambda f: transformers.AutoModelForCausalLM.from_pretrained(f).state_dict())
    experts["b"] = experts["b"] | {"lm_head.weight": experts["b"]["lm_head.weight"] + 1}
    with pytest.raises(BadInput, match=r"b: has its own lm_head\.weight, while the base ties it"):
        merge(base, experts, files(world), allow_mismatch=True)


def test_what_is_not_what_was_scored_is_refused(world, caplog):
    base, experts = models(world, tensors_of)
    changed = {**experts["a"], "model.norm.weight": experts["a"]["model.norm.weight"] + 1}
    with pytest.raises(BadInput, match=r"scores of a: these scores were made for the expert .* whose weights differ"):
        merge(base, {"a": changed, "b": experts["b"]}, files(world))
    merge(base, {"a": changed, "b": experts["b"]}, files(world), allow_mismatch=True)
    assert "merging all the same" in caplog.text
    with pytest.raises(BadInput, match="made for the base"):
        merge(experts["a"], experts, files(world))


def test_bad_input_is_a_sentence(world, tmp_path):
    base, experts = models(world, tensors_of)
    text, texts = models(world, str)
    name = "model.layers.1.mlp.up_proj.weight"
    less = {k: v for k, v in experts["a"].items() if k != name}
    bad = {**experts["a"], name: torch.full_like(experts["a"][name], float("nan"))}
    whole = {"allow_mismatch": True}
    for arguments, options, said in [
        ((text, texts, files(world)), {}, "out: name the folder to write"),
        ((base, texts, files(world)), {}, "some are folders and some are in memory"),
        ((base, experts, files(world)), {"out": tmp_path / "x"}, "out: goes with folders"),
        ((base, experts, files(world)[:1]), {}, "scores: found 1 for 2 experts"),
        ((base, experts, {"a": world.score(0), "c": world.score(1)}), {}, "scores: of a, c, and the experts are a, b"),
        ((base, experts), {}, "scores: there are none of the expert a"),
        ((base, {}), {}, "experts: there are none"),
        ((base, experts, files(world)), {"scale": float("nan")}, "scale: found nan, expected a number"),
        ((base, experts, files(world)), {"weight": [0, 0]}, "weight: those of all experts are 0"),
        ((base, experts, files(world)), {"weight": -1}, "weight: found -1, expected a number of at least 0"),
        ((base, experts, files(world)), {"dtype": "float8"}, "dtype: found 'float8'"),
        ((base, {"a": less, "b": experts["b"]}, files(world)), whole, f"a: the tensor {name} is missing"),
        (
            (base, {"a": {**experts["a"], "x.weight": bad[name]}, "b": bad}, files(world)),
            whole,
            "a: has a tensor x.wei",
        ),
        ((base, {"a": bad, "b": experts["b"]}, files(world)), whole, f"{name}: an expert holds a NaN"),
        ((base, {"a": {}, "b": bad}, files(world)), whole, "a: no tensor in it is named like a causal LM's"),
        ((text, texts, files(world)), {"out": tmp_path / "x", "cudas": 1}, "cudas: neither an option of merge nor"),
    ]:
        with pytest.raises(BadInput, match=re.escape(said)):
            merge(*arguments, **options)
    assert not list(tmp_path.iterdir())


def test_a_fit_in_the_place_of_scores(world, tmp_path):
    """Of folders and in memory, to the bit as by the command; in memory too it knows the experts again."""
    world.write_fit([1, 0])
    run(world.recipe(world.fitted([{"scale": 0.5}, {}]), "fit.yaml"), world.root / "by-fit")
    want = tensors_of(world.root / "by-fit")
    base, experts = models(world, str)
    options = {"scale": {"a": 0.5, "b": 1.0}, "audit": False}
    same(tensors_of(merge(base, experts, fit=world.fit, out=tmp_path / "out", **options)), want)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    same(tensors_of(merge(base, experts, fit=read_fit(world.fit), out=tmp_path / "held", **options)), want)
    assert torch.equal(read_fit(tmp_path / "held.fit.safetensors").heads, read_fit(world.fit).heads)
    states, tuned = models(world, tensors_of)
    same(merge(states, tuned, fit=read_fit(world.fit), scale=[0.5, 1]), want)


@pytest.mark.parametrize("kind", ["llama-biased", "phi3", "gemma2"])
def test_modules_by_a_fit(kind, tmp_path):
    """Biases of o_proj and down_proj belong to no component; fused projections; a tied head."""
    world = World(tmp_path, kind, experts=2).build()
    fit = world.write_fit([1, 0])
    base, experts = models(world, transformers.AutoModelForCausalLM.from_pretrained)
    base.load_state_dict(merge(base, experts, fit=fit))
    base.save_pretrained(tmp_path / "merged")
    assert_merged(tensors_of(tmp_path / "merged"), reference(world, order=[1, 0]))


def test_a_fit_of_other_models_or_beside_scores(world, tmp_path, caplog):
    fit = read_fit(world.write_fit([1, 0]))
    base, experts = models(world, tensors_of)
    changed = {**experts["a"], "model.norm.weight": experts["a"]["model.norm.weight"] + 1}
    for arguments, options, said in [
        ((base, experts, files(world)), {}, "scores: goes without a fit"),
        ((base, experts), {"weight": [1, 2]}, "weight: goes without a fit"),
        ((base, {"a": changed, "b": experts["b"]}), {}, "and a cannot be found among these"),
        ((base, {"b": experts["b"]}), {}, "merge all of the fitted experts and no other"),
        ((experts["a"], experts), {}, "fit: these weights were made for the base"),
        ((base, experts), {"fit": world.score(0)}, "without the `wp_fit` metadata"),
    ]:
        with pytest.raises(BadInput, match=re.escape(said)):
            merge(*arguments, **{"fit": fit, **options})
    found = merge(base, {"a": changed, "b": experts["b"]}, fit=fit, allow_mismatch=True)
    assert "taking them in order" in caplog.text
    name = "model.embed_tokens.weight"
    assert torch.equal(found[name], merge(base, experts, fit=fit)[name])
    text, texts = models(world, str)
    with pytest.raises(BadInput, match="merge all of the fitted experts and no other"):
        merge(text, {"a": texts["a"]}, fit=fit, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_numbers_of_other_libraries_and_what_is_none(world):
    base, experts = models(world, tensors_of)
    want = merge(base, experts, files(world), scale=1.5)
    for scale in (np.float32(1.5), torch.tensor(1.5), [1.5, torch.tensor(1.5)], np.array([1.5, 1.5])):
        same(merge(base, experts, files(world), scale=scale), want)
    for scale, said in (
        ("1.5", "scale: found '1.5', expected a number"),
        (None, "scale: found None, expected a number"),
        (torch.ones(3), "scale: found 3 for 2 experts"),
        (float("nan"), "scale: found nan"),
    ):
        with pytest.raises(BadInput, match=re.escape(said)):
            merge(base, experts, files(world), scale=scale)


def test_scores_of_another_depth(world):
    """Of state dicts there is no config that says so."""

    def deeper(state):
        return state | {k.replace(".0.", ".4.", 1): t for k, t in state.items() if k.startswith("model.layers.0.")}

    base, experts = models(world, lambda folder: deeper(tensors_of(folder)))
    with pytest.raises(BadInput, match="scores of a: made for 4 layers, and the base has 5"):
        merge(base, experts, files(world), allow_mismatch=True)


def test_threads_are_those_that_were_asked_for(world, tmp_path, monkeypatch):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr("mergekit_wp.merge.cli.carry_out", lambda *_: seen.append(torch.get_num_threads()))
    base, experts = models(world, str)
    merge(base, experts, files(world), out=tmp_path / "out", num_threads=before + 1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_the_name_is_the_package_and_the_function(world):
    """`merge` can be called whether or not anything has imported the package of that name."""
    import mergekit_wp.merge.kernel

    assert mergekit_wp.merge is merge
    assert mergekit_wp.merge.kernel.fuse
