"""`merge_method: wp` for mergekit, the checks before a merge, and `wp-merge`."""

from __future__ import annotations


def register() -> None:
    """Make `wp` known to mergekit in this process; idempotent.

    Only needed where `.pth` files are not read (`python -S`, `pip install --target`) or with
    MERGEKIT_WP_DISABLE=1: after an ordinary installation `mergekit_wp.autoload` does it.
    """
    from mergekit_wp.merge.method import register as register_method

    register_method()
