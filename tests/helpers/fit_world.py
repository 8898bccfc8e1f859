"""What tests of the fit share: a base with experts on disk, a merge by the formula, random weights."""

from __future__ import annotations

import copy

import tiny
import torch
from streamed_world import resident
from torch.nn import functional

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.fit.objective import batch_lessons, read_lessons
from mergekit_wp.fit_file import FusionWeights
from mergekit_wp.geometry import Geometry, Kind, text_name
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.models.merged import MergedStack

ALONE = ProcessGroup()
V = 97
# Ragged prompts and answers of two experts, and of the base.
PROMPTS = [[[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]], [[3, 4], [20, 21, 22, 23], [30, 31]], [[60, 61, 62], [63, 64]]]
ANSWERS = [[[40, 41], [42]], [[43, 44, 45, 46], [47, 2], [48]], [[70], [71, 72]]]


def save_experts(root, kind, count=2, extra_rows=0, dtype=torch.float32):
    """root/base and root/expert0, ...; the first expert has `extra_rows` more."""
    base = tiny.random_model(kind, seed=1)
    folders = [tiny.save(base, root / "base", dtype)]
    for k in range(count):
        expert = tiny.fine_tuned(base, seed=2 + k)
        if extra_rows and k == 0:
            tiny.add_rows(expert, extra_rows)
        folders.append(tiny.save(expert, root / f"expert{k}", dtype))
    return folders


def geometry_of(folder) -> Geometry:
    return Checkpoint.open(str(folder)).geometry


def random_weights(geometry: Geometry, count: int, seed: int = 0) -> FusionWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, geometry.layers, geometry.count(kind)) for kind in Kind]
    heads, neurons = (2 * torch.rand(shape, generator=generator) for shape in shapes)
    return FusionWeights(heads, neurons, 2 * torch.rand(count, generator=generator))


def merged_parameters(base, experts, weights: FusionWeights, geometry: Geometry):
    """{name in the model: tensor} of the merge, slice by slice from the formula; differentiable in the weights."""
    own = {text_name(name): (name, p.detach()) for name, p in base.named_parameters() if text_name(name)}
    after = [{text_name(name): p.detach() for name, p in e.named_parameters()} for e in experts]
    r, d = geometry.group_size, geometry.head_dim
    Q, KV = geometry.heads * d, geometry.kv_heads * d
    found = {}
    taken = {}  # tensor -> [(where, weights of the K experts)]

    def take(name, where, numbers_K):
        if name in own:
            taken.setdefault(name, []).append((where, numbers_K))

    for layer in range(geometry.layers):
        for kind, table in ((Kind.HEAD, weights.heads_KLH), (Kind.NEURON, weights.neurons_KLF)):
            for index in range(geometry.count(kind)):
                for name, where in geometry.owned_slices(kind, layer, index):
                    take(name, where, table[:, layer, index])
        inside = f"model.layers.{layer}.self_attn"
        for group in range(geometry.kv_heads):
            mean_K = weights.heads_KLH[:, layer, group * r : (group + 1) * r].mean(-1)
            begin, end = group * d, (group + 1) * d
            for what in ("weight", "bias"):
                for key in ("k", "v"):
                    take(f"{inside}.{key}_proj.{what}", slice(begin, end), mean_K)
                for first in (Q, Q + KV):
                    take(f"{inside}.qkv_proj.{what}", slice(first + begin, first + end), mean_K)
    for name, (full, before) in own.items():
        total = before
        for k, expert in enumerate(after):
            change = expert[name][: len(before)] - before
            share = weights.rest_K[k] * torch.ones_like(before)
            for where, numbers_K in taken.get(name, ()):
                share[where] = numbers_K[k]
            total = total + share * change
        found[full] = total
    return found


def merged_by_hand(base, experts, weights: FusionWeights, geometry: Geometry):
    """A model with the parameters of `merged_parameters`."""
    merged = copy.deepcopy(base)
    for name, tensor in merged_parameters(base, experts, weights, geometry).items():
        merged.get_parameter(name).data = tensor
    return merged


def quiet(_done):
    pass


class LessonWorld:
    """Base and two experts, their lessons (with `keep` the base's too), and the reference; all prompts begin with
    `alike`."""

    def __init__(self, root, kind, opened=resident, extra_rows=0, keep=False, alike=()):
        self.folders = save_experts(root, kind, extra_rows=extra_rows)
        self.geometry = geometry_of(self.folders[0])
        base, *experts = map(opened, self.folders)
        self.merged = MergedStack(base, experts, self.geometry, random_weights(self.geometry, 2))
        self.lessons = []
        for j, teacher in enumerate([*experts, base] if keep else experts):
            prompts = [[*alike, *prompt] for prompt in PROMPTS[j]]
            self.lessons += read_lessons(teacher, j, prompts, ANSWERS[j], 2, quiet)
        self.batches, self.apart = (
            batch_lessons(self.lessons, 2, (base, *experts), by_prompt=by_prompt) for by_prompt in (False, True)
        )

    def by_hand(self, weights, numbers=None):
        """KL_t(x | merge) of every lesson, differentiable in the weights."""
        base, *experts = (resident(folder).model for folder in self.folders)
        parameters = merged_parameters(base, experts, weights, self.geometry)
        found = []
        for lesson in self.lessons:
            ids = torch.tensor([lesson.prompt + lesson.answer[:-1]])
            reads = slice(len(lesson.prompt) - 1, None)
            own = torch.func.functional_call(base, parameters, (ids,)).logits[0, reads, :V]
            with torch.no_grad():
                wanted = [*experts, base][lesson.teacher](ids).logits[0, reads, :V]
            own, wanted = (functional.log_softmax(x, -1) for x in (own, wanted))
            found.append((wanted.exp() * (wanted - own)).sum(-1).mean())
        return torch.stack(found)
