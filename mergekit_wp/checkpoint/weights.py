"""The weight files of a model folder: which of them count, and what their headers say. Reads no weights.

transformers takes `model.safetensors` before an index, mergekit and vLLM an index before that; transformers takes
every tensor of a shard, mergekit those that the index lists. A folder in which two readers would find different weights
is refused, so that scores, fingerprint, merge and evaluation are of one model. So is a file that lies elsewhere than in
its folder (a link or a shard's name may say so), except in the Hub's cache, where snapshots link to blobs.

And names of tensors that only some programs understand (`name_trouble`): transformers fills a tensor that it does not
find with random numbers; others it finds under a name that mergekit and vLLM do not know (without `model.`, say).
`geometry.text_name` says which names are right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mergekit_wp.documents import parse_json
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import inside, open_file, read_json_mapping
from mergekit_wp.geometry import HEAD, SUPPORTED, layer_of, text_name

MODEL, ADAPTER = "model", "adapter_model"
"""The stems of weight files: of a model, of a LoRA."""
ADAPTER_CONFIG = "adapter_config.json"
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its safetensors header describes it; `start` and `end` are byte positions in `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def read(self, first: int, count: int) -> bytes:
        """`count` of the tensor's bytes from byte `first` of it. Raises `BadInput` where the file is cut short."""
        with open(self.file, "rb") as stream:
            stream.seek(self.start + first)
            found = stream.read(count)
        if len(found) < count:
            raise BadInput(f"{self.file}: cut short while it was read; is something writing to it?")
        return found

    def part(self, name: str, where: Any) -> torch.Tensor:
        """The part of the tensor, by the name that it has in its file, that a slice or a tuple of slices says."""
        with safe_open(self.file, framework="pt") as file:
            part: torch.Tensor = file.get_slice(name)[where]
        return part


@dataclass(frozen=True, eq=False)
class HeldTensor(TensorHeader):
    """One tensor in memory, seen as one in a file."""

    tensor: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, tensor: torch.Tensor) -> HeldTensor:
        """Named as safetensors would name its dtype."""
        dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.").upper())
        nbytes = tensor.numel() * tensor.element_size()
        return cls(dtype, tuple(tensor.shape), Path("(in memory)"), 0, nbytes, tensor.detach())

    def read(self, first: int, count: int) -> bytes:
        bytes_N = self.tensor.contiguous().view(-1).view(torch.uint8)
        return bytes_N[first : first + count].cpu().numpy().tobytes()

    def part(self, name: str, where: Any) -> torch.Tensor:
        return self.tensor[where]


_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_tensors(folder: Path, stem: str = MODEL) -> dict[str, TensorHeader]:
    """Every tensor of the model (or LoRA) in a folder by name, from the headers of its files.

    Raises `BadInput` when there are none, or readers would disagree on them.
    """
    single, index = folder / f"{stem}{SUFFIX}", folder / f"{stem}{INDEX_SUFFIX}"
    if not index.is_file():
        if not single.is_file():
            raise BadInput(f"{folder}: {_why_no_weights(folder, stem)}")
        return read_header(inside(folder, single))
    shard_of = read_index(inside(folder, index))
    shards = sorted(set(shard_of.values()))
    if single.is_file() and shards != [single.name]:
        raise BadInput(f"{folder}: {two_sets(single.name, index.name, shards, _files_of(folder))}")
    missing = sorted(set(shards) - set(_files_of(folder)))
    if missing:
        raise BadInput(f"{folder}: {index.name} names the shard {_some(missing)}, which is missing; download it again.")
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        for name, header in read_header(inside(folder, folder / shard)).items():
            if name in tensors:
                raise BadInput(
                    f"{folder}: the tensor {name} is in two shards, {tensors[name].file.name} and {shard}, and "
                    "programs differ in which they take; save or download the model again."
                )
            tensors[name] = header
    _check_index(index, shard_of, tensors)
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> shard of an index. Raises `BadInput` for anything else, shards outside of its folder included."""
    content = read_json_mapping(path, "shard index")
    shard_of = content.get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise BadInput(
            f"{path}: `weight_map` is {shown(shard_of)}, expected an object of tensors and their files; download it "
            "again."
        )
    if not isinstance(content.get("metadata"), dict):
        raise BadInput(f'{path}: has no `metadata`, without which transformers cannot load it; add `"metadata": {{}}`.')
    for tensor, shard in shard_of.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise BadInput(
                f"{path}: the tensor {tensor} is said to lie in {shown(shard)}, expected the name of a file in this "
                "folder; download the index again."
            )
        if not shard.endswith(SUFFIX):
            raise BadInput(
                f"{path}: names {shown(shard)}, which is no {SUFFIX} file; pickled weights are never opened."
            )
    return shard_of


def strays(folder: Path) -> list[str]:
    """Files that only vLLM would read: without an index it takes every .safetensors in a folder for weights."""
    if (folder / f"{MODEL}{INDEX_SUFFIX}").is_file():
        return []
    return sorted(path.name for path in folder.glob(f"*{SUFFIX}") if path.name != f"{MODEL}{SUFFIX}")


def two_sets(single: str, index: str, shards: Iterable[str], there: Iterable[str]) -> str:
    """What to say of a single file beside an index of others."""
    if missing := sorted(set(shards) - set(there)):
        return (
            f"{index} is left over from an earlier save (it names {_some(missing)}, which is not there), and mergekit "
            f"and vLLM would go by it, while transformers loads {single}; delete {index}."
        )
    return (
        f"holds two sets of weights: transformers loads {single}, mergekit and vLLM the shards of {index}; keep one of "
        "them."
    )


def read_header(file: Path) -> dict[str, TensorHeader]:
    """The header of one safetensors file: 8 bytes little-endian length, then JSON (the format's own spec).

    Raises `BadInput` when the safetensors library does not take the file, or two of its tensors have one name.
    """
    try:
        size = file.stat().st_size
        with open_file(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            # The library checks offsets against each other, dtypes, shapes and size, and has its limits.
            with safe_open(file, framework="np"):
                pass
            entries = parse_json(stream.read(length))
    except OSError as error:
        raise BadInput(f"{file}: cannot read this weight file ({error.strerror or error}).") from error
    except SafetensorError as error:
        if size and str(error).endswith("file not fully covered"):
            raise BadInput(
                f"{file}: cut short at {size} bytes, or longer than its header says; download or save it again."
            ) from error
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise BadInput(f"{file}: not a safetensors file ({reason[:200]}); save or download it again.") from error
    except ValueError as error:
        raise BadInput(f"{file}: its header is not one that can be used: {error}.") from error
    return {name: _header(entry, file, 8 + length) for name, entry in entries.items() if name != "__metadata__"}


def _header(entry: dict[str, Any], file: Path, data: int) -> TensorHeader:
    start, end = entry["data_offsets"]
    return TensorHeader(entry["dtype"], tuple(entry["shape"]), file, data + start, data + end)


def _check_index(index: Path, shard_of: dict[str, str], tensors: dict[str, TensorHeader]) -> None:
    for name, shard in shard_of.items():
        if name not in tensors or tensors[name].file.name != shard:
            where = f", {tensors[name].file.name} does" if name in tensors else ""
            raise BadInput(
                f"{index}: the tensor {name} is said to lie in {shard}, which does not hold it{where}; download index "
                "and shards again."
            )
    if unlisted := sorted(set(tensors) - set(shard_of)):
        raise BadInput(
            f"{index}: does not list {_some(unlisted)} of {tensors[unlisted[0]].file.name}, which transformers would "
            "load and mergekit leave out; download index and shards again."
        )


def _why_no_weights(folder: Path, stem: str) -> str:
    """Why a folder cannot be read as a model (or LoRA), and what to do, as the end of a sentence."""
    there = _files_of(folder)
    weights = sorted(name for name in there if name.endswith(SUFFIX))
    if any(name.endswith((".bin", ".pt", ".pth")) for name in there) and not weights:
        return "holds pickled .bin weights only, which are never opened; convert them to safetensors."
    if stem == ADAPTER:
        return f"no {ADAPTER}{SUFFIX} there; a LoRA is a folder with that file and {ADAPTER_CONFIG}."
    if any(name.startswith("consolidated") for name in weights):
        return (
            f"holds {_some(weights)}, the layout of the model's makers, and no model.safetensors; take the files that "
            "transformers loads, or convert these."
        )
    if variants := [name for name in weights if name.startswith("model.")]:
        return f"no model.safetensors there, only the variant {_some(variants)}; rename that to model.safetensors."
    if weights:
        return f"no model.safetensors and no {MODEL}{INDEX_SUFFIX} there, which would say what {_some(weights)} is."
    return (
        "no model.safetensors and no model.safetensors.index.json there; if this model comes as pickled .bin files, "
        "which are never opened, convert it to safetensors once."
    )


def _files_of(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _some(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


_OF_BACKBONE = ("layers.", "embed_tokens.", "norm.")
_LAYER = re.compile(r"(?:.*\.)?layers\.\d+\.")
# What is left in the names of tensors by those who save a model in its wrapping, and what to do.
_AT_START = {
    "base_model.model.": "peft's, whose LoRA is not merged; save what merge_and_unload() returns",
    "module.": "that of DataParallel, DDP or DeepSpeed; save `model.module`, or take it off all the names",
}
_ANYWHERE = {
    "_orig_mod.": "torch.compile's; save the model that was compiled, or take it out of all the names",
    "_fsdp_wrapped_module.": "FSDP's; save a full state dict, or take it out of all the names",
    "_checkpoint_wrapped_module.": "activation checkpointing's; take it out of all the names",
    "base_layer.": "peft's, whose LoRA is not merged; save what merge_and_unload() returns",
}


def name_trouble(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """What is wrong with the names of a checkpoint's tensors, and what to do; None when nothing is.

    Of an architecture that is not supported, which wp-eval may be given, only the wrappings are known.
    """
    names = list(names)
    for name in names:
        whose = [(mark, text) for mark, text in _AT_START.items() if name.startswith(mark)]
        whose += [(mark, text) for mark, text in _ANYWHERE.items() if f".{mark}" in f".{name}"]
        if whose:
            return f"its tensors are named like {name}: the `{whose[0][0]}` in it is {whose[0][1]}."
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and architectures[0] in SUPPORTED):
        return None
    odd = [n for n in names if n.startswith(_OF_BACKBONE) or (n.endswith(f".{HEAD}") and text_name(n) != HEAD)]
    layers = [name for name in names if _LAYER.match(name)]
    if odd or (layers and not any(layer_of(name) is not None for name in layers)):
        return (
            f"its tensors are named like {(odd or layers)[0]}, and a causal LM's like model.layers.0... and {HEAD}; "
            "load it with transformers' AutoModelForCausalLM and save it again, if that finds them all, or rename them."
        )
    return None
