"""A suite: which lm-eval tasks make up the columns of a results table, and how models are run on them."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from mergekit_wp.errors import BadInput, shown
from mergekit_wp.eval.options import BACKEND_OPTIONS, BACKENDS, OPTIONS, check_options
from mergekit_wp.fields import (
    Form,
    ValueKind,
    any_text,
    default_of,
    described,
    first_wrong,
    json_schema,
    mapping,
    one_of,
    rows,
    switch,
    text,
    whole,
)
from mergekit_wp.files import read_yaml_mapping

DTYPES = ("auto", "bfloat16", "float16", "float32")


_NAME = text("a non-empty string")


@dataclass(frozen=True)
class SuiteTask:
    """One column of the table: a task (or group of tasks) of lm-eval and the metric that is shown."""

    task: str = described(_NAME, "Name of a task or group of lm-eval, or of `include_path`.")
    column: str = described(_NAME, "Title of its column; no two alike.")
    metric: str = described(
        _NAME, "The value that is shown: `METRIC,FILTER` as lm-eval reports it, such as `acc,none`."
    )
    num_fewshot: int | None = described(whole(0, "a whole number from 0 up"), "Shots.", None, unset="the task's")
    gen_kwargs: dict[str, Any] = described(
        mapping(),
        "Generation settings that are laid over the task's: `max_gen_toks`, `until`, `temperature`, ...",
        {},
        unset="the task's",
    )
    apply_chat_template: bool = described(switch(), "Put prompts into the model's chat template.", False)
    fewshot_as_multiturn: bool | None = described(
        switch(), "Each shot is a turn of its own.", None, unset="as `apply_chat_template`"
    )
    system_instruction: str | None = described(any_text(), "System prompt.", None)

    @property
    def multiturn(self) -> bool:
        """Whether each shot is a turn of its own; unless said otherwise, wherever there is a chat template."""
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    def __post_init__(self) -> None:
        _refuse_wrong(self)
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise BadInput("`fewshot_as_multiturn: true` needs `apply_chat_template: true`; set both or none.")


_TASKS = ValueKind(
    "a list of tasks",
    lambda value: isinstance(value, tuple),
    {"type": "array", "minItems": 1, "items": json_schema(SuiteTask)},
)
_FOLDERS = ("include_path", "data")  # fields of a suite
_FOLDER = ValueKind("a folder", lambda value: isinstance(value, str | Path), {"type": "string"})


@dataclass(frozen=True)
class Suite:
    """The content of a suite file; every field is checked when the object is made."""

    name: str = described(_NAME, "Title of the table.")
    tasks: tuple[SuiteTask, ...] = described(_TASKS, "List of tasks, each a column.")
    include_path: Path | None = described(_FOLDER, "Folder of lm-eval tasks of your own, relative to this file.", None)
    data: Path | None = described(
        _FOLDER, "Folder of data sets that stands in for the Hub, relative to this file.", None, unset="the Hub"
    )
    baseline: str | None = described(
        any_text(), "Row that differences are taken from, if there is one of this name.", None
    )
    device: str | None = described(any_text(), "`cpu`, `cuda`, `cuda:1`.", None, unset="a GPU if there is one")
    dtype: str = described(one_of(*DTYPES), "Dtype to run in; `auto` is as each model is stored.", "auto")
    batch_size: int | str = described(
        whole(1, "a whole number or `auto`", word="auto"),
        "Sequences at a time on transformers, or `auto`; vLLM forms its batches itself.",
        16,
    )
    max_gen_toks: int | None = described(
        whole(1, "a whole number from 1 up"),
        "Longest answer of every task that generates.",
        None,
        unset="the task's",
    )
    backend: str | None = described(one_of(*BACKENDS), "`hf` or `vllm`.", None, unset="vLLM if it and a GPU are there")
    backend_options: dict[str, Any] = described(BACKEND_OPTIONS, "Options of the backend, see below.", {})

    def __post_init__(self) -> None:
        _refuse_wrong(self)
        if not self.tasks:
            raise BadInput("`tasks` is empty; a suite needs at least one task.")
        for column in self.columns:
            if self.columns.count(column) > 1:
                raise BadInput(f"`tasks` has two columns {shown(column)}; give each a title of its own.")
        check_options(self.backend_options)

    @property
    def columns(self) -> list[str]:
        return [task.column for task in self.tasks]

    @property
    def hash(self) -> str:
        """SHA-256 of what is asked: the tasks and the length of answers, not the name or how models are run."""
        tasks = [{name: value for name, value in asdict(task).items() if name != "column"} for task in self.tasks]
        asked = {"tasks": tasks, "max_gen_toks": self.max_gen_toks}
        return sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def read_suite(path: str | os.PathLike[str]) -> Suite:
    """The suite in a YAML file; `include_path` and `data` are taken relative to that file.

    Raises `BadInput`, naming the file and the field, for anything that is not a valid suite.
    """
    content = read_yaml_mapping(path, "suite")
    try:
        return parse_suite(content, Path(path).parent)
    except BadInput as error:
        raise BadInput(f"{path}: {error.message}") from error


def parse_suite(content: dict[str, Any], folder: Path) -> Suite:
    """The suite of a mapping that lies in `folder`. Raises `BadInput`, naming the field."""
    _refuse_unknown(content, Suite, "a suite")
    raw_tasks = content.get("tasks")
    if not isinstance(raw_tasks, list):
        raise BadInput("`tasks` must be a list of tasks, each with `task`, `column` and `metric`.")
    tasks = tuple(_read_task(raw, number) for number, raw in enumerate(raw_tasks, start=1))
    folders = {name: _beside(folder, name, content.get(name)) for name in _FOLDERS}
    return Suite(**{**content, "tasks": tasks, **folders})


def _beside(folder: Path, name: str, value: Any) -> Path | None:
    if value is not None and not isinstance(value, str):
        raise BadInput(f"`{name}` must be a folder, found {shown(value)}.")
    return folder / Path(value).expanduser() if value else None


def suite_text(suite: Suite) -> str:
    """The YAML of a suite, as `read_suite` takes it; what a field is without being named is left out."""
    content = _named(suite)
    content |= {name: str(content[name]) for name in _FOLDERS if name in content}
    content["tasks"] = [_named(task) for task in suite.tasks]
    return yaml.safe_dump(content, sort_keys=False, width=110)


def _named(part: Suite | SuiteTask) -> dict[str, Any]:
    """The fields of a suite or a task that are not as they are by default."""
    named = {}
    for item in fields(part):
        value = getattr(part, item.name)
        if value != default_of(item):
            named[item.name] = value
    return named


def _read_task(raw: Any, number: int) -> SuiteTask:
    try:
        if not isinstance(raw, dict):
            raise BadInput(f"expected a mapping with `task`, `column` and `metric`, found {shown(raw)}.")
        _refuse_unknown(raw, SuiteTask, "a task")
        return SuiteTask(**raw)
    except BadInput as error:
        raise BadInput(f"task {number}: {error.message}") from error


def _refuse_wrong(part: Suite | SuiteTask) -> None:
    if wrong := first_wrong(type(part), vars(part)):
        name, kind = wrong
        raise BadInput(f"`{name}` must be {kind.expected}, found {shown(getattr(part, name))}.")


def _refuse_unknown(content: dict[str, Any], kind: type[Suite] | type[SuiteTask], what: str) -> None:
    """Refuse fields that `kind` does not have, and the absence of those it cannot do without."""
    known = [item.name for item in fields(kind)]
    for name in content:
        if name not in known:
            raise BadInput(f"unknown field `{name}`; {what} has {', '.join(known)}.")
    for item in fields(kind):
        if default_of(item) is MISSING and item.name not in content:
            raise BadInput(f"the field `{item.name}` is missing.")


FORM = Form(
    "suite",
    "Which lm-eval tasks make up the columns of a table, and how models are run on them.",
    lambda: json_schema(Suite),
    {
        "Suite": rows(Suite),
        "Each of its tasks": rows(SuiteTask),
        "backend_options": {name: (option.kind.expected, option.meaning) for name, option in OPTIONS.items()},
    },
)
