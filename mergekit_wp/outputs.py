"""Where a run writes: never onto what it reads, one run at a time, with what killed runs left there cleared away.

    with claimed(out) as left: ...     the run's own; `left` says what a killed one had left, if anything
    claim(out)                         the same for the rest of a command

`files.atomic_path` makes the file itself, beside its final name. Both names begin with a dot and the output's own name:
`.NAME.lock` is held while a run lives, `.NAME.partial-*` is what it writes until it is whole. Since the lock tells that
nobody else is at work, every partial that is found under it is a dead run's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
from filelock import FileLock, Timeout

from mergekit_wp.errors import BadInput
from mergekit_wp.files import beside, check_writable_parent, open_file
from mergekit_wp.foreign import echo

_LOCK = ".lock"
REPLACED = ".replaced"
"""In the folder that an output is written in: what it took the place of, until that is thrown away."""
_INSIDE_A_MODEL = "wp"  # the folder of a model where what belongs to it may lie, such as its scores


def refuse_inputs(
    out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], *, holds: bool = True, inside: bool = True
) -> None:
    """Refuse an output that is one of the inputs, (`inside`) lies inside one, or (`holds`) has one inside it.

    Whatever the spelling: links are followed, and hard links are the same file. Inputs that are not here (Hub names)
    are passed over, and a model's own `wp/` is a place to write to. Raises `BadInput` naming both.
    """
    target = Path(out)
    real = Path(os.path.realpath(target))
    for source in inputs:
        if not os.path.exists(source):
            continue
        found = Path(os.path.realpath(source))
        if found == real or (os.path.exists(target) and os.path.samefile(target, source)):
            how = "is itself what is read"
        elif inside and os.path.isdir(found) and _lies_inside(real, found):
            how = f"lies inside what is read, {source}"
        elif holds and real in found.parents:
            how = f"holds what is read, {source}"
        else:
            continue
        raise BadInput(f"{out}: this output {how}; name another place to write to.")


def _lies_inside(path: Path, folder: Path) -> bool:
    return folder in path.parents and path.relative_to(folder).parts[0] != _INSIDE_A_MODEL


def check_file(
    out: str | os.PathLike[str], ours: str | None, what: str, inputs: Iterable[str | os.PathLike[str]] = ()
) -> Path:
    """The absolute path of a file that may be written: a new one, or one that an earlier run of the same kind made.

    ours    the metadata key of our safetensors file of this kind, which `what` names in errors; None: any file goes
    inputs  what the run reads; see `refuse_inputs`
    Raises `BadInput` for a folder, a file of another kind, an input, and a place that cannot be written.
    """
    if os.path.isdir(out):
        raise BadInput(f"{out}: this is a folder; name a file, such as {Path(out) / f'{what}.safetensors'}.")
    refuse_inputs(out, inputs, holds=False)
    if ours is not None and os.path.lexists(out):
        _refuse_foreign(out, ours, what)
    return check_writable_parent(out)


def _refuse_foreign(out: str | os.PathLike[str], ours: str, what: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        open_file(out).close()
        with safe_open(out, framework="pt") as file:
            mine = ours in (file.metadata() or {})
    except (OSError, SafetensorError):
        mine = False
    if not mine:
        raise BadInput(f"{out}: there is a file of this name that is no {what} file; move it away, or name another.")


@contextmanager
def claimed(out: str | os.PathLike[str]) -> Iterator[str]:
    """Hold the right to write `out` (a file or a folder) inside the block.

    Yields one line about what dead runs had left of it, which is removed; empty when there was nothing. Raises
    `BadInput` when another run is at work on it, or its folder cannot be written.
    """
    target = check_writable_parent(out)
    with _held(beside(target, _LOCK), out) as lock:
        try:
            yield clear_partials(target)
        finally:
            # While it is held: whoever waits for it sees that this file is gone, and makes another.
            Path(lock.lock_file).unlink(missing_ok=True)


def refuse_busy(out: str | os.PathLike[str]) -> None:
    """As `claimed` where another run is at work, for one that writes nothing (yet). Raises `BadInput`."""
    try:
        lock = beside(Path(out).absolute(), _LOCK)
    except OSError as error:
        raise BadInput(f"{out}: cannot write there ({error.strerror or error}); choose another output.") from error
    if lock.exists():
        with _held(lock, out):
            pass


@contextmanager
def _held(file: Path, out: str | os.PathLike[str]) -> Iterator[FileLock]:
    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise BadInput(f"{out}: another run is writing this; wait for it, stop it, or name another place.") from None
    try:
        yield lock
    finally:
        lock.release()


def claim(out: str | os.PathLike[str]) -> None:
    """As `claimed`, until the click command that calls this has come to its end; says what dead runs had left."""
    if left := click.get_current_context().with_resource(claimed(out)):
        echo(left, err=True)


@contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A folder in the system's temporary folder, gone at the end of the block; those that killed runs left go now.

    A merged LoRA takes as much as its base, so it must not stay there until the machine is started again. Each folder
    holds a lock while its run lives.
    """
    for found in Path(tempfile.gettempdir()).glob(f"{prefix}*/.lock"):
        with suppress(Timeout, OSError), FileLock(found, blocking=False):
            shutil.rmtree(found.parent, ignore_errors=True)
    temporary = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    with temporary as folder, FileLock(Path(folder) / ".lock", blocking=False):
        yield Path(folder)


def clear_partials(target: Path) -> str:
    """Remove every `.NAME.partial-*` beside `target`; one line about them, empty when there were none. What a run had
    moved out of the way of its result, which it then did not put there, is put back."""
    found = sorted(target.parent.glob(f".{_escaped(target.name)}.partial-*"))
    for path in found:
        put_back(path, target)
    size = sum(_size(path) for path in found)
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if not found:
        return ""
    return f"Removed what a killed run had left of {target.name}: {size / 1e6:,.1f} MB."


def put_back(work: Path, target: Path) -> None:
    """Move what was taken from `target` into a folder of work back there, if nothing has come into its place."""
    if os.path.lexists(work / REPLACED) and not os.path.lexists(target):
        os.replace(work / REPLACED, target)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    total = 0
    for each in [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]:
        with suppress(OSError):
            total += each.lstat().st_size
    return total
