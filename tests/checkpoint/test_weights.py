"""Which weight files count, what is refused, and that transformers, mergekit and we take the same tensors."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mergekit_wp.checkpoint.folder import Checkpoint, fingerprint_of, fingerprint_tensors
from mergekit_wp.checkpoint.weights import name_trouble, read_header, read_tensors, strays
from mergekit_wp.errors import BadInput

LLAMA = {"architectures": ["LlamaForCausalLM"]}
NAMES = ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")


def tensors(value=0.0, names=NAMES):
    return {name: np.full((3, 2), value + i, np.float32) for i, name in enumerate(names)}


def write(folder, shards, listed=None, metadata=True, **config):
    """A model folder of {file: {tensor: value}}; an index of them unless it is one file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    for file, content in shards.items():
        save_file(content, folder / file)
    if list(shards) != ["model.safetensors"]:
        listed = listed or {name: file for file, content in shards.items() for name in content}
        index = {"weight_map": listed} | ({"metadata": {}} if metadata else {})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def halves(value=0.0):
    all_of_them = tensors(value)
    first = NAMES[:2]
    return {
        "model-1.safetensors": {name: all_of_them[name] for name in first},
        "model-2.safetensors": {name: all_of_them[name] for name in NAMES if name not in first},
    }


def refused(folder, *words):
    for read in (lambda: Checkpoint.open(str(folder)), lambda: fingerprint_of(str(folder))):
        with pytest.raises(BadInput) as caught:
            read()
        for word in words:
            assert word in caught.value.message


# ---------------------------------------------------------------------- which files


@pytest.mark.parametrize("shards", [{"model.safetensors": tensors()}, halves()], ids=["single", "sharded"])
def test_the_files_are_those_of_transformers_and_of_mergekit(tmp_path, shards):
    from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    folder = write(tmp_path / "m", shards)
    for stray in ("model.fp16.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
        save_file(tensors(9.0), folder / stray)  # no reader's business
    found = read_tensors(folder)
    theirs, _ = _get_resolved_checkpoint_files(str(folder), None, None, True, None, False)
    assert sorted({str(header.file) for header in found.values()}) == sorted(theirs)
    index = ShardedTensorIndex.from_disk(str(folder))
    assert {name: header.file.name for name, header in found.items()} == index.tensor_paths
    # vLLM goes by an index, and without one loads whatever ends in .safetensors.
    assert strays(folder) == (
        [] if len(shards) > 1 else ["adapter_model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"]
    )


def test_an_index_of_the_single_file_itself_is_fine(tmp_path):
    folder = write(tmp_path / "m", {"model.safetensors": tensors()})
    index = {"metadata": {}, "weight_map": dict.fromkeys(NAMES, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(Checkpoint.open(str(folder)).tensors) == set(NAMES)


def test_two_sets_of_weights(tmp_path):
    folder = write(tmp_path / "m", halves())
    save_file(tensors(5.0), folder / "model.safetensors")
    refused(folder, "two sets of weights", "model.safetensors,", "model.safetensors.index.json")
    (folder / "model-2.safetensors").unlink()
    refused(folder, "left over", "model-2.safetensors", "delete model.safetensors.index.json")


@pytest.mark.parametrize(
    ("shards", "listed", "words"),
    [
        ({**halves(), "model-3.safetensors": tensors(names=NAMES[:1])}, None, ("two shards", NAMES[0])),
        (halves(), {**dict.fromkeys(NAMES[:2], "model-1.safetensors"), NAMES[2]: "model-2.safetensors"},
         ("does not list", NAMES[3])),
        (halves(), {**dict.fromkeys(NAMES[:3], "model-1.safetensors"), NAMES[3]: "model-2.safetensors"},
         ("does not hold it, model-2.safetensors does", NAMES[2])),
        (halves(), {**dict.fromkeys(NAMES, "model-1.safetensors"), "x": "model-2.safetensors"}, ("does not hold it",)),
        (halves(), {"x": "../m.safetensors"}, ("'../m.safetensors'", "name of a file in this folder")),
        (halves(), {"x": "/etc/passwd"}, ("name of a file in this folder",)),
        (halves(), {"x": ".."}, ("is no .safetensors file",)),
        (halves(), {"x": "a\\b.safetensors"}, ("name of a file in this folder",)),
        (halves(), {"x": "pytorch_model.bin"}, ("pickled",)),
        (halves(), {"x": None}, ("None",)),
        (halves(), {"x": 5, "y": "model-1.safetensors"}, ("5",)),
        (halves(), [1], ("weight_map",)),
        (halves(), {"x": "model-9.safetensors"}, ("model-9.safetensors", "missing")),
    ],
)  # fmt: skip
def test_an_index_that_readers_would_take_differently(tmp_path, shards, listed, words):
    refused(write(tmp_path / "m", shards, listed), *words)


def test_an_index_without_metadata(tmp_path):
    refused(write(tmp_path / "m", halves(), metadata=False), "`metadata`")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model.fp16.safetensors", "only the variant model.fp16.safetensors"),
        ("consolidated.safetensors", "the layout of the model's makers"),
        ("pytorch_model.bin", "pickled"),
        ("weights.safetensors", "no model.safetensors"),
    ],
)
def test_a_folder_without_the_weights_that_are_looked_for(tmp_path, file, words):
    write(tmp_path / "m", {"model.safetensors": tensors()})
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / file)
    refused(tmp_path / "m", words)


def test_a_file_that_the_config_names(tmp_path):
    folder = write(tmp_path / "m", {"model.safetensors": tensors()}, transformers_weights="other.safetensors")
    refused(folder, "`transformers_weights`", "other.safetensors")


def test_a_lora_alone_and_a_lora_in_the_models_folder(tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "user/base"}))
    save_file(tensors(), lora / "adapter_model.safetensors")
    refused(lora, f"write BASE+{lora}", "user/base")
    (lora / "config.json").write_text(json.dumps(LLAMA))
    refused(lora, f"write BASE+{lora}")
    save_file(tensors(), lora / "model.safetensors")
    refused(lora, "a model and a LoRA", "folder of their own")


# ---------------------------------------------------------------------- links


def test_links_out_of_the_folder(tmp_path):
    """Only the Hub's cache, where a snapshot links to the blobs of its own repository, may have them."""
    outside = write(tmp_path / "outside", {"model.safetensors": tensors()})
    for name in ("model.safetensors", "config.json"):
        folder = write(tmp_path / f"of-{name}", {"model.safetensors": tensors()})
        (folder / name).unlink()
        (folder / name).symlink_to(outside / name)
        refused(folder, name, "outside of its folder")
    whole = tmp_path / "whole"
    whole.symlink_to(outside)
    Checkpoint.open(str(whole))

    repo = tmp_path / "models--user--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(outside / name, repo / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    Checkpoint.open(str(snapshot))
    (tmp_path / "link").symlink_to(snapshot)
    linked = Checkpoint.open(str(tmp_path / "link"))
    assert fingerprint_tensors(linked.tensors) == fingerprint_tensors(Checkpoint.open(str(outside)).tensors)
    other = tmp_path / "models--user--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(outside / "model.safetensors", other / "x")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "x")
    refused(snapshot, "outside of its folder")


# ---------------------------------------------------------------------- headers

TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
ONE = {"dtype": "F32", "shape": [1]}


def put(path, header, data=b"\0" * 16, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": {**TENSOR, "data_offsets": [0.0, 16.0]}}, "floating point"),
        ({"a": {**TENSOR, "data_offsets": [-1, 15]}}, "-1"),
        ({"a": {**TENSOR, "data_offsets": [16, 0]}}, "offset"),
        ({"a": {**TENSOR, "data_offsets": [0, 8]}}, "shape, data type, or offset"),
        ({"a": {**TENSOR, "data_offsets": None}}, "null"),
        ({"a": {**TENSOR, "shape": [-4]}}, "-4"),
        ({"a": {**TENSOR, "shape": [2**70]}}, "floating point"),
        ({"a": {**TENSOR, "dtype": "F33"}}, "F33"),
        ({"a": {**TENSOR, "dtype": "BF16"}}, "shape, data type, or offset"),
        ({"a": None}, "null"),
        ({"a": 5}, "5"),
        ([TENSOR], "JSON"),
        ({"a": TENSOR, "b": {**TENSOR, "shape": [2], "data_offsets": [8, 16]}}, "offset"),
        ({"a": {**ONE, "data_offsets": [0, 4]}, "b": {**ONE, "data_offsets": [12, 16]}}, "offset"),
        ({"__metadata__": {"a": 1}, "a": TENSOR}, "expected a string"),
        (b'{"a": ' + b"[" * 100_000, "recursion"),
        (b'{"a": ' + json.dumps(TENSOR).encode() + b', "a": ' + json.dumps(TENSOR).encode() + b"}", "twice"),
        (json.dumps({"a": TENSOR}).encode("utf-16"), "UTF-8"),
        (b'{"\\ud800": ' + json.dumps(TENSOR).encode() + b"}", "hex escape"),
    ],
)  # fmt: skip
def test_headers_of_odd_writers(tmp_path, header, words):
    with pytest.raises(BadInput, match=words):
        read_header(put(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(("data", "length"), [(b"\0" * 10, None), (b"\0" * 20, None), (b"\0" * 16, 10**15), (b"", 500)])
def test_files_of_another_size_than_they_say(tmp_path, data, length):
    with pytest.raises(BadInput, match=r"x\.safetensors: (cut short|not a safetensors file)"):
        read_header(put(tmp_path / "x.safetensors", {"a": TENSOR}, data, length))


def test_an_empty_file_and_a_folder(tmp_path):
    for name in ("empty", "folder"):
        path = tmp_path / name
        path.write_bytes(b"") if name == "empty" else path.mkdir()
        with pytest.raises(BadInput, match=name):
            read_header(path)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 40))
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(tmp_path_factory, place, byte, cut):
    from safetensors import safe_open

    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save_file(tensors(), path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content[: len(content) - cut])
    try:
        header = read_header(path)
    except BadInput:
        return
    with safe_open(path, framework="np") as file:
        assert set(header) == set(file.keys())
        for name, entry in header.items():
            assert list(entry.shape) == file.get_slice(name).get_shape()


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name: name.removeprefix("model."), "embed_tokens.weight"),
        (lambda name: "_orig_mod." + name, "`_orig_mod.`"),
        (lambda name: name.replace("layers.0.", "layers.0._orig_mod."), "`_orig_mod.`"),
        (lambda name: name.replace("self_attn", "_checkpoint_wrapped_module.self_attn"), "activation checkpointing's"),
        (lambda name: "_fsdp_wrapped_module." + name, "`_fsdp_wrapped_module.`"),
        (lambda name: "module." + name, "`module.`"),
        (lambda name: "base_model.model." + name, "merge_and_unload"),
        (lambda name: name.replace("q_proj", "q_proj.base_layer"), "merge_and_unload"),
        (lambda name: "model." + name, "model.lm_head.weight"),
        (lambda name: "llm." + name, "llm.lm_head.weight"),
        (lambda name: name.replace("lm_head", "model.lm_head"), "model.lm_head.weight"),
        (lambda name: name.replace("model.norm", "norm"), "norm.weight"),
    ],
)  # fmt: skip
def test_names_of_a_wrapped_or_bare_model(tmp_path, change, words):
    folder = write(tmp_path / "m", {"model.safetensors": {change(name): x for name, x in tensors().items()}})
    refused(folder, "its tensors are named like", words)


def test_only_wrappings_are_known_of_other_architectures():
    """wp-eval is given those too."""
    opt = {"architectures": ["OPTForCausalLM"]}
    assert name_trouble(["model.decoder.layers.0.fc1.weight", "lm_head.weight"], opt) is None
    assert "_orig_mod" in str(name_trouble(["_orig_mod.model.decoder.layers.0.fc1.weight"], opt))
    assert name_trouble(["transformer.h.0.attn.weight"], {"architectures": 1}) is None
