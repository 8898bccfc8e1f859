"""Judge the functions that models of the miniature world write, in the sandbox of `mergekit_wp.sandbox`.

The process returns what the function returned; what is right stays here and is compared here, so printing a
verdict earns nothing.
"""

from __future__ import annotations

from mergekit_wp.sandbox import call_function
from mergekit_wp.scoring.anchor.graders import returns_right as passes

__all__ = ["call_function", "passes"]
