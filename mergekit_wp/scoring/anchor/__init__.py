"""Where a capability's direction is read: `directions` of every layer, and `search` for the layer (`--layer auto`).

The search steers the base (`steering`) and grades what it answers (`graders`). `cli` is wp-anchor.
"""
