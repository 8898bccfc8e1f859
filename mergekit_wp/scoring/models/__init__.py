"""A model as a stack of layers: `load` decides (`offload`: resident or streamed), `layerwise` is what both can do.

`streaming` reads layers from disk (`shards`), with a LoRA's share added (`lora`); `merged` is a merge that is never
written, its layers made from those of base and experts while they are read; `exchanged` is one whose components are
each the base's or the expert's; `precision` says in which dtypes.
"""
