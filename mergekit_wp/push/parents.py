"""The models that a merge was made of: which they are on the Hub, and under which licence they come."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mergekit_wp.checkpoint.references import Source, recipe_models
from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import one_line
from mergekit_wp.push.licences import Licence

# huggingface_hub's cache: .../models--USER--NAME/snapshots/<commit>
_SNAPSHOT = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})$")
UNASKED = "not looked up: a dry run leaves the network alone"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Parent:
    """One model or LoRA of a recipe.

    reference: as the recipe has it; hub: USER/NAME if known; folder: where it lies on this machine, if it does;
    shown: the name that may be published.
    """

    reference: str
    role: str
    hub: str | None
    revision: str | None
    folder: Path | None
    shown: str


def find_parents(recipe: dict[str, Any], given: Sequence[str]) -> list[Parent]:
    """The base and the experts, in the recipe's order. given: `FOLDER=USER/NAME` of the command line.

    Raises `BadInput` for a malformed one, and for one whose folder is no parent's.
    """
    base = next(recipe_models({key: value for key, value in recipe.items() if key == "base_model"}), None)
    sources = dict.fromkeys([*([base.model] if base else []), *(s for m in recipe_models(recipe) for s in m.sources)])
    references = {str(source): source for source in sources}
    mapping, unused = dict(_split(text) for text in given), {text.partition("=")[0] for text in given}
    parents: list[Parent] = []
    for source in references.values():
        key = next((key for key in mapping if _same(key, source)), None)
        unused.discard(key or "")
        taken = {parent.shown for parent in parents}
        role = "base" if base and source == base.model else "expert"
        parents.append(_parent(source, role, mapping.get(key or ""), taken))
    if unused:
        raise BadInput(f"--parent {sorted(unused)[0]}: the recipe has no such model; it has {', '.join(references)}.")
    return parents


def licence_of(parent: Parent, api: Any | None) -> Licence:
    """The licence in the parent's card: in its folder, in huggingface_hub's cache, or on the Hub.

    api: a `HfApi`, or None to leave the network alone. Raises `BadInput` when the Hub has no such model.
    """
    reasons = []
    for card in _local_cards(parent):
        try:
            found = _stated(_read_card(card), "its card", parent)
        except _UnreadableError as error:
            reasons.append(str(error))
            continue
        if found.ids:
            return found
        reasons.append(found.where)
    if parent.hub is None:
        reason = reasons[0] if reasons else "no README.md in its folder"
        return Licence((), f"{reason}, and --parent does not name it on the Hub")
    if api is None:
        return Licence((), UNASKED)
    return _on_hub(parent, api)


def _on_hub(parent: Parent, api: Any) -> Licence:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    from mergekit_wp.push.retry import retry

    try:
        info = retry(lambda: api.model_info(parent.hub, revision=parent.revision))
    except GatedRepoError:
        return Licence((), "gated, and this account has no access to its card", gated=True)
    except RepositoryNotFoundError as error:
        raise BadInput(
            f"{parent.reference}: the recipe names this parent, and the Hub has no model {parent.hub} that this "
            "account can see; name it with --parent, or log in with an account that has access."
        ) from error
    data = info.card_data.to_dict() if info.card_data is not None else {}
    return replace(_stated(data, "its card on the Hub", parent), gated=bool(info.gated))


def _split(text: str) -> tuple[str, str]:
    folder, equals, hub = text.partition("=")
    if not equals or not folder or _HUB_NAME.fullmatch(hub) is None:
        raise BadInput(f"--parent {text}: expected FOLDER=USER/NAME, such as ./wizardlm-13b=WizardLMTeam/WizardLM-13B.")
    return folder, hub


def _same(key: str, source: Source) -> bool:
    return key in (str(source), source.path, Path(source.path).name) or (
        os.path.abspath(key) == os.path.abspath(source.path)
    )


def _parent(source: Source, role: str, given: str | None, taken: set[str]) -> Parent:
    path, revision = source.path, source.revision
    folder = Path(path) if source.kind == "folder" else None
    hub = given or (path if source.kind == "hub" else None)
    if given is None and folder is not None and (match := _SNAPSHOT.search(str(folder.resolve()))):
        hub, revision = f"{match[1]}/{match[2]}", match[3]
    shown = hub or Path(path).name or "model"
    number = 2
    while hub is None and shown in taken:
        shown, number = f"{Path(path).name}-{number}", number + 1
    return Parent(str(source), role, hub, revision, folder, shown)


def _local_cards(parent: Parent) -> Iterator[Path]:
    if parent.folder is not None and (card := parent.folder / "README.md").exists():
        yield card
    if parent.hub is not None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(parent.hub, "README.md", revision=parent.revision)
        if isinstance(cached, str):
            yield Path(cached)


class _UnreadableError(Exception):
    """A card whose metadata cannot be read; why."""


def _read_card(card: Path) -> dict[str, Any]:
    """The metadata of a card on this machine; empty where there is no card or none in it. Raises `_UnreadableError`."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        data = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:150].rstrip(".")
        raise _UnreadableError(f"the metadata of {card} cannot be read: {reason}") from error
    return data or {}


def _stated(data: dict[str, Any], where: str, parent: Parent) -> Licence:
    """What a card's metadata says of the licence: an id or a list of them; anything else is a licence not known."""
    value = data.get("license")
    given = value if isinstance(value, list) else [value] if value else []
    ids = tuple(dict.fromkeys(one.strip().lower() for one in given if isinstance(one, str) and one.strip()))
    if given and len(ids) < len(given) and not all(isinstance(one, str) for one in given):
        return Licence((), f"{where} has a {type(value).__name__} as `license:`, expected an id")
    if not ids:
        return Licence((), f"no `license:` in {where}")
    return Licence(
        ids, where, name=_line(data.get("license_name")), link=_link(_line(data.get("license_link")), parent)
    )


def _line(value: Any) -> str | None:
    """A field of a card that should be one short text; None for anything else."""
    return one_line(value.strip()) if isinstance(value, str) and value.strip() and len(value) < 500 else None


def _link(link: str | None, parent: Parent) -> str | None:
    """A card's link to its terms from elsewhere: a file beside that card is one of the parent's repository."""
    if link is None or link.startswith(("https://", "http://")):
        return link
    return f"https://huggingface.co/{parent.hub}/blob/main/{quote(link)}" if parent.hub else None
