"""`make table3`: the structure of the paper's table of merges (METHOD.md 6), measured on the miniature world."""
