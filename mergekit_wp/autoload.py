"""How the stock mergekit commands find `merge_method: wp` and the others with nothing imported by hand.

mergekit 0.1.5 has no plugin hook: a method must be registered after `mergekit.merge_methods.registry` has run
and before a recipe is planned. `mergekit_wp.pth` (Python >= 3.15: `mergekit_wp.start`), installed at the root
of site-packages, calls `install` at interpreter start. That puts a finder on `sys.meta_path`, which waits
for that one module, lets it load as usual, removes itself, and registers the methods. An interpreter that
never imports mergekit pays a fraction of a millisecond.

A second finder waits for mergekit-evolve, which searches the parameters of methods that it has in a table.

MERGEKIT_WP_DISABLE=1 turns it off. If a method cannot be loaded, a warning says why and mergekit goes on.

Only the standard library is imported here, and of that only what every interpreter has loaded already.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_REGISTRY, _GENOME = "mergekit.merge_methods.registry", "mergekit.evo.genome"
# Each method's name in a recipe, and the module whose `register` makes it known.
METHODS = {
    "wp": "mergekit_wp.merge.methods.wp",
    "widen": "mergekit_wp.merge.methods.widen",
    "aim": "mergekit_wp.merge.methods.aim",
    "wp_patch": "mergekit_wp.merge.methods.patch",
}

# What mergekit-evolve may search: numbers that each expert has of its own. `weight` must come first, where its search
# starts at 1/K; it starts the others at 1. The others have no such number.
EVOLVED = {"wp": ["weight", "scale"]}


def install() -> None:
    """Wait for mergekit's registry and for mergekit-evolve. Idempotent; never raises; does nothing when disabled."""
    if os.environ.get("MERGEKIT_WP_DISABLE", "0") not in ("", "0"):
        return
    _after(_REGISTRY, register_methods)
    _after(_GENOME, extend_evolve)


def install_evolve() -> None:
    """Wait for mergekit-evolve alone, whatever the environment says. Idempotent; never raises."""
    _after(_GENOME, extend_evolve)


def _after(module: str, action: Any) -> None:
    """Do this once the module has run: now, or when it is imported."""
    if module in sys.modules:
        action()
    elif not any(isinstance(finder, _Finder) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(module, action))


class _Finder:
    """Finds one module, through the other finders, and gives its spec a loader that acts afterwards."""

    def __init__(self, module: str, action: Any) -> None:
        self.module, self.action = module, action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.module:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader:
    """The module's own loader, and the finder's action after it has run."""

    def __init__(self, original: Any, finder: _Finder) -> None:
        self._original, self._finder = original, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def create_module(self, spec: Any) -> Any:
        return self._original.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # Here and not in find_spec: a spec may be looked up without being loaded.
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self._finder]
        module.__loader__ = self._original
        module.__spec__.loader = self._original
        self._original.exec_module(module)
        self._finder.action()


def register_methods() -> None:
    """Register every method that can be loaded; warn of those that cannot. Never raises; idempotent."""
    if _half_imported("mergekit_wp.merge.methods.base", "register_method"):
        return  # its own import made mergekit load; it calls this at its end
    for name, module in METHODS.items():
        if not _half_imported(module, "register"):
            _register(name, module)


def extend_evolve() -> None:
    """Put `EVOLVED` into mergekit-evolve's table, unless an entry is there. Never raises; idempotent."""
    try:
        table = sys.modules[_GENOME].METHOD_PARAM_MAPS
        for name, parameters in EVOLVED.items():
            table.setdefault(name, list(parameters))
    except Exception as error:  # whatever it is, mergekit-evolve must go on working
        _warn("mergekit-evolve does not know this package's methods", error)


def _half_imported(module: str, last: str) -> bool:
    """It is being imported, and has not come to the definition of `last`."""
    return sys.modules.get(module) is not None and not hasattr(sys.modules[module], last)


def _register(name: str, module: str) -> None:
    try:
        from importlib import import_module

        import_module(module).register()
    except Exception as error:  # whatever it is, mergekit's own methods must go on working
        _warn(f"`merge_method: {name}` is not available", error)


def _warn(what: str, error: Exception) -> None:
    import warnings

    from mergekit_wp.foreign import one_line

    said = one_line(error)[:300]
    # Not logging: a first logging call would configure the root logger before mergekit does.
    warnings.warn(
        f"mergekit-wp: {what} ({type(error).__name__}: {said}); mergekit's own methods are not affected. Reinstall "
        "mergekit-wp, or set MERGEKIT_WP_DISABLE=1 to silence this.",
        RuntimeWarning,
        stacklevel=3,
    )
