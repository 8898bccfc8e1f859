"""A step: a command, what it reads, what it writes, and whether that is still right.

A step is done when a stamp of its last run says that its command and its inputs had the content that they have now,
and that its outputs are what it wrote. A fresh clone or a touched file redoes nothing; an edited recipe or score
file redoes what depends on it. Whether a change of this package's own code does is the caller's choice: the demo
follows it line by line, while a user who updates the package does not want to score 13B models again.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import mergekit_wp
from mergekit_wp.documents import MOST_JSON_BYTES, parse_json
from mergekit_wp.errors import OneSentence
from mergekit_wp.files import read_text, write_text
from mergekit_wp.hashing import Digests, digest_of

_PACKAGE = Path(mergekit_wp.__file__).parent
# Words that decide whether there is an outcome, and not which: consent, and leave to replace what is there.
_LEAVE = ("--allow-code-execution", "--overwrite")
_DIES_WITH_PARENT = 1  # Linux: PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Step:
    """One command. `stage` is what --until and --redo name; `code` the parts of the package that it depends on."""

    name: str
    stage: str
    title: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    code: tuple[str, ...]

    def text(self) -> str:
        """The command as a person types it."""
        return shlex.join(self.command)

    def identity(self) -> str:
        """The command as far as it decides the outcome."""
        return shlex.join(word for word in self.command if word not in _LEAVE)


class StepFailed(OneSentence):
    """A command failed; its exit code is ours."""

    def __init__(self, step: Step, what: str, exit_code: int) -> None:
        super().__init__(
            f"the step `{step.title}` failed ({what}); its own message is above. Once that is mended, run the same "
            "command again: finished steps are skipped."
        )
        self.exit_code = exit_code  # type: ignore[misc]  # click has it on the class


@dataclass(frozen=True)
class Stamps:
    """The folder in which finished steps leave their stamps."""

    folder: Path
    digests: Digests
    code_counts: bool = False
    texts: Mapping[Path, str] = field(default_factory=dict)

    @classmethod
    def below(cls, folder: Path, code_counts: bool = False) -> Stamps:
        return cls(folder, Digests(folder / "digests.json"), code_counts)

    @classmethod
    def only_read(cls, folder: Path, texts: Mapping[Path, str]) -> Stamps:
        """To ask what is done without writing anything; `texts` are files as they would be written before a run."""
        return cls(folder, Digests(folder / "digests.json", keep=False), texts=texts)

    def to_run(self) -> Stamps:
        """The same for a run, whose files are written: what was read already is not read again."""
        self.digests.keep()
        return replace(self, texts={})

    def why_not_done(self, step: Step) -> str | None:
        """What makes the step due, for a person; None when it is done."""
        try:
            stamp = parse_json(read_text(self.folder / f"{step.name}.json", MOST_JSON_BYTES))
            before, written = dict(stamp["inputs"]), dict(stamp["outputs"])
        except (OSError, ValueError, KeyError, TypeError):
            return "not run yet"
        if missing := [path for path in step.outputs if not os.path.exists(path)]:
            return f"{missing[0]} is missing"
        if stamp.get("command") != step.identity():
            return "its command is another one"
        if changed := _differing(before, self._digests(step.inputs)):
            return f"{changed} has changed"
        if changed := _differing(written, self._digests(step.outputs)):
            return f"{changed} is not what this step wrote"
        if self.code_counts and stamp.get("code") != code_digest(step.code):
            return "the code behind it has changed"
        return None

    def run(self, step: Step, quiet: bool = False) -> None:
        """Run the step's command, with --quiet if so, and stamp it.

        What an earlier run left is the command's to replace, once it has something better to put there.
        Raises `StepFailed` when it fails or leaves no output, `KeyboardInterrupt` when it was interrupted.
        """
        inputs = self._digests(step.inputs)  # before the run: what changes while it runs makes it stale
        code = _run([*program(step.command[0]), *step.command[1:], *(["--quiet"] if quiet else [])])
        missing = [str(path) for path in step.outputs if not os.path.exists(path)]
        if code or missing:
            raise StepFailed(step, f"exit code {code}" if code else f"{', '.join(missing)} missing", max(code, 1))
        stamp = {"command": step.identity(), "inputs": inputs, "outputs": self._digests(step.outputs)}
        write_text(
            self.folder / f"{step.name}.json", json.dumps({**stamp, "code": code_digest(step.code)}, indent=2) + "\n"
        )

    def _digests(self, paths: Iterable[Path]) -> dict[str, str]:
        return {str(path): self._digest(path) for path in paths}

    def _digest(self, path: Path) -> str:
        return sha256(self.texts[path].encode()).hexdigest() if path in self.texts else self.digests.of(path)


def code_digest(parts: Iterable[str]) -> str:
    """SHA-256 of this package's shared modules and of the source of some parts, a checkout's experiments too."""
    folders = [_PACKAGE / "checkpoint"]
    folders += [
        path if (path := _PACKAGE / name).is_dir() else _PACKAGE.parent / "experiments" / name for name in parts
    ]
    files = [*_PACKAGE.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    return digest_of(f"{file.relative_to(_PACKAGE.parent)}={Digests().of(file)}" for file in sorted(files))


def program(name: str) -> list[str]:
    """How to start a command of this very installation, whatever PATH says."""
    if name == "python":
        return [sys.executable]
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise OneSentence(f"there is no `{name}` beside {sys.executable}; install mergekit-wp there.")
    return [found]


def _differing(before: dict[str, str], now: dict[str, str]) -> str | None:
    """The first path whose digest is not the one before."""
    return next((path for path in {**before, **now} if before.get(path) != now.get(path)), None)


def _run(command: list[str]) -> int:
    """The exit code of a command that ends when we do, however we end."""
    process = subprocess.Popen(command, preexec_fn=die_with(os.getpid()))
    try:
        return process.wait()
    except BaseException:
        process.terminate()  # it got a Ctrl-C of its own; this is for every other reason
        process.wait()
        raise


def die_with(parent: int) -> Callable[[], None] | None:
    """For a new process to call: be told to end when the parent has ended, even by SIGKILL. None where there is no such
    thing, which is everywhere but on Linux (and `Popen` takes no `preexec_fn` on Windows)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_DIES_WITH_PARENT, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before we could ask
            os._exit(1)

    return ask
