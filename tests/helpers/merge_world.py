"""Tiny bases, experts and score files on disk for the merge tests, and the naive reference to judge them by."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fit_example
import tiny
import torch
import yaml
from safetensors.torch import load_file

from mergekit_wp.checkpoint.folder import Checkpoint, fingerprint_of
from mergekit_wp.fit_file import write_fit
from mergekit_wp.geometry import Geometry
from mergekit_wp.scores import ModelId, ScoreMeta, Scores, TaskMeta, TaskScores, UtilityStats, write_scores


def write_random_scores(path: Path, base: str, expert: str, seed: int, geometry: Geometry | None = None) -> Path:
    """A valid score file for this pair, with random scores, a third of them negative."""
    geometry = geometry or Checkpoint.open(base.partition("+")[0]).geometry
    generator = torch.Generator().manual_seed(seed)
    meta = ScoreMeta(
        base=identity(base),
        expert=identity(expert),
        geometry=geometry,
        tasks={"t": TaskMeta(1, 1, {"anchor": UtilityStats(1, 0, 0.5)})},
        method="attr",
        utility="anchor",
        gap="sample",
        split="half",
        anchor_layer=1,
        dtype="float32",
        device="cpu",
        seed=seed,
        versions={},
        date="2026-11-21T00:00:00Z",
    )
    heads = torch.rand(geometry.layers, geometry.heads, generator=generator) - 0.33
    neurons = torch.rand(geometry.layers, geometry.neurons, generator=generator) - 0.33
    scores = TaskScores(heads, neurons, torch.zeros(geometry.d_model))
    write_scores(Scores.from_tasks(meta, {"t": scores}), path)
    return path


def write_random_fit(path: Path, base: str, experts: Sequence[str], seed: int = 0) -> Path:
    """A valid fit file for these models in this order, with random weights."""
    about = fit_example.meta(identity(base), [identity(name) for name in experts], Checkpoint.open(base).geometry)
    write_fit(fit_example.example(about, seed), path)
    return path


def identity(name: str) -> ModelId:
    print_ = fingerprint_of(name)
    return ModelId(name, None, print_.config, print_.tensors)


# Phi-3's tensors, and how many projections lie above this one there.
FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


@dataclass
class World:
    """root/base, root/e0..., root/e0.safetensors...; `recipe` writes a YAML about them."""

    root: Path
    kind: str
    experts: int = 2
    dtypes: list[torch.dtype] = field(default_factory=list)
    extra_rows: list[int] = field(default_factory=list)

    def build(self, **overrides: Any) -> World:
        dtypes = self.dtypes or [torch.float32] * (self.experts + 1)
        rows = self.extra_rows or [0] * self.experts
        base = tiny.random_model(self.kind, seed=1, **overrides)
        tiny.save(base, self.root / "base", dtypes[0])
        for k in range(self.experts):
            # A copy: tiny models share their config object, which added rows change.
            expert = tiny.fine_tuned(copy.deepcopy(base), seed=10 + k, size=0.5)
            if rows[k]:
                tiny.add_rows(expert, rows[k])
            tiny.save(expert, self.root / f"e{k}", dtypes[k + 1])
            write_random_scores(self.score(k), str(self.base), str(self.expert(k)), seed=k)
        return self

    @property
    def base(self) -> Path:
        return self.root / "base"

    def expert(self, k: int) -> Path:
        return self.root / f"e{k}"

    def score(self, k: int) -> Path:
        return self.root / f"e{k}.scores.safetensors"

    def config(self, own: Sequence[dict[str, Any]] = (), **more: Any) -> dict[str, Any]:
        """A recipe for wp; `own`: parameters of each expert beside its scores."""
        models = [
            {"model": str(self.expert(k)), "parameters": {"scores": str(self.score(k)), **(own[k] if own else {})}}
            for k in range(self.experts)
        ]
        return {"merge_method": "wp", "base_model": str(self.base), "models": models, **more}

    @property
    def fit(self) -> Path:
        return self.root / "fit.safetensors"

    def write_fit(self, order: Sequence[int], seed: int = 0) -> Path:
        """A fit file of the experts in this order."""
        return write_random_fit(self.fit, str(self.base), [str(self.expert(k)) for k in order], seed)

    def fitted(self, own: Sequence[dict[str, Any]] = (), **more: Any) -> dict[str, Any]:
        """The same merge by `fit`; `more` are parameters of the whole."""
        config = self.widen(merge_method="wp", parameters={"fit": str(self.fit), **more})
        for model, parameters in zip(config["models"], own, strict=False):
            model["parameters"] = parameters
        return config

    def widen(self, **more: Any) -> dict[str, Any]:
        """The same merge without scores."""
        models: list[dict[str, Any]] = [{"model": str(self.expert(k))} for k in range(self.experts)]
        return {"merge_method": "widen", "base_model": str(self.base), "models": models, **more}

    def recipe(self, config: dict[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
        path = self.root / name
        path.write_text(yaml.safe_dump(config or self.config()))
        return path


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def reference(
    world: World,
    experts: list[int] | None = None,
    prior: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    order: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """METHOD.md 4, component by component, in float64: theta_base + sum_k scale_k alpha_k (theta_k - theta_base).

    prior: the experts' weights, with which their scores are multiplied before they are shared out.
    order: the experts of the fit file, whose weights then are the alphas (METHOD.md 6).
    """
    experts = list(range(world.experts)) if experts is None else experts
    prior = [1.0] * len(experts) if prior is None else prior
    scales = [1.0] * len(experts) if scales is None else scales
    whole = Checkpoint.open(str(world.base)).config
    config, root = whole.get("text_config", whole), "language_model.model" if "text_config" in whole else "model"
    H, KV, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    F = config["intermediate_size"]
    base = {k: v.double() for k, v in tensors_of(world.base).items()}
    tuned = [{k: v.double() for k, v in tensors_of(world.expert(k)).items()} for k in experts]
    scores = [] if order else [load_file(world.score(k)) for k in experts]

    fit = load_file(world.fit) if order else {}

    def share(kind: str, layer: int, index: int) -> list[float]:
        if order:
            return [float(fit[kind][list(order).index(k), layer, index]) for k in experts]
        positive = [w * max(float(s[kind][layer, index]), 0.0) for w, s in zip(prior, scores, strict=True)]
        total = sum(positive)
        return [p / total for p in positive] if total > 0 else [w / sum(prior) for w in prior]

    def mixed(name: str, where: Any, weights: list[float]) -> torch.Tensor:
        theta = base[name][where].clone()
        for weight, scale, expert in zip(weights, scales, tuned, strict=True):
            tau = expert[name][: base[name].shape[0]] - base[name]
            theta += scale * weight * tau[where]
        return theta

    uniform = [float(fit["rest"][list(order).index(k)]) for k in experts] if order else [w / sum(prior) for w in prior]
    out: dict[str, torch.Tensor] = {}
    for name, tensor in base.items():
        out[name] = torch.empty_like(tensor)
        rows = slice(0, tensor.shape[0])
        out[name][rows] = mixed(name, rows, uniform)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"{root}.layers.{layer}."

        def put(short: str, where: Any, weights: list[float], prefix: str = prefix) -> None:
            fused, below = FUSED.get(short.rpartition(".")[2], ("", 0))
            if fused and f"{prefix}{short.partition('.')[0]}.{fused}.weight" in base:
                start = below * F if fused == "gate_up_proj" else (0, H, H + KV)[below] * d
                short, where = f"{short.partition('.')[0]}.{fused}", slice(start + where.start, start + where.stop)
            for kind in ("weight", "bias"):
                name = f"{prefix}{short}.{kind}"
                if name in base and not (kind == "bias" and isinstance(where, tuple)):
                    out[name][where] = mixed(name, where, weights)

        per_head = [share("heads", layer, h) for h in range(H)]
        for h in range(H):
            rows = slice(h * d, (h + 1) * d)
            put("self_attn.q_proj", rows, per_head[h])
            put("self_attn.o_proj", (slice(None), rows), per_head[h])
        for g in range(KV):
            members = per_head[g * H // KV : (g + 1) * H // KV]
            mean = [sum(column) / len(members) for column in zip(*members, strict=True)]
            for short in ("self_attn.k_proj", "self_attn.v_proj"):
                put(short, slice(g * d, (g + 1) * d), mean)
        for j in range(F):
            weights = share("neurons", layer, j)
            put("mlp.gate_proj", slice(j, j + 1), weights)
            put("mlp.up_proj", slice(j, j + 1), weights)
            put("mlp.down_proj", (slice(None), slice(j, j + 1)), weights)
    return out


def merge(world: World, config: dict[str, Any] | None = None, out: str = "out", **options: Any) -> Path:
    """What mergekit-yaml does after parsing, in this process; returns the output folder."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    import mergekit_wp.merge

    mergekit_wp.merge.register()
    LoaderCache.loaders.clear()
    folder = world.root / out
    validated = MergeConfiguration.model_validate(config or world.config())
    run_merge(validated, str(folder), MergeOptions(quiet=True, **options))
    return folder
