"""Run model-written Python where it can do no harm: one short-lived, limited process for each piece of code.

Each runs in a fresh, isolated interpreter (`python -I -B`) with none of the caller's memory, open files or
environment, in a temporary folder of its own, in its own session, which is killed as a group.

| what | everywhere | Linux | as root |
|---|---|---|---|
| CPU time, wall time, memory, file size, open files, new processes | rlimits and the parent's clock | | |
| writing outside its folder, reading what is not Python's | | Landlock (5.13 and later) | |
| network, signals to other processes, tracing them | | seccomp (x86-64, ARM64), Landlock | |
| the user's own rights | | | becomes nobody, without capabilities |

Where neither seccomp nor Landlock may be used (macOS, other processors, old kernels), the functions of `os`,
`socket` and `subprocess` that kill, start or connect are taken away instead, as code_eval of `evaluate` does; a
program that looks for them elsewhere finds them, and it may write and delete as the user may.
Not defended at all: the disk fills for as long as a program may run, at 64 KiB a file; a program that searches
its own process for the pipe to the parent can report what it likes. No model writes that by accident, and what
it gains is one point. This is not a virtual machine: for code by an adversary, use one.
"""

from mergekit_wp.sandbox.run import Verdict, call_function, check, run_programs

__all__ = ["Verdict", "call_function", "check", "run_programs"]
