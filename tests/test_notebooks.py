"""The notebooks of the documentation run from top to bottom, on models that they make themselves."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 100_000  # with the stored outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_stores_what_it_gave(path):
    """A cell that ends in a value has it stored; none has stored an error."""
    assert path.stat().st_size < MOST_BYTES
    space: dict[str, object] = {}
    ran = 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(path), "exec"), space)
        value = None if last is None else eval(compile(ast.Expression(last.value), str(path), "eval"), space)
        shown = [output for output in cell["outputs"] if output["output_type"] == "execute_result"]
        assert bool(shown) == (value is not None)
        assert not [output for output in cell["outputs"] if output["output_type"] == "error"]
        ran += 1
    assert ran >= 5


def test_there_is_one_of_each():
    assert [path.stem for path in NOTEBOOKS] == ["merge", "read_a_finetune", "score"]
