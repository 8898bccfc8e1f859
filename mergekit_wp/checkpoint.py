"""Model folders on disk: config, tensor headers and fingerprints, without reading the weights.

Only safetensors are opened: a checkpoint in pickled `.bin` files is refused, since unpickling runs code.

A fingerprint answers "are these scores of this very model?". It has two halves, each a SHA-256: `config` over
what transformers builds from config.json (`modelconfig`), and `tensors` over every tensor's name, dtype and
shape plus three 4 KiB windows of its data. The headers alone would not do: two fine-tunes of one base have
equal headers. Sharding and tensor order do not enter, so a re-sharded copy keeps its fingerprint. The windows
of a 13B model are about 4 MB of I/O.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_wp import modelconfig
from mergekit_wp.components import Geometry, text_config
from mergekit_wp.errors import BadInput

_WINDOW_BYTES = 4096


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its safetensors header describes it; `start` and `end` are byte positions in `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


@dataclass(frozen=True)
class Fingerprint:
    """Hex SHA-256 of the config and of the tensors (names, dtypes, shapes, sampled bytes).

    `spelled` is the config's hash as files made before 2026-11-25 have it; a fingerprint from a file has none.
    """

    config: str
    tensors: str
    spelled: str = field(default="", compare=False)

    def has_config(self, hashed: str) -> bool:
        """Whether this is the hash, new or old, of the model's config."""
        return hashed in (self.config, self.spelled)

    def __str__(self) -> str:
        return _digest([self.config, self.tensors])


@dataclass(frozen=True)
class Checkpoint:
    """A local model folder: `name` is what the user wrote, `folder` where its files lie."""

    name: str
    folder: Path

    @classmethod
    def open(cls, name: str) -> Checkpoint:
        """Open a folder, or a Hub name (`user/model`, `user/model@revision`), downloading safetensors only.

        Raises `BadInput` when the folder is missing or unreadable, or holds no safetensors.
        """
        checkpoint = cls(name, local_folder(name))
        checkpoint.config, checkpoint.tensors  # noqa: B018  (both are cached; read now, so errors come early)
        return checkpoint

    @cached_property
    def config(self) -> dict[str, Any]:
        return _read_json(self.folder / "config.json", "the model's config")

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The fields of `config` that describe the decoder (see `components.text_config`)."""
        return text_config(self.config, where=str(self.folder / "config.json"))

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry.from_config(self.config, where=str(self.folder / "config.json"))

    @cached_property
    def tensors(self) -> dict[str, TensorHeader]:
        """Every tensor of the model by name, from the headers of its shards."""
        return {k: v for file in _weight_files(self.folder) for k, v in read_header(file).items()}

    @cached_property
    def nbytes(self) -> int:
        return sum(header.end - header.start for header in self.tensors.values())

    @cached_property
    def resolved_config(self) -> dict[str, Any]:
        """The fields that change a forward pass, as transformers understands them (see `modelconfig.resolved`)."""
        return modelconfig.resolved(self.config, str(self.folder / "config.json"))

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            modelconfig.digest(self.resolved_config),
            fingerprint_tensors(self.tensors),
            modelconfig.spelled_digest(self.config, self.geometry),
        )

    def lineage_differences(self, base: Checkpoint) -> list[str]:
        """What transformers computes otherwise than for the base, shapes aside, readable; [] when nothing."""
        return modelconfig.differences(self.resolved_config, base.resolved_config)


def fingerprint_of(name: str) -> Fingerprint:
    """The fingerprint of a model reference: `model` or `model+lora` (the way mergekit writes a LoRA).

    A LoRA's fingerprint hashes the base's and the adapter's own files, so it does not depend on the dtype in
    which somebody merges the two. Raises `BadInput` as `Checkpoint.open` does.
    """
    model, plus, adapter = name.partition("+")
    base = Checkpoint.open(model).fingerprint
    if not plus:
        return base
    folder = local_folder(adapter)
    settings = _read_json(folder / "adapter_config.json", "the LoRA's config")
    tensors = {k: v for file in _weight_files(folder) for k, v in read_header(file).items()}
    keys = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
    parts = [base.tensors, json.dumps([settings.get(key) for key in keys]), fingerprint_tensors(tensors)]
    return Fingerprint(base.config, _digest(parts), base.spelled)


def content_digest(tensors: Mapping[str, TensorHeader]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and all of its bytes, whatever the sharding.

    Where a fingerprint's samples would not do: two merges may differ in the rows of one head. Reads the whole
    model (about a second a GB).
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        header = tensors[name]
        digest.update(f"{name}|{header.dtype}|{header.shape}|".encode())
        with open(header.file, "rb") as stream:
            stream.seek(header.start)
            left = header.end - header.start
            while left:
                block = stream.read(min(left, 1 << 24))
                if not block:
                    raise BadInput(f"{header.file}: cut short while it was read; is something writing to it?")
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def fingerprint_tensors(tensors: Mapping[str, TensorHeader]) -> str:
    """SHA-256 over names, dtypes, shapes and three data windows (start, middle, end) of every tensor."""
    digest = hashlib.sha256()
    streams = {file: open(file, "rb") for file in {header.file for header in tensors.values()}}  # noqa: SIM115
    try:
        for name in sorted(tensors):
            header = tensors[name]
            digest.update(f"{name}|{header.dtype}|{header.shape}|".encode())
            last = max(header.start, header.end - _WINDOW_BYTES)
            # The middle window is counted from the tensor's start, so that it does not move with the shard.
            for position in sorted({header.start, header.start + (last - header.start) // 2, last}):
                stream = streams[header.file]
                stream.seek(position)
                digest.update(stream.read(min(_WINDOW_BYTES, header.end - position)))
    finally:
        for stream in streams.values():
            stream.close()
    return digest.hexdigest()


def read_header(file: Path) -> dict[str, TensorHeader]:
    """The header of one safetensors file: 8 bytes little-endian length, then JSON (the format's own spec).

    Raises `BadInput` when the file is not safetensors or is shorter than its header says.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("the header is longer than the file")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        headers = {
            name: TensorHeader(
                entry["dtype"],
                tuple(entry["shape"]),
                file,
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
        }
    except OSError as error:
        raise BadInput(f"{file}: cannot read this weight file ({error.strerror or error}).") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(f"{file}: not a safetensors file ({error}); save or download it again.") from error
    if headers and max(header.end for header in headers.values()) > size:
        raise BadInput(f"{file}: cut short at {size} bytes; download or save it again.")
    return headers


def is_hub_name(name: str) -> bool:
    """Whether a reference can only mean a model on the Hub: `user/model`, and there is no such folder."""
    path = name.partition("@")[0]
    return not Path(path).is_dir() and path.count("/") == 1 and not path.startswith((".", "/", "~"))


def local_folder(name: str) -> Path:
    """The folder behind a reference; what is on the Hub is downloaded, safetensors only. Raises `BadInput`."""
    path, _, revision = name.partition("@")
    if Path(path).is_dir():
        return Path(path)
    if not is_hub_name(name):
        raise BadInput(f"{name}: no such model folder; give a local folder or a Hub name such as user/model.")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
        return Path(snapshot_download(path, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the Hub client raises many types; each means "not to be had"
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{name}: not a local folder, and the Hub did not give it ({type(error).__name__}: {reason})."
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those of the index, or the single file."""
    for stem in ("model", "adapter_model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            weight_map = _read_json(index, "the shard index").get("weight_map") or {}
            files = [folder / shard for shard in sorted(set(weight_map.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing or not files:
                raise BadInput(f"{folder}: the shard {', '.join(missing) or 'list'} is missing; download it again.")
            return files
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    if any(folder.glob("*.bin")):
        raise BadInput(
            f"{folder}: holds pickled .bin weights only, which are never opened; convert them to safetensors."
        )
    raise BadInput(
        f"{folder}: no model.safetensors and no model.safetensors.index.json there; if this model comes as pickled "
        ".bin files, which are never opened, convert it to safetensors once."
    )


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot read {what} ({error.strerror or error}).") from error
    except ValueError as error:
        raise BadInput(f"{path}: {what} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: {what} must be a JSON object.")
    return content


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
