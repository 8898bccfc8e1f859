"""What is run from a checkout and is not in the wheel: the miniature world, the demo, the tables, the benchmarks."""
