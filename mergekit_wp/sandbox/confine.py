"""What a process gives up before it runs model-written code; standard library only. See the package's table.

In this order, each where the system has it:

1. a disk of its own: a tmpfs of fixed size over its folder, in a mount namespace that dies with the process
2. Landlock: write there and nowhere else, read Python and the system's libraries and nothing else
3. root becomes nobody; every capability goes
4. seccomp: the calls that `_CALLS` lists, and no other
5. rlimits

Sources: landlock(7), seccomp(2), user_namespaces(7), capabilities(7), and the kernel's headers linux/landlock.h,
linux/seccomp.h, linux/audit.h and asm/unistd.h, whose numbers these are. The filter is written here because libseccomp
is a system library that not every machine has, and its bindings for Python come with it or are no longer kept; a test
holds `_CALLS` against libseccomp where there is one. Packages that do all of this ask for Linux 6.7, and machines with
GPUs often run 5.15.
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
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
_NO_SUID_NO_DEVICES, _PRIVATE_EVERYWHERE = 2 | 4, 0x4000 | 1 << 18  # MS_NOSUID|MS_NODEV, MS_REC|MS_PRIVATE
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every processor
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
# By version of Landlock: how many rights on files it knows, and how many bytes its rule set has.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_RULESET_BYTES = {1: 8, 2: 8, 3: 8, 4: 16, 5: 16}

# The calls that a Python program on files of its own needs, each with its number on x86-64 and on ARM64. What is not
# here is refused: processes and threads, signals, sockets, tracing, other processes' limits, priority and processors,
# modes, times and attributes of files (which Landlock does not know), truncating by path (which old ones do not),
# shared memory, queues and keys that outlive their program, links, mounts, namespaces, io_uring, bpf, perf.
_CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
preadv2 327 286, pwritev2 328 287, lseek 8 62, open 2 -, openat 257 56, close 3 57, close_range 436 436, stat 4 -,
fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439,
readlink 89 -, readlinkat 267 78, getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50,
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276,
ftruncate 77 46, fsync 74 82, fdatasync 75 83, fallocate 285 47, fadvise64 221 223, statfs 137 43, fstatfs 138 44,
umask 95 166, sendfile 40 71, copy_file_range 326 285, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59,
flock 73 32,
mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, msync 26 227, brk 12 214, membarrier 324 283,
exit 60 93, exit_group 231 94, restart_syscall 219 128, wait4 61 260, waitid 247 95, getpid 39 172, gettid 186 178,
getppid 110 173, getpgrp 111 -, getpgid 121 155, getsid 124 156, getuid 102 174, geteuid 107 175, getgid 104 176,
getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158, getpriority 140 141, uname 63 160,
sysinfo 99 179, getrusage 98 165, times 100 153, getcpu 309 168, getrlimit 97 163, sched_yield 24 124,
sched_getaffinity 204 123, sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125,
sched_get_priority_min 147 126,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -, alarm 37 -, setitimer 38 103, getitimer 36 102,
futex 202 98, set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96, rseq 334 293, arch_prctl 158 -,
getrandom 318 278,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169, time 201 -,
select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, eventfd 284 -, eventfd2 290 19, timerfd_create 283 85,
timerfd_settime 286 86, timerfd_gettime 287 87,
sendto 44 206, recvfrom 45 207, shutdown 48 210, getsockname 51 204, getpeername 52 205, getsockopt 55 209
"""
# Calls allowed for some values of one argument alone: (name and numbers, argument, mask, values).
_SOME_CALLS = (
    # Not F_SETOWN, F_SETSIG and their kin, which make the kernel send a signal to any process of this user.
    ("fcntl 72 25", 1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),
    # Whether it is a terminal, how much can be read, close on exec: what `open` and `isatty` ask.
    ("ioctl 16 29", 1, 0xFFFFFFFF, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    ("prlimit64 302 261", 0, 0xFFFFFFFF, (0,)),  # of itself alone
    # A connected pair of streams, which asyncio wakes itself with; a datagram could be sent to any address.
    ("socketpair 53 199", 1, 0xF, (1,)),
)
_ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}  # AUDIT_ARCH, and the column in the tables


def confine(limits: dict[str, int], folder: str) -> list[str]:
    """Give up everything that `limits` (fields of `run.Limits`) and the platform allow to give up, for good.

    Returns which walls stand: disk, landlock, seccomp. Raises `PermissionError` when the process must become nobody,
    who may not read this Python, and Landlock, which would let it read nothing else, is not there.
    """
    libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    walls = []
    if libc is not None:
        _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
        if _disk(libc, folder, limits["disk_bytes"], limits["disk_files"]):
            walls.append("disk")
        if _landlock(libc, folder):
            walls.append("landlock")
    keep = 0
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        keep = _become_nobody(libc, may_read=bool(limits["open_files"]), walled="landlock" in walls)
    if libc is not None:
        header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        if libc.capset(header, struct.pack("6I", keep, keep, 0, 0, 0, 0)) != 0:
            raise PermissionError("cannot give up root's capabilities")
    if libc is not None and _filter_calls(libc):
        walls.append("seccomp")
    else:
        _take_away()
    if resource is not None:
        _limit(limits)  # last: with no open file allowed, nothing can be imported
    return walls


def _disk(libc: Any, folder: str, size: int, files: int) -> bool:
    """Put a tmpfs of `size` bytes and `files` inodes over the folder, where nobody else sees it; whether it is there.

    Root needs a mount namespace for that, others a user namespace too, which some systems refuse (Docker by its own
    filter, Ubuntu by AppArmor); then the parent watches the folder.
    """
    user, group, owner = os.geteuid(), os.getegid(), NOBODY
    if user == 0:
        # Not in a user namespace, where root cannot become nobody.
        if libc.unshare(_NEW_MOUNTS) != 0:
            return False
    else:
        if libc.unshare(_NEW_USER | _NEW_MOUNTS) != 0:
            return False
        owner = user
        for file, text in (("uid_map", f"{user} {user} 1"), ("setgroups", "deny"), ("gid_map", f"{group} {group} 1")):
            with contextlib.suppress(OSError), open(f"/proc/self/{file}", "w") as stream:
                stream.write(text)
    if libc.mount(None, b"/", None, ctypes.c_ulong(_PRIVATE_EVERYWHERE), None) != 0:
        return False
    options = f"size={size},nr_inodes={files},mode=700,uid={owner}".encode()
    flags = ctypes.c_ulong(_NO_SUID_NO_DEVICES)
    if libc.mount(b"wp-sandbox", os.fsencode(folder), b"tmpfs", flags, options) != 0:
        return False
    os.chdir(folder)
    return True


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


def _become_nobody(libc: Any, may_read: bool, walled: bool) -> int:
    """Root is not bound by RLIMIT_NPROC, may read every file and signal every process. Returns capabilities to keep.

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
    if may_read and not all(os.access(path, os.R_OK | os.X_OK) for path in (os.path.dirname(os.__file__), sys.prefix)):
        if not walled:
            raise PermissionError(f"{sys.prefix}: only root may read this Python")
        return 1 << _CAP_DAC_READ_SEARCH
    return 0


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


def allowed_calls(column: int) -> dict[str, int]:
    """Name and number of every call that is allowed whatever its arguments; column 1 is x86-64, 2 ARM64."""
    rows = (entry.split() for entry in _CALLS.replace("\n", " ").split(","))
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def _filter_calls(libc: Any) -> bool:
    """Let the kernel refuse every call that is not in the tables; whether it does."""
    if (known := _ARCHITECTURES.get(os.uname().machine)) is None or sys.maxsize < 2**32:
        return False
    code = filter_program(*known)
    buffer = ctypes.create_string_buffer(code)
    return _prctl(libc, _PR_SET_SECCOMP, 2, struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))


def filter_program(architecture: int, column: int) -> bytes:
    """The tables as a BPF program, 8 bytes an instruction.

    Refused calls fail with EPERM; those with numbers above all in the table, which are younger than it, with ENOSYS, at
    which the C library takes the older way (and with them x32's, whose numbers begin at 2^30).
    """
    load, mask, equal, above, leave = 0x20, 0x54, 0x15, 0x25, 0x06
    refuse, unknown, allow = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x7FFF0000
    calls = sorted(allowed_calls(column).values())
    # (code, where to jump if true, if false, operand); None is the next instruction. Offsets of `struct seccomp_data`:
    # the number of the call at 0, the architecture at 4, the arguments from 16, of which the lower halves count.
    steps: list[tuple[int, str | None, str | None, int]] = [
        (load, None, None, 4),
        (equal, None, "refuse", architecture),
        (load, None, None, 0),
        (above, "unknown", None, calls[-1]),
        *((equal, "allow", None, number) for number in calls),
    ]
    for numbers, argument, bits, values in _SOME_CALLS:
        skip = f"after {numbers}"
        steps += [(equal, None, skip, int(numbers.split()[column]))]
        steps += [(load, None, None, 16 + 8 * argument), (mask, None, None, bits)]
        steps += [(equal, "allow", None, value) for value in values]
        # Jumps are taken by comparisons alone: one that is true either way.
        steps += [(equal, "refuse", "refuse", 0), (0, skip, None, 0)]
    steps += [
        (0, "refuse", None, 0),
        (leave, None, None, refuse),
        (0, "unknown", None, 0),
        (leave, None, None, unknown),
    ]
    steps += [(0, "allow", None, 0), (leave, None, None, allow)]
    return _assembled(steps)


def _assembled(steps: list[tuple[int, str | None, str | None, int]]) -> bytes:
    """Instructions with their jumps counted; a step of code 0 only names the place of the one after it."""
    places: dict[str, int] = {}
    kept: list[tuple[int, str | None, str | None, int]] = []
    for step in steps:
        if step[0] == 0 and step[1] is not None:
            places[step[1]] = len(kept)
        else:
            kept.append(step)
    code = b""
    for here, (operation, if_true, if_false, operand) in enumerate(kept):
        jumps = [places[name] - here - 1 if name else 0 for name in (if_true, if_false)]
        code += struct.pack("HBBI", operation, *jumps, operand)
    return code


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
