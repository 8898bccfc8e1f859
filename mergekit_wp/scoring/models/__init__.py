"""A model as a stack of layers: `load` decides (`offload`: resident or streamed), `layerwise` is what both can do.

`streaming` reads layers from disk, with a LoRA's share added (`lora`); `merged` is a merge that is never written, its
layers made from those of base and experts while they are read; `precision` says in which dtypes.
"""
