"""What tests of merges share: running one, refusals, changed inputs, and the comparison of tensors."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from merge_world import merge, tensors_of
from safetensors.torch import save_file
from warm import script, warm

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.merge.cli import main
from mergekit_wp.merge.recipe import read_recipe


def assert_merged(got, want, dtype=torch.float32):
    """The same tensors, each within the rounding of `dtype` and of a float32 sum."""
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape, name
        assert got[name].dtype == dtype, name
        allowed = torch.finfo(dtype).eps / 2 * tensor.abs() + 1e-6
        assert ((got[name].double() - tensor).abs() <= allowed).all(), name


def written_config(folder):
    return json.loads((folder / "config.json").read_text())


def slices(world, ranges, shift=0):
    """A recipe of output slices; `shift` moves the first expert's layers against the others'."""

    def source(model, a, b, **parameters):
        return {"model": str(model), "layer_range": [a, b], **({"parameters": parameters} if parameters else {})}

    listed = []
    for a, b in ranges:
        sources = [
            source(world.expert(k), a + shift * (k == 0), b + shift * (k == 0), scores=str(world.score(k)))
            for k in range(world.experts)
        ]
        listed.append({"sources": [*sources, source(world.base, a, b)]})
    return {"merge_method": "wp", "base_model": str(world.base), "slices": listed}


def make_lora(base, folder, seed):
    """A random adapter, as peft saves it, and the state dict of the model that it makes of the base."""
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().state_dict()


def refused(world, config=None, **options):
    """The sentence of the refusal; nothing may have been written."""
    with pytest.raises(BadInput) as caught:
        merge(world, config, **options)
    assert not (world.root / "out").exists()
    assert "\n" not in caught.value.message
    return caught.value.message


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder, change):
    """Change the tensors of a folder: `change` maps the dict of them to another; one file afterwards."""
    tensors = change(tensors_of(folder))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def run(*arguments, code=0):
    from mergekit.io.tasks import LoaderCache

    LoaderCache.loaders.clear()
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def files_under(root):
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*")}


def plan_of(world, out, config=None):
    from mergekit.options import MergeOptions

    recipe = read_recipe(str(world.recipe(config)))
    recipe.prepare(MergeOptions(), merge_loras=False)
    return recipe.plan(out, MergeOptions())


def change(folder, name, where, value):
    """Overwrite one element of a merged folder."""
    header = Checkpoint.open(str(folder)).tensors[name]
    tensors = {
        k: v for k, v in tensors_of(folder).items() if Checkpoint.open(str(folder)).tensors[k].file == header.file
    }
    tensors[name][where] = value
    save_file(tensors, header.file, metadata={"format": "pt"})


def same_files(one, other):
    a, b = tensors_of(one), tensors_of(other)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


MIXED_DTYPES = [  # dtypes of base and experts, what the recipe says more, dtype of the result
    ((torch.float16, torch.bfloat16, torch.float32), {}, torch.float16),
    ((torch.bfloat16, torch.float16, torch.bfloat16), {"out_dtype": "float32"}, torch.float32),
    ((torch.float32, torch.float32, torch.float32), {"out_dtype": "bfloat16"}, torch.bfloat16),
]


def merged_by_stock(world, config):
    """The tensors of a merge by mergekit's own command, in another process, with nothing imported by hand."""
    (world.root / "recipe.yaml").write_text(yaml.safe_dump(config))
    done = warm().run(script("mergekit-yaml"), "recipe.yaml", "out", cwd=world.root)
    assert done.returncode == 0, done.stderr
    return tensors_of(world.root / "out")
