"""Judge the functions that models of the miniature world write, in the sandbox of `mergekit_wp.sandbox`.

The process returns what the function returned; what is right stays here and is compared here, so printing a
verdict earns nothing.
"""

from __future__ import annotations

import json
from typing import Any

from mergekit_wp.sandbox import call_function

__all__ = ["call_function", "passes"]


def passes(code: str, function: str, cases: list[list[Any]]) -> bool:
    """Whether the function returns the expected result, and of the same type, in every [argument, expected]."""
    results = call_function(code, function, [argument for argument, _ in cases])
    # JSON text tells 1 from true and 4 from 4.0, which == does not.
    return results is not None and json.dumps(results) == json.dumps([expected for _, expected in cases])
