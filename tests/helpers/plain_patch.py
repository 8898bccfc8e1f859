"""A set patch by hand: what a head and a neuron own, written out from the definition, without `geometry`."""

from __future__ import annotations

import json

from merge_world import FUSED, tensors_of


def patched(recipient, donor, heads, neurons):
    """The recipient's tensors with the slices of heads and neurons, lists of (layer, index), from the donor's."""
    config = json.loads((recipient / "config.json").read_text())
    root = "language_model.model" if "text_config" in config else "model"
    config = config.get("text_config", config)
    H, KV, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    F = config["intermediate_size"]
    out, other = tensors_of(recipient), tensors_of(donor)

    def take(layer, module, start, count, columns=False):
        short = module.rpartition(".")[2]
        fused, below = FUSED.get(short, ("", 0))
        name = f"{root}.layers.{layer}.{module}"
        if fused and f"{name.rpartition('.')[0]}.{fused}.weight" in out:
            start += below * F if fused == "gate_up_proj" else (0, H, H + KV)[below] * d
            name = f"{name.rpartition('.')[0]}.{fused}"
        if columns:
            out[f"{name}.weight"][:, start : start + count] = other[f"{name}.weight"][:, start : start + count]
            return
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in out:
                out[f"{name}.{kind}"][start : start + count] = other[f"{name}.{kind}"][start : start + count]

    for layer, h in heads:
        take(layer, "self_attn.q_proj", h * d, d)
        take(layer, "self_attn.o_proj", h * d, d, columns=True)
    for layer, j in neurons:
        take(layer, "mlp.gate_proj", j, 1)
        take(layer, "mlp.up_proj", j, 1)
        take(layer, "mlp.down_proj", j, 1, columns=True)
    return out


def highest(table, count):
    """The (layer, index) of the `count` highest entries of a table [L, n]; ties in reading order."""
    places = [(-float(score), layer, i) for layer, row in enumerate(table) for i, score in enumerate(row)]
    return [(layer, i) for _, layer, i in sorted(places)[:count]]
