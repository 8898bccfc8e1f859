"""The tasks of a suite, found and checked in lm-eval before any model loads.

Everything that lm-eval would notice only after hours of generation is looked at here first: unknown tasks and
metrics, missing data, NLTK's word lists, tasks that run model-written code. First comes lm-eval's index: names, and the
configurations behind a task, a group or a tag.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_wp import sandbox
from mergekit_wp.errors import BadInput, reason_of
from mergekit_wp.eval.code_eval import sandboxed
from mergekit_wp.eval.datafiles import check_data, function_modules, task_key
from mergekit_wp.eval.official_data import DataFolder
from mergekit_wp.eval.suite import Suite, SuiteTask
from mergekit_wp.files import check_files
from mergekit_wp.scoring.anchor.graders import check_punkt

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


def entries(manager: TaskManager, name: str) -> Iterator[Any]:
    """What lm-eval's index has on a task, a group or a tag, and on all that belong to it."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    yield entry
    below = sorted(entry.tags) if entry.cfg is None else _names(members(entry.cfg))
    for member in below:
        yield from entries(manager, member)


def _names(listed: Sequence[Any]) -> Iterator[str]:
    for member in listed:
        if isinstance(member, dict):
            yield from _names(members(member))
            member = member.get("task") or member.get("group")
        if isinstance(member, str):
            yield member


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


_TOKENIZER_DATA = "punkt_tab"


def check_word_lists(task: str, folders: Iterable[Path]) -> None:
    """Whether NLTK has what the Python in these folders, a task's own, asks for. Raises `BadInput`."""
    if any(map(_asks_for_it, folders)):
        check_punkt(f"task {task}: its grader")


@lru_cache
def _asks_for_it(folder: Path) -> bool:
    return any(_TOKENIZER_DATA in file.read_text(encoding="utf-8", errors="replace") for file in folder.glob("*.py"))


@dataclass(frozen=True)
class ReadyTask:
    """A task of the suite: as lm-eval loaded it (its TaskDict), and the hash of everything that defines it.

    data: what was read from a folder in the Hub's place, as `DataFolder.record` has it
    """

    spec: SuiteTask
    loaded: Any
    key: str
    data: dict[str, Any] = field(default_factory=dict)


_NO_SHARES = ("perplexity", "weighted_perplexity", "bits_per_byte", "bleu", "chrf", "chrf++", "ter", "brier_score")


def about_metric(task: ReadyTask) -> dict[str, Any]:
    """What the number of a task is: `higher_is_better`; `share`, whether it lies between 0 and 1; of a group, the
    `subtasks` whose items it shares."""
    from lm_eval.api.registry import get_aggregation

    metric, leaves = task.spec.metric.partition(",")[0], task.loaded["tasks"]
    others = {get_aggregation(name) for name in _NO_SHARES}
    subtasks = {"subtasks": sorted(leaves)} if task.spec.task in task.loaded.get("groups", ()) else {}
    return {
        "higher_is_better": all(leaf.higher_is_better().get(metric) is not False for leaf in leaves.values()),
        "share": not any(leaf.aggregation().get(metric) in others for leaf in leaves.values()),
        **subtasks,
    }


def ready_tasks(suite: Suite, include_path: Path | None, allow_code: bool) -> list[ReadyTask]:
    """Find, check and load every task of the suite.

    Raises `BadInput` for an unknown task or metric, and what `find_tasks` refuses.
    """
    manager, configs, boxed = find_tasks(suite, include_path, allow_code)
    data = DataFolder.open(suite.data) if suite.data else None
    with ExitStack() as loading:
        if "code_eval" in boxed:  # only where it is asked for: `evaluate` takes seconds to import
            loading.enter_context(sandboxed())
        if data is not None:
            loading.enter_context(data.answering())
        return [_ready(manager, suite, spec, configs[spec.task], data) for spec in suite.tasks]


def find_tasks(
    suite: Suite, include_path: Path | None, allow_code: bool
) -> tuple[TaskManager, dict[str, list[dict[str, Any]]], set[str]]:
    """Every task of the suite in lm-eval's index, nothing of it loaded: the index, configurations, see `_check_code`.

    Raises `BadInput` for an unknown task, data that is neither here nor reachable, model-written code without consent
    or on a machine where it cannot be judged, in an order such that nothing slow precedes a cheap check.
    """
    names = [task.task for task in suite.tasks]
    data = DataFolder.open(suite.data) if suite.data else None
    manager = task_manager(names, include_path)
    configs = {name: list(leaves(manager, name)) for name in names}
    boxed = _check_code(configs, allow_code)
    for spec in suite.tasks:
        _check_metric(spec, _listed_metrics(manager, spec.task))
    for name, found in configs.items():
        for config in found:
            check_data(name, config, data)
        # Before a grader is imported: it would try to download them, and go on without.
        check_word_lists(name, {module.parent for module in function_modules(found)})
    if boxed:
        sandbox.check()
    return manager, configs, boxed


def _check_code(configs: dict[str, list[dict[str, Any]]], allow_code: bool) -> set[str]:
    """By which names the tasks' Python calls the sandbox, empty where no model-written code is run.

    Raises `BadInput` without consent, and for a task that runs such code by means of its own: a fork or a child of
    the process that holds the model, with none of the sandbox's limits.
    """
    unsafe = {name: found for name, found in configs.items() if any(config.get("unsafe_code") for config in found)}
    if unsafe and not allow_code:
        raise BadInput(
            f"{', '.join(unsafe)}: this runs Python that the models write; "
            "add --allow-code-execution if you accept that on this machine."
        )
    boxed: set[str] = set()
    for name, found in unsafe.items():
        modules = sorted(set(function_modules(found)))
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in modules]
        named = {way for way in ("code_eval", "mergekit_wp") for text in texts if way in text}
        if modules and not named:
            raise BadInput(
                f"task {name}: {modules[0]} runs model-written code by means of its own, in or beside the process "
                'that holds the model; wp-eval runs only what goes through `evaluate.load("code_eval")` or '
                "`mergekit_wp.sandbox`, so leave the task out or change it."
            )
        boxed |= named
    return boxed


def _ready(
    manager: TaskManager, suite: Suite, spec: SuiteTask, configs: list[dict[str, Any]], data: DataFolder | None
) -> ReadyTask:
    try:
        found: Any = manager.load(spec.task)
    except BadInput as error:
        raise BadInput(f"task {spec.task}: {error.message}") from error
    except Exception as error:  # task files run arbitrary code: any exception can come out
        raise BadInput(f"task {spec.task}: lm-eval cannot load it ({reason_of(error, 300, typed=True)}).") from error
    named = found["groups"].get(spec.task) or found["tasks"].get(spec.task)
    if named is None:
        raise BadInput(
            f"task {spec.task} is a tag, which has no value of its own; name its tasks: {', '.join(found['tasks'])}."
        )
    _check_metric(spec, _metrics(named))
    gen_kwargs = {**({"max_gen_toks": suite.max_gen_toks} if suite.max_gen_toks else {}), **spec.gen_kwargs}
    for task in found["tasks"].values():
        # A task that names no number of shots has none; the suite's number wins even where a task says 0.
        shots = task.get_config("num_fewshot") if spec.num_fewshot is None else spec.num_fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
        if gen_kwargs and task.OUTPUT_TYPE == "generate_until":
            task.set_config(key="generation_kwargs", value=gen_kwargs, update=True)
    loaded = list(found["tasks"].values())
    groups = [entry.cfg for entry in entries(manager, spec.task) if members(entry.cfg or {})]
    record = data.record(loaded) if data else {}
    return ReadyTask(spec, found, task_key(spec, gen_kwargs, configs, groups, loaded, record.get("files", {})), record)


def _check_metric(spec: SuiteTask, metrics: Sequence[str]) -> None:
    """Raise `BadInput` unless the suite's metric is one of these, if they are known."""
    if metrics and spec.metric not in metrics:
        raise BadInput(
            f"task {spec.task} has no metric `{spec.metric}`; it has {', '.join(f'`{m}`' for m in metrics)}."
        )


def _listed_metrics(manager: TaskManager, name: str) -> list[str]:
    """What a task of a YAML file says that it reports; empty where only lm-eval can tell once it is loaded: groups,
    tags, tasks in Python, metrics that are functions or report under other names."""
    entry = manager.task_index.get(name)
    config = (entry.cfg if entry else None) or {}
    listed = config.get("metric_list") or []
    plain = all(str(each.get("metric")).isidentifier() and "k" not in each for each in listed)  # else a function's path
    if not plain or members(config) or "class" in config or "include" in config:
        return []
    filters = [str(each.get("name")) for each in config.get("filter_list") or []] or ["none"]
    return [f"{each['metric']},{filter_}" for each in listed for filter_ in filters]


def _metrics(loaded: Any) -> list[str]:
    """The metric keys a task or group will report; empty where lm-eval cannot know before running."""
    from lm_eval.api.group import Group

    if isinstance(loaded, Group):
        return [
            f"{entry.metric},{name}"
            for entry in loaded.aggregate_metric_list or []
            for name in entry.filter_list or _filters(loaded.get_all_tasks()[0])
        ]
    metrics = [name for metric in loaded.aggregation() for name in _reported(loaded, metric)]
    return [f"{metric},{name}" for metric in metrics for name in _filters(loaded)]


def _reported(task: Any, metric: str) -> list[str]:
    """What a metric is called in the results: HumanEval's `pass_at_k` with k = [1] reports `pass@1`."""
    sizes = getattr(task, "_metric_fn_kwargs", {}).get(metric, {}).get("k")
    return [f"pass@{size}" for size in sizes] if isinstance(sizes, list) else [metric]


def _filters(task: Any) -> list[str]:
    return [ensemble.name for ensemble in getattr(task, "_filters", [])]
