"""What config.json says of quantised weights, and whether the weights are quantised.

A fine-tune by QLoRA that was merged to 16 bits often keeps the base's `quantization_config`. Its weights are plain
floats, and transformers would quantise them anew or look for tensors that are not there: such a mark is left aside.
Of weights that are quantised no differences can be formed, so scoring refuses them by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_wp.checkpoint import Checkpoint
from mergekit_wp.components import text_name
from mergekit_wp.errors import BadInput, shown

MARKS = ("quantization_config", "compression_config")
PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""safetensors' names of the dtypes that hold weights as they are."""
# These quantise while they compute, so their weights may lie in the file as plain floats.
_AT_RUN_TIME = frozenset({"bitnet", "fp_quant"})
_WEIGHTS = (".weight", ".bias")
_TABLES = ("inv_freq", "rope.freqs")  # rotary, which old checkpoints store


def check_plain(checkpoint: Checkpoint) -> None:
    """Raise `BadInput` where the decoder's weights are quantised, whatever config.json says of it."""
    marks = _marks(checkpoint.config)
    method = next((str(mark.get("quant_method", "")) for mark in marks if isinstance(mark, Mapping)), "")
    found = _quantised_tensor(checkpoint, marked=bool(marks))
    if found is None and method not in _AT_RUN_TIME:
        return
    why = [f"the tensor {found}"] if found else []
    why += [f"config.json names the method {shown(method)}"] if method else []
    raise BadInput(
        f"{checkpoint.name}: its weights are quantised ({', '.join(why)}), and differences are formed of weights as "
        "they were trained; take the model that it was made from, or dequantise it to bfloat16 and save that."
    )


def plain_config(checkpoint: Checkpoint, remote_code: bool) -> Any:
    """The config as transformers reads it, without a mark that the weights contradict. Raises what it raises."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=remote_code)
    if _marks(checkpoint.config) and _quantised_tensor(checkpoint, marked=True) is None:
        for part in (config, config.get_text_config()):
            for mark in MARKS:
                if hasattr(part, mark):
                    delattr(part, mark)
    return config


def _marks(config: Mapping[str, Any]) -> list[Any]:
    """The marks of the whole and of what is nested in it (`text_config`)."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return [part[mark] for part in parts for mark in MARKS if part.get(mark)]


def _quantised_tensor(checkpoint: Checkpoint, marked: bool) -> str | None:
    """The first of the decoder's tensors that plain weights would not have, with its dtype; None where all are plain.

    marked: config.json speaks of quantised weights, so a scale or a zero point of its own tells as well.
    """
    ours = [name for name in sorted(checkpoint.tensors) if text_name(name) and not name.endswith(_TABLES)]
    weights = [name for name in ours if name.endswith(_WEIGHTS)]
    odd = [name for name in weights if checkpoint.tensors[name].dtype not in PLAIN]
    odd += [name for name in ours if marked and not name.endswith(_WEIGHTS)]
    return f"{odd[0]}, stored as {checkpoint.tensors[odd[0]].dtype}" if odd else None
