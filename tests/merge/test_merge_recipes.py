"""The shipped recipes: in step with their table, and each passes a dry run on models of the real shapes."""

from __future__ import annotations

import json
import math
import struct
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from merge_world import World, tensors_of, write_random_scores
from mergekit.config import MergeConfiguration

from experiments import write_recipes as make
from mergekit_wp.checkpoint.folder import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("13b-*.yaml"))
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "widen", "wp")
LLAMA_2_13B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
}
TABLE = yaml.safe_load((ROOT / "recipes" / "table.yaml").read_text())


def test_the_files_are_what_the_table_makes(tmp_path):
    make.main(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in RECIPES}, "run `make recipes`"


def test_the_table_is_the_papers():
    """Four combinations by seven methods; the merges by scores keep their short names."""
    assert len(RECIPES) == 28
    combinations = {"code-instruction", "code-maths", "instruction-maths", "all"}
    assert {path.name for path in RECIPES} == {make.file_name(c, m) for c in combinations for m in METHODS}
    assert make.file_name("all", "wp") == "13b-all.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_parses_and_its_scores_have_jobs(path):
    text = path.read_text()
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    assert str(config.base_model) == TABLE["base"]
    assert path.stem.endswith(config.merge_method) or config.merge_method == "wp"
    assert f"recipes/{path.name}" in text
    for model in config.models:
        if config.merge_method == "wp":
            scores = Path(model.parameters["scores"])
            assert f"wp-score scoring/{scores.stem}.yaml --out {scores}" in text
            job = yaml.safe_load((ROOT / "scoring" / f"{scores.stem}.yaml").read_text())
            assert (job["base"], job["expert"]) == (TABLE["base"], str(model.model))


def write_hollow_model(folder: Path, rows: int, layers: int) -> int:
    """A Llama-2-13B, of 26 GB if it has all 40 layers, whose weights are a hole in the file: it takes a few pages of
    disk. Returns the bytes."""
    D, F = LLAMA_2_13B["hidden_size"], LLAMA_2_13B["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (rows, D), "model.norm.weight": (D,), "lm_head.weight": (rows, D)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{x}_proj.weight": (D, D) for x in "qkvo"}
        shapes |= {f"{prefix}mlp.{x}_proj.weight": (F, D) for x in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (D, F)}
        shapes |= {f"{prefix}{x}_layernorm.weight": (D,) for x in ("input", "post_attention")}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA_2_13B, "vocab_size": rows, "num_hidden_layers": layers}))
    # Sharded, because safetensors maps a file whole, and the kernel refuses a mapping larger than its memory.
    shards = {f"model-{i}.safetensors": list(shapes)[i::16] for i in range(16)}
    for name, names in shards.items():
        write_hollow_file(folder / name, {tensor: shapes[tensor] for tensor in names})
    weight_map = {tensor: name for name, names in shards.items() for tensor in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return 2 * sum(map(math.prod, shapes.values()))


def write_hollow_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def models(root: Path, layers: int) -> tuple[Path, int]:
    """The models as folders of their Hub names, and score files where the recipes look for them; bytes of the base."""
    size = write_hollow_model(root / TABLE["base"], 32000, layers)
    geometry = Checkpoint.open(str(root / TABLE["base"])).geometry
    (root / "scores").mkdir()
    for seed, expert in enumerate(TABLE["experts"].values()):
        write_hollow_model(root / expert["model"], 32001, layers)
        scores = root / "scores" / f"{expert['job']}.safetensors"
        write_random_scores(scores, str(root / TABLE["base"]), str(root / expert["model"]), seed, geometry)
    return root, size


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return models(tmp_path_factory.mktemp("13b"), 40)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """With two layers: a plan and its checks take time by the tensor."""
    return models(tmp_path_factory.mktemp("13b-shallow"), 2)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_dry_run_on_models_of_these_shapes(path, request, monkeypatch):
    """Every recipe as it is, with folders for Hub names; no tensor is read, and nothing is written."""
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader
    from mergekit.io.tasks import LoaderCache

    from mergekit_wp.merge.cli import main

    def read(*_, **__):
        raise AssertionError("a dry run reads no weights")

    here, size = request.getfixturevalue("whole" if path.stem == "13b-all" else "shallow")
    monkeypatch.setattr(LazyTensorLoader, "get_tensor", read)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**12, 0, 10**12))
    monkeypatch.chdir(here)
    LoaderCache.loaders.clear()
    before = sorted(here.rglob("*"))
    result = CliRunner().invoke(main, [str(path), "merged", "--dry-run", "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"all checks passed; the merge would write {size / 1e9:.2f} GB" in result.output
    if path.stem == "13b-all":
        assert f"{size / 1e9:.2f}" == "26.03"
    assert sorted(here.rglob("*")) == before
    assert sum(file.stat().st_blocks for file in here.rglob("*.safetensors")) * 512 < 2**26


def test_dry_run_without_the_tokenizer_line(shallow, monkeypatch, tmp_path):
    """What the recipes' `tokenizer:` is for."""
    from mergekit_wp.merge.cli import main

    monkeypatch.chdir(shallow[0])
    text = (ROOT / "recipes" / "13b-all-ties.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text("\n".join(x for x in text.split("\n") if not x.startswith("tokenizer")))
    result = CliRunner().invoke(main, [str(tmp_path / "recipe.yaml"), "--dry-run"])
    assert result.exit_code == 2
    assert "has 32001 rows, another model 32000" in result.output


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("13b-all")], ids=lambda p: p.stem)
def test_the_merges_run(path, tmp_path):
    """Each method's recipe on tiny models, two of them with added rows, through wp-merge and its audit."""
    from mergekit.io.tasks import LoaderCache

    from mergekit_wp.merge.cli import main

    world = World(tmp_path, "llama", experts=3, extra_rows=[1, 0, 2]).build()
    text = path.read_text().replace(TABLE["base"], str(world.base))
    for k, expert in enumerate(TABLE["experts"].values()):
        text = text.replace(expert["model"], str(world.expert(k)))
        text = text.replace(f"scores/{expert['job']}.safetensors", str(world.score(k)))
    (tmp_path / "recipe.yaml").write_text(text)
    LoaderCache.loaders.clear()
    out = tmp_path / "out"
    arguments = [str(tmp_path / "recipe.yaml"), str(out), "--random-seed", "0"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "it generates a token" in result.output
    assert (out / "generation_config.json").read_bytes() == (world.base / "generation_config.json").read_bytes()
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 97
    base, got = tensors_of(world.base), tensors_of(out)
    assert {name: tensor.shape for name, tensor in got.items()} == {name: tensor.shape for name, tensor in base.items()}
    assert {tensor.dtype for tensor in got.values()} == {torch.float16}
    changes = {"linear": 1 / 3, "task_arithmetic": 1.0}  # the two that a line can check
    if share := changes.get(yaml.safe_load(text)["merge_method"]):
        experts = [tensors_of(world.expert(k)) for k in range(3)]
        for name, tensor in base.items():
            want = tensor + share * sum(expert[name][: tensor.shape[0]] - tensor for expert in experts)
            torch.testing.assert_close(got[name].float(), want, rtol=2**-8, atol=1e-5)
