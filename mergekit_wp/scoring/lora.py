"""A LoRA laid over its base one tensor at a time, without the model: W + scaling * B A.

peft builds its layers over a model without weights and computes the products, so rank and alpha patterns, rsLoRA and
transposed layers are peft's own. What a sum onto single weights cannot express is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergekit_wp.adapters import vocabulary_rows
from mergekit_wp.errors import BadInput, out_of_memory, reason_of
from mergekit_wp.weightfiles import ADAPTER, read_tensors

_RESIDENT = "use --offload none, which merges it whole"
# Beside the rank and alpha: settings that change more than W + scaling * B A does, with the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    # PiSSA, OLoRA and their kin also move the base's weights when peft loads them.
    "init_lora_weights": (True, False, None, "gaussian", "eva"),
}


class Adapter:
    """The LoRA `adapter` in a folder, its factors on `device` in float32."""

    def __init__(self, name: str, adapter: str, skeleton: nn.Module, device: torch.device):
        """Put the LoRA over `skeleton`, a model without weights that is spoilt by it; `name` is used in errors.

        Raises `BadInput` for an adapter that is missing, does not fit, or is more than plain LoRA.
        """
        self.name = name
        layers = _layers(name, adapter, skeleton, device)
        self._layers = {f"{module}.weight": layer for module, layer in layers.items()}

    @property
    def targets(self) -> set[str]:
        """Names of the tensors that it changes."""
        return set(self._layers)

    @torch.no_grad()
    def merge(self, key: str, weight: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
        """`weight`, the float32 base weight of the target `key`, with the LoRA's share, in the dtype `stored`.

        That is the base's own, in which a merged model is saved (by mergekit's loader too). Bit for bit what peft
        writes there.
        """
        from peft.tuners.lora import Embedding

        layer = self._layers[key]
        delta = layer.get_delta_weight(layer.active_adapters[0])
        if isinstance(layer, Embedding):
            delta = delta.to(stored)
        return weight.add_(delta).to(stored)


def _layers(name: str, adapter: str, skeleton: nn.Module, device: torch.device) -> dict[str, Any]:
    """peft's LoRA layers by the name of the module they wrap."""
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora import Embedding, Linear, LoraLayer

    # peft moves factors to where the base's weights are: there, but one zero seen in every place.
    zero = torch.zeros((), device=device)
    skeleton.load_state_dict(
        {key: zero.expand(value.shape) for key, value in skeleton.state_dict().items()}, assign=True
    )
    try:
        config = PeftConfig.from_pretrained(adapter)
        _check_plain(name, config)
        _check_rows(name, adapter, skeleton)
        model: Any = PeftModel.from_pretrained(
            skeleton, adapter, config=config, low_cpu_mem_usage=True, torch_device=str(device)
        )
    except BadInput:
        raise
    except Exception as error:  # peft raises many types for an adapter that does not fit
        if out_of_memory(error):
            raise BadInput(f"{name}: its LoRA does not fit on {device}; use another device.") from error
        raise BadInput(f"{name}: the LoRA could not be merged into its base ({reason_of(error)}).") from error
    if any(p.data_ptr() != zero.data_ptr() for key, p in model.named_parameters() if "lora_" not in key):
        raise BadInput(
            f"{name}: the LoRA carries weights of the base, such as embeddings (save_embedding_layers), and cannot be "
            f"streamed; {_RESIDENT}."
        )
    found = {}
    for module, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if type(layer) not in (Linear, Embedding) or layer.lora_variant:
            raise BadInput(f"{name}: {module} is more than plain LoRA, which cannot be streamed; {_RESIDENT}.")
        factors = [p for part in layer.adapter_layer_names for p in getattr(layer, part).parameters()]
        if any(factor.is_meta for factor in factors):
            raise BadInput(f"{name}: the LoRA lacks its tensors for {module}; download it again.")
        if not all(torch.isfinite(factor).all() for factor in factors):
            raise BadInput(f"{name}: the LoRA's tensors for {module} hold a NaN or an infinity; download it again.")
        found[module] = layer
    return found


def _check_rows(name: str, adapter: str, skeleton: Any) -> None:
    rows, own = vocabulary_rows(read_tensors(Path(adapter), ADAPTER)), skeleton.config.vocab_size
    if rows not in (None, own):
        raise BadInput(
            f"{name}: the LoRA was made for {rows} vocabulary rows, its base has {own}, so it cannot be streamed; "
            f"{_RESIDENT}."
        )


def _check_plain(name: str, config: Any) -> None:
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        raise BadInput(f"{name}: a {config.peft_type} adapter cannot be streamed, only LoRA can; {_RESIDENT}.")
    for field, plain in _PLAIN.items():
        if (value := getattr(config, field, None)) not in plain:
            raise BadInput(f"{name}: a LoRA with {field} {value!r} cannot be streamed; {_RESIDENT}.")
