"""Names of a checkpoint's tensors that only some programs understand, told before anything is read.

transformers fills a tensor that it does not find with random numbers; others it finds under a name that mergekit and
vLLM do not know (without `model.`, say). `components.text_name` says which names are right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_wp.components import HEAD, SUPPORTED, layer_of, text_name

_OF_BACKBONE = ("layers.", "embed_tokens.", "norm.")
_LAYER = re.compile(r"(?:.*\.)?layers\.\d+\.")
# What is left in the names of tensors by those who save a model in its wrapping, and what to do.
_AT_START = {
    "base_model.model.": "peft's, whose LoRA is not merged; save what merge_and_unload() returns",
    "module.": "that of DataParallel, DDP or DeepSpeed; save `model.module`, or take it off all the names",
}
_ANYWHERE = {
    "_orig_mod.": "torch.compile's; save the model that was compiled, or take it out of all the names",
    "_fsdp_wrapped_module.": "FSDP's; save a full state dict, or take it out of all the names",
    "_checkpoint_wrapped_module.": "activation checkpointing's; take it out of all the names",
    "base_layer.": "peft's, whose LoRA is not merged; save what merge_and_unload() returns",
}


def name_trouble(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """What is wrong with the names of a checkpoint's tensors, and what to do; None when nothing is.

    Of an architecture that is not supported, which wp-eval may be given, only the wrappings are known.
    """
    names = list(names)
    for name in names:
        whose = [(mark, text) for mark, text in _AT_START.items() if name.startswith(mark)]
        whose += [(mark, text) for mark, text in _ANYWHERE.items() if f".{mark}" in f".{name}"]
        if whose:
            return f"its tensors are named like {name}: the `{whose[0][0]}` in it is {whose[0][1]}."
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and architectures[0] in SUPPORTED):
        return None
    odd = [n for n in names if n.startswith(_OF_BACKBONE) or (n.endswith(f".{HEAD}") and text_name(n) != HEAD)]
    layers = [name for name in names if _LAYER.match(name)]
    if odd or (layers and not any(layer_of(name) is not None for name in layers)):
        return (
            f"its tensors are named like {(odd or layers)[0]}, and a causal LM's like model.layers.0... and {HEAD}; "
            "load it with transformers' AutoModelForCausalLM and save it again, if that finds them all, or rename them."
        )
    return None
