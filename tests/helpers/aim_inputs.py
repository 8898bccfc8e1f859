"""Inputs of AIM: a recipe, and activations files with random means."""

from __future__ import annotations

import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.merge.activations import Activations, Calibration, write_activations
from mergekit_wp.scores import ModelId

EMBEDDING = "model.embed_tokens.weight"


def write_random_activations(world, seed=0):
    """Of every weight but the embedding; 0 in the first channel and in all of one module, as if nothing came there."""
    base = Checkpoint.open(str(world.base))
    generator = torch.Generator().manual_seed(seed)
    means = {
        name: torch.rand(header.shape[-1], generator=generator)
        for name, header in base.tensors.items()
        if name.endswith("weight") and name != EMBEDDING
    }
    for mean_C in means.values():
        mean_C[0] = 0
    means["model.layers.1.mlp.down_proj.weight"].zero_()
    about = ModelId(str(world.base), None, base.fingerprint.config, base.fingerprint.tensors)
    path = world.root / "activations.safetensors"
    write_activations(
        Activations(Calibration(about, "texts", 1, 1, 8, "float32", "cpu", {}, "2026-11-21"), means), path
    )
    return path


def recipe(world, omega=None, **more):
    given = {"activations": str(world.root / "activations.safetensors")}
    return {
        "merge_method": "aim",
        "base_model": str(world.base),
        "models": [{"model": str(world.expert(0))}],
        "parameters": given if omega is None else given | {"omega": omega},
        **more,
    }
