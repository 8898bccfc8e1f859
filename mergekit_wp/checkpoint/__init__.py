"""Model folders as people have them: the only code that decides what a name, a file, a config or a tensor's name means.

references   a name -> a folder, a Hub name, a LoRA over one of them      hub   which files are the model's; downloads
weights      which weight files of a folder count, their headers          model_config   what transformers builds
folder       a model folder whole: config, tensors, fingerprints; reads no weights
vocabulary   embeddings and head, one tensor or two, and whose rows       adapters   a LoRA merged into its base
"""
