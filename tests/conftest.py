"""Tests run tiny tensors: one thread each is faster than two that wait for one another."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests start hundreds of interpreters, each of which would compile this package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import torch

torch.set_num_threads(1)
# A shell starts its background jobs with Ctrl-C ignored, and so would everything that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Minutes each: begun first, since one of these begun last is waited for by all other workers.
LONG = {"test_kills", "test_score", "test_quiet", "test_score_engine", "test_table3_work", "test_eval_process",
        "test_table3", "test_merge_widen_method", "test_eval", "test_fit", "test_answer_files",
        "test_merge_recipes"}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Commands called in this process send the package's log to the terminal; the next test reads it itself."""
    log = logging.getLogger("mergekit_wp")
    before = log.level, list(log.handlers), log.propagate
    yield
    log.setLevel(before[0])
    log.handlers, log.propagate = before[1:]
