"""Upload a list of files as one commit of a model repository, so that a half-sent model never looks finished.

Large objects go first, one after the other, in the way that the Hub asks for (xet, or LFS): an object that has
arrived stays there, so a push that is run again sends the rest. Then one commit names them all, with the small files
and the card. (`upload_folder` of huggingface_hub 2 would make several commits, weights without an index among them.)
The commit states the state that it was compared with; when something else was committed meanwhile, or its answer was
lost, the repository is looked at again. At the end the Hub's list of files must be ours.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_wp.checkpoint.hub import CHAT_TEMPLATES
from mergekit_wp.errors import BadInput
from mergekit_wp.push.gate import is_model_file
from mergekit_wp.push.retry import WAITS, first, passing, retry, status_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

# Smaller files need no line of progress and no request of their own.
_LARGE = 10_000_000
_OURS = ("wp/", "licences/", f"{CHAT_TEMPLATES}/")
_PICKLED = (".bin", ".bin.index.json")


@dataclass(frozen=True)
class UploadFile:
    """One file of the repository: its path there, where it lies now, its size in bytes and hex SHA-256."""

    path: str
    source: Path
    size: int
    sha256: str


def check_login(api: HfApi) -> str:
    """Who is logged in; the name of the account. Raises `BadInput` for a token that can only read."""
    account = retry(lambda: api.whoami())
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise BadInput(
            f"the token of {account.get('name')} can only read; make one with write permission on "
            "https://huggingface.co/settings/tokens and give it to `hf auth login`."
        )
    return str(account.get("name"))


def check_card(text: str) -> None:
    """Have the Hub look at the card's metadata, before anything large is sent. Raises `BadInput`."""
    from huggingface_hub import ModelCard

    try:
        retry(lambda: ModelCard(text).validate())
    except ValueError as error:
        raise BadInput(f"README.md: the Hub does not take the metadata of this card: {error}") from error


def upload(api: HfApi, repo_id: str, items: Sequence[UploadFile], *, private: bool, say: Callable[[str], None]) -> str:
    """Make the repository hold exactly these model files; the address of the commit, or of the one that had them.

    Raises what huggingface_hub raises (see `retry.explain`), and `BadInput` for what the person can mend.
    """
    _open_repository(api, repo_id, private, say)
    additions: dict[str, CommitOperationAdd] = {}
    for wait in (*WAITS, None):
        head, remote = _state(api, repo_id)
        missing = [item for item in items if not _is_there(item, remote.get(item.path))]
        if obsolete := _obsolete(items, remote):
            say(f"no longer part of the model, and taken out of the repository: {', '.join(obsolete)}")
        if not missing and not obsolete:
            return f"{api.endpoint}/{repo_id}/commit/{head}"
        _send_large(api, repo_id, missing, additions, say)
        try:
            commit = _commit(api, repo_id, head, [additions[item.path] for item in missing], obsolete)
        except Exception as error:
            # 412: somebody committed since `head` was read. A lost answer: the commit may be there.
            if wait is None or not (passing(error) or status_of(error) == 412):
                raise
            say("the commit did not go through; looking at the repository again ...")
            time.sleep(wait)
            continue
        _verify(api, repo_id, commit.oid, items)
        return str(commit.commit_url)
    raise AssertionError("unreachable")


def _open_repository(api: HfApi, repo_id: str, private: bool, say: Callable[[str], None]) -> None:
    """Find or make the repository. Raises `BadInput` when it is another than was asked for."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = retry(lambda: api.model_info(repo_id))
    except RepositoryNotFoundError:
        retry(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
        info = retry(lambda: api.model_info(repo_id))  # it may not be the one that was asked for: made by another
        say(f"made the {'private ' if info.private else ''}repository {api.endpoint}/{repo_id}")
    if info.id.lower() != repo_id.lower():
        raise BadInput(f"{repo_id}: this repository is called {info.id} now; push to that name.")
    if private and info.private is False:
        raise BadInput(
            f"{repo_id}: exists and is public, and --private makes new repositories only; change its visibility at "
            f"{api.endpoint}/{repo_id}/settings, or leave --private out."
        )


def _state(api: HfApi, repo_id: str) -> tuple[str, dict[str, Any]]:
    """The newest commit of the repository, and its files by path."""
    head = retry(lambda: api.model_info(repo_id)).sha
    if head is None:
        raise BadInput(f"{repo_id}: the Hub names no commit of this repository; is it broken or disabled?")
    tree = retry(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=head)))
    return head, {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}


def _is_there(item: UploadFile, entry: Any) -> bool:
    """Whether the Hub has this very content under this path."""
    if entry is None or entry.size != item.size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == item.sha256)
    from huggingface_hub.utils.sha import git_hash

    return bool(entry.blob_id == git_hash(item.source.read_bytes()))  # the Hub keeps small files only outside of LFS


def _obsolete(items: Sequence[UploadFile], remote: dict[str, Any]) -> list[str]:
    """What the model must not have of an earlier push, or of whoever had the repository: transformers would load it as
    well, and the model would be one that no audit saw. Licence texts and what is no file of a model stay."""
    ours = {item.path for item in items}
    return sorted(path for path in remote if path not in ours and _belongs_to_a_model(path))


def _belongs_to_a_model(path: str) -> bool:
    if "/" in path:
        return path.startswith(_OURS)
    return is_model_file(Path(path)) or path.endswith(_PICKLED)


def _send_large(
    api: HfApi,
    repo_id: str,
    items: Sequence[UploadFile],
    additions: dict[str, CommitOperationAdd],
    say: Callable[[str], None],
) -> None:
    """Fill `additions` with an operation for every item, the content of those that are large objects sent."""
    from huggingface_hub import CommitOperationAdd

    for item in items:
        if item.path not in additions:
            additions[item.path] = CommitOperationAdd(item.path, _content(item))
            additions[item.path].upload_info.sha256 = bytes.fromhex(item.sha256)  # known: not read once more
    small = [item for item in items if item.size < _LARGE]
    api.preupload_lfs_files(repo_id, [additions[item.path] for item in small], free_memory=False)
    large = [item for item in items if item.size >= _LARGE]
    for number, item in enumerate(large, start=1):
        say(f"[{number}/{len(large)}] {item.path} ({item.size / 1e6:,.0f} MB)")
        api.preupload_lfs_files(repo_id, [additions[item.path]], free_memory=False)


def _content(item: UploadFile) -> str | bytes:
    """What is sent: of a large file its path (its storage refuses bytes of another SHA-256), of a small one the bytes.

    Raises `BadInput` when they are not those that were checked.
    """
    if item.size >= _LARGE:
        return str(item.source)
    content = item.source.read_bytes()
    if hashlib.sha256(content).hexdigest() != item.sha256:
        raise BadInput(f"{item.source}: changed after it was checked; run the same command again.")
    return content


def _commit(api: HfApi, repo_id: str, head: str, additions: list[CommitOperationAdd], obsolete: list[str]) -> Any:
    from huggingface_hub import CommitOperationDelete

    deletions = [CommitOperationDelete(path, is_folder=False) for path in obsolete]
    message = "Upload the merge with mergekit-wp"
    return api.create_commit(repo_id, [*deletions, *additions], commit_message=message, parent_commit=head)


def _verify(api: HfApi, repo_id: str, commit: str, items: Sequence[UploadFile]) -> None:
    """Raises `BadInput` when the commit does not hold every file as it is here."""
    tree = retry(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)))
    remote = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
    if wrong := [item.path for item in items if not _is_there(item, remote.get(item.path))]:
        raise BadInput(
            f"{repo_id}: after the commit the Hub holds {first(wrong)} not as here; does a .gitignore of the "
            "repository leave it out, or did it change while it was sent? Mend that and run the same command again."
        )
