"""Scores: of every head and neuron, the share of the gap between base and expert that it restores when it alone is put
in.

    config -> pairs -> prompt_format -> batching -> score (the run, from here to the score file)
      anchor/       directions, steering, the search for the anchor layer
      passes        both models forward; then, by method,
      first_order   attr, from gradients          patching   writeback, atp (first order); exact, ap (one by one)
      convert       wp-pairs: other people's rows become pairs
    over packing (prompts in one row, where nothing is kept by prompt), sweep (layer by layer, with an activation
    cache), hooks (one layer and what is kept of it), metrics (what is read, gaps), accumulator (sums of a task), resume
    (finished layers), distributed

`models/` holds a model resident or streams its layers from disk.
"""
