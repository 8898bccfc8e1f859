"""What a push adds to the merged model, in a folder beside it: card, recipe, picture, score and fit files, results,
licences.

The model's own folder is left alone, whatever happens. All of `FOLDER.push` is made anew by every push from the same
inputs, byte for byte, so that a second push of the same merge has nothing to commit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_wp.checkpoint.hub import CHAT_TEMPLATES
from mergekit_wp.documents import MOST_JSON_BYTES, parse_json
from mergekit_wp.errors import BadInput
from mergekit_wp.files import atomic_path, check_writable_parent, inside, read_text, write_text
from mergekit_wp.fit_file import METADATA_KEY as FIT_KEY
from mergekit_wp.foreign import file_parts, one_line
from mergekit_wp.hashing import FileDigests, sha256_of
from mergekit_wp.merge.activations import METADATA_KEY as AIM_KEY
from mergekit_wp.merge.certificate import (
    CERTIFICATE,
    Certificate,
    CertifiedScores,
    certified_files,
    certified_scores,
    file_name,
    is_tensors,
)
from mergekit_wp.merge.patch_file import METADATA_KEY as PATCH_KEY
from mergekit_wp.merge.plan import OURS, WP
from mergekit_wp.merge.recipe import files_of
from mergekit_wp.push.bundle import Bundle
from mergekit_wp.push.gate import is_licence_text, is_model_file
from mergekit_wp.push.names import Names, without_home
from mergekit_wp.push.parents import Parent
from mergekit_wp.push.upload import UploadFile
from mergekit_wp.scores import METADATA_KEY as SCORES_KEY

VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
DIGESTS = ".digests.json"
RECIPE = "mergekit_config.yml"
PICTURE = "wp/shares.png"
CURVE = "wp/fit-loss.png"


def stage_of(folder: Path) -> Path:
    """`FOLDER.push`."""
    return folder.absolute().parent / f"{folder.absolute().name}.push"


def open_stage(folder: Path) -> Path:
    """`FOLDER.push`, empty but for what is remembered between pushes. Raises `BadInput` if it is somebody else's."""
    stage = stage_of(folder)
    check_writable_parent(stage / DIGESTS)
    if any(stage.iterdir()) and not (stage / DIGESTS).exists():
        raise BadInput(f"{stage}: wp-push writes its card there, and the folder holds something else; move it away.")
    for path in stage.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (DIGESTS, CERTIFICATE):
            path.unlink()
    if not (stage / DIGESTS).exists():
        write_text(stage / DIGESTS, "{}")
    return stage


def recipe_files(recipe: dict[str, Any], parents: Sequence[Parent], beside: Path) -> dict[str, Path]:
    """Score, fit and other files of a recipe, as it names them, and where they are: in the working directory, or
    beside it, as wp-merge looks for them.

    An expert may bring its own (see `merge.shares.BESIDE`). Raises `BadInput` naming one that is missing.
    """
    from mergekit_wp.merge.shares import scores_beside

    found: dict[str, Path] = {}
    for name in files_of(recipe) if recipe.get("merge_method") in OURS else ():
        place = next((path for path in (Path(name), beside / name) if os.path.isfile(path)), None)
        if place is None:
            raise BadInput(
                f"{name}: the recipe names this file, and it is neither in the working directory nor in {beside}; "
                "run wp-push where wp-merge ran, or point to the recipe beside it with --recipe."
            )
        found[name] = place
    for parent in parents if recipe.get("merge_method") == WP else ():
        if parent.folder is not None and (own := scores_beside(parent.folder)):
            found.setdefault(own, Path(own))
    return found


def check_scores(files: dict[str, Path], certificate: Certificate) -> dict[str, Path]:
    """Those of the files that the merge used. Raises `BadInput` when one that it used has changed or is missing."""
    now = {name: certified_scores(path) for name, path in files.items()}
    contents = {scores.content for scores in now.values()}
    for used in certificate.scores:
        if used.content not in contents:
            raise BadInput(
                f"{used.name}: the merge was made with other numbers than this file holds now; merge again with the "
                "new ones, or bring back the old."
            )
    wanted = {used.content for used in certificate.scores}
    return {name: files[name] for name, scores in now.items() if scores.content in wanted}


def place(files: dict[str, Path]) -> dict[str, str]:
    """The path in the repository of every file that a recipe names, by what it is."""
    stems = file_parts(path.name.removesuffix(_ending(path)) for path in files.values())
    return {
        name: f"wp/{_folder(path)}/{stem}{_ending(path)}"
        for (name, path), stem in zip(files.items(), stems, strict=True)
    }


def _ending(path: Path) -> str:
    return ".safetensors" if is_tensors(path) else ".txt"


def _folder(path: Path) -> str:
    if not is_tensors(path):
        return "components"
    keys = _metadata(path)
    return "fit" if FIT_KEY in keys else "patch" if PATCH_KEY in keys else "scores"


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def stage_files(stage: Path, files: dict[str, Path], placed: dict[str, str], names: Names) -> None:
    """Copy the files that a recipe names; where their metadata names folders of this machine, with public names.

    Raises `BadInput` for one whose document is not JSON.
    """
    for name, path in files.items():
        metadata = _metadata(path) if is_tensors(path) else {}
        try:
            public = {key: _public_text(key, text, names) for key, text in metadata.items()}
        except ValueError as error:
            raise BadInput(
                f"{path}: its metadata is not the JSON that this package writes ({error}); make it again."
            ) from error
        target = check_writable_parent(stage / placed[name])
        if public == metadata:
            shutil.copyfile(path, target)
        else:
            with atomic_path(target) as partial:
                save_file(load_file(path), partial, metadata=public)


_DOCUMENTS = (SCORES_KEY, FIT_KEY, PATCH_KEY, AIM_KEY)


def _public_text(key: str, text: str, names: Names) -> str:
    """An entry of a file's metadata with published names: a document of ours, or what another program put there
    (`format: pt`). Raises ValueError."""
    if key not in _DOCUMENTS:
        return str(names.content(text))
    document = parse_json(text)
    public = _public(document, names)
    return text if public == document else json.dumps(public, sort_keys=True)


_MODELS = ("base", "expert", "experts", "recipient", "donor")
_NAMING = dict.fromkeys(_MODELS, "name") | dict.fromkeys(("prompts", "style"), "chat_owner")
"""Fields of such a file's document -> which field in them is a model's name."""


def _public(node: Any, names: Names, field: str = "") -> Any:
    """The JSON document of such a file, or what is in a field of it, with published names."""
    if isinstance(node, list):
        return [_public(item, names, field) for item in node]
    if not isinstance(node, dict):
        return names.content(node)
    if field == "recipe":
        return names.recipe(node)
    own = _NAMING.get(field)
    return {k: names.of(v) if k == own and isinstance(v, str) else _public(v, names, k) for k, v in node.items()}


def stage_recipe(stage: Path, recipe: dict[str, Any], names: Names, parents: Sequence[Parent]) -> str:
    """The recipe as it may be published; its text."""
    local = [parent.shown for parent in parents if parent.hub is None]
    what = "The fit file is" if isinstance((recipe.get("parameters") or {}).get("fit"), str) else "Score files are"
    head = f"# {what} beside this recipe, in wp.\n" if recipe.get("merge_method") == WP else ""
    if local:
        head += f"# Not on the Hub, shown by the names of their folders: {one_line(', '.join(local))}.\n"
    text = head + yaml.safe_dump(names.recipe(recipe), sort_keys=False, allow_unicode=True, width=100)
    text = without_home(text)
    write_text(stage / RECIPE, text)
    return text


def stage_certificate(stage: Path, certificate: Certificate, cleaned: dict[str, Path]) -> None:
    """The certificate as it is published: for those files, as they are; `cleaned` are those that differ by a path.

    The recipe is not among them, its paths are rewritten.
    """
    files = {name: digest for name, digest in certificate.files.items() if name != RECIPE and is_model_file(Path(name))}
    files |= dict(zip(cleaned, sha256_of(list(cleaned.values())), strict=True))
    scores = tuple(CertifiedScores(scores.name, scores.content) for scores in certificate.scores)
    write_text(stage / "published" / CERTIFICATE, replace(certificate, files=files, scores=scores).text())


def stage_results(stage: Path, name: str, content: dict[str, Any], command: Sequence[str], names: Names) -> str:
    """One results.json, its paths replaced, with the command as it is published; its path in the repository."""
    target = f"wp/results/{name}.json"
    write_text(stage / target, json.dumps({**names.content(content), "command": list(command)}, indent=2) + "\n")
    return target


def stage_suite(stage: Path, made: Bundle) -> None:
    """The suite and the task files of a table."""
    for target, source in made.copies.items():
        shutil.copyfile(source, check_writable_parent(stage / target))
    for target, text in made.texts.items():
        write_text(stage / target, text)


def stage_model_files(stage: Path, folder: Path, names: Names) -> dict[str, Path]:
    """The JSON files of the model that name folders of a machine, written anew without them: name -> where it lies.

    Vocabularies are left alone: `/usr` is a token there.
    """
    cleaned: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name in VOCABULARIES or path.name.endswith(".index.json") or not os.path.isfile(path):
            continue
        try:
            found = parse_json(read_text(inside(folder, path), MOST_JSON_BYTES))
        except ValueError:
            continue  # not for us to judge; the audit has passed it
        if (public := names.model_file(found)) != found:
            cleaned[path.name] = stage / "model" / path.name
            write_text(cleaned[path.name], json.dumps(public, indent=2, ensure_ascii=False) + "\n")
    return cleaned


def stage_licences(stage: Path, parents: Sequence[Parent]) -> list[str]:
    """Copy the licence texts that lie in the parents' folders; their paths in the repository."""
    copied: list[str] = []
    for parent, place in zip(parents, file_parts(parent.shown.replace("/", "--") for parent in parents), strict=True):
        there = sorted(parent.folder.iterdir()) if parent.folder is not None else []
        texts = [inside(path.parent, path) for path in there if path.is_file() and is_licence_text(path)]
        for path, name in zip(texts, file_parts(path.name for path in texts), strict=True):
            target = f"licences/{place}/{name}"
            shutil.copyfile(path, check_writable_parent(stage / target))
            copied.append(target)
    return copied


def collect(
    folder: Path, stage: Path, digests: FileDigests, certificate: Certificate, cleaned: dict[str, Path]
) -> tuple[list[UploadFile], list[str]]:
    """Every file that is published, by path, and the names in `folder` that are not.

    Raises `BadInput` for a file that the Hub would not take, for a link that leaves `folder`, and for a file that is
    no longer as the certificate's audit found it.
    """
    published: dict[str, Path] = {}
    left_out: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name in ("README.md", CERTIFICATE, RECIPE) or path.name.startswith("."):
            continue
        if os.path.isfile(path) and (is_model_file(path) or is_licence_text(path)):
            published[path.name] = cleaned.get(path.name, inside(folder, path))
        elif path.name != CHAT_TEMPLATES:
            left_out.append(path.name)
    for path in certified_files(folder):
        if path.parent.name == CHAT_TEMPLATES:
            published[file_name(folder, path)] = inside(folder, path)
    published |= {
        RECIPE: stage / RECIPE,
        "README.md": stage / "README.md",
        CERTIFICATE: stage / "published" / CERTIFICATE,
    }
    for root in ("wp", "licences"):
        for path in sorted((stage / root).rglob("*")):
            if os.path.isfile(path):
                published[str(path.relative_to(stage))] = path
    found = digests(list(published.values()))
    items = [UploadFile(name, path, path.stat().st_size, found[path]) for name, path in sorted(published.items())]
    for item in items:
        if (
            folder in item.source.parents
            and is_model_file(item.source)
            and certificate.files.get(item.path) != item.sha256
        ):
            raise BadInput(
                f"{item.source}: changed while this push was prepared; run it again when nothing writes there."
            )
        # https://huggingface.co/docs/hub/storage-limits: no single file above 500 GB, and under 200 GB at best.
        if item.size > 500e9:
            raise BadInput(
                f"{item.source}: {item.size / 1e9:.0f} GB, and the Hub takes no file above 500 GB; merge again with "
                "--out-shard-size 5B."
            )
    return items, left_out
