"""The data and code that tasks read: whether they are there, and a hash of their content."""

from __future__ import annotations

import glob
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergekit_wp import sandbox
from mergekit_wp.checkpoint.hub import reason
from mergekit_wp.errors import BadInput
from mergekit_wp.eval import code_eval
from mergekit_wp.eval.official_data import DataFolder
from mergekit_wp.eval.suite import SuiteTask

# Names that `datasets` takes for a file format: such a task reads the files it lists.
_FILE_FORMATS = {"json", "csv", "parquet", "arrow", "text", "xml", "pandas"}
_HUB_TIMEOUT_S = 5


def check_data(task: str, config: dict[str, Any], data: DataFolder | None = None) -> None:
    """A task's data set must be here or reachable; lm-eval would retry for half a minute and then fail.

    With a folder of `data`, what the Hub would give must be in it.
    """
    source = config.get("dataset_path")
    if source in _FILE_FORMATS:
        for name in data_files(config):
            if "://" not in name and not glob.glob(name):
                raise BadInput(
                    f"task {task}: its data file {name} does not exist "
                    f"(a relative path is taken from the current folder, {Path.cwd()})."
                )
    elif not isinstance(source, str) or "custom_dataset" in config:
        return
    elif data is not None and (data.has(source) or not os.path.exists(source)):
        data.check(task, config)
    elif not os.path.exists(source) and not _is_cached(source):
        _check_hub(task, source)


def data_files(config: dict[str, Any]) -> list[str]:
    """Every path in `dataset_kwargs.data_files`, which may be a string, a list or a mapping of either."""
    pending = [(config.get("dataset_kwargs") or {}).get("data_files") or []]
    names: list[str] = []
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            names.append(value)
        else:
            pending.extend(value.values() if isinstance(value, dict) else value)
    return sorted(names)


def _is_cached(dataset: str) -> bool:
    """Whether the Hub data set has been downloaded before, under either of the caches' naming schemes."""
    import datasets
    import huggingface_hub

    if Path(huggingface_hub.constants.HF_HUB_CACHE, f"datasets--{dataset.replace('/', '--')}").is_dir():
        return True
    prepared = Path(datasets.config.HF_DATASETS_CACHE)
    wanted = dataset.replace("/", "___").replace("-", "_").lower()
    return any(folder.name.replace("-", "_").lower() == wanted for folder in prepared.glob("*"))


def _check_hub(task: str, dataset: str) -> None:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    advice = "download it where there is network (HF_HOME is the cache), or name a folder of data sets with --data"
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"task {task}: its data set {dataset} is not cached and HF_HUB_OFFLINE is set; {advice}.")
    try:
        HfApi().dataset_info(dataset, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise BadInput(f"task {task}: its data set {dataset} is gated; log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise BadInput(f"task {task}: there is no data set {dataset} on the Hub (or it is private).") from error
    except HfHubHTTPError as error:
        raise BadInput(
            f"task {task}: its data set {dataset} is not cached and the Hub answered {error.response.status_code} "
            f"({reason(error)}); log in again with `hf auth login` if that is 401 or 403, else try again later."
        ) from error
    except Exception as error:  # whatever the HTTP client of the day raises for "no network"
        raise BadInput(
            f"task {task}: its data set {dataset} is not cached and the Hub cannot be reached "
            f"({reason(error)}); {advice}."
        ) from error


def task_key(
    spec: SuiteTask,
    gen_kwargs: dict[str, Any],
    leaves: list[dict[str, Any]],
    tasks: list[Any],
    data: Mapping[str, str],
) -> str:
    """A hash of how the task is asked and of every local file that defines it or grades it.

    `leaves` are its configurations as read, `tasks` as loaded, `data` the hashes of what it reads in the Hub's place.
    The column's title and the metric shown are
    left out: all metrics of a task are kept. What judges model-written code counts for the tasks that have any.
    """
    asked = {**asdict(spec), "gen_kwargs": gen_kwargs}
    del asked["column"], asked["metric"]
    digest = hashlib.sha256(json.dumps([asked, leaves], sort_keys=True, default=str).encode())
    files = {path for leaf in leaves for path in files_read(leaf)} | {path for t in tasks for path in _code_of(t)}
    if any(leaf.get("unsafe_code") for leaf in leaves):
        files |= {Path(code_eval.__file__), *Path(sandbox.__file__).parent.glob("*.py")}
    if data:
        digest.update(json.dumps(sorted(data.values())).encode())
    for path in sorted(files):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def files_read(config: dict[str, Any]) -> Iterator[Path]:
    """Data files, a local data folder, and the folders of the Python functions that the YAML names.

    Such a function may read anything beside it, so all files below its folder count.
    """
    for name in data_files(config):
        yield from (Path(match) for match in glob.glob(name) if os.path.isfile(match))
    folders = [Path(str(config.get("dataset_path") or ""))] if config.get("dataset_path") else []
    folders += [module.parent for module in function_modules(config)]
    for folder in folders:
        if os.path.isdir(folder):
            yield from (p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".yaml", ".pyc"))


def function_modules(value: Any) -> Iterator[Path]:
    """The files behind `!function module.name`, which lm-eval's index keeps as `<folder>/module.name`."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from function_modules(item)
    elif isinstance(value, str) and os.sep in value and "\n" not in value and len(value) < 1000:
        module = Path(value.rpartition(".")[0] + ".py")
        if module.is_file():
            yield module


def _code_of(task: Any) -> Iterator[Path]:
    """Modules that hold the task's functions, with their neighbours: a file beside the YAML may only import them."""
    for function in vars(task.config).values():
        if inspect.isfunction(function) and (source := inspect.getsourcefile(function)):
            yield from Path(source).parent.glob("*.py")
