"""An adapter as peft would write it, from tensors."""

from __future__ import annotations

import torch

PROJECTIONS = ("q_proj", "o_proj", "up_proj", "down_proj")


def write(folder, base, save_embedding_layers=False, **options):
    """A random LoRA over `base`."""
    import peft
    from transformers import AutoModelForCausalLM

    options = {"r": 2, "lora_alpha": 4, "target_modules": list(PROJECTIONS), **options}
    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter.dtype)
    wrapped.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder
