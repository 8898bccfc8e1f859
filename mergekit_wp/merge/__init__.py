"""`merge_method: wp`, `wp_patch`, `widen` and `aim` for mergekit, the checks before a merge, `wp-merge`, `wp-patch`,
and `merge` of Python.

`from mergekit_wp import merge` gives this package, which can be called: that is `merging.merge`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


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


class _Callable(ModuleType):
    """A function of the package's own name would be hidden as soon as anything imported the package."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from importlib import import_module

        return import_module(f"{__name__}.merging").merge(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
