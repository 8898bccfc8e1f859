"""Model-written functions run where they can do no harm, and cannot talk the grader round."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from experiments.miniature.sandbox import call_function, passes


def test_a_function_returns_its_results() -> None:
    code = "def f(x):\n    x = x + 1\n    return [x, str(x)]"
    assert call_function(code, "f", [1, 2]) == [[2, "2"], [3, "3"]]


@pytest.mark.parametrize(
    "code",
    [
        "",
        "def f(x)\n    return x",
        "def g(x):\n    return x",
        "f = 3",
        "def f(x):\n    return x / 0",
        "def f(x):\n    return f(x)",
        "def f(x):\n    raise SystemExit(0)",
        "import sys\nsys.exit(0)",
        "import os\ndef f(x):\n    os._exit(0)",
        "import os, signal\ndef f(x):\n    os.kill(os.getpid(), signal.SIGSEGV)",
        "def f(x):\n    return {x}",
        "def f(x):\n    return 'a' * 10**10",
        "def f(x):\n    y = []\n    while True:\n        y.append('a' * 10**6)",
        "import os\ndef f(x):\n    os.write(3, b'x' * 10**6)\n    return x",
        "import os\ndef f(x):\n    os.write(1, b'[1]')\n    os.write(3, b'[')\n    return x",
    ],
)
def test_whatever_goes_wrong_is_only_a_wrong_answer(code: str) -> None:
    assert call_function(code, "f", [1]) is None


@pytest.mark.parametrize(
    "code",
    ["def f(x):\n    while True:\n        pass", "import time\ndef f(x):\n    time.sleep(60)", "while True:\n    pass"],
)
def test_endless_functions_are_stopped(code: str) -> None:
    started = time.monotonic()
    assert call_function(code, "f", [1]) is None
    assert time.monotonic() - started < 10


def test_files_are_neither_written_nor_read(tmp_path: Path) -> None:
    for folder in (str(tmp_path), "."):
        code = f"def f(x):\n    with open({folder + '/new'!r}, 'w') as out:\n        out.write('x')\n    return x"
        assert call_function(code, "f", [1]) is None
    assert not (tmp_path / "new").exists()
    assert call_function(f"def f(x):\n    return open({__file__!r}).read()", "f", [1]) is None


def test_no_process_is_started_and_no_socket_opened() -> None:
    assert call_function("import os\ndef f(x):\n    return os.fork() * 0", "f", [1]) is None
    assert call_function("import os\ndef f(x):\n    return os.system('true')", "f", [1]) != [0]
    assert call_function("import socket\ndef f(x):\n    socket.socket()\n    return x", "f", [1]) is None


def test_the_environment_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    names = call_function("import os\ndef f(x):\n    return sorted(os.environ)", "f", [1])
    assert names is not None
    assert "HF_TOKEN" not in names[0]


def test_one_bad_function_leaves_the_next_alone() -> None:
    good = "def f(x):\n    return x"
    assert call_function("import builtins\nbuiltins.len = None\ndef f(x):\n    return 1", "f", [1]) == [1]
    assert passes(good, "f", [[1, 1], ["a", "a"]])
    assert os.getcwd()


def test_printing_a_verdict_earns_nothing() -> None:
    """The right results are never sent to the child, so it cannot echo them."""
    code = "import sys, os\nprint('[4]', flush=True)\nos.write(1, b'[4]')\ndef f(x):\n    return 0"
    assert not passes(code, "f", [[2, 4]])
    assert call_function(code, "f", [2]) == [0]


def test_results_must_be_of_the_right_type() -> None:
    assert passes("def f(x):\n    return x + 1", "f", [[0, 1]])
    assert not passes("def f(x):\n    return True", "f", [[0, 1]])
    assert not passes("def f(x):\n    return 1.0", "f", [[0, 1]])
    assert not passes("def f(x):\n    return '1'", "f", [[0, 1]])
