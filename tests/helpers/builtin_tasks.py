"""lm-eval's index of its own 14,000 tasks, read once by a run of the tests and not once by every process of it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from filelock import FileLock


@pytest.fixture(scope="session", autouse=True)
def builtin_tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The index is built by the first who asks and unpickled by the others; of folders beside it, nothing is kept."""
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    root, build = tmp_path_factory.getbasetemp(), TaskIndex.build
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # what the workers of one run share
    builtin, file = Path(lm_eval.tasks.__file__).parent, root / "builtin-tasks.pickle"

    def kept(paths: Iterable[Path], *, resolve_includes: bool = True) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in paths:
            found |= own() if path == builtin else build([path], resolve_includes=resolve_includes)
        return found

    def own() -> dict[str, Any]:
        with FileLock(f"{file}.lock"):
            if not file.exists():
                file.write_bytes(pickle.dumps(build([builtin])))
        return pickle.loads(file.read_bytes())

    with mock.patch.object(TaskIndex, "build", staticmethod(kept)):
        yield
