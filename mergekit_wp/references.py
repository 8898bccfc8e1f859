"""What the name of a model means; the one place that decides.

    FOLDER                 an existing folder of exactly this name, whatever characters it is made of
    USER/NAME[@REVISION]   a model on the Hub; hf://USER/NAME is the same
    MODEL+LORA             a LoRA laid over its base, each of the two named as above

An existing folder always comes first. Where a text could be divided at several `+`, the model is the longest left part
that is an existing folder, or else a Hub name (those hold no `+`).

mergekit divides a text at its `@` and its `+` whatever folders there are, and has a mapping form for names that it
would misread: `Reference.for_mergekit`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_wp.errors import BadInput, shown

# huggingface_hub.utils.validate_repo_id, whose import would take longer than all the rest here.
_HUB_NAME = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]*/\w[\w.-]{0,95}(?<![.-])(?<!\.git)", re.ASCII)
_REVISION = re.compile(r"[^@+\s]+")
_SCHEME = "hf://"
MODEL_KEYS: dict[str, tuple[str, ...]] = {
    "model": (),
    "base_model": (),
    "tokenizer_source": ("union", "base"),
    "source": ("union", "base"),
}
"""Where a recipe names models, and the words that are no model there (`base_model: base` is one)."""

_MOST_NAME = 500  # characters of a name in a sentence
# Names that can only be places on this machine; a slash at the end says folder as well.
_LOCAL = (".", "/", "~")


@dataclass(frozen=True)
class Source:
    """One model or LoRA: a folder of this machine, a repository on the Hub, or neither (`missing`).

    path: the folder, or USER/NAME; revision: of the Hub's, None for its main branch.
    """

    path: str
    revision: str | None
    kind: Literal["folder", "hub", "missing"]

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path

    def check(self) -> None:
        """Raise `BadInput` when there is no such model, saying what was looked for."""
        if self.kind != "missing":
            return
        name = str(self) if len(str(self)) < _MOST_NAME else shown(str(self))
        if os.path.isfile(name):
            raise BadInput(f"{name}: a file, not a model folder; name the folder that it lies in.")
        if os.path.islink(name.rstrip("/")):
            raise BadInput(f"{name}: a link to {os.readlink(name.rstrip('/'))}, which is not there; mend the link.")
        if self.revision and os.path.isdir(os.path.expanduser(self.path)):
            raise BadInput(
                f"{name}: there is no folder of this name; the folder {self.path} is there, but only models on the Hub "
                f"have revisions, so write {self.path} if it is the one."
            )
        if match := re.match(r"https?://[^/]+/(\w[\w.-]*/\w[\w.-]*)", name):
            raise BadInput(f"{name}: an address, not a model; write {match[1]}.")
        raise BadInput(f"{name}: no such model folder; give a local folder or a Hub name such as user/model.")

    def for_mergekit(self) -> dict[str, Any]:
        """mergekit's mapping of a model path.

        A folder is absolute: for a relative one of fewer than two slashes, mergekit asks the Hub when it writes the
        model card, and without a network it stops there, after the merge and before the tokenizer is copied.
        """
        path = os.path.abspath(self.path) if self.kind == "folder" else self.path
        return {"path": path} | ({"revision": self.revision} if self.revision else {})


@dataclass(frozen=True)
class Reference:
    """What a model reference means: a model, or a LoRA over it. `text` is as the user wrote it."""

    text: str
    model: Source
    lora: Source | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.model,) if self.lora is None else (self.model, self.lora)

    def check(self) -> None:
        """Raise `BadInput` when a part is neither a folder nor a Hub name."""
        for source in self.sources:
            try:
                source.check()
            except BadInput as error:
                if self.lora is None:
                    raise
                raise BadInput(
                    f"{self.text}: there is no folder of this name, and read as the model {self.model} with the LoRA "
                    f"{self.lora}: {error.message}"
                ) from None

    def for_mergekit(self) -> dict[str, Any]:
        """mergekit's mapping of a model, which nothing is left to divide in."""
        parts = {"model": self.model.for_mergekit()}
        return parts if self.lora is None else {**parts, "lora": self.lora.for_mergekit()}


def read_reference(text: str) -> Reference:
    """What `text` means. Raises `BadInput` for a blank one only; `Reference.check` refuses what is not there."""
    if not text.strip():
        raise BadInput("a model's name is empty; give a local folder or a Hub name such as user/model.")
    whole = _source(text)
    if whole.kind != "missing":
        return Reference(text, whole)
    divided = [Reference(text, _source(left), _source(right)) for left, right in _halves(text)]
    for kind in ("folder", "hub"):
        for reference in divided:
            if reference.lora and reference.model.kind == kind and reference.lora.kind != "missing":
                return reference
    # Nothing fits: for the error, a half that is there, else what mergekit would read.
    there = next((reference for reference in divided if reference.model.kind != "missing"), None)
    return there or (divided[-1] if divided else Reference(text, whole))


def is_hub_name(text: str) -> bool:
    """Whether a text means one model on the Hub (and no folder of this machine)."""
    return bool(text.strip()) and _source(text).kind == "hub"


def recipe_models(node: Any) -> Iterator[Reference]:
    """Every model that a recipe of mergekit's merges, its base included, in the order of the file."""
    found: list[Reference] = []
    with_recipe_models(node, lambda reference, _: found.append(reference), ("model", "base_model"))
    yield from found


def with_recipe_models(node: Any, change: Callable[[Reference, Any], Any], keys: Iterable[str] = ()) -> Any:
    """A recipe of mergekit's with `change(meaning, value)` in the place of every value that names a model.

    keys: which of `MODEL_KEYS` count; none given are all of them.
    """
    if isinstance(node, list):
        return [with_recipe_models(item, change, keys) for item in node]
    if not isinstance(node, dict):
        return node
    counted = {key: words for key, words in MODEL_KEYS.items() if key in keys or not keys}
    return {
        key: change(_recipe_reference(value), value)
        if key in counted and _names_a_model(value, counted[key])
        else with_recipe_models(value, change, keys)
        for key, value in node.items()
    }


def _names_a_model(value: Any, words: tuple[str, ...]) -> bool:
    if isinstance(value, Mapping):  # with a `kind`, it says where one token's embedding comes from
        return isinstance(value.get("model"), str | Mapping) and "kind" not in value
    return isinstance(value, str) and bool(value.strip()) and value not in words


def _recipe_reference(value: Any) -> Reference:
    """The meaning of a text, or of `{model: ..., lora: ...}` with texts or `{path: ..., revision: ...}` in it."""
    return read_reference(value) if isinstance(value, str) else reference_of(value["model"], value.get("lora"))


def reference_of(model: Any, lora: Any = None) -> Reference:
    """A model and a LoRA, each a text or mergekit's mapping `{path: ..., revision: ...}`, parted already."""
    source = _recipe_source(model)
    if lora is None:
        return Reference(str(source), source)
    return Reference(f"{source}+{_recipe_source(lora)}", source, _recipe_source(lora))


def _recipe_source(node: Any) -> Source:
    if isinstance(node, Mapping):
        path, revision = str(node.get("path", "")), node.get("revision")
        if revision is None:
            return _folder(path) or _hub(path) or Source(path, None, "missing")
        hub = _hub(f"{path}@{revision}")
        return hub or Source(path, str(revision), "missing")
    return _source(str(node))


def _source(text: str) -> Source:
    path, _, revision = text.rpartition("@")
    return _folder(text) or _hub(text) or Source(path or text, revision if path else None, "missing")


def _folder(text: str) -> Source | None:
    for path in dict.fromkeys((text, os.path.expanduser(text))):
        if path and os.path.isdir(path):
            return Source(path, None, "folder")
    return None


def _hub(text: str) -> Source | None:
    name, at, revision = text.removeprefix(_SCHEME).partition("@")
    if text.startswith(_LOCAL) or _HUB_NAME.fullmatch(name) is None or (at and not _REVISION.fullmatch(revision)):
        return None
    if os.path.exists(text) or (at and os.path.isdir(name)):  # a file, or a folder with a revision that it cannot have
        return None
    return Source(name, revision or None, "hub")


def _halves(text: str) -> Iterator[tuple[str, str]]:
    """The text divided at each of its `+`, the longest left part first."""
    for place in reversed([i for i, letter in enumerate(text) if letter == "+"]):
        if text[:place].strip() and text[place + 1 :].strip():
            yield text[:place], text[place + 1 :]
