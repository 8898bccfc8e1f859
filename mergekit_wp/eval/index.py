"""lm-eval's index of tasks: finding names, and the configurations behind a task, a group or a tag."""

from __future__ import annotations

import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_wp.errors import BadInput
from mergekit_wp.files import check_files

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PROTOCOL = Path(__file__).with_name("protocol")


def task_manager(names: list[str], include_path: Path | None) -> TaskManager:
    """lm-eval's index of tasks, with ours of `protocol/` and those of `include_path`, which win in this order.

    Its 14,000 built-in ones (6 s) are read only if a name needs them. Raises `BadInput` for a name that is in
    none of the three and for an `include_path` that is no folder.
    """
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [str(PROTOCOL)]
    if include_path is not None:
        if not os.path.isdir(include_path):
            raise BadInput(
                f"{include_path}: the suite's include_path is not a folder; "
                "make it, or name another with --include-path."
            )
        check_files(include_path, "the tasks' folder", below=True)
        folders.append(str(include_path))
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not any(_missing(manager, name) for name in names):
        return manager
    manager = TaskManager(include_path=folders)
    for name in names:
        if missing := _missing(manager, name):
            where = f"lm-eval or in {include_path}" if include_path else "lm-eval; --include-path adds a folder"
            local = [task for task in manager.all_tasks if _is_under(manager, task, include_path)]
            near = get_close_matches(missing, manager.all_tasks, n=5) or local[:20]
            raise BadInput(f"unknown task `{missing}`: not in {where}. Nearest: {', '.join(near) or 'none'}.")
    return manager


def _is_under(manager: TaskManager, task: str, folder: Path | None) -> bool:
    source = manager.task_index[task].yaml_path
    return folder is not None and source is not None and folder.resolve() in Path(source).resolve().parents


def _missing(manager: TaskManager, name: str) -> str | None:
    """The first name, this one or a member of this group, that the index lacks.

    lm-eval itself would make a new, half-defined task out of an unknown member.
    """
    entry = manager.task_index.get(name)
    if entry is None:
        return name
    for member in members(entry.cfg or {}):
        inline = isinstance(member, dict) and ("group" in member or "dataset_path" in member)
        child = member if isinstance(member, str) else member.get("task")
        if isinstance(child, str) and not inline and (missing := _missing(manager, child)):
            return missing
    return None


def members(config: dict[str, Any]) -> list[Any]:
    """What a group lists: names, or configurations with a `task` or more members."""
    return config["task"] if isinstance(config.get("task"), list) else []


def leaves(manager: TaskManager, name: str) -> Iterator[dict[str, Any]]:
    """The configurations of the tasks behind a task, group or tag, functions unresolved."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    if entry.cfg is None:  # a tag
        for tagged in sorted(entry.tags):
            yield from leaves(manager, tagged)
    elif listed := members(entry.cfg):
        yield from _group_leaves(manager, entry.cfg, listed)
    else:
        yield entry.cfg


def _group_leaves(manager: TaskManager, group: dict[str, Any], listed: list[Any]) -> Iterator[dict[str, Any]]:
    shared = {key: value for key, value in group.items() if key in ("dataset_path", "unsafe_code")}
    for member in listed:
        own = member if isinstance(member, dict) else {"task": member}
        if nested := members(own):
            yield from _group_leaves(manager, {**shared, **own}, nested)
            continue
        child = own.get("task") or own.get("group")
        found = list(leaves(manager, str(child))) or [{}]
        yield from ({**leaf, **shared, **own} for leaf in found)
