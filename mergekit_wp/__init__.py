"""mergekit-wp: score where a fine-tune put a capability, and merge experts by that knowledge.

This file stays free of heavy imports: the `.pth` hook imports it at every interpreter start.
"""

__version__ = "0.1.0"
