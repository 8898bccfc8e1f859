"""The data and code that tasks read: whether they are there, and a hash of their content."""

from __future__ import annotations

import ast
import glob
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergekit_wp import sandbox
from mergekit_wp.checkpoint.hub import reason
from mergekit_wp.errors import BadInput
from mergekit_wp.eval import code_eval
from mergekit_wp.eval.official_data import DataFolder
from mergekit_wp.eval.suite import SuiteTask
from mergekit_wp.files import open_file

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


def revisions(tasks: Iterable[Any]) -> dict[str, str]:
    """The commits of the Hub's data sets that these tasks, as loaded, read, by data set: `datasets` keeps the rows of
    one in a folder of that name. Not there is what came from elsewhere."""
    found = {}
    for task in tasks:
        splits = task.dataset if isinstance(getattr(task, "dataset", None), dict) else {}
        for split in splits.values():
            for file in getattr(split, "cache_files", ()):
                commit = Path(file["filename"]).parent.name
                if re.fullmatch("[0-9a-f]{40}", commit):
                    found[str(task.get_config("dataset_path"))] = commit
    return found


def task_key(
    spec: SuiteTask,
    gen_kwargs: dict[str, Any],
    leaves: Sequence[dict[str, Any]],
    groups: Sequence[dict[str, Any]],
    tasks: list[Any],
    data: Mapping[str, str],
) -> str:
    """A hash of how the task is asked and of every local file that defines it or grades it.

    `leaves` are its configurations as read, `groups` those of the groups above them, which say how values are put
    together; `tasks` as loaded, `data` the hashes of what it reads in the Hub's place. The column's title and the
    metric shown are left out: all metrics of a task are kept. What judges model-written code counts for the tasks that
    have any.
    """
    asked = {**asdict(spec), "gen_kwargs": gen_kwargs}
    del asked["column"], asked["metric"]
    configs = [leaves, groups] if groups else [leaves]
    digest = hashlib.sha256(json.dumps([asked, *configs], sort_keys=True, default=str).encode())
    files = files_read(leaves) | {path for task in tasks for path in _code_of(task)}
    if any(leaf.get("unsafe_code") for leaf in leaves):
        files |= {Path(code_eval.__file__), *Path(sandbox.__file__).parent.glob("*.py")}
    if data:
        digest.update(json.dumps(sorted(data.values())).encode())
    for path in sorted(files):
        digest.update(path.name.encode())
        with open_file(path) as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def files_read(configs: Sequence[dict[str, Any]]) -> set[Path]:
    """What tasks are made of, beside their YAML: the data files and local data folders that they name, and the Python
    of their functions with what this names.

    Of a folder, files that hold data count (`_DATA`); hidden ones, models and outputs of wp-eval never do.
    """
    found = {Path(match) for config in configs for name in data_files(config) for match in glob.glob(name)}
    found = {path for path in found if path.is_file()}
    for source in {str(config.get("dataset_path") or "") for config in configs} - {"", *_FILE_FORMATS}:
        found.update(_below(Path(source), _DATA))
    return found | _python_with_its_files(set(function_modules(list(configs))))


def function_modules(value: Any) -> Iterator[Path]:
    """The files behind `!function package.module.name`, which lm-eval's index keeps as `<folder>/package.module.name`,
    the folder being that of the YAML."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from function_modules(item)
    elif isinstance(value, str) and os.sep in value and "\n" not in value and len(value) < 1000:
        folder, name = os.path.split(value)
        module = Path(folder, *name.split(".")[:-1]).with_suffix(".py")
        if "." in name and module.is_file():
            yield module


def _python_with_its_files(modules: set[Path]) -> set[Path]:
    """These modules and all Python beside them, the packages that they import from there, and the files beside them
    that they, or what they import, name in a string."""
    found: set[Path] = set()
    pending, seen = list(modules), set()
    while pending:
        module = pending.pop()
        if module in seen or not module.is_file():
            continue
        seen.add(module)
        found |= {module, *(path for path in module.parent.glob("*.py") if not path.name.startswith("."))}
        imported, texts = _names_in(module)
        for place in imported:
            pending += [place.with_name(f"{place.name}.py"), *_below(place, (".py",))]
        there = set(os.listdir(module.parent))
        found.update(path for text in texts for path in _named(module.parent, there, text))
    return {path for path in found if path.is_file()}


def _names_in(module: Path) -> tuple[set[Path], set[str]]:
    """What a module imports, as the paths (without an ending) where that would lie beside it, and the strings in it.

    What a string takes in when the program runs is `*`.
    """
    imported: set[Path] = set()
    texts: set[str] = set()
    try:
        nodes = list(ast.walk(ast.parse(module.read_bytes())))
    except (SyntaxError, ValueError):  # lm-eval says so, if it needs this file
        return imported, texts
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {module.parent / alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level <= len(module.parents):
            folder = module.parents[max(node.level, 1) - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            imported |= {folder / name.partition(".")[0] for name in names}
        elif isinstance(node, ast.JoinedStr):
            texts.add("".join(glob.escape(str(v.value)) if isinstance(v, ast.Constant) else "*" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(_TO_FILL_IN.sub("*", node.value))
    return imported, texts


_TO_FILL_IN = re.compile(r"%[sd]|\{\w*\}")


def _named(folder: Path, there: set[str], text: str) -> Iterator[Path]:
    """The files that a string means if it is a path below a folder, or a pattern of such; `there`: what lies in it."""
    path = Path(text) if len(text) < 256 and text.isprintable() else Path()
    path = path.relative_to(folder) if path.is_relative_to(folder) else path
    if not path.parts or path.is_absolute() or any(part.startswith(".") for part in path.parts):
        return
    if glob.has_magic(text):
        found = folder.glob(str(path)) if path.suffix in _DATA and "**" not in text else ()
        shown = [each for each in found if not any(part.startswith(".") for part in each.relative_to(folder).parts)]
        yield from (each for each in shown if not _lies_apart(folder, each))
    elif path.parts[0] in there and not _lies_apart(folder, folder / path):
        yield from [folder / path] if os.path.isfile(folder / path) else _below(folder / path, _DATA)


# Endings of files with data or texts, as `datasets` and graders read them; weights, keys and programs are none.
_DATA = (
    ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".md", ".parquet", ".arrow", ".xml", ".jinja",
    ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar",
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".wav", ".flac", ".mp3", ".ogg", ".mp4",
)  # fmt: skip


def _below(folder: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    """Files below a folder with one of these endings; none that are hidden, nor of a model or an output of wp-eval."""
    for place, folders, files in os.walk(folder):
        if _is_apart(place):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in files if name.lower().endswith(endings) and not name.startswith(".")]
        yield from (path for path in map(Path(place).joinpath, names) if path.is_file())


def _lies_apart(folder: Path, path: Path) -> bool:
    """Whether a model, or an output of wp-eval, below `folder` is or holds `path`."""
    between = [path, *path.parents]
    return any(_is_apart(place) for place in between[: between.index(folder)])


_CACHE_FILE = re.compile(r".+-[0-9a-f]{20}\.json")  # as measure.cache_file names them


def _is_apart(folder: str | Path) -> bool:
    """Whether a folder is a model, or an output of wp-eval, which writes its cache there first."""
    with suppress(OSError):
        names = os.listdir(folder)
        if {"config.json", "adapter_config.json"} & set(names) and any(n.endswith(".safetensors") for n in names):
            return True
        return "cache" in names and any(map(_CACHE_FILE.fullmatch, os.listdir(Path(folder, "cache"))))
    return False


def _code_of(task: Any) -> Iterator[Path]:
    """Modules that hold the task's functions, with their neighbours: a file beside the YAML may only import them."""
    for function in vars(task.config).values():
        if inspect.isfunction(function) and (source := inspect.getsourcefile(function)):
            yield from Path(source).parent.glob("*.py")
