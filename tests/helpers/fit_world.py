"""What tests of the fit share: a base with experts on disk, a merge by the formula, random weights."""

from __future__ import annotations

import copy

import tiny
import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.fit.merged import FusionWeights
from mergekit_wp.geometry import Geometry, Kind, text_name


def save_experts(root, kind, count=2, extra_rows=0):
    """root/base and root/expert0, ...; the first expert has `extra_rows` more."""
    base = tiny.random_model(kind, seed=1)
    folders = [tiny.save(base, root / "base")]
    for k in range(count):
        expert = tiny.fine_tuned(base, seed=2 + k)
        if extra_rows and k == 0:
            tiny.add_rows(expert, extra_rows)
        folders.append(tiny.save(expert, root / f"expert{k}"))
    return folders


def geometry_of(folder) -> Geometry:
    return Checkpoint.open(str(folder)).geometry


def random_weights(geometry: Geometry, count: int, seed: int = 0) -> FusionWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, geometry.layers, geometry.count(kind)) for kind in Kind]
    heads, neurons = (2 * torch.rand(shape, generator=generator) for shape in shapes)
    return FusionWeights(heads, neurons, 2 * torch.rand(count, generator=generator))


def merged_by_hand(base, experts, weights: FusionWeights, geometry: Geometry):
    """A copy of the model `base` with every component's slices moved by the formula, one after the other."""
    merged = copy.deepcopy(base)
    own = {text_name(name): p for name, p in merged.named_parameters() if text_name(name)}
    before = {name: p.detach().clone() for name, p in own.items()}
    after = [{text_name(name): p.detach() for name, p in e.named_parameters()} for e in experts]

    def move(name, where, numbers):
        for number, expert in zip(numbers, after, strict=True):
            change = expert[name][: len(before[name])] - before[name]
            own[name].data[where] += float(number) * change[where]

    r, d = geometry.group_size, geometry.head_dim
    Q, KV = geometry.heads * d, geometry.kv_heads * d
    covered = set()
    for layer in range(geometry.layers):
        for kind, table in ((Kind.HEAD, weights.heads_KLH), (Kind.NEURON, weights.neurons_KLF)):
            for index in range(geometry.count(kind)):
                for name, where in geometry.owned_slices(kind, layer, index):
                    if name in own:
                        move(name, where, table[:, layer, index])
                        covered.add(name)
        for group in range(geometry.kv_heads):
            mean_K = weights.heads_KLH[:, layer, group * r : (group + 1) * r].mean(-1)
            rows = slice(group * d, (group + 1) * d)
            for what in ("weight", "bias"):
                for key in ("k", "v"):
                    if (name := f"model.layers.{layer}.self_attn.{key}_proj.{what}") in own:
                        move(name, rows, mean_K)
                        covered.add(name)
                fused = f"model.layers.{layer}.self_attn.qkv_proj.{what}"
                if fused in own:
                    for begin in (Q, Q + KV):
                        move(fused, slice(begin + group * d, begin + (group + 1) * d), mean_K)
    for name in own.keys() - covered:
        move(name, ..., weights.rest_K)
    return merged
