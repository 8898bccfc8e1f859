"""Whether a score, fit or patch file was made for the model that it is used with: by fingerprints."""

from __future__ import annotations

from mergekit_wp.checkpoint.folder import Fingerprint
from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import logger
from mergekit_wp.scores import ModelId

LOG = logger(__name__)

OR_ALLOW = "or set `allow_mismatch: true` (of wp-patch: --allow-mismatch) to take them all the same"
OF_A_FIT = ("weights", f"fit these models with wp-fit, {OR_ALLOW}")
"""The last words of `check_fingerprint`."""


def check_fingerprint(
    found: Fingerprint,
    role: str,
    model: str,
    scored: ModelId,
    where: str,
    allow: bool,
    what: str = "scores",
    remedy: str = f"score this pair with wp-score, {OR_ALLOW}",
) -> None:
    """Raise `BadInput` unless what is in a file (`where`) was made for this model; a warning if that is allowed.

    what, remedy: the file's words. Of tensors alone a fingerprint has no config, which then is not compared.
    """
    halves = [
        half
        for half, same in (
            ("config", not found.config or found.has_config(scored.config)),
            ("weights", found.tensors == scored.tensors),
        )
        if not same
    ]
    if not halves:
        return
    text = (
        f"{where}: these {what} were made for the {role} {scored.name}, whose {' and '.join(halves)} differ from those "
        f"of {model}"
    )
    if not allow:
        raise BadInput(f"{text}; {remedy}.")
    LOG.warning("%s; merging all the same, as allow_mismatch says.", text)
