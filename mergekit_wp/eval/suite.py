"""A suite: which lm-eval tasks make up the columns of a results table, and how models are run on them."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from mergekit_wp.errors import BadInput, shown
from mergekit_wp.eval.options import BACKENDS, check_options
from mergekit_wp.files import read_yaml_mapping

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class SuiteTask:
    """One column of the table: a task (or group of tasks) of lm-eval and the metric that is shown."""

    task: str
    column: str
    metric: str
    num_fewshot: int | None = None
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None

    @property
    def multiturn(self) -> bool:
        """Whether each shot is a turn of its own; unless said otherwise, wherever there is a chat template."""
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    def __post_init__(self) -> None:
        for name in ("task", "column", "metric"):
            if not isinstance(value := getattr(self, name), str) or not value.strip():
                raise BadInput(f"`{name}` must be a non-empty string, found {shown(value)}.")
        if self.num_fewshot is not None and not _is_count(self.num_fewshot, minimum=0):
            raise BadInput(f"`num_fewshot` must be a whole number from 0 up, found {shown(self.num_fewshot)}.")
        if not isinstance(self.gen_kwargs, dict):
            raise BadInput(f"`gen_kwargs` must be a mapping, found {shown(self.gen_kwargs)}.")
        if not isinstance(self.apply_chat_template, bool):
            raise BadInput(f"`apply_chat_template` must be true or false, found {shown(self.apply_chat_template)}.")
        if not isinstance(self.fewshot_as_multiturn, bool | None):
            raise BadInput(f"`fewshot_as_multiturn` must be true or false, found {shown(self.fewshot_as_multiturn)}.")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise BadInput("`fewshot_as_multiturn: true` needs `apply_chat_template: true`; set both or none.")
        if not isinstance(self.system_instruction, str | None):
            raise BadInput(f"`system_instruction` must be a string, found {shown(self.system_instruction)}.")


@dataclass(frozen=True)
class Suite:
    """The content of a suite file; every field is checked when the object is made."""

    name: str
    tasks: tuple[SuiteTask, ...]
    include_path: Path | None = None
    baseline: str | None = None
    device: str | None = None
    dtype: str = "auto"
    batch_size: int | str = 16
    max_gen_toks: int | None = None
    backend: str | None = None
    backend_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise BadInput(f"`name` must be a non-empty string, found {shown(self.name)}.")
        if not self.tasks:
            raise BadInput("`tasks` is empty; a suite needs at least one task.")
        for column in self.columns:
            if self.columns.count(column) > 1:
                raise BadInput(f"`tasks` has two columns {shown(column)}; give each a title of its own.")
        if self.dtype not in DTYPES:
            raise BadInput(f"`dtype` must be one of {', '.join(DTYPES)}, found {shown(self.dtype)}.")
        if self.batch_size != "auto" and not _is_count(self.batch_size, minimum=1):
            raise BadInput(f"`batch_size` must be a whole number or `auto`, found {shown(self.batch_size)}.")
        if self.max_gen_toks is not None and not _is_count(self.max_gen_toks, minimum=1):
            raise BadInput(f"`max_gen_toks` must be a whole number from 1 up, found {shown(self.max_gen_toks)}.")
        if self.backend is not None and self.backend not in BACKENDS:
            raise BadInput(f"`backend` must be one of {', '.join(BACKENDS)}, found {shown(self.backend)}.")
        check_options(self.backend_options)
        for name in ("baseline", "device"):
            if not isinstance(value := getattr(self, name), str | None):
                raise BadInput(f"`{name}` must be a string, found {shown(value)}.")

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
    """The suite in a YAML file; `include_path` is taken relative to that file.

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
    include = content.get("include_path")
    if include is not None and not isinstance(include, str):
        raise BadInput(f"`include_path` must be a folder, found {shown(include)}.")
    include_path = folder / Path(include).expanduser() if include else None
    return Suite(**{**content, "tasks": tasks, "include_path": include_path})


def suite_text(suite: Suite) -> str:
    """The YAML of a suite, as `read_suite` takes it; what a field is without being named is left out."""
    content = _named(suite)
    if suite.include_path is not None:
        content["include_path"] = str(suite.include_path)
    content["tasks"] = [_named(task) for task in suite.tasks]
    return yaml.safe_dump(content, sort_keys=False, width=110)


def _named(part: Suite | SuiteTask) -> dict[str, Any]:
    """The fields of a suite or a task that are not as they are by default."""
    named = {}
    for item in fields(part):
        value = getattr(part, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if value != default:
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


def _refuse_unknown(content: dict[str, Any], kind: type[Suite] | type[SuiteTask], what: str) -> None:
    """Refuse fields that `kind` does not have, and the absence of those it cannot do without."""
    known = [item.name for item in fields(kind)]
    required = ("name", "tasks") if kind is Suite else ("task", "column", "metric")
    for name in content:
        if name not in known:
            raise BadInput(f"unknown field `{name}`; {what} has {', '.join(known)}.")
    for name in required:
        if name not in content:
            raise BadInput(f"the field `{name}` is missing.")


def _is_count(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum
