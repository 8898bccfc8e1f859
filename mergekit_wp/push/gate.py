"""Nothing is published that wp-merge's audit did not pass: its certificate is checked, or the audit is made now."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from mergekit_wp.errors import BadInput
from mergekit_wp.files import write_text
from mergekit_wp.hashing import FileDigests
from mergekit_wp.merge.certificate import (
    CERTIFICATE,
    Certificate,
    certified_files,
    file_name,
    make_certificate,
    read_certificate,
)
from mergekit_wp.push.parents import Parent
from mergekit_wp.push.retry import first

# What transformers may read from a model folder: a file of these kinds belongs to the model, and to its audit.
MODEL_KINDS = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py", ".yml", ".yaml")
# Texts that an owner may add afterwards.
LICENCE_TEXTS = ("license", "licence", "notice", "use_policy", "copying")


def is_model_file(path: Path) -> bool:
    """Whether a file is part of the model (and so of the audit), rather than a licence text or something else."""
    return path.suffix in MODEL_KINDS and not is_licence_text(path)


def is_licence_text(path: Path) -> bool:
    return path.name.lower().startswith(LICENCE_TEXTS) and path.suffix in ("", ".txt", ".md")


def passed_audit(
    folder: Path, recipe: Path, parents: list[Parent], beside: Path, digests: FileDigests, say: Callable[[str], None]
) -> Certificate:
    """The certificate of an audit that `folder` has passed as it is now.

    beside: the folder for what a push makes; the certificate goes there when the audit is made here, for the next push.
    Raises `BadInput` when the folder was not audited or has changed, and its inputs are not at hand.
    """
    trouble = ""
    for place in (folder / CERTIFICATE, beside / CERTIFICATE):
        certificate = read_certificate(place)
        if certificate is not None:
            trouble = _changes(folder, certificate, digests)
            if not trouble:
                say(f"audit of {certificate.date[:10]}: every file is as it was then.")
                return certificate
    trouble = trouble or "there is no certificate of an audit (stock mergekit-yaml and --no-audit leave none)"
    missing = [parent.reference for parent in parents if not _at_hand(parent)]
    if missing:
        raise BadInput(
            f"{folder}: not published, since {trouble}, and it cannot be audited now without {first(missing)}; merge "
            "it again with wp-merge, or bring back what is missing."
        )
    say(f"{folder}: {trouble}; auditing it now.")
    return _audit(folder, recipe, beside, say)


def _changes(folder: Path, certificate: Certificate, digests: FileDigests) -> str:
    """What of the model is not as the certificate says; empty when nothing."""
    here = {file_name(folder, path): path for path in certified_files(folder) if is_model_file(path)}
    marked = {name: digest for name, digest in certificate.files.items() if is_model_file(Path(name))}
    if gone := sorted(set(marked) - set(here)):
        return f"{first(gone)} was there when it was audited and is gone"
    if new := sorted(set(here) - set(marked)):
        return f"{first(new)} was not there when it was audited"
    now = digests([here[name] for name in sorted(here)])
    changed = [name for name in sorted(here) if now[here[name]] != marked[name]]
    return f"{first(changed)} has changed since it was audited" if changed else ""


def _at_hand(parent: Parent) -> bool:
    """Whether a parent's weights are on this machine; nothing is downloaded for an audit."""
    if parent.folder is not None:
        return True
    if parent.hub is None:
        return False
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    return any(isinstance(try_to_load_from_cache(parent.hub, n, revision=parent.revision), str) for n in names)


def _audit(folder: Path, recipe: Path, beside: Path, say: Callable[[str], None]) -> Certificate:
    import transformers
    from mergekit.options import MergeOptions

    from mergekit_wp.merge import register
    from mergekit_wp.merge.audit import audit
    from mergekit_wp.merge.recipe import read_recipe

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    register()
    checked: list[str] = []

    def note(line: str) -> None:
        say(line)
        checked.append(line)

    with tempfile.TemporaryDirectory(dir=beside, prefix=".loras-") as loras:
        options = MergeOptions(lora_merge_cache=loras, quiet=True)
        try:
            loaded = read_recipe(str(recipe))
            loaded.prepare(options, merge_loras=True)
            plan = loaded.plan(folder, options)
            audit(folder, plan, say=note)
        except click.ClickException as error:  # BadInput, or AuditFailed
            raise BadInput(f"{folder}: not published, since it did not pass the audit: {error.message}") from error
        certificate = make_certificate(folder, plan, checked)
    write_text(beside / CERTIFICATE, certificate.text())
    return certificate
