"""The suite and the task files behind a results table, published so that its command runs in a copy of the repository.

A suite NAME becomes `wp/eval/NAME.yaml`, its tasks `wp/eval/NAME/`: of the suite's `include_path` those files that
one of its tasks is made of (see `files_read`), in their folders. Files that these name elsewhere (data, an `include:`)
go to `wp/eval/NAME/outside/N/`, and the YAML that names them is rewritten: a path in it is one of this machine.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mergekit_wp.errors import BadInput, reason_of
from mergekit_wp.eval.datafiles import data_files, files_read
from mergekit_wp.eval.suite import Suite, suite_text
from mergekit_wp.eval.tasks import entries, leaves
from mergekit_wp.files import inside


@dataclass
class Bundle:
    """What goes to the repository: `copies` as they are, `texts` as written here, by path; `suite` is one of them."""

    suite: str
    copies: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def bundle(name: str, suite: Suite, include_path: Path | None) -> Bundle:
    """The suite under a name that is part of a path and, where `include_path` is a folder here, its task files.

    Raises `BadInput` for a file of that folder that is a link out of it. Tasks that come with lm-eval or with this
    package need no files.
    """
    made = Bundle(f"wp/eval/{name}.yaml")
    if include_path is not None and os.path.isdir(include_path):
        try:
            _Gatherer(made, include_path.resolve(), f"wp/eval/{name}").add_tasks([task.task for task in suite.tasks])
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise BadInput(
                f"{include_path}: the suite {suite.name} was measured with the tasks in this folder, and they cannot "
                f"be read now ({reason_of(error, 300)}); bring them back, or leave these results out."
            ) from error
    include = Path(name) if made.copies or made.texts else None
    made.texts[made.suite] = suite_text(replace(suite, include_path=include, data=None))
    return made


class _Gatherer:
    """Collects the files of tasks below one folder into a bundle."""

    def __init__(self, made: Bundle, folder: Path, place: str) -> None:
        self._made, self._folder, self._place = made, folder, place
        self._outside: dict[Path, str] = {}

    def add_tasks(self, names: Sequence[str]) -> None:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=[str(self._folder)], include_defaults=False)
        for name in dict.fromkeys(names):
            for entry in entries(manager, name):
                if entry.yaml_path is not None:
                    self._add_yaml(Path(entry.yaml_path))
            self._copy_files(list(leaves(manager, name)))

    def _add_yaml(self, path: Path) -> None:
        """A task's YAML and those that it includes, the paths in them as they are in the repository."""
        from lm_eval.tasks._yaml_loader import load_yaml

        target = self._target(path)
        if target in self._made.texts:
            return
        if self._folder in path.resolve().parents:
            inside(self._folder, path)
        content = load_yaml(path, resolve_func=False, recursive=False)
        included = content.get("include") or []
        renamed: dict[str, str] = {}
        for name in included if isinstance(included, list) else [included]:
            source = path.parent / str(name)
            renamed[str(name)] = _relative(self._target(source), target)
            self._made.texts.setdefault(target, "")  # before what it includes: a circle ends here
            self._add_yaml(source)
        for name in data_files(content):
            if "://" not in name and os.path.isdir((found := Path(name)).parent):
                renamed[name] = self._target(found)
        text = path.read_text(encoding="utf-8")
        for name, published in renamed.items():
            text = _replaced(text, r"(?<![\w./~-])", name, published)
        if isinstance(folder := content.get("dataset_path"), str) and os.path.isdir(folder):
            text = _replaced(text, r"(?<=dataset_path:)\s*[\"']?", folder, self._target(Path(folder)))
        self._made.texts[target] = text
        self._copy_files([content])  # of an include also what is overridden: lm-eval reads it all the same

    def _copy_files(self, configs: Sequence[dict[str, Any]]) -> None:
        for path in sorted(files_read(configs)):
            source = inside(self._folder, path) if self._folder in Path(path).absolute().parents else path
            target = self._target(path)
            if "/." not in target:
                self._made.copies[target] = source

    def _target(self, path: Path) -> str:
        """Where a file goes; a file of another folder keeps its neighbours."""
        parent = path.absolute().parent.resolve()
        roots = {self._folder: self._place, **self._outside}
        root = next((folder for folder in (parent, *parent.parents) if folder in roots), None)
        if root is None:  # stays the nearest: a folder below it gets no place of its own afterwards
            root = parent
            roots[root] = self._outside[root] = f"{self._place}/outside/{len(self._outside) + 1}"
        return "/".join([roots[root], *parent.relative_to(root).parts, path.name])


def _replaced(text: str, before: str, name: str, published: str) -> str:
    """The text with a path under its published name, where it stands as a whole and after what `before` matches."""
    return re.sub(rf"({before}){re.escape(name)}(?![\w./-])", lambda found: found[1] + published, text)


def _relative(target: str, start: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(start))
