"""The steps of a push: what is cheap to check first, then the audit, the card, and at last the upload."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.console import say_nothing
from mergekit_wp.errors import BadInput
from mergekit_wp.files import read_yaml_mapping, write_text
from mergekit_wp.fit_file import Fit, read_fit
from mergekit_wp.foreign import file_parts
from mergekit_wp.geometry import auto_name
from mergekit_wp.hashing import FileDigests
from mergekit_wp.merge.certificate import Certificate, certified_files
from mergekit_wp.merge.plan import TORCH_DTYPE, WP
from mergekit_wp.push import evaluation as evaluations
from mergekit_wp.push import stage as staging
from mergekit_wp.push.bundle import bundle
from mergekit_wp.push.card import Card, CardResults
from mergekit_wp.push.gate import passed_audit
from mergekit_wp.push.licences import OTHER, Licence, Terms, chosen, decide, name_trouble
from mergekit_wp.push.names import Names
from mergekit_wp.push.parents import UNASKED, Parent, find_parents, licence_of
from mergekit_wp.push.retry import clean_logs, explain
from mergekit_wp.push.secrets import check_secrets
from mergekit_wp.push.stage import RECIPE
from mergekit_wp.push.upload import UploadFile
from mergekit_wp.scores import read_scores

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Say = Callable[[str], None]
_FINGERPRINT = "wp-eval's fingerprint, 2026-11-27"  # another name whenever it is made of other things


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    folder: Path
    repo_id: str
    results: Sequence[Path] = ()
    recipe: Path | None = None
    parents: Sequence[str] = ()
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None


@dataclass(frozen=True)
class Publication:
    """Every file that goes to the repository, and where the card lies."""

    items: Sequence[UploadFile]
    left_out: Sequence[str]
    card: Path

    def listing(self) -> str:
        """One line a file, with its size in bytes."""
        lines = [f"{item.size:>16,}  {item.path}" for item in self.items]
        total = sum(item.size for item in self.items)
        lines.append(f"{total:>16,}  bytes in {len(self.items)} files")
        if self.left_out:
            lines.append(f"left out, since they are no part of the model: {', '.join(self.left_out)}")
        return "\n".join(lines)


Prepare = Callable[[Request, "HfApi | None", Say], Publication]


def publish(request: Request, private: bool, bars: bool, say: Say, prepare: Prepare, what: str = "the merge") -> str:
    """Prepare and upload; a last line for the person. Raises `BadInput` for everything that stops it."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    from mergekit_wp.push.upload import check_card, check_login, upload

    clean_logs()
    if not bars:
        disable_progress_bars()
    api = HfApi(library_name="mergekit-wp")
    with _explained(api, request.repo_id):
        say(f"logged in as {check_login(api)}")
        publication = prepare(request, api, say)
        total = sum(item.size for item in publication.items)
        say(f"{len(publication.items)} files, {total:,} bytes; the card is {publication.card}")
        check_card(publication.card.read_text(encoding="utf-8"))
        commit = upload(api, request.repo_id, publication.items, private=private, say=say)
    return f"{api.endpoint}/{request.repo_id} holds {what} ({commit})"


def check_request(request: Request, recipe: dict[str, Any], *, network: bool) -> None:
    """What can be known before there is a merge: the account, the parents and the licence. Raises `BadInput`.

    recipe: what the merge will be made by; network: whether the Hub may be asked.
    """
    from huggingface_hub import HfApi

    from mergekit_wp.push.upload import check_login

    api = HfApi(library_name="mergekit-wp") if network else None
    parents = find_parents(recipe, request.parents)
    if api is None:
        _licence(request, parents, None, say_nothing)
        return
    with _explained(api, request.repo_id):
        check_login(api)
        _licence(request, parents, api, say_nothing)


@contextmanager
def _explained(api: HfApi, repo_id: str) -> Iterator[None]:
    """What the Hub refuses, in a sentence."""
    try:
        yield
    except (click.ClickException, LookupError, TypeError, AttributeError, AssertionError):
        raise  # a sentence already, or a mistake of ours
    except Exception as error:  # the Hub's client, its HTTP library and xet raise many types
        # `from None`: what they carry may quote addresses and headers.
        raise explain(error, repo_id, api.endpoint) from None


def prepare(request: Request, api: HfApi | None, say: Say) -> Publication:
    """Check everything and write what is added to the model into FOLDER.push. api: None leaves the network alone."""
    folder = request.folder
    merged = Checkpoint.open(str(folder)) if os.path.isdir(folder) else None
    if merged is None:
        raise BadInput(f"{folder}: no such folder; name the folder that wp-merge wrote.")
    path, recipe = _read_recipe(request)
    parents = find_parents(recipe, request.parents)
    if local := [parent.shown for parent in parents if parent.hub is None]:
        say(
            f"on this machine, so the card names them without a link: {', '.join(local)}; --parent "
            f"{local[0]}=USER/NAME tells where one is on the Hub."
        )
    licences, terms = _licence(request, parents, api, say)
    files = staging.recipe_files(recipe, parents, path.absolute().parent)
    stage = staging.open_stage(folder)
    digests = FileDigests(stage / staging.DIGESTS, say)
    found = [_read_results(results, folder, digests) for results in request.results]
    certificate = passed_audit(folder, path, parents, stage, digests, say)
    files = staging.check_scores(files, certificate)
    placed = staging.place(files)
    names = Names(folder, request.repo_id, parents, placed)
    staging.stage_files(stage, files, placed, names)
    cleaned = staging.stage_model_files(stage, folder, names)
    if cleaned:
        say(f"published without the folders of this machine that they name: {', '.join(cleaned)}.")
    card = Card(
        repo_id=request.repo_id,
        parents=parents,
        licences=licences,
        terms=terms,
        recipe=staging.stage_recipe(stage, recipe, names, parents),
        certificate=certificate,
        dtype=" and ".join(sorted({_dtype(header.dtype) for header in merged.tensors.values()})),
        loader=auto_name(merged.config),
        scores=[
            (at, read_scores(stage / at).meta) for at in placed.values() if certificate.method == WP and not _fit(at)
        ],
        fit=next(((at, read_fit(stage / at)) for at in placed.values() if _fit(at)), None),
        results=[
            _card_results(stage, name, one, names, request.repo_id, say)
            for name, one in zip(file_parts(one.suite.name for one in found), found, strict=True)
        ],
        cleaned=tuple(cleaned),
        licence_texts=staging.stage_licences(stage, parents),
    )
    _draw(certificate, card.fit and card.fit[1], stage)
    staging.stage_certificate(stage, certificate, cleaned)
    write_text(stage / "README.md", card.text())
    items, left_out = staging.collect(folder, stage, digests, certificate, cleaned)
    say_secrets(items, say)
    return Publication(items, left_out, stage / "README.md")


def _read_recipe(request: Request) -> tuple[Path, dict[str, Any]]:
    """The recipe that the merge was made by. Raises `BadInput` when there is none, or two that differ."""
    inside = request.folder / RECIPE
    if request.recipe is None:
        if not os.path.isfile(inside):
            raise BadInput(f"{inside}: missing, so the recipe of this merge is not known; name it with --recipe.")
        return inside, read_yaml_mapping(inside, "recipe")
    recipe = read_yaml_mapping(request.recipe, "recipe")
    if os.path.isfile(inside) and read_yaml_mapping(inside, "recipe") != recipe:
        raise BadInput(
            f"{request.recipe}: not the recipe that this merge was made by, which is {inside}; leave --recipe out, or "
            "merge again."
        )
    return request.recipe, recipe


def _licence(request: Request, parents: Sequence[Parent], api: HfApi | None, say: Say) -> tuple[list[Licence], Terms]:
    """The parents' licences and the merge's. Raises `BadInput` where it cannot be told and was not named."""
    licences = [licence_of(parent, api) for parent in parents]
    known = list(zip([parent.shown for parent in parents], licences, strict=True))
    listed = ", ".join(f"{name} {licence.text or 'unknown'}" for name, licence in known)
    decision = decide(known)
    if request.licence is not None:
        terms = chosen(request.licence, request.licence_name, request.licence_link, licences)
    elif request.licence_name or request.licence_link:
        raise BadInput("--license-name and --license-link go with --license other; add it, or leave them out.")
    elif decision.id is not None:
        terms = Terms(decision.id)
    elif api is None and _only_unasked(licences):
        say(f"licences: {listed}; those unknown are looked up on the Hub when the merge is pushed.")
        return licences, Terms(OTHER)
    else:
        raise BadInput(
            f"the licence of the merge cannot be told: {decision.trouble}; if you may publish it, say under which "
            "licence with --license ID."
        )
    say(f"licences of the parents: {listed}; of the merge: {terms.id}" + (" (--license)" if request.licence else ""))
    if request.licence is not None and decision.id != terms.id:
        say(f"you answer for --license {terms.id}: {decision.trouble or f'wp-push would have said {decision.id}'}")
    if trouble := name_trouble(terms.id, request.repo_id.partition("/")[2]):
        say(f"note: {trouble}.")
    return licences, terms


def _only_unasked(licences: Sequence[Licence]) -> bool:
    """Whether nothing is wrong but that a dry run did not ask the Hub."""
    asked = [("", licence) for licence in licences if licence.where != UNASKED]
    return len(asked) < len(licences) and (not asked or not decide(asked).trouble)


def _read_results(results: Path, folder: Path, digests: FileDigests) -> evaluations.Results:
    def fingerprint() -> str:
        files = certified_files(folder)
        return digests.remember(_FINGERPRINT, files, lambda: evaluations.model_fingerprint(folder))

    return evaluations.read_folder(results, folder, fingerprint)


def _card_results(
    stage: Path, name: str, results: evaluations.Results, names: Names, repo_id: str, say: Say
) -> CardResults:
    from mergekit_wp.eval.tables import to_markdown

    names.learn(results.row.model.reference, repo_id)
    include = evaluations.include_path(results.content, results.suite)
    made = bundle(name, results.suite, include)
    staging.stage_suite(stage, made)
    if include is not None and not os.path.isdir(include):
        say(f"note: {include} is not here, so the tasks of the suite {results.suite.name} are not published with it.")
    command = evaluations.command(results.content, names, made.suite)
    return CardResults(
        markdown=to_markdown(results.table),
        row=results.row.model.name,
        measured=evaluations.how_measured(results.content),
        command=shlex.join(command),
        path=staging.stage_results(stage, name, results.content, command, names),
        figures=evaluations.figures(results.table, results.row),
    )


def _dtype(name: str) -> str:
    """safetensors' name of a dtype in torch's."""
    return TORCH_DTYPE.get(name, name).removeprefix("torch.")


def _fit(place: str) -> bool:
    """Whether a file in the repository is a fit (`staging.place`)."""
    return place.startswith("wp/fit/")


def _draw(certificate: Certificate, fit: Fit | None, stage: Path) -> None:
    """The pictures of the card: a fit's loss, and how much each expert gave of each layer."""
    import numpy as np

    from mergekit_wp.files import atomic_path
    from mergekit_wp.fit_page import curve_png
    from mergekit_wp.pictures import shares_png

    if fit is not None:
        with atomic_path(stage / staging.CURVE) as partial:
            partial.write_bytes(curve_png(fit))
    if not certificate.shares:
        return
    shares = {kind: np.array(certificate.shares[kind]) for kind in ("heads", "neurons")}
    with atomic_path(stage / staging.PICTURE) as partial:
        partial.write_bytes(shares_png(shares, certificate.shares["experts"]))


def say_secrets(items: Sequence[UploadFile], say: Say) -> None:
    from huggingface_hub import get_token

    for path, named in check_secrets(items, get_token()).items():
        say(f"note: {path} names {named} of a machine, and will be public as it is.")
