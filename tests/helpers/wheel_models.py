"""Helper of wheel_test.sh: writes a base, two experts, pairs and a recipe here, or compares the two merges."""

import json
import sys
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file

# mergekit's model card asks the Hub about any model named with fewer than two slashes, so folders are absolute.
RECIPE = """\
merge_method: wp
base_model: {here}/base
models:
  - model: {here}/one
    parameters: {{scores: scores/one.safetensors}}
  - model: {here}/two
    parameters: {{scores: scores/two.safetensors}}
dtype: bfloat16
"""


def prepare() -> None:
    base = tiny.random_model("llama", seed=1)
    tiny.save(base, Path("base"), torch.bfloat16)
    tiny.save(tiny.fine_tuned(base, seed=2), Path("one"), torch.bfloat16)
    tiny.save(tiny.add_rows(tiny.fine_tuned(base, seed=3), 1), Path("two"), torch.bfloat16)
    rows = [{"task": "t", "prompt": f"w{i} w{i + 1} w5", "contrast": f"w{i} w{i + 1}"} for i in range(8)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("recipe.yaml").write_text(RECIPE.format(here=Path.cwd()))


def compare() -> None:
    def tensors(folder: str) -> dict[str, torch.Tensor]:
        return {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}

    stock, ours, one, two = map(tensors, ("merged", "merged-by-wp-merge", "one", "two"))
    assert stock.keys() == ours.keys() == one.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)
    norm = "model.norm.weight"  # belongs to no component, so it is the plain mean
    mean = ((one[norm].float() + two[norm].float()) / 2).to(torch.bfloat16)
    assert torch.equal(stock[norm], mean)
    assert stock["model.embed_tokens.weight"].shape[0] == one["model.embed_tokens.weight"].shape[0]
    assert any(not torch.equal(stock[name], one[name]) for name in stock)


if __name__ == "__main__":
    compare() if sys.argv[1:] == ["compare"] else prepare()
