"""What model-written code may ask of the kernel, as root and as an ordinary user, and what it may leave behind.

Every probe is a program that passes when the kernel refuses it (EPERM). A probe of `BY_ANYBODY` succeeds outside of the
sandbox, which a control shows, so that "refused" says something.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_wp
from mergekit_wp.sandbox import confine, run, run_programs

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
MACHINE = os.uname().machine if hasattr(os, "uname") else ""
pytestmark = pytest.mark.skipif(MACHINE not in ("x86_64", "aarch64"), reason="the filter knows x86-64 and ARM64")

# Calls of every processor by number: x86-64, ARM64.
NUMBERS = {
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "memfd_create": (319, 279), "add_key": (248, 217),
    "keyctl": (250, 219), "request_key": (249, 218), "userfaultfd": (323, 282), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "io_uring_setup": (425, 425), "bpf": (321, 280), "perf_event_open": (298, 241), "mq_open": (240, 180),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "chroot": (161, 51), "pivot_root": (155, 41),
    "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221), "kill": (62, 129), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "setuid": (105, 146), "setsid": (112, 157), "prctl": (157, 167),
    "seccomp": (317, 277), "landlock_create_ruleset": (444, 444), "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "personality": (135, 92), "quotactl": (179, 60), "syslog": (103, 116), "kcmp": (312, 272), "mlock": (149, 228),
    "socket": (41, 198), "connect": (42, 203), "sendmsg": (46, 211), "setsockopt": (54, 208), "mknodat": (259, 33),
    "symlinkat": (266, 36), "linkat": (265, 37), "splice": (275, 76),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30),
}  # fmt: skip
COLUMN = 0 if MACHINE == "x86_64" else 1
YOUNGER = ("landlock_create_ruleset",)  # than every call that is allowed: ENOSYS

# Programs that reach for the process `{pid}` and the file `{file}` of the user who runs the sandbox.
BY_ANYBODY = {
    "prlimit": "resource.prlimit({pid}, resource.RLIMIT_NOFILE, (3, 3))",
    "setpriority": "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "affinity": "os.sched_setaffinity({pid}, {{0}})",
    "scheduler": "os.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))",
    "chmod": "os.chmod({file!r}, 0o666)",
    "utime": "os.utime({file!r}, (0, 0))",
    "truncate": "os.truncate({file!r}, 0)",
    "kill": "os.kill({pid}, 0)",
    "signal by pipe": "fcntl.fcntl(0, fcntl.F_SETOWN, {pid})",
    "datagram pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "shared memory": "call({shmget}, 0, 4096, 0o1600)",
    "semaphores": "call({semget}, 0, 1, 0o1600)",
    "queue": "call({msgget}, 0, 0o1600)",
    "memory file": "call({memfd_create}, b'x', 0)",
    "fork": "os._exit(0) if os.fork() == 0 else None",
    "process": "subprocess.run(['true'], check=True)",
    "socket": "socket.socket()",
    "abstract socket": "socket.socket(socket.AF_UNIX)",
    "pidfd": "os.pidfd_open({pid})",
    "inotify": "call({inotify_init1}, 0)",
}
_TRY = """
import ctypes, fcntl, os, resource, socket, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "refused")
try:
    {}
except (PermissionError, BlockingIOError):
    refused = True
else:
    refused = False
"""


def probes(pid: int | str, file: str) -> dict[str, str]:
    calls = {call: numbers[COLUMN] for call, numbers in NUMBERS.items()}
    filled = {name: code.format(pid=pid, file=file, **calls) for name, code in BY_ANYBODY.items()}
    return {name: _TRY.format(code) + "assert refused" for name, code in filled.items()}


def not_stopped(pid: int, file: str) -> list[str]:
    asked = probes(pid, file)
    return [name for name, v in zip(asked, run_programs(list(asked.values()), 10), strict=True) if not v.passed]


@pytest.fixture
def victim():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process.pid
    process.kill()
    process.wait()


def test_probes_succeed_outside_of_the_sandbox(victim: int, tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("x")
    succeeded = []
    for name, code in probes(victim, str(file)).items():
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 or "AssertionError" in done.stderr, f"{name}: {done.stderr}"
        if done.returncode:
            succeeded.append(name)
    assert set(succeeded) >= set(BY_ANYBODY) - {"signal by pipe"}  # standard input may be a file


def test_nothing_of_the_users_is_within_reach(victim: int, tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("x")
    before = os.stat(file)
    assert not_stopped(victim, str(file)) == []
    after = os.stat(file)
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (before.st_mode, before.st_mtime_ns, before.st_size)
    assert os.getpriority(os.PRIO_PROCESS, victim) == os.getpriority(os.PRIO_PROCESS, 0)
    assert os.sched_getaffinity(victim) == os.sched_getaffinity(0)


def test_every_call_that_is_not_listed_is_refused() -> None:
    """All of them in one program, with arguments that would fail otherwise too, but with another error."""
    program = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nbad = []\n"
    for name, numbers in NUMBERS.items():
        program += f"ctypes.set_errno(0)\nif libc.syscall({numbers[COLUMN]}, -1, -1, -1, -1, -1) != -1 or "
        program += f"ctypes.get_errno() != {38 if name in YOUNGER else 1}: bad.append(({name!r}, ctypes.get_errno()))\n"
    assert run_programs([program + "assert not bad, bad"], 10) == [run.Verdict(True, "passed")]


def test_only_listed_calls_get_through() -> None:
    """Every number there is, but those of the lists: a program in a real filter sees EPERM or ENOSYS."""
    listed = set(confine.allowed_calls(COLUMN + 1).values())
    listed |= {int(numbers.split()[COLUMN + 1]) for numbers, *_ in confine._SOME_CALLS}
    asked = [number for number in range(600) if number not in {*listed, 335, 336}]  # those two belong to probes
    program = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nthrough = []\n"
    program += f"for number in {asked}:\n    ctypes.set_errno(0)\n"
    program += "    if libc.syscall(number, -1, -1, -1, -1, -1, -1) != -1 or ctypes.get_errno() not in (1, 38):\n"
    program += "        through.append(number)\nassert not through, through"
    assert run_programs([program], 10) == [run.Verdict(True, "passed")]


@pytest.mark.parametrize("column", [1, 2])
def test_the_numbers_are_libseccomps(column: int) -> None:
    name = ctypes.util.find_library("seccomp")
    if name is None:
        pytest.skip("no libseccomp on this machine")
    resolve = ctypes.CDLL(name).seccomp_syscall_resolve_name_arch
    resolve.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    architecture = {1: 0xC000003E, 2: 0xC00000B7}[column]
    listed = confine.allowed_calls(column)
    listed |= {row[0].split()[0]: int(row[0].split()[column]) for row in confine._SOME_CALLS}
    assert len(listed) > 100
    assert listed == {call: resolve(architecture, call.encode()) for call in listed}


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 2**32 - 1)), max_size=20), st.sampled_from([1, 2]))
@settings(max_examples=50, deadline=None)
def test_the_filter_decides_as_the_tables_say(calls: list[tuple[int, int]], column: int) -> None:
    """The program, interpreted by the rules of BPF, against the tables read directly."""
    architecture = {1: 0xC000003E, 2: 0xC00000B7}[column]
    program = confine.filter_program(architecture, column)
    allowed = set(confine.allowed_calls(column).values())
    some = {int(row[0].split()[column]): row[1:] for row in confine._SOME_CALLS}
    for number, argument in [*calls, *((n, v) for n, (_, _, values) in some.items() for v in (*values, 99))]:
        expected = 0x7FFF0000 if number in allowed else 0x50000 | (38 if number > max(allowed) else 1)
        if number in some:
            _, mask, values = some[number]
            expected = 0x7FFF0000 if argument & mask in values else 0x50001
        assert interpret(program, architecture, number, argument) == expected
        assert interpret(program, 0x40000003, number, argument) == 0x50001  # i386's own numbers


def interpret(program: bytes, architecture: int, number: int, argument: int) -> int:
    import struct

    steps = list(struct.iter_unpack("HBBI", program))
    at, value = 0, 0
    while True:
        code, if_true, if_false, operand = steps[at]
        at += 1
        if code == 0x20:
            value = {0: number, 4: architecture}.get(operand, argument)
        elif code == 0x54:
            value &= operand
        elif code == 0x06:
            return operand
        else:
            at += if_true if (value == operand if code == 0x15 else value > operand) else if_false


def python_for_others() -> str | None:
    """A Python of 3.11 or later that a user who is not root can run."""
    for path in ("/usr/bin/python3", sys.executable):
        command = ["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups", path, "-c"]
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [*command, "import sys; assert sys.version_info >= (3, 11)"], capture_output=True, cwd="/"
            )
            if done.returncode == 0:
                return path
    return None


@pytest.mark.skipif(not ROOT, reason="an ordinary user's probes are the test above")
def test_nothing_is_within_an_ordinary_users_reach_either() -> None:
    python = python_for_others()
    if python is None:
        pytest.skip("no Python here that another user could run")
    site = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        site.chmod(0o755)
        package = Path(mergekit_wp.__file__).parent
        shutil.copytree(package, site / "mergekit_wp", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(Path(click.__file__).parent, site / "click")
        code = f"""
import json, os, subprocess, sys, tempfile
from mergekit_wp.sandbox import run_programs
probes, left = json.loads(sys.stdin.read()), tempfile.mkdtemp()
file = os.path.join(left, "mine")
open(file, "w").write("x")
victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
programs = [text.replace("<pid>", str(victim.pid)).replace("<file>", file) for text in probes.values()]
tempfile.tempdir = tempfile.mkdtemp(dir=left)
verdicts = run_programs(programs, 10)
endless = run_programs([{ENDLESS!r}], 2)
print(json.dumps([
    [(name, v.result) for name, v in zip(probes, verdicts) if not v.passed], endless[0].result,
    os.listdir(tempfile.tempdir), oct(os.stat(file).st_mode), victim.poll(),
]))
victim.kill()
"""
        done = subprocess.run(
            ["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups", python, "-c", code],
            input=json.dumps(probes("<pid>", "<file>")), capture_output=True, text=True, cwd="/tmp",
            env={"PYTHONPATH": str(site), "HOME": "/tmp", "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        through, endless, left, mode, ended = json.loads(done.stdout)
        assert (through, left, mode[-3:], ended) == ([], [], "644", None)
        assert endless.startswith("failed: ")
    finally:
        shutil.rmtree(site, ignore_errors=True)


# What a program leaves, with a disk of its own and without one.

ENDLESS = "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')"
LEAVINGS = {
    "folders in one another": ENDLESS,
    "files": "for i in range(10**6): open(f'f{i}', 'w').close()",
    "bytes": "for i in range(10**6): open(f'f{i}', 'w').write('x' * 60_000)",
    "closed folders": "import os\nwhile True:\n    os.mkdir('d', 0o300); os.chdir('d')",
    "odd names": "import os\nfor i in range(1, 10**6): os.mkdir(bytes([255, 10, 27, i % 9 + 1]) + str(i).encode())",
}


@pytest.fixture(params=["its own disk", "the user's disk"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if request.param == "the user's disk":
        child = tmp_path / "child.py"
        child.write_text(
            f"import sys\nsys.path.insert(0, {str(Path(confine.__file__).parent)!r})\nimport confine\n"
            "confine._disk = lambda *_: False\nimport child\nchild.main()\n"
        )
        monkeypatch.setattr(run, "_CHILD", child)
    elif "disk" not in run._run_program("", 10)[1]:
        pytest.skip("no mount namespace for this process on this system")
    return request.param


@pytest.mark.parametrize("leaving", LEAVINGS)
def test_whatever_a_program_leaves_it_gets_a_verdict_and_is_cleared_up(leaving: str, disk: str, tmp_path: Path) -> None:
    verdicts = run_programs([LEAVINGS[leaving], "assert True"], 4, 1)
    assert [verdict.passed for verdict in verdicts] == [False, True]
    assert "left more than" in verdicts[0].result or "No space left" in verdicts[0].result
    assert [path.name for path in tmp_path.iterdir() if path.name != "child.py"] == []


def test_a_little_may_be_written(disk: str) -> None:
    program = "import os\nos.makedirs('a/b/c')\nfor i in range(200): open(f'a/b/{i}', 'w').write('x' * 9_000)"
    assert run_programs([program], 10) == [run.Verdict(True, "passed")]


def test_removal_takes_what_no_path_can_name(tmp_path: Path) -> None:
    """1,000 folders in one another, closed ones, pipes and sockets; the folder beside it, linked to, stays."""
    folder, beside = tmp_path / "x", tmp_path / "beside"
    folder.mkdir()
    beside.mkdir()
    (beside / "kept").write_text("x")
    (folder / "link").symlink_to(beside)
    os.mkfifo(folder / "pipe")
    here = os.getcwd()
    try:
        os.chdir(folder)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
        for i in range(1000):
            os.mkdir("d" * 200)
            if i % 500 == 0:
                Path("file").write_text("x")
            os.chdir("d" * 200)
        os.mkdir("closed", 0)
    finally:
        os.chdir(here)
    run._remove(str(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside"]
    assert (beside / "kept").exists()


def test_what_a_killed_parent_left_is_removed_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new, other = tmp_path / "wp-sandbox-old", tmp_path / "wp-sandbox-new", tmp_path / "other"
    for folder in (old, new, other):
        folder.mkdir()
        (folder / "file").write_text("x")
    for folder in (old, other):
        os.utime(folder, (time.time() - 7200,) * 2)
    run_programs([""], 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "wp-sandbox-new"]


def test_where_no_wall_stands_the_user_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run.check()
    assert not caplog.records
    real = run._run_program
    monkeypatch.setattr(run, "_run_program", lambda *asked, **more: (real(*asked, **more)[0], frozenset({"disk"})))
    run.check()
    assert "from reading and writing the files that you can or the network and your other processes." in caplog.text
