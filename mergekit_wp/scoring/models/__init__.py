"""A model as a stack of layers: `load` decides (`offload`: resident or streamed), `layerwise` is what both can do.

`streaming` reads layers from disk, with a LoRA's share added (`lora`); `precision` says in which dtypes.
"""
