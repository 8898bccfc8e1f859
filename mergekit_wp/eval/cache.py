"""What is kept of a run: a file a model and settings, with the results of each task that is finished."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mergekit_wp.documents import MOST_JSON_BYTES, parse_json
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.files import read_text, write_text
from mergekit_wp.foreign import file_part

Entry = dict[str, Any]  # a task's results as lm-eval gave them, and how they came about


def cache_file(cache: Path, model: EvalModel, key: str) -> Path:
    """The file of this model under this key, under whatever row name it was first evaluated."""
    found = sorted(cache.glob(f"*-{key[:20]}.json"))
    return found[0] if found else cache / f"{file_part(model.name)}-{key[:20]}.json"


def read_cache(path: Path) -> dict[str, Entry]:
    """Finished tasks by key; a file that is not ours or was damaged counts as nothing done."""
    try:
        tasks = parse_json(read_text(path, MOST_JSON_BYTES))["tasks"]
        return {key: entry for key, entry in tasks.items() if _is_entry(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_entry(entry: Entry) -> bool:
    samples = entry.get("samples", "")
    return isinstance(entry.get("results"), dict) and (samples is None or type(samples) is int)


def write_cache(path: Path, model: EvalModel, done: dict[str, Entry]) -> None:
    """All finished tasks of a model, whole or not at all."""
    content = {"model": model.reference, "fingerprint": model.fingerprint, "tasks": done}
    write_text(path, json.dumps(plain(content), indent=2) + "\n")


def plain(value: Any) -> Any:
    """The same content in JSON's own types: numpy scalars become numbers, what JSON lacks becomes text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
