"""The start-up hook, in interpreters of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_wp import autoload

HOOKED = "import mergekit_wp.autoload as a, sys; a.install(); a.install(); "


def run(code, *flags, **environment):
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_start_imports_nothing_heavy():
    """An interpreter that never imports mergekit gets one finder and one small module."""
    code = HOOKED + (
        "print(sum(type(f).__name__ == '_Finder' for f in sys.meta_path), "
        "[m for m in ('torch', 'click', 'yaml', 'mergekit', 'importlib.util', 'logging') if m in sys.modules])"
    )
    done = run(code)
    assert done.stdout.strip() == "1 []", done.stderr


def test_disabled_by_the_environment():
    code = HOOKED + "print(sum(type(f).__name__ == '_Finder' for f in sys.meta_path))"
    assert run(code, MERGEKIT_WP_DISABLE="1").stdout.strip() == "0"
    assert run(code, MERGEKIT_WP_DISABLE="0").stdout.strip() == "1"


def test_registers_leaves_no_trace_and_warns_of_nothing():
    code = HOOKED + (
        "from mergekit.merge_methods import registry as r; "
        "print({'wp', 'widen'} <= set(r._METHODS), type(r.__loader__).__name__, type(r.__spec__.loader).__name__, "
        "sum(type(f).__name__ == '_Finder' for f in sys.meta_path)); "
        "import mergekit_wp.merge; mergekit_wp.merge.register(); print(len(r.registered_methods()))"
    )
    done = run(code, "-W", "error")
    first, count = done.stdout.split("\n")[:2]
    assert first == "True SourceFileLoader SourceFileLoader 0", done.stderr
    assert int(count) > 10


@pytest.mark.parametrize("first", ["mergekit_wp.merge.method", "mergekit_wp.merge.widen", "mergekit.merge"])
def test_any_order_of_imports(first):
    code = (
        HOOKED
        + f"import {first}; from mergekit.merge_methods.registry import _METHODS as m; print('wp' in m, 'widen' in m)"
    )
    done = run(code, "-W", "error::RuntimeWarning")
    assert done.stdout.strip() == "True True", done.stderr


def test_a_broken_method_leaves_mergekit_working():
    code = (
        "import sys; sys.modules['mergekit_wp.merge.method'] = None; "
        + HOOKED
        + "from mergekit.merge_methods.registry import _METHODS as m; print('linear' in m, 'wp' in m, 'widen' in m)"
    )
    done = run(code)
    assert done.stdout.strip() == "True False True", done.stderr
    assert "merge_method: widen" not in done.stderr
    assert "`merge_method: wp` is not available (ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("package", ["mergekit_wp", None])
def test_the_pth_line_never_fails(package, monkeypatch):
    """site.py executes each line of a .pth that starts with `import`: one line, and silent without the package."""
    folder = Path(autoload.__file__).parent / "merge"
    lines = (folder / "mergekit_wp.pth").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("import ")
    if package is None:
        monkeypatch.setitem(sys.modules, "mergekit_wp.autoload", None)
    exec(lines[0], {})
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, autoload._Finder)]


def test_the_start_file_names_a_callable():
    """Python >= 3.15 reads `module:callable` lines (PEP 829)."""
    text = (Path(autoload.__file__).parent / "merge" / "mergekit_wp.start").read_text()
    module, _, name = text.strip().partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_looking_for_the_module_does_not_use_the_hook_up():
    # Before the finder is there: importing the package loads the registry, which would use the hook up.
    package = importlib.import_module("mergekit.merge_methods")
    finder = autoload._Finder()
    sys.meta_path.insert(0, finder)
    try:
        assert importlib.util.find_spec("json") is not None
        assert finder in sys.meta_path
        spec = finder.find_spec("mergekit.merge_methods.registry", package.__path__)
        assert spec.loader.get_filename(spec.name).endswith("registry.py")
        assert finder in sys.meta_path
    finally:
        sys.meta_path.remove(finder)
