"""Model folders on disk: config, tensor headers and fingerprints, without reading the weights.

Only safetensors are opened: a checkpoint in pickled `.bin` files is refused, since unpickling runs code.

A fingerprint answers "are these scores of this very model?". It has two halves, each a SHA-256: `config` over
what transformers builds from config.json (`model_config`), and `tensors` over every tensor's name, dtype and
shape plus three 4 KiB windows of its data. The headers alone would not do: two fine-tunes of one base have
equal headers. Sharding and tensor order do not enter, so a re-sharded copy keeps its fingerprint. The windows
of a 13B model are about 4 MB of I/O.

Windows are samples: two models that differ in a few neurons may have one fingerprint. Whether two models at hand are
one is a question for `content_of`, and whether a model is still the one that kept work was begun with for `files`: the
sizes and times of its files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_wp.checkpoint import model_config as modelconfig
from mergekit_wp.checkpoint.hub import download
from mergekit_wp.checkpoint.references import Reference, Source, read_reference
from mergekit_wp.checkpoint.weights import (
    ADAPTER,
    ADAPTER_CONFIG,
    INDEX_SUFFIX,
    MODEL,
    SUFFIX,
    HeldTensor,
    TensorHeader,
    name_trouble,
    read_tensors,
)
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import check_files, inside, read_json_mapping
from mergekit_wp.geometry import Geometry, text_config

_WINDOW_BYTES = 4096
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Fingerprint:
    """Hex SHA-256 of the config and of the tensors (names, dtypes, shapes, sampled bytes).

    `spelled` is the config's hash as files made before 2026-11-25 have it; `files` what `stamp_tensors` says of
    the model here and now. A fingerprint from a file has neither.
    """

    config: str
    tensors: str
    spelled: str = field(default="", compare=False)
    files: str = field(default="", compare=False)

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

        Raises `BadInput` when the folder is missing or unreadable, or holds no safetensors, and for a model with a
        LoRA.
        """
        reference = read_reference(name)
        reference.check()
        if reference.lora is not None:
            raise BadInput(
                f"{name}: a LoRA over its base, where one whole model is wanted; merge the two first (peft's "
                "merge_and_unload), and name that folder."
            )
        return cls.of(reference.model)

    @classmethod
    def of(cls, source: Source, cache: str | None = None) -> Checkpoint:
        """As `open`, for the model of a reference; cache: the folder of the Hub's cache, None for the usual one."""
        checkpoint = cls(str(source), local_folder(source, cache))
        checkpoint.tensors, checkpoint.config  # noqa: B018  (both are cached; read now, so errors come early)
        return checkpoint

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json_mapping(inside(self.folder, self.folder / "config.json"), "model's config")

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The fields of `config` that describe the decoder (see `geometry.text_config`)."""
        return text_config(self.config, where=str(self.folder / "config.json"))

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry.from_config(self.config, where=str(self.folder / "config.json"))

    @cached_property
    def tensors(self) -> dict[str, TensorHeader]:
        """Every tensor of the model by name, from the headers of its shards.

        Raises `BadInput` unless transformers, mergekit and this package take the same tensors for the model's.
        """
        _check_kind(self.name, self.folder)
        tensors = read_tensors(self.folder)
        explicit = self.config.get("transformers_weights")
        if explicit not in (None, f"{MODEL}{SUFFIX}", f"{MODEL}{INDEX_SUFFIX}"):
            raise BadInput(
                f"{self.folder / 'config.json'}: `transformers_weights` is {shown(explicit)}, which transformers would "
                "load and mergekit would not; take the field out and call the weights model.safetensors."
            )
        if trouble := name_trouble(tensors, self.config):
            raise BadInput(f"{self.name}: {trouble}")
        return tensors

    @cached_property
    def nbytes(self) -> int:
        return sum(header.nbytes for header in self.tensors.values())

    @cached_property
    def resolved_config(self) -> dict[str, Any]:
        """The fields that change a forward pass, as transformers understands them (see `model_config.resolved`)."""
        return modelconfig.resolved(self.config, str(self.folder / "config.json"))

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            modelconfig.digest(self.resolved_config),
            fingerprint_tensors(self.tensors),
            spelled_digest(self.config, self.geometry),
            stamp_tensors(self.tensors),
        )

    def lineage_differences(self, base: Checkpoint) -> list[str]:
        """What transformers computes otherwise than for the base, shapes aside, readable; [] when nothing."""
        return modelconfig.differences(self.resolved_config, base.resolved_config)


def fingerprint_of(reference: str | Reference, cache: str | None = None) -> Fingerprint:
    """The fingerprint of a model, or of a model with a LoRA. cache: as for `Checkpoint.of`.

    A LoRA's fingerprint hashes the base's and the adapter's own files, so it does not depend on the dtype in
    which somebody merges the two. Raises `BadInput` as `Checkpoint.open` does.
    """
    reference = read_reference(reference) if isinstance(reference, str) else reference
    reference.check()
    base = Checkpoint.of(reference.model, cache).fingerprint
    if reference.lora is None:
        return base
    folder = local_folder(reference.lora, cache)
    settings = read_json_mapping(inside(folder, folder / ADAPTER_CONFIG), "LoRA's config")
    tensors = read_tensors(folder, ADAPTER)
    keys = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
    parts = [base.tensors, json.dumps([settings.get(key) for key in keys]), fingerprint_tensors(tensors)]
    return Fingerprint(base.config, _digest(parts), base.spelled, _digest([base.files, stamp_tensors(tensors)]))


def content_of(reference: str | Reference, cache: str | None = None) -> str:
    """As `content_digest`, of a model or of a model with a LoRA, whose tensors are beside the base's."""
    reference = read_reference(reference) if isinstance(reference, str) else reference
    found = content_digest(Checkpoint.of(reference.model, cache).tensors)
    if reference.lora is None:
        return found
    return _digest([found, content_digest(read_tensors(local_folder(reference.lora, cache), ADAPTER))])


def content_digest(tensors: Mapping[str, TensorHeader]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and all of its bytes, whatever the sharding.

    Where a fingerprint's samples would not do: two merges may differ in the rows of one head. Reads the whole
    model (about a second a GB).
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        header = tensors[name]
        digest.update(f"{name}|{header.dtype}|{header.shape}|".encode())
        for first in range(0, header.nbytes, _BLOCK_BYTES):
            digest.update(header.read(first, min(_BLOCK_BYTES, header.nbytes - first)))
    return digest.hexdigest()


def fingerprint_tensors(tensors: Mapping[str, TensorHeader]) -> str:
    """SHA-256 over names, dtypes, shapes and three data windows (start, middle, end) of every tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        header = tensors[name]
        digest.update(f"{name}|{header.dtype}|{header.shape}|".encode())
        last = max(0, header.nbytes - _WINDOW_BYTES)
        # The middle window is counted from the tensor's start, so that it does not move with the shard.
        for first in sorted({0, last // 2, last}):
            digest.update(header.read(first, min(_WINDOW_BYTES, header.nbytes - first)))
    return digest.hexdigest()


def stamp_tensors(tensors: Mapping[str, TensorHeader]) -> str:
    """SHA-256 over names, sizes and times of modification of the files that tensors lie in; of none in memory.

    A file of the Hub's cache is known by its name there, which is a digest of its content.
    """
    parts = []
    for file in sorted({header.file for header in tensors.values() if not isinstance(header, HeldTensor)}):
        real = file.resolve()
        stat = real.stat()
        parts.append(f"{file.name} {stat.st_size} {real.name if real.parent.name == 'blobs' else stat.st_mtime_ns}")
    return _digest(parts)


def local_folder(source: Source, cache: str | None = None) -> Path:
    """The folder behind a source; what is on the Hub is downloaded (see `hub`). Raises `BadInput`."""
    source.check()
    if source.kind == "folder":
        check_files(Path(source.path), "a model's folder")
        return Path(source.path)
    return download(source, cache)


def _check_kind(name: str, folder: Path) -> None:
    """Raise `BadInput` for a LoRA in the place of a model, and for a model with a LoRA in its own folder."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    if any((folder / f"{MODEL}{suffix}").is_file() for suffix in (SUFFIX, INDEX_SUFFIX)):
        raise BadInput(
            f"{folder}: holds a model and a LoRA: transformers would lay the LoRA over the model, mergekit would not; "
            f"put {ADAPTER_CONFIG} and {ADAPTER}{SUFFIX} into a folder of their own (MODEL+LORA then means both)."
        )
    base = read_json_mapping(folder / ADAPTER_CONFIG, "LoRA's config").get("base_model_name_or_path")
    trained = f" (its {ADAPTER_CONFIG} says {base})" if isinstance(base, str) and base.isprintable() else ""
    raise BadInput(f"{name}: a LoRA, not a model; write BASE+{name}, BASE being the model it was trained on{trained}.")


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# The hash of score files made before configs were resolved; still accepted.
_SPELLED: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "hidden_activation": None,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


_SPELLED_GEOMETRY = (
    "architecture", "layers", "heads", "kv_heads", "head_dim", "neurons", "d_model", "vocabulary"
)  # fmt: skip


def spelled_digest(config: Mapping[str, Any], geometry: Geometry) -> str:
    """The config's hash in score and activations files of mergekit-wp before 2026-11-25: of ten fields as spelled."""
    fields = dict(config)
    rope = dict(fields.get("rope_parameters") or {})
    if "rope_theta" in rope:
        fields["rope_theta"] = rope.pop("rope_theta")
    if rope.pop("rope_type", "default") != "default":
        fields["rope_scaling"] = fields.get("rope_scaling") or config["rope_parameters"]
    computed = {name: getattr(geometry, name) for name in _SPELLED_GEOMETRY}
    computed |= {name: default if fields.get(name) is None else fields[name] for name, default in _SPELLED.items()}
    return hashlib.sha256(json.dumps(computed, sort_keys=True).encode()).hexdigest()
