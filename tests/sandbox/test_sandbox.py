"""Model-written programs are judged by whether they reach their end, and can do no harm on the way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_for

from mergekit_wp import sandbox
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.code_eval import CodeEval, pass_at_k, sandboxed
from mergekit_wp.sandbox import confine, run, run_programs

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")


def judge(program: str, seconds: int = 5) -> sandbox.Verdict:
    return run_programs([program], seconds)[0]


@pytest.mark.parametrize(
    "program",
    [
        "",
        "def add(a, b):\n    return a + b\nassert add(2, 3) == 5",
        "from typing import List\nimport math, re, heapq, collections, itertools, functools, datetime, decimal",
        "import numpy as np\nassert np.linalg.det(np.eye(3)) == 1",
        "with open('note.txt', 'w') as out:\n    out.write('x')\nassert open('note.txt').read() == 'x'",
        "import tempfile\nwith tempfile.TemporaryFile() as out:\n    out.write(b'x')",
        "if __name__ == '__main__':\n    raise ValueError('not run under code_eval either')",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 1\nassert P().x == 1",
        "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\nassert f(900) == 900",
    ],
)
def test_right_programs_pass(program: str) -> None:
    assert judge(program) == sandbox.Verdict(True, "passed")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("undefined", "NameError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("exit()", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError"),
        ("x = 'a' * (6 * 2**30)", "MemoryError"),
        ("def f(x):\n    return f(x)\nf(1)", "RecursionError"),
        ("import os\nos._exit(0)", "ended before the code did (status 0)"),
        ("import ctypes\nctypes.string_at(0)", "ended before the code did (status -11)"),
        ("class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E", "ended before"),
        ("while True: pass", "timed out"),
        ("import time\ntime.sleep(60)", "timed out"),
    ],
)
def test_wrong_programs_fail_for_their_reason(program: str, reason: str) -> None:
    verdict = judge(program, seconds=1 if reason == "timed out" else 5)
    assert not verdict.passed
    assert reason in verdict.result


@pytest.mark.parametrize(
    "text",
    ["passed", '{"token": "", "answer": "reached the end"}', '{"token": null, "answer": "reached the end"}', "[]", "3"],
)
def test_what_a_program_says_earns_nothing(text: str) -> None:
    """Neither printed nor written to every open file does a claim count, before leaving or failing."""
    write = f"import os\nprint({text!r}, flush=True)\nfor fd in range(10):\n    try: os.write(fd, {text.encode()!r})\n"
    write += "    except OSError: pass\n"
    assert not judge(write + "os._exit(0)").passed
    assert not judge(write + "assert False").passed


def test_the_token_is_in_no_variable() -> None:
    """It stays in the pipe until the end; frames, modules and objects that a program can reach lack it."""
    program = """
import gc, re, sys
texts = [str(value) for frame in sys._current_frames().values() for value in frame.f_globals.values()]
frame = sys._getframe()
while frame:
    texts += [str(value) for value in frame.f_locals.values()]
    frame = frame.f_back
texts += [str(thing) for thing in gc.get_objects() if isinstance(thing, (str, bytes, dict, list, tuple))]
found = [text for text in texts if re.search(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", text[:100_000])]
assert not found, found
"""
    assert judge(program) == sandbox.Verdict(True, "passed")


def test_processor_time_is_limited_apart_from_the_clock() -> None:
    """On a busy machine the clock allows twice as much, so only the limit itself shows that it is there."""
    assert judge("import resource\nassert resource.getrlimit(resource.RLIMIT_CPU) == (7, 8)", seconds=7).passed


def test_endless_programs_are_stopped_in_time() -> None:
    started = time.monotonic()
    verdicts = run_programs(["while True: pass", "import time\ntime.sleep(60)", "x = 1"], seconds=1)
    assert [verdict.result for verdict in verdicts] == ["timed out", "timed out", "passed"]
    assert time.monotonic() - started < 15


@LINUX
def test_a_process_left_behind_by_a_killed_parent_ends_by_itself() -> None:
    """The parent is killed while a program sleeps for ever."""
    code = "from mergekit_wp.sandbox import run_programs\nrun_programs(['import time; time.sleep(99)'], seconds=2)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: confined_children(parent.pid), "the program to begin")
    (child,) = confined_children(parent.pid)
    parent.kill()
    parent.wait()
    assert proc_status(child)  # or nothing was left behind
    wait_for(lambda: proc_status(child).get("State", "Z").startswith("Z"), "the program to end", seconds=20)


def confined_children(parent: int) -> list[int]:
    """The processes of this parent that have a seccomp filter, which a sandbox takes on as its program begins."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    found = {pid: proc_status(pid) for pid in pids}
    return [pid for pid, s in found.items() if (s.get("PPid"), s.get("Seccomp")) == (str(parent), "2")]


def proc_status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status; none for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@LINUX
@pytest.mark.parametrize("how", ["open({0!r}, 'w').write('x')", "open({0!r}, 'a')", "import os; os.mkdir({0!r})"])
def test_nothing_is_written_outside_its_folder(tmp_path: Path, how: str) -> None:
    tmp_path.chmod(0o777)  # what stops it is the sandbox, not the folder
    target = tmp_path / "new"
    assert "Permission" in judge(how.format(str(target))).result
    assert not target.exists()


@LINUX
def test_nothing_is_removed_and_little_is_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "secret").write_text("x")
    assert "Permission" in judge(f"import os; os.remove({str(tmp_path / 'secret')!r})").result
    assert "Permission" in judge(f"open({str(tmp_path / 'secret')!r}).read()").result
    assert "Permission" in judge("open('/etc/passwd').read()").result
    assert (tmp_path / "secret").exists()


def test_files_stay_small_and_are_gone_afterwards() -> None:
    assert "File too large" in judge("open('big', 'wb').write(b'x' * 10**6)").result
    verdict = judge("import os\nopen('a', 'w').close()\nraise ValueError(os.getcwd())")
    assert verdict.result.startswith("failed: ValueError: /")
    assert not Path(verdict.result.rpartition(" ")[2]).exists()


def test_no_network() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    port = server.getsockname()[1]
    program = f"import socket\nsocket.create_connection(('127.0.0.1', {port})).sendall(b'x')"
    assert not judge(program).passed
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()
    for kind in ("AF_INET, socket.SOCK_DGRAM", "AF_INET6, socket.SOCK_STREAM", "AF_UNIX, socket.SOCK_STREAM"):
        assert "Permission" in judge(f"import socket\nsocket.socket(socket.{kind})").result


def test_no_process_thread_or_signal() -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    for program in (
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'], check=True)",
        "import threading\nthreading.Thread(target=print).start()",
        f"import os\nos.kill({victim.pid}, 9)",
    ):
        assert not judge(program).passed
    assert victim.poll() is None
    victim.kill()
    victim.wait()


def test_neither_environment_nor_open_files_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with open(tmp_path / "weights", "w") as held:
        os.set_inheritable(held.fileno(), True)
        program = f"import os\nassert 'HF_TOKEN' not in os.environ\nos.fstat({held.fileno()})"
        assert "Bad file descriptor" in judge(program).result or held.fileno() < 6
    count = "import os\nopen_ = []\nfor fd in range(1000):\n    try: os.fstat(fd); open_.append(fd)\n"
    count += "    except OSError: pass\nassert len(open_) == 5, open_"  # standard three, and both ends of the talk
    assert judge(count) == sandbox.Verdict(True, "passed")


@pytest.mark.skipif(not ROOT, reason="only root has rights to give up")
def test_root_becomes_nobody_without_capabilities() -> None:
    assert judge("import os\nassert os.getresuid() == (65534,) * 3 and os.getgroups() == []").passed
    assert not judge("import os\nos.setuid(0)").passed
    assert not judge("import os\nos.chown('.', 0, 0)").passed


def test_verdicts_keep_their_order_and_run_side_by_side() -> None:
    most = 0

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, sum(thread.name.startswith("ThreadPool") for thread in threading.enumerate()))
            time.sleep(0.01)

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    verdicts = run_programs([f"assert {i} % 2" for i in range(12)], workers=3)
    done.set()
    watcher.join()
    assert [verdict.passed for verdict in verdicts] == [bool(i % 2) for i in range(12)]
    assert most == 3


def test_a_machine_that_cannot_judge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.check()
    monkeypatch.setattr(run, "_CHILD", Path("/nowhere/child.py"))
    with pytest.raises(BadInput, match="cannot be judged on this machine"):
        sandbox.check()


@LINUX
@pytest.mark.parametrize("call", ["os.kill(0, 9)", "os.fork()", "socket.socket()", "subprocess.run(['true'])"])
def test_without_the_kernels_help_accidents_are_still_stopped(call: str, tmp_path: Path) -> None:
    limits = asdict(run.function_limits(5)) | {"memory_bytes": 2**32}
    code = f"""
import os, sys, socket, subprocess
sys.path.insert(0, {str(Path(confine.__file__).parent)!r})
import confine
confine._disk = confine._landlock = lambda *_: False
confine._filter_calls = lambda _: False
confine.confine({limits}, {str(tmp_path)!r})
try:
    {call}
except PermissionError as error:
    os._exit(3 if 'sandbox' in str(error) else 4)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 3


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(case: tuple[int, int, int]) -> None:
    n, c, k = case
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


@pytest.mark.parametrize("right", [[[True]], [[False, True], [True, False, True]], [[False] * 3, [True, True, False]]])
def test_code_eval_gives_what_evaluate_gives(right: list[list[bool]]) -> None:
    """Against the formula of the original: 1 - prod(1 - k / (n - c + 1 .. n)), averaged over problems."""
    import numpy as np

    candidates = [[f"def f(x): return x + {int(ok)}" for ok in tries] for tries in right]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ALLOW_CODE_EVAL", "1")
        scores, results = CodeEval().compute(["assert f(1) == 2"] * len(right), candidates, k=[1, 2, 3])
    assert set(scores) == {f"pass@{k}" for k in (1, 2, 3) if all(len(tries) >= k for tries in right)}
    for name, score in scores.items():
        k = int(name.removeprefix("pass@"))
        expected = [
            1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
            for n, c in ((len(tries), sum(tries)) for tries in right)
        ]
        assert score == pytest.approx(np.mean(expected))
    assert [[found["passed"] for _, found in results[i]] for i in range(len(right))] == right
    assert [[j for j, _ in results[i]] for i in range(len(right))] == [list(range(len(tries))) for tries in right]


def test_code_eval_needs_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ValueError, match="HF_ALLOW_CODE_EVAL"):
        CodeEval().compute(["assert True"], [["x = 1"]], k=[1])


def test_only_code_eval_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    asked = []
    monkeypatch.setattr(evaluate, "load", lambda name, *_, **__: asked.append(name))
    with sandboxed():
        assert isinstance(evaluate.load("code_eval"), CodeEval)
        evaluate.load("exact_match")
    assert asked == ["exact_match"]
    evaluate.load("code_eval")
    assert asked == ["exact_match", "code_eval"]
