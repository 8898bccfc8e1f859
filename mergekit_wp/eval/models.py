"""The models named on the command line: distinct row names, and what identifies a model to the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_wp.checkpoint.adapters import merge_lora
from mergekit_wp.checkpoint.folder import Checkpoint, content_digest, fingerprint_of, local_folder
from mergekit_wp.checkpoint.hub import is_tokenizer_file, tokenizer_files
from mergekit_wp.checkpoint.references import Reference, read_reference
from mergekit_wp.checkpoint.weights import ADAPTER, TensorHeader, read_tensors
from mergekit_wp.errors import BadInput, reason_of
from mergekit_wp.files import check_writable_parent, open_file


@dataclass(frozen=True)
class EvalModel:
    """One row: the name shown, the reference as the user wrote it, the local folder, the fingerprint."""

    name: str
    reference: str
    folder: Path
    fingerprint: str


def name_models(arguments: tuple[str, ...]) -> dict[str, str]:
    """Row name -> model reference for every `MODEL` or `NAME=MODEL`, in order. Raises `BadInput`."""
    references = [_split(argument) for argument in arguments]
    return dict(zip(_distinct_names(references), (ref for _, ref in references), strict=True))


def takes_long(reference: str) -> bool:
    """Whether a model may have to come from the Hub, or a LoRA to be merged; a wrong path is not worth such a wait.

    Raises `BadInput` when the reference can be neither a folder nor a Hub name.
    """
    meaning = read_reference(reference)
    meaning.check()
    return meaning.lora is not None or meaning.model.kind == "hub"


def _split(argument: str) -> tuple[str | None, str]:
    """`NAME=MODEL` in its parts; a model that itself holds `=` and is there is a model."""
    name, equals, reference = argument.partition("=")
    if not equals or all(source.kind != "missing" for source in read_reference(argument).sources):
        return None, argument
    if not name.strip() or not reference.strip():
        raise BadInput(f"{argument}: expected NAME=MODEL, with a name before `=` and a model after it.")
    return name.strip(), reference.strip()


def _distinct_names(references: list[tuple[str | None, str]]) -> list[str]:
    """The given names; else the last path parts, as many as it takes to tell the models apart."""
    given = [name for name, _ in references if name]
    for name in given:
        if given.count(name) > 1:
            raise BadInput(f"two models are named {name!r}; give each NAME=MODEL a name of its own.")
    unnamed = [Path(reference).parts for name, reference in references if not name]
    names: list[str] = []
    for own_name, reference in references:
        parts = Path(reference).parts
        if unnamed.count(parts) > 1 and not own_name:
            raise BadInput(f"{reference} is given twice; name it once, or tell the rows apart with NAME=MODEL.")
        depth = 1
        while not own_name and depth < len(parts) and _clashes(parts, depth, unnamed, given):
            depth += 1
        names.append(own_name or "/".join(parts[-depth:]))
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"two rows would be named {name!r}; tell them apart with NAME=MODEL.")
    return names


def _clashes(parts: tuple[str, ...], depth: int, unnamed: list[tuple[str, ...]], given: list[str]) -> bool:
    tail = parts[-depth:]
    return "/".join(tail) in given or sum(other[-depth:] == tail for other in unnamed) > 1


def open_model(name: str, reference: str, trust_remote_code: bool, loras: Path | None = None) -> EvalModel:
    """Identify a model by all its bytes, and see that config and tokenizer load; a Hub model is fetched first.

    loras: where a LoRA merged into its base is kept. Raises `BadInput`.
    """
    meaning = read_reference(reference)
    if meaning.lora is not None and loras is not None:
        meaning.check()
        checkpoint = Checkpoint.open(str(_merged(meaning, loras, trust_remote_code)))
    else:
        checkpoint = Checkpoint.open(reference)
    _check_loadable(reference, checkpoint.folder, trust_remote_code)
    digest = answers_digest(checkpoint.tensors, checkpoint.folder)
    return EvalModel(name, reference, checkpoint.folder, digest)


def answers_digest(tensors: Mapping[str, TensorHeader], folder: Path) -> str:
    """SHA-256 of all that changes what a model answers: every weight, and the files of `_answering_files`. No code
    of the model is run for it."""
    # Every byte, not the samples of a fingerprint: two merges may differ in the rows of one head.
    digest = hashlib.sha256(content_digest(tensors).encode())
    for name in sorted(_answering_files(folder)):
        with open_file(folder / name) as stream:
            digest.update(name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _answering_files(folder: Path) -> Iterator[str]:
    """Beside the weights, the files that may change what a model answers, by their paths there: configs, generation
    defaults, tokenizer and chat templates, code. Not texts such as a licence, which an owner may add."""
    for path in [*folder.iterdir(), *folder.glob("*/*.jinja")]:
        name = path.relative_to(folder).as_posix()
        # Without the index: a re-sharded copy is the same model.
        config = path.parent == folder and path.suffix in (".json", ".py") and not name.endswith(".index.json")
        if (config or is_tokenizer_file(name)) and path.is_file():
            yield name


def _merged(meaning: Reference, loras: Path, trust_remote_code: bool) -> Path:
    """The folder below `loras` of a LoRA merged into its base, merged now unless it was before.

    The weights are those that are scored.
    """
    assert meaning.lora is not None
    base, lora = Checkpoint.of(meaning.model), local_folder(meaning.lora)
    fingerprint_of(meaning)  # says what is wrong with either before the long work
    parts = answers_digest(base.tensors, base.folder) + answers_digest(read_tensors(lora, ADAPTER), lora)
    target = loras / hashlib.sha256(parts.encode()).hexdigest()[:32]
    if target.is_dir():
        return target
    check_writable_parent(target)
    owner = tokenizer_folder(base.folder, lora)
    for left in loras.glob(".partial-*"):  # by a killed run: this one has the output folder to itself
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=loras, prefix=".partial-") as work:
        merged = merge_lora(meaning, Path(work), trust_remote_code)
        for path in tokenizer_files(owner):
            copied = merged / path.relative_to(owner)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copied)
        os.replace(merged, target)
    return target


def tokenizer_folder(base: Path, lora: Path) -> Path:
    """Whose tokenizer a LoRA over a base is used with: its own where it has one (with it come a chat template and added
    tokens), else the base's, as for an expert that is a whole model."""
    return lora if (lora / "tokenizer_config.json").is_file() else base


def _check_loadable(reference: str, folder: Path, trust_remote_code: bool) -> None:
    """Config and tokenizer must load: a folder without its tokenizer would fail only when its turn comes."""
    from transformers import AutoConfig, AutoTokenizer

    for what, auto in (("config", AutoConfig), ("tokenizer", AutoTokenizer)):
        try:
            auto.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers raises many types; each means "not a usable model"
            raise BadInput(
                f"{reference}: transformers cannot load the {what} in this folder ({reason_of(error)})."
            ) from error
