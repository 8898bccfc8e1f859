"""wp-merge, in this process: dry run, audit, output folder, recipes that mergekit would misread."""

from __future__ import annotations

import json
import os
import re

import pytest
import tiny
import torch
import yaml
from merge_checks import assert_merged, change, files_under, make_lora, plan_of, rewrite, run, slices
from merge_world import World, reference, tensors_of
from safetensors.torch import save_file

from mergekit_wp.merge.audit import AuditFailed, audit
from mergekit_wp.merge.cli import new_folder

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "w", "llama", experts=3, extra_rows=[0, 1, 0]).build()


def swap_words(folder):
    """The tokenizer of a folder with two words in each other's place."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["w5"], words["w6"] = words["w6"], words["w5"]
    path.write_text(json.dumps(content))


def test_merge_with_audit(world):
    out = world.root / "deep" / "out"
    text = run(world.recipe(), out)
    assert_merged(tensors_of(out), reference(world))
    assert "48 slices of 12 kinds" in text
    assert "no NaN and no infinity" in text
    assert "it generates a token" in text
    assert not list(out.parent.glob(".*"))
    assert (out / "README.md").read_text().count("# out")
    assert (out / "mergekit_config.yml").read_text() == world.recipe().read_text()


def test_a_merge_without_memory_is_a_sentence(world, monkeypatch):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mergekit_wp.merge.kernel.fuse", full)
    out = world.root / "out"
    assert "no memory left to merge it" in run(world.recipe(), out, code=2)
    monkeypatch.setattr("mergekit.merge.run_merge", full)
    assert "the merge does not fit into the memory of cpu; use a machine with more" in run(world.recipe(), out, code=2)
    assert not out.exists()


def test_dry_run_prints_shares_and_writes_nothing(world):
    recipe = world.recipe()
    before = files_under(world.root)
    text = run(recipe, world.root / "out", "--dry-run")
    assert files_under(world.root) == before
    assert "Nothing was written" in text
    rows = [line.split() for line in text.splitlines() if re.match(r"\d+ ", line)]
    assert len(rows) == 4
    for row in rows:
        heads, neurons = [float(x) for x in row[1:4]], [float(x) for x in row[4:7]]
        assert sum(heads) == pytest.approx(1, abs=2e-3)
        assert sum(neurons) == pytest.approx(1, abs=2e-3)


def test_dry_run_with_a_lora_does_not_merge_it(world):
    from merge_world import write_random_scores

    make_lora(world.base, world.root / "lora", seed=3)
    name = f"{world.base}+{world.root / 'lora'}"
    write_random_scores(world.score(1), str(world.base), name, seed=1)
    config = world.config()
    config["models"][1]["model"] = name
    recipe = world.recipe(config)
    before = files_under(world.root)
    assert "all checks passed" in run(recipe, "--dry-run")
    assert files_under(world.root) == before
    assert "recomputed" in run(recipe, world.root / "out")
    assert set(files_under(world.root)) - set(before) == set(files_under(world.root)) & {
        p for p in files_under(world.root) if p.split("/")[0] == "out"
    }


def test_existing_output_is_kept_unless_told(world):
    out = world.root / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert "--overwrite" in run(world.recipe(), out, code=2)
    assert (out / "precious").exists()
    run(world.recipe(), out, "--overwrite", "--no-audit")
    assert not (out / "precious").exists()
    assert_merged(tensors_of(out), reference(world))


def test_scores_are_found_beside_the_recipe(world, monkeypatch, tmp_path):
    config = world.config()
    for k, model in enumerate(config["models"]):
        model["parameters"]["scores"] = world.score(k).name
    monkeypatch.chdir(tmp_path)
    # A relative model folder too: mergekit alone would ask the Hub for it, after the merge.
    config["models"][0]["model"] = os.path.relpath(world.expert(0), tmp_path)
    run(world.recipe(config), "here", "--no-audit")
    assert_merged(tensors_of(tmp_path / "here"), reference(world))


def test_other_methods_pass_through(world):
    models = [{"model": str(world.expert(k)), "parameters": {"weight": 1.0}} for k in (0, 2)]
    text = run(world.recipe({"merge_method": "linear", "models": models}), world.root / "out")
    assert "recomputed" not in text
    assert "no NaN" in text


def test_tokenizer_config_keeps_the_generation_config(world):
    run(world.recipe(world.config(tokenizer={"source": "base"})), world.root / "out")
    name = "generation_config.json"
    assert (world.root / "out" / name).read_bytes() == (world.base / name).read_bytes()


def test_rows_that_a_tokenizer_config_has_moved_are_audited_by_token(world):
    swap_words(world.expert(0))
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(world.expert(1))
    config, out = world.config(tokenizer={"source": "union"}, parameters={"scale": 1.5}), world.root / "out"
    text = run(world.recipe(config), out)
    assert "48 slices of 12 kinds of tensors recomputed" in text
    assert "rows of 1 tokens that not every model has were not." in text
    plan = plan_of(world, out, config)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        right = tensors_of(out)[name]
        change(out, name, ..., right.roll(1, 0))
        with pytest.raises(AuditFailed, match="is not what its inputs and wp give"):
            audit(out, plan, say=lambda _: None, load=False)
        change(out, name, ..., right)
    (out / "tokenizer.json").write_text("{}")
    lines = []
    audit(out, plan, say=lines.append, load=False)
    assert (
        "allows; model.embed_tokens.weight and lm_head.weight, whose rows `tokenizer:` has moved, were not." in lines[0]
    )


def test_the_audit_reads_inputs_in_the_recipes_dtype(world):
    """Below 6e-5 the steps of float16 are equally wide, so that numbers lose most of their digits there."""
    for folder in (world.base, *(world.expert(k) for k in range(3))):
        rewrite(folder, lambda tensors: {name: tensor * 1e-5 for name, tensor in tensors.items()})
    more = {"dtype": "float16", "out_dtype": "float32", "parameters": {"allow_mismatch": True}}
    assert "48 slices of 12 kinds" in run(world.recipe(world.config(**more)), world.root / "out")


@pytest.mark.parametrize("name", ["model.layers.{}.self_attn.v_proj.weight", "model.layers.{}.mlp.down_proj.weight"])
def test_audit_catches_a_corrupted_slice(world, name):
    """Every layer is spoilt in a single column or row, since the audit takes a sample."""
    out = world.root / "out"
    run(world.recipe(), out, "--no-audit")
    plan = plan_of(world, out)
    audit(out, plan, say=lambda _: None, load=False)
    for layer in range(4):
        tensor = tensors_of(out)[name.format(layer)]
        change(out, name.format(layer), ..., tensor * 1.001)
    with pytest.raises(AuditFailed, match=r"is not what its inputs and wp give"):
        audit(out, plan, say=lambda _: None, load=False)


def test_audit_catches_swapped_experts(world):
    """The right numbers under the wrong expert: scores of two experts exchanged after the merge."""
    out = world.root / "out"
    run(world.recipe(), out, "--no-audit")
    plan = plan_of(world, out)
    first, second = world.score(0).read_bytes(), world.score(1).read_bytes()
    world.score(0).write_bytes(second)
    world.score(1).write_bytes(first)
    with pytest.raises(AuditFailed):
        audit(out, plan, say=lambda _: None, load=False)


def test_audit_catches_nan_and_missing_weights(world):
    out = world.root / "out"
    run(world.recipe(), out, "--no-audit")
    change(out, "model.embed_tokens.weight", (5, 5), float("nan"))
    with pytest.raises(AuditFailed, match=r"model\.embed_tokens\.weight holds a NaN"):
        audit(out, None, say=lambda _: None)
    tensors = tensors_of(out)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AuditFailed, match="missing keys"):
        audit(out, None, say=lambda _: None)


def test_the_audit_knows_the_scale(world):
    """It recomputes the merge with it, and finds one that was made with another."""
    out = world.root / "out-options"
    asked, other = ({"scale": 1.5}, {"scale": 1.3})
    assert "48 slices of 12 kinds" in run(world.recipe(world.config(parameters=asked)), out)
    run(world.recipe(world.config(parameters=other)), out, "--overwrite", "--no-audit")
    with pytest.raises(AuditFailed, match="is not what its inputs and wp give"):
        audit(out, plan_of(world, out, world.config(parameters=asked)), say=lambda _: None, load=False)


def test_a_failed_audit_keeps_the_result_aside(world, monkeypatch):
    """A wrong kernel: the folder is not put where it would be trusted, nor in the place of anything."""
    (world.root / "out.rejected").mkdir()
    (world.root / "out.rejected" / "mine.txt").write_text("x")
    monkeypatch.setattr("mergekit_wp.merge.methods.wp.tensor_shares", lambda *_: None)
    text = run(world.recipe(), world.root / "out", code=1)
    assert "out.rejected-2" in text
    assert not (world.root / "out").exists()
    assert (world.root / "out.rejected-2" / "config.json").exists()
    assert (world.root / "out.rejected" / "mine.txt").exists()


def test_what_cannot_take_the_old_ones_place_leaves_it_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(FileNotFoundError), new_folder(out):
        pass  # nothing is made
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mine.txt").exists()


def test_a_tokenizer_that_mergekit_could_not_copy(world, monkeypatch):
    """It logs the error and calls the merge a success."""
    monkeypatch.setattr("mergekit.merge._copy_tokenizer", lambda *_args, **_more: 1 / 0)
    text = run(world.recipe(), world.root / "out", code=2)
    assert f"mergekit could not copy the tokenizer of {world.base}" in text
    assert not (world.root / "out").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("merge_method: [", "not valid YAML"),
        ("models: []", "no merge_method"),
        ("- a", "YAML mapping"),
        ({"parameters": {"score": "a"}}, "unknown parameter score"),
        ({"models": None}, "mergekit cannot carry out this recipe"),
        ({"base_model": "/nowhere/base"}, "/nowhere/base"),
        ({"merge_method": "wq"}, "mergekit has no merge_method 'wq'"),
        ({"dtype": "float8"}, "dtype float8"),
        ({"chat_template": "foo"}, "Invalid chat template: foo"),
        ({"tokenizer": {"source": "nope"}}, "nope: no such model folder"),
        ({"tokenizer": {"tokens": {"w5": {"source": "nope"}}}}, "its source nope is none of the models"),
        ({"tokenizer": {"tokens": {"w5": {"force": True}}}}, "tokenizer, tokens, 'w5': has no source"),
        ({"tokenizer": {"tokens": {"w5x": {"source": "BASE"}}}}, "does not have the token 'w5x'"),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "model": "BASE", "token_id": 99}}}}},
            "does not have a row 99",
        ),
    ],
)
def test_bad_recipes(world, content, text):
    if isinstance(content, dict):
        content = yaml.safe_dump({k: v for k, v in world.config(**content).items() if v is not None})
        content = content.replace("BASE", str(world.base))
    recipe = world.root / "bad.yaml"
    recipe.write_text(content)
    assert text in run(recipe, world.root / "out", code=2)
    assert not (world.root / "out").exists()
    assert not list(world.root.glob(".out*"))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--device", "cdua"], "device: 'cdua' cannot be used here"),
        (["--device", "cuda:77"], "device: 'cuda:77' cannot be used here"),
        (["--num-threads", "0"], "num_threads: found 0, expected a whole number of at least 1"),
        (["--write-threads", "-1"], "write_threads: found -1"),
        (["--device", "meta"], "device: 'meta' cannot hold weights"),
        (["--random-seed", "-1"], "random_seed: found -1, expected a whole number from 0 to 4294967295"),
        pytest.param(["--cuda"], "device: 'cuda' cannot be used here", marks=NO_GPU),
        pytest.param(["--gpu-rich"], "device: 'cuda' cannot be used here", marks=NO_GPU),
        pytest.param(["--multi-gpu"], "multi_gpu: there is no GPU here", marks=NO_GPU),
    ],
)
def test_what_this_machine_does_not_have(world, flags, text):
    for more in ([], ["--dry-run"]):
        assert text in run(world.recipe(), world.root / "out", *flags, *more, code=2)
    assert not (world.root / "out").exists()


def test_layers_that_a_model_does_not_have(world):
    config = slices(world, [(2, 9)])
    text = run(world.recipe(config), "--dry-run", code=2)
    assert re.search(r"layer_range \[2, 9\] of \S+, which has 4 layers; end it there at most", text)


def test_an_expert_of_another_architecture(world):
    """mergekit would advise --allow-crimes."""
    tiny.save(tiny.random_model("qwen2"), world.root / "qwen")
    config = world.config()
    config["models"][1] = {"model": str(world.root / "qwen")}
    text = run(world.recipe(config), world.root / "out", code=2)
    assert "a LlamaForCausalLM" in text
    assert f"{world.root / 'qwen'} " in text
    assert "a Qwen2ForCausalLM" in text
    assert "wp merges models that were tuned from one base" in text
    assert "allow-crimes" not in text


def test_no_recipe_and_no_output(world):
    assert "cannot read this recipe" in run(world.root / "none.yaml", world.root / "out", code=2)
    assert "OUT_PATH" in run(world.recipe(), code=2)


def test_pickled_input_is_refused_before_mergekit_opens_it(world):
    for file in world.expert(1).glob("*.safetensors*"):
        file.unlink()
    torch.save({}, world.expert(1) / "pytorch_model.bin")
    assert "pickled" in run(world.recipe(), world.root / "out", code=2)
