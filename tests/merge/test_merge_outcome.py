"""What the merged folder gets from the base's texts though the merged tensors contradict it, and float16's end."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from merge_world import World, merge, tensors_of
from mergekit.io.tasks import LoaderCache
from safetensors.torch import save_file

from mergekit_wp.errors import BadInput
from mergekit_wp.merge.cli import main
from mergekit_wp.merge.kernel import NotFiniteError, fuse
from mergekit_wp.merge.outcome import _bring_code


@pytest.fixture
def world(tmp_path):
    return World(tmp_path, "llama", experts=1).build()


def edit(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


STALE = {
    "dtype": None,
    "torch_dtype": "float16",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "_name_or_path": "/home/bob/base",
    "bos_token_id": 151643,
    "auto_map": {
        "AutoConfig": "configuration_acme.AcmeConfig",
        "AutoModel": "../../../etc/passwd.X",
        "AutoModelForCausalLM": "modeling_acme.AcmeForCausalLM",
        "AutoModelForTokenClassification": "modeling_gone.X",
        "AutoModelForMaskedLM": "bob/acme--modeling_other.X",
    },
}


def test_the_result_says_what_its_tensors_are(world, caplog):
    edit(world.base / "config.json", **STALE)
    edit(world.base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_gone.Slow", None]})
    (world.base / "configuration_acme.py").write_text("from transformers import LlamaConfig as AcmeConfig\n")
    (world.base / "modeling_acme.py").write_text("from .configuration_acme import AcmeConfig\nfrom .more import x\n")
    (world.base / "more.py").write_text("x = 1\n")
    out = merge(world)  # as the stock command does
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert {str(t.dtype) for t in tensors_of(out).values()} == {"torch.float32"}
    assert not {"torch_dtype", "quantization_config", "_name_or_path"} & config.keys()
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM", "AutoModelForMaskedLM"}
    assert sorted(p.name for p in out.glob("*.py")) == ["configuration_acme.py", "modeling_acme.py", "more.py"]
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    assert "config.json has a quantization_config, and the tensors are not quantised" in caplog.text
    # The audit of wp-merge generates from a token that exists, and other methods' results are settled too.
    recipe = world.recipe({
        "merge_method": "linear", "base_model": str(world.base), "out_dtype": "bfloat16",
        "models": [{"model": str(world.expert(0))}], "parameters": {"weight": 1.0},
    })  # fmt: skip
    LoaderCache.loaders.clear()
    run = CliRunner().invoke(main, [str(recipe), str(world.root / "other")])
    assert run.exit_code == 0, run.output
    config = json.loads((world.root / "other" / "config.json").read_text())
    assert (config["dtype"], "quantization_config" in config) == ("bfloat16", False)


@pytest.mark.parametrize(("changes", "told"), [
    ({"num_hidden_layers": 3}, "num_hidden_layers 3, and there are tensors of 4 layers"),
    ({"vocab_size": 90}, "vocab_size 90, and model.embed_tokens.weight has 97 rows"),
])  # fmt: skip
def test_a_base_whose_config_is_of_other_tensors(world, changes, told):
    for folder in (world.base, world.expert(0)):
        edit(folder / "config.json", **changes)
    with pytest.raises(BadInput, match=told):
        merge(world, world.widen())


@pytest.mark.parametrize("recipe", [{"dtype": "float16"}, {"out_dtype": "float16"}])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_value_beyond_float16(world, recipe, stored):
    """Nothing is wrong with the checkpoint, and the one who merges can choose another dtype."""
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = {key: value.to(stored) for key, value in tensors_of(world.expert(0)).items()}
    tensors[name][0, 0] = 1e5
    for file in world.expert(0).glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, world.expert(0) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput) as caught:
        merge(world, {**world.config(), "parameters": {"allow_mismatch": True}, **recipe})
    assert f"{name} holds {float(tensors[name][0, 0]):.6g}, and float16 ends at 65504" in caught.value.message
    assert "bfloat16" in caught.value.message


def test_fuse_sees_what_the_output_does_not_hold():
    big = torch.full((3, 3), 4e4)
    with pytest.raises(NotFiniteError):
        fuse([big * 2, big * 2], None, 0, torch.float16, big * 0)
    assert torch.equal(fuse([big, big], None, 0, torch.float16).float(), big.half().float())
    with pytest.raises(NotFiniteError):
        fuse([torch.full((2, 2), 1e300, dtype=torch.float64)], None, 0, torch.float32)


def test_code_that_a_base_only_links_to_does_not_come_along(tmp_path):
    """What lies elsewhere on the machine would be published with the merge."""
    secret = tmp_path / "secret.py"
    secret.write_text("token = 1\n")
    base, merged = tmp_path / "base", tmp_path / "merged"
    for folder in (base, merged):
        folder.mkdir()
    (base / "modeling_acme.py").symlink_to(secret)
    (base / "own.py").write_text("x = 1\n")
    config = {"auto_map": {"AutoModel": "modeling_acme.Acme", "AutoConfig": "own.Config"}}
    _bring_code(config, base, merged)
    assert config == {"auto_map": {"AutoConfig": "own.Config"}}
    assert [path.name for path in merged.iterdir()] == ["own.py"]


def test_chat_templates_beside_the_default_one_come_along(world, tmp_path, caplog):
    """mergekit copies the files of the base's tokenizer one by one, and no folder."""
    templates = {"chat_template.jinja": "{{ messages }}", "additional_chat_templates/tool_use.jinja": "T"}
    for name, text in templates.items():
        (world.base / name).parent.mkdir(exist_ok=True)
        (world.base / name).write_text(text)
    (tmp_path / "secret").write_text("s")
    (world.base / "additional_chat_templates" / "away.jinja").symlink_to(tmp_path / "secret")
    out = merge(world)
    assert {name: (out / name).read_text() for name in templates} == templates
    assert sorted(path.name for path in (out / "additional_chat_templates").iterdir()) == ["tool_use.jinja"]
    assert "outside of its folder" in caplog.text
    # One template in the place of all, as the recipe wants it.
    own = merge(world, {**world.config(), "chat_template": "{{ messages }} and no others"}, out="own")
    assert not (own / "additional_chat_templates").exists()
