"""`make demo`: the whole loop on the miniature world, and the report it ends with."""
