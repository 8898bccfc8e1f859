"""How the code lies: no circle of imports, nothing imported from above, one name for one thing.

The import graph is read off the source, imports inside functions included; those for type checkers alone do not count.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import mergekit_wp

ROOT = Path(mergekit_wp.__file__).parents[1]
# What a part may import: itself, and the parts before it. Top-level modules (but those that are named) and `checkpoint`
# are the first part; what `__init__` offers lazily does not count.
PARTS = ("", "sandbox", "merge", "scoring", "calibrate", "fit", "eval", "study", "push", "pipeline", "api")
# Every package has these; they are no topics.
SHARED_NAMES = {"__init__", "__main__", "cli"}


def sources():
    for top in ("mergekit_wp", "experiments"):
        for path in sorted((ROOT / top).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


SOURCES = dict(sources())


def imports_of(path):
    tree = ast.parse(path.read_text())
    for_types = {
        id(inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inside in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in SOURCES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH = {name: {other for other in imports_of(path) if other in SOURCES} - {name} for name, path in SOURCES.items()}


def part_of(module):
    """Its place in `PARTS`; experiments come after all."""
    words = module.split(".")
    if words[0] == "experiments":
        return len(PARTS)
    return PARTS.index(words[1]) if len(words) > 1 and words[1] in PARTS else 0


def test_no_circle_of_imports():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_nothing_is_imported_from_above():
    upward = [(name, other) for name, seen in GRAPH.items() for other in seen if part_of(other) > part_of(name)]
    assert not upward


def test_a_file_is_found_by_its_name():
    """One module of a name, and one public class of a name."""
    modules, classes = defaultdict(list), defaultdict(list)
    for name, path in SOURCES.items():
        if path.stem not in SHARED_NAMES:
            modules[path.stem].append(name)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(name)
    assert not {stem: found for stem, found in (modules | classes).items() if len(found) > 1}


def test_the_package_imports_without_torch():
    """The `.pth` hook imports it at every start of an interpreter."""
    import subprocess

    heavy = ["torch", "transformers", "mergekit", "lm_eval", "click", "numpy", "pydantic"]
    code = f"import mergekit_wp, mergekit_wp.autoload, sys; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_says_what_is_inside():
    for name, path in SOURCES.items():
        if path.stem == "__init__":
            assert ast.get_docstring(ast.parse(path.read_text())), name
