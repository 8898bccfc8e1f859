"""`merge_method: wp`, `widen` and `aim` for mergekit, the checks before a merge, and `wp-merge`."""

from __future__ import annotations


def register() -> None:
    """Make the methods known to mergekit in this process, mergekit-evolve included; idempotent.

    Only needed where `.pth` files are not read (`python -S`, `pip install --target`) or with
    MERGEKIT_WP_DISABLE=1: after an ordinary installation `mergekit_wp.autoload` does it.
    """
    from importlib import import_module

    from mergekit_wp.autoload import METHODS, install_evolve

    for module in METHODS.values():
        import_module(module).register()
    install_evolve()
