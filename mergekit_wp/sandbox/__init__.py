"""Run model-written Python where it can do no harm: one short-lived, limited process for each piece of code.

Each runs in a fresh, isolated interpreter (`python -I -B`) with none of the caller's memory, open files or
environment, in a temporary folder of its own, in its own session, which is killed as a group.

everywhere      rlimits and the parent's clock: CPU and wall time, memory, size of a file, open files, new processes;
                the parent looks every 50 ms whether it leaves more than 16 MiB or 1,000 files in its folder
Linux >= 5.13   Landlock: it writes in its folder alone, and reads that, Python, /usr, /lib, /lib64, /opt and /nix
Linux, x86-64   seccomp, a list of the allowed calls: no socket, signal, tracing, new process; no limit, priority or
and ARM64       processor of another process; no mode, time or attribute of a file; nothing that outlives the process
where allowed   a tmpfs of 16 MiB and 1,000 files over its folder, which goes with the process
as root         it becomes nobody, without capabilities

Where neither seccomp nor Landlock may be used (macOS, other processors, old kernels), the functions of `os`,
`socket` and `subprocess` that kill, start or connect are taken away instead, as code_eval of `evaluate` does; a
program that looks for them elsewhere finds them, and it may write and delete as the user may. `check` says so
before anything runs.
Not defended at all: a program that searches its own process for the pipe to the parent can report what it likes. No
model writes that by accident, and what it gains is one point. This is not a virtual machine: for code by an
adversary, use one. docs/security.md has what is tested, and how.
"""

from mergekit_wp.sandbox.run import Verdict, call_function, check, run_programs

__all__ = ["Verdict", "call_function", "check", "run_programs"]
