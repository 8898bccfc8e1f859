"""The start-up hook, in interpreters of its own: real ones where it is about the start, else forks that have torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from warm import warm

from mergekit_wp import autoload

HOOKED = "import mergekit_wp.autoload as a, sys; a.install(); a.install(); "


def at_start(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def run(code, errors=None, **environment):
    """`errors`: the category of warnings that are errors, as by -W."""
    strict = f"import warnings; warnings.simplefilter('error', {errors}); " if errors else ""
    return warm().run(strict + code, **environment)


def test_start_imports_nothing_heavy():
    """An interpreter that never imports mergekit gets two finders and one small module."""
    code = HOOKED + (
        "print(sum(type(f).__name__ == '_Finder' for f in sys.meta_path), "
        "[m for m in ('torch', 'click', 'yaml', 'mergekit', 'importlib.util', 'logging') if m in sys.modules])"
    )
    done = at_start(code)
    assert done.stdout.strip() == "2 []", done.stderr


def test_disabled_by_the_environment():
    code = HOOKED + "print(sum(type(f).__name__ == '_Finder' for f in sys.meta_path))"
    assert at_start(code, MERGEKIT_WP_DISABLE="1").stdout.strip() == "0"
    assert at_start(code, MERGEKIT_WP_DISABLE="0").stdout.strip() == "2"


def test_registers_leaves_no_trace_and_warns_of_nothing():
    code = HOOKED + (
        "from mergekit.merge_methods import registry as r; "
        "print({'wp', 'widen'} <= set(r._METHODS), type(r.__loader__).__name__, type(r.__spec__.loader).__name__, "
        "sum(type(f).__name__ == '_Finder' for f in sys.meta_path)); "
        "import mergekit_wp.merge; mergekit_wp.merge.register(); print(len(r.registered_methods()))"
    )
    done = run(code, "Warning")
    first, count = done.stdout.split("\n")[:2]
    # The finder that is left waits for mergekit-evolve.
    assert first == "True SourceFileLoader SourceFileLoader 1", done.stderr
    assert int(count) > 10


@pytest.mark.parametrize("first", ["mergekit_wp.merge.methods.wp", "mergekit_wp.merge.methods.widen", "mergekit.merge"])
def test_any_order_of_imports(first):
    code = (
        HOOKED
        + f"import {first}; from mergekit.merge_methods.registry import _METHODS as m; print('wp' in m, 'widen' in m)"
    )
    done = run(code, "RuntimeWarning")
    assert done.stdout.strip() == "True True", done.stderr


def test_a_broken_method_leaves_mergekit_working():
    code = (
        "import sys; sys.modules['mergekit_wp.merge.methods.wp'] = None; "
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
    finder = autoload._Finder("mergekit.merge_methods.registry", autoload.register_methods)
    sys.meta_path.insert(0, finder)
    try:
        assert importlib.util.find_spec("json") is not None
        assert finder in sys.meta_path
        spec = finder.find_spec("mergekit.merge_methods.registry", package.__path__)
        assert spec.loader.get_filename(spec.name).endswith("registry.py")
        assert finder in sys.meta_path
    finally:
        sys.meta_path.remove(finder)


EVOLVE = "from mergekit.evo.genome import METHOD_PARAM_MAPS as m; print(m.get('wp'), 'widen' in m, m['ties']); "


@pytest.mark.parametrize("before", ["", "import mergekit.merge; ", "import mergekit.evo.genome; "])
def test_mergekit_evolve_knows_wp(before):
    """Whichever of the two modules comes first, and without importing anything that evolution needs."""
    left = "print(sum(type(f).__name__ == '_Finder' and 'evo' in f.module for f in sys.meta_path))"
    done = run(HOOKED + before + EVOLVE + left, "RuntimeWarning")
    assert done.stdout.split("\n")[:2] == ["['weight', 'scale'] False ['weight', 'density']", "0"], done.stderr


@pytest.mark.parametrize("order", [("{register}", "{evolve}"), ("{evolve}", "{register}")])
def test_register_tells_mergekit_evolve_too(order):
    """Where no .pth is read, or with the hook disabled."""
    lines = {"register": "import mergekit_wp.merge as w; w.register()", "evolve": "import mergekit.evo.genome"}
    code = "; ".join(order).format(**lines) + "; " + EVOLVE
    done = run(code, MERGEKIT_WP_DISABLE="1")
    assert done.stdout.startswith("['weight', 'scale'] False"), done.stderr
    assert run(lines["evolve"] + "; " + EVOLVE, MERGEKIT_WP_DISABLE="1").stdout.startswith("None False")


def test_an_entry_of_ones_own_is_kept_and_a_table_that_is_gone_is_a_warning():
    code = (
        "import mergekit.evo.genome as g, mergekit_wp.autoload as a; g.METHOD_PARAM_MAPS['wp'] = ['weight']; "
        "a.extend_evolve(); print(g.METHOD_PARAM_MAPS['wp']); del g.METHOD_PARAM_MAPS; a.extend_evolve()"
    )
    done = run(code, MERGEKIT_WP_DISABLE="1")
    assert done.returncode == 0
    assert done.stdout.strip() == "['weight']"
    assert "mergekit-evolve does not know this package's methods (AttributeError" in done.stderr
