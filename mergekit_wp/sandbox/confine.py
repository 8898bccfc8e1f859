"""What a process gives up before it runs model-written code; standard library only. See the package's table.

Sources: landlock(7), seccomp(2), capabilities(7), and the kernel's headers linux/landlock.h, linux/seccomp.h and
linux/audit.h, whose numbers these are.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

try:
    import resource
except ImportError:  # Windows: only the parent's time limit holds there.
    resource = None  # type: ignore[assignment]

NOBODY = 65534
_PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 8, 22, 38
_CAP_DAC_READ_SEARCH = 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every processor
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
# By version of Landlock: how many rights on files it knows, and how many bytes its rule set has.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_RULESET_BYTES = {1: 8, 2: 8, 3: 8, 4: 16, 5: 16}
# AUDIT_ARCH, then socket, connect, kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal,
# ptrace, process_vm_writev, unshare, setns, io_uring_setup (which can open sockets).
_CALLS = {
    "x86_64": (0xC000003E, (41, 42, 62, 200, 234, 129, 297, 424, 101, 311, 272, 308, 425)),
    "aarch64": (0xC00000B7, (198, 203, 129, 130, 131, 138, 240, 424, 117, 271, 97, 268, 425)),
}
_X32 = 0x40000000  # on x86-64, the same calls by other numbers


def confine(limits: dict[str, int], folder: str) -> None:
    """Give up everything that `limits` (fields of `run.Limits`) and the platform allow to give up, for good.

    Raises `PermissionError` when the process must become nobody, who may not read this Python, and Landlock,
    which would let it read nothing else, is not there.
    """
    libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    walled = False
    if libc is not None:
        _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
        walled = _landlock(libc, folder)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        _become_nobody(libc, may_read=bool(limits["open_files"]), walled=walled)
    if libc is None or not _filter_calls(libc):
        _take_away()
    if resource is not None:
        _limit(limits)  # last: with no open file allowed, nothing can be imported


def _limit(limits: dict[str, int]) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + limits["seconds"]
    for name, soft, hard in (
        ("RLIMIT_CPU", seconds, seconds + 1),
        ("RLIMIT_AS", limits["memory_bytes"], limits["memory_bytes"]),
        ("RLIMIT_FSIZE", limits["file_bytes"], limits["file_bytes"]),
        ("RLIMIT_CORE", 0, 0),
        ("RLIMIT_NPROC", 0, 0),
        # At 0 no file, socket or pipe can be opened from here on.
        ("RLIMIT_NOFILE", limits["open_files"], limits["open_files"]),
    ):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (soft, hard))


def _become_nobody(libc: Any, may_read: bool, walled: bool) -> None:
    """Root is not bound by RLIMIT_NPROC, may read every file and signal every process.

    A Python in root's home cannot be read by nobody: behind Landlock, which lets only that Python be read, the
    process keeps the right to read.
    """
    if libc is not None:
        _prctl(libc, _PR_SET_KEEPCAPS, 1)
    try:
        os.setgid(NOBODY)
        os.setgroups([])
        os.setuid(NOBODY)
    except OSError as error:
        # In a namespace of one user there is no nobody, and root is an ordinary user outside it.
        if error.errno != errno.EINVAL:
            raise
    keep = 0
    if may_read and not all(os.access(path, os.R_OK | os.X_OK) for path in (os.path.dirname(os.__file__), sys.prefix)):
        if not walled:
            raise PermissionError(f"{sys.prefix}: only root may read this Python")
        keep = 1 << _CAP_DAC_READ_SEARCH
    if libc is not None:
        header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        if libc.capset(header, struct.pack("6I", keep, keep, 0, 0, 0, 0)) != 0:
            raise PermissionError("cannot give up root's capabilities")


def _landlock(libc: Any, folder: str) -> bool:
    """Write nowhere but in `folder`, read nothing but that, Python and the system's libraries; no TCP either."""
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return False
    rights = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    attributes = struct.pack("QQQ", rights, 3, 3)  # files; bind and connect TCP; abstract sockets and signals
    size = _RULESET_BYTES.get(version, 24)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint(0))
    if ruleset < 0:
        return False
    try:
        for path, allowed in _allowed(folder, rights):
            with contextlib.suppress(OSError):
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
                rule = struct.pack("=Qi", allowed, place)
                libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, ctypes.c_uint(0))
                os.close(place)
        return libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint(0)) == 0
    finally:
        os.close(ruleset)


def _allowed(folder: str, rights: int) -> Iterator[tuple[str, int]]:
    yield folder, rights
    yield os.devnull, _READ_FILE | _WRITE_FILE
    for path in {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/opt", "/nix"}:
        yield path, _EXECUTE | _READ_FILE | _READ_DIR
    for path in ("/etc/ld.so.cache", "/dev/urandom"):
        yield path, _READ_FILE


def _filter_calls(libc: Any) -> bool:
    """Let the kernel refuse (EPERM) sockets, signals, tracing and new namespaces; whether it does."""
    if (known := _CALLS.get(os.uname().machine)) is None or sys.maxsize < 2**32:
        return False
    architecture, refused = known
    jump_equal, jump_from, load, leave = 0x15, 0x35, 0x20, 0x06
    count = len(refused)
    # Offsets in `struct seccomp_data`: the number of the call at 0, the architecture at 4. Jumps count
    # instructions to skip; the last two are "allow" and "refuse".
    steps = [(load, 0, 0, 4), (jump_equal, 0, count + 3, architecture), (load, 0, 0, 0)]
    steps += [(jump_from, count + 1, 0, _X32)]
    steps += [(jump_equal, count - number, 0, call) for number, call in enumerate(refused)]
    steps += [(leave, 0, 0, 0x7FFF0000), (leave, 0, 0, 0x00050000 | errno.EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    return _prctl(libc, _PR_SET_SECCOMP, 2, program)


def _prctl(libc: Any, option: int, first: int, second: bytes | None = None) -> bool:
    """All arguments are of a pointer's width: the kernel refuses some options if an unused one is not 0."""
    pointer = ctypes.c_char_p(second) if second else ctypes.c_ulong(0)
    return libc.prctl(option, ctypes.c_ulong(first), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)) == 0


def _take_away() -> None:
    """Where the kernel refuses nothing: at least no accident. The names are those code_eval takes away."""
    import socket
    import subprocess

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("not allowed in the sandbox")

    for name in ("kill", "killpg", "system", "fork", "forkpty", "remove", "unlink", "rmdir", "removedirs", "rename",
                 "renames", "replace", "truncate", "chmod", "chown", "link", "symlink", "execv", "execve",
                 "posix_spawn"):  # fmt: skip
        if hasattr(os, name):
            setattr(os, name, refused)
    taken: Callable[..., None] = refused
    socket.socket = taken  # type: ignore[misc,assignment]
    subprocess.Popen = taken  # type: ignore[misc,assignment]
