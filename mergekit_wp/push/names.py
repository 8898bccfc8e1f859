"""What may be published of names and paths: no folder of this machine leaves it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_wp.checkpoint.references import is_hub_name, read_reference
from mergekit_wp.merge.plan import names_file
from mergekit_wp.push.parents import Parent

# An absolute path of some machine, POSIX or Windows, as a whole text or within one; addresses are none.
_ROOT = r"(?:file:/+|~?/|[A-Za-z]:[\\/]|\\\\)"
_PATH = re.compile(rf"{_ROOT}[^\n]*")
_DEEP = re.compile(rf"{_ROOT}[^\n]*[^\n\\/][\\/][^\n]*")
_PATHS = re.compile(rf"(?<![\w./:~<}}\])-]){_ROOT}(?:[\w.@+-]+[\\/])+[\w.@+-]*")
# In a model's JSON: fields whose text is a token or a template rather than a name.
_TOKENS = re.compile(r"(token|tokens|content|template|pattern|regex)$", re.IGNORECASE)
_FIELDS = re.compile(r"(name_or_path|path|file|dir|folder)$", re.IGNORECASE)
# Fields of results.json whose text is a row's or a suite's name.
_GIVEN = ("name", "baseline")
MODEL_KEYS = ("model", "base_model", "lora", "path")


class Names:
    """Local references and paths to the names under which they are published."""

    def __init__(self, folder: Path, repo_id: str, parents: Sequence[Parent], scores: Mapping[str, str]) -> None:
        """scores: path of a score or other file as the recipe has it -> its path in the repository."""
        self._published = {str(folder): repo_id, str(folder.absolute()): repo_id, **scores}
        for parent in parents:
            path = read_reference(parent.reference).model.path
            shown = parent.shown + (f"@{parent.revision}" if parent.hub and parent.revision else "")
            self._published |= {path: parent.shown, os.path.abspath(path): parent.shown, parent.reference: shown}
        # A score file may know a parent by the place where it lay then.
        last = [Path(read_reference(parent.reference).model.path).name for parent in parents]
        self._by_last = {n: p.shown for n, p in zip(last, parents, strict=True) if last.count(n) == 1}

    def learn(self, reference: str, published: str) -> None:
        """Another reference, and the name under which it is published."""
        self._published[reference] = published

    def of(self, reference: str) -> str:
        """A model, a LoRA (`model+lora`) or a path: its published name, else its last part; Hub names stay."""
        meaning = read_reference(reference) if reference.strip() else None
        if meaning and meaning.lora and reference not in self._published:
            return "+".join(self.of(str(source)) for source in meaning.sources)
        for known in (reference, os.path.abspath(reference) if reference else ""):
            if known in self._published:
                return self._published[known]
        path = meaning.model.path if meaning else reference
        if is_hub_name(reference) or not _is_path(reference):
            return reference
        return self._by_last.get(_last(path), _last(path))

    def recipe(self, node: Any) -> Any:
        """A recipe with every model and score file under its published name."""
        if isinstance(node, list):
            return [self.recipe(item) for item in node]
        if not isinstance(node, dict):
            known = isinstance(node, str) and (_PATH.fullmatch(node) or ("/" in node and node in self._published))
            return self.of(node) if known else node
        return {
            key: self.of(value)
            if (key in MODEL_KEYS and isinstance(value, str)) or names_file(key, value)
            else self.recipe(value)
            for key, value in node.items()
        }

    def content(self, node: Any, key: str = "") -> Any:
        """Any JSON document, the models in it and its absolute paths replaced.

        Names that somebody gave stay (a row `base`, a task), though a model may lie in a folder of that name.
        """
        if isinstance(node, list):
            return [self.content(item, key) for item in node]
        if isinstance(node, dict):
            return {name: self.content(value, name) for name, value in node.items()}
        if not isinstance(node, str):
            return node
        place = _DEEP.fullmatch(node) or (_PATH.fullmatch(node) and os.path.exists(node))
        known = "/" in node and node in self._published and key not in _GIVEN
        return self.of(node) if key == "model" or known or place else without_home(node)

    def model_file(self, node: Any, key: str = "") -> Any:
        """A JSON file of the model (its config, say) without folders of any machine; tokens and templates stay.

        A field such as `name_or_path` that holds a path gets the model's published name. Of `auto_map`'s
        FOLDER--MODULE.CLASS the module stays.
        """
        if isinstance(node, list):
            return [self.model_file(item, key) for item in node]
        if isinstance(node, dict):
            return {name: self.model_file(value, name) for name, value in node.items()}
        if not isinstance(node, str) or _TOKENS.search(key):
            return node
        place, dashes, rest = node.rpartition("--")
        if key.startswith("Auto") and dashes and _PATH.fullmatch(place):
            return rest
        whole = _PATH.fullmatch(node) and (_FIELDS.search(key) or _DEEP.fullmatch(node))
        if whole or (_FIELDS.search(key) and _is_path(node)):
            return self.of(node)
        return without_home(node)


def paths_in(text: str) -> list[str]:
    """The absolute paths of two parts and more in a text, each once."""
    return list(dict.fromkeys(match[0] for match in _PATHS.finditer(text)))


def _last(path: str) -> str:
    """The last part of a path, of POSIX or Windows."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "model"


def without_home(text: str) -> str:
    """`text` with the user's home directory written `~`."""
    home = str(Path.home())
    return text if len(home) < 2 else re.sub(re.escape(home) + r"(?![\w.-])", "~", text)


def _is_path(text: str) -> bool:
    return (
        _PATH.fullmatch(text) is not None or text.startswith((".", "~")) or text.count("/") != 1 or os.path.exists(text)
    )
