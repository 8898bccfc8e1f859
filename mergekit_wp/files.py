"""Files that appear whole or not at all, files that are read whole, and the YAML that ships with the package.

Outputs are written beside their final name and renamed at the end, so a killed run never leaves a half file
under a name that a later stage would trust.

Our own files of tensors have in common a JSON document under a metadata key, in one safetensors file
(`write_tensors`, `read_tensors`).

Every command imports this file before it knows whether help alone is asked for, so torch is imported inside.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_wp.documents import MOST_JSON_BYTES, MOST_YAML_BYTES, parse_json, parse_yaml, parse_yaml_documents
from mergekit_wp.errors import BadInput

if TYPE_CHECKING:
    import torch

_PACKAGE = Path(__file__).resolve().parent


def check_writable_parent(path: str | os.PathLike[str]) -> Path:
    """The absolute path, after making its parent folder and proving that a file can be made there.

    Raises `BadInput` when the folder cannot be made or written, so that a long job stops before it starts.
    """
    target = Path(path).absolute()
    try:
        beside(target, f".partial-{os.getpid()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):  # without a name, so that a kill cannot leave it
            pass
    except OSError as error:
        raise BadInput(f"{target}: cannot write there ({error.strerror or error}); choose another output.") from error
    return target


def beside(target: Path, ending: str) -> Path:
    """`.NAME.ending` beside an output. Raises OSError where such a name cannot be: it is too long, or `/` has none."""
    if not target.name:
        raise OSError(errno.EINVAL, "it has no folder around it", str(target))
    hidden = target.with_name(f".{target.name}{ending}")
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(hidden)
    return hidden


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """The nearest folder above `path` that is there, with the permission to write in it; nothing is made to prove it.

    Raises `BadInput` where there is none.
    """
    anchor = Path(path).absolute()
    while not os.path.exists(anchor):
        anchor = anchor.parent
    why = "" if anchor.is_dir() else f"{anchor} is a file"
    if not why and not os.access(anchor, os.W_OK | os.X_OK):
        why = f"no permission to write in {anchor}"
    if why:
        raise BadInput(f"{path}: cannot write there ({why}); choose another output folder.")
    return anchor


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any error.

    Raises `BadInput` when the folder cannot be written, or its disk is full.
    """
    target = check_writable_parent(path)
    partial = beside(target, f".partial-{os.getpid()}")
    with explained(target):
        try:
            yield partial
            if partial.is_file():
                partial.chmod(_usual_mode(partial))  # some writers make private files
            os.replace(partial, target)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)


def disk_trouble(error: BaseException) -> str | None:
    """In words, if it is that no more can be written: a full disk, a quota, a limit on a file's size. Else None.

    Looks through what the error came from, and into safetensors' own, which quotes the system's number.
    """
    full = {getattr(errno, name, None) for name in ("ENOSPC", "EFBIG", "EDQUOT")}  # Windows has no quota
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        if number is None and (quoted := re.search(r"\(os error (\d+)\)", str(seen))):
            number = int(quoted[1])
        if number is not None and number in full:
            return os.strerror(number)
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Inside the block, writing onto a full disk is a `BadInput` that names `target`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BadInput) or (trouble := disk_trouble(error)) is None:
            raise
        raise BadInput(f"{target}: cannot be written ({trouble}); free some room, or write to another disk.") from error


def _usual_mode(beside: Path) -> int:
    """The permissions that the user's umask gives to a new file there.

    Read off one: the umask can only be asked for by setting it, and files of other threads would be made without it.
    """
    probe = beside.with_name(f"{beside.name}-mode-{threading.get_ident()}")
    try:
        with open(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb") as stream:
            return stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
    finally:
        probe.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_yaml_mapping(path: str | os.PathLike[str], what: str, text: str | None = None) -> dict[str, Any]:
    """A YAML file that must hold a mapping; `what` names it in errors ("scoring job", "suite").

    text: what the file will hold, where it is still to be written.
    Raises `BadInput` when the file is missing, is not YAML (see `documents` for what is taken), or is not a mapping.
    """
    return _mapping(path, what, "YAML", "mapping of fields", parse_yaml, MOST_YAML_BYTES, text)


def read_yaml_documents(path: str | os.PathLike[str], what: str) -> list[dict[str, Any]]:
    """The mappings of a YAML file of several documents; otherwise as `read_yaml_mapping`."""
    content = _content(path, what, "YAML", parse_yaml_documents, MOST_YAML_BYTES, None)
    for each in content:
        _check_mapping(each, path, what, "YAML", "mapping of fields")
    return list(content)


def read_json_mapping(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """A JSON file that must hold an object; otherwise as `read_yaml_mapping`."""
    return _mapping(path, what, "JSON", "object", parse_json, MOST_JSON_BYTES)


def _mapping(
    path: str | os.PathLike[str],
    what: str,
    language: str,
    kind: str,
    parse: Callable[[str], Any],
    most: int,
    text: str | None = None,
) -> dict[str, Any]:
    content = _content(path, what, language, parse, most, text)
    _check_mapping(content, path, what, language, kind)
    mapping: dict[str, Any] = content
    return mapping


def _content(
    path: str | os.PathLike[str], what: str, language: str, parse: Callable[[str], Any], most: int, text: str | None
) -> Any:
    try:
        return parse(read_text(path, most) if text is None else text)
    except OSError as error:
        raise BadInput(f"{path}: cannot read this {what} ({error.strerror or error}).") from error
    except ValueError as error:
        raise BadInput(f"{path}: this {what} is not valid {language}: {error}.") from error


def _check_mapping(content: Any, path: str | os.PathLike[str], what: str, language: str, kind: str) -> None:
    if not isinstance(content, dict):
        raise BadInput(f"{path}: not a {what}, which is a {language} {kind}; found {type(content).__name__}.")


def open_file(path: str | os.PathLike[str]) -> BufferedReader:
    """A file, open to be read. Raises OSError, also for what is none: a pipe may stay silent, /dev/zero never ends.

    Everything that may come from elsewhere is opened by this, or seen to be a file before another library opens it.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder, the system says it better
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, where a file is wanted", str(path))
    return open(path, "rb")


def check_files(folder: Path, what: str, below: bool = False) -> None:
    """Raise `BadInput` for what is neither file nor folder in a folder (`below`: or deeper) that other libraries read.

    what: names the folder in the sentence. Links that lead nowhere are left to whoever needs them.
    """

    def refuse(error: OSError) -> None:
        raise BadInput(f"{error.filename}: cannot read this folder ({error.strerror or error}).") from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        for path in sorted(os.path.join(place, name) for name in names):
            if os.path.exists(path) and not os.path.isfile(path):
                raise BadInput(f"{path}: a pipe, a socket or a device in {what}; take it away.")
        if not below:
            folders.clear()


def expand_home(record: object, *fields: str) -> None:
    """In these fields of a dataclass, a path that begins with `~` becomes one in the home directory, as in a shell."""
    for name in fields:
        if isinstance(value := getattr(record, name), str):
            object.__setattr__(record, name, os.path.expanduser(value))


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """A UTF-8 text of at most `most` bytes. Raises OSError, or ValueError with a clause for what it holds."""
    with open_file(path) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text ({error.reason})") from error


def inside(folder: Path, file: Path) -> Path:
    """`file`, once it is known to lie in the folder. Raises `BadInput` when it is a link to somewhere else.

    A snapshot in the Hub's cache is links into the `blobs` beside it: .../models--USER--NAME/{snapshots/COMMIT,blobs}.
    """
    home, real = folder.resolve(), file.resolve()
    if home in real.parents or (home.parent.name == "snapshots" and home.parent.parent / "blobs" == real.parent):
        return file
    raise BadInput(
        f"{file}: a link to {real}, outside of its folder; put the file itself there, or name its own folder."
    )


Stamp = tuple[str, int, int]
"""A path with what tells a rewritten file apart: nanoseconds of modification, bytes."""


def stamp(path: str, what: str, remedy: str) -> Stamp:
    """The key of a file for a cache. Raises `BadInput` ("cannot read this `what` ...; `remedy`.") if there is none."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise BadInput(
            f"{path}: cannot read this {what} ({error.strerror or error}; relative paths start at {os.getcwd()}); "
            f"{remedy}."
        ) from error
    return path, found.st_mtime_ns, found.st_size


def shipped(name: str) -> Path:
    """A YAML that travels with the project, such as `eval/paper.yaml`, in a checkout or in the wheel."""
    for root in (_PACKAGE / "shipped", _PACKAGE.parent):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(name)


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], key: str, document: str) -> None:
    """Write the file atomically. Raises `BadInput` when the folder cannot be written."""
    from safetensors.torch import save_file

    with atomic_path(path) as partial:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial, metadata={key: document})


def read_tensors(path: str | Path, key: str, what: str, maker: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The document and the tensors. `what` names the kind of file in errors, `maker` the command that writes it.

    Raises `BadInput` when the file is missing, is not safetensors, or has no document under the key.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_file(path).close()
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(key)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BadInput(f"{path}: no such {what} file; make it with {maker}.") from None
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be read as a safetensors {what} file ({error}).") from error
    if text is None:
        raise BadInput(f"{path}: a safetensors file, but without the `{key}` metadata of a {what} file.")
    return text, tensors
