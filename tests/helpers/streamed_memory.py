"""Run by test_streamed in a process of its own: a pair swept, then loaded, under a memory limit.

Prints one word a step: `streamed` once both models were swept together; `too-large` if loading them whole fails under
the same limit; `loaded` if that works without it.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.batching import batches
from mergekit_wp.scoring.models.load import _load_model
from mergekit_wp.scoring.models.streaming import open_streamed
from mergekit_wp.scoring.sweep import forward_sweep

LAYERS, HEADROOM = 10, 200e6
# A layer is 28 MB in float32. Two models swept together need four layers, 113 MB; one of them whole is 283 MB.
SHAPE = {"vocab_size": 64, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 8}
CPU = torch.device("cpu")


def write_model(folder: Path, seed: int) -> None:
    """142 MB of bfloat16; every layer has the same weights, which is quick to make."""
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=LAYERS, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(seed)
    weights = {}
    for key, tensor in model.state_dict().items():
        like = re.sub(r"layers\.\d+", "layers.0", key)
        weights[key] = weights[like] if like in weights else torch.randn(tensor.shape).mul_(0.03).bfloat16()
    index = {}
    for layer in range(-1, LAYERS):
        file = f"model-{layer + 1}.safetensors"
        mine = [
            key for key in weights if key.startswith(f"model.layers.{layer}.") or (layer < 0 and ".layers." not in key)
        ]
        save_file({key: weights[key].clone() for key in mine}, folder / file)
        index.update(dict.fromkeys(mine, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def limit(headroom: float) -> None:
    """Let the process take `headroom` bytes beside the writable memory it has now."""
    status = Path("/proc/self/status").read_text()
    data = int(re.search(r"VmData:\s+(\d+) kB", status)[1]) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(data + headroom) if headroom else hard, hard))


def sweep_both(folders: list[Path]) -> None:
    stacks = [open_streamed(str(f), Checkpoint.open(str(f)), torch.float32, CPU) for f in folders]
    (batch,) = batches([[1, 2, 3, 4]], 1, *stacks)
    for _base, _expert in zip(*(forward_sweep(s, [s.start(batch)], LAYERS) for s in stacks), strict=True):
        pass


def load_both(folders: list[Path]) -> None:
    _models = [_load_model(str(folder), str(folder), torch.float32, CPU, False) for folder in folders]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    folders = [root / "base", root / "expert"]
    for seed, folder in enumerate(folders):
        write_model(folder, seed)
    # Whatever libraries take once, they take now.
    tiny = root / "tiny"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, "hidden_size": 16, "intermediate_size": 16},
                                                           num_hidden_layers=LAYERS)).save_pretrained(tiny)  # fmt: skip
    sweep_both([tiny, tiny])
    load_both([tiny, tiny])
    limit(HEADROOM)
    sweep_both(folders)
    print("streamed", flush=True)
    try:
        load_both(folders)
    except (BadInput, MemoryError, RuntimeError) as error:
        print(error, file=sys.stderr)
        print("too-large", flush=True)
    limit(0)
    load_both(folders)
    print("loaded", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
