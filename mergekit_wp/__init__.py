"""mergekit-wp: score where a fine-tune put a capability, and merge experts by that knowledge.

    from mergekit_wp import load_pair, merge, patch, read_fit, read_scores, score, steer

docs/python.md has examples. This file stays free of heavy imports, for the `.pth` hook imports it at every start of an
interpreter: what it offers is imported when it is first asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit_wp.api import load_pair, patch, score, steer
    from mergekit_wp.fit_file import Fit, read_fit
    from mergekit_wp.merge.merging import merge
    from mergekit_wp.scores import Scores, read_scores

__version__ = "0.1.0"
__all__ = ["Fit", "Scores", "load_pair", "merge", "patch", "read_fit", "read_scores", "score", "steer"]

_HOMES = {
    "Fit": "mergekit_wp.fit_file",
    "read_fit": "mergekit_wp.fit_file",
    "Scores": "mergekit_wp.scores",
    "read_scores": "mergekit_wp.scores",
    "score": "mergekit_wp.api",
    "load_pair": "mergekit_wp.api",
    "patch": "mergekit_wp.api",
    "steer": "mergekit_wp.api",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "merge":  # a package, and what it is called with: see its end
        return import_module("mergekit_wp.merge")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
