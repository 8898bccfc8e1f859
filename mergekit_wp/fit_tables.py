"""What a fit file says, as grids of text and as data; a grid's first line is its head.

Legend: K experts, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from mergekit_wp.fit_file import Fit, FittedPrompts
from mergekit_wp.foreign import one_line
from mergekit_wp.geometry import Kind
from mergekit_wp.page import aligned
from mergekit_wp.score_tables import Grid

_KEPT = "*"


def as_text(found: Mapping[str, Fit]) -> str:
    """All of it, for a terminal."""
    parts = []
    for name, fit in found.items():
        facts = about(fit)
        width = max(map(len, facts))
        lines = [one_line(name), *(f"  {label.ljust(width)}  {one_line(value)}" for label, value in facts.items())]
        parts += ["\n".join(lines), *(aligned(grid) for grid in (of_teachers(fit), of_curve(fit), of_layers(fit)))]
    return "\n\n".join(parts)


def about(fit: Fit) -> dict[str, str]:
    """What the file says of itself, for people: label -> text."""
    meta = fit.meta
    tokens = f"up to {meta.answer_tokens} tokens" if meta.answer_tokens else "the token after the prompt"
    return {
        "base": meta.base.called,
        "experts": ", ".join(expert.called for expert in meta.experts),
        "weights by": meta.family,
        "started from": meta.start,
        "weights of": f"step {meta.best_step} of {meta.curve[-1].step}",
        "answers": tokens,
        "dtype": meta.dtype,
        "date": meta.date[:10],
    }


def of_teachers(fit: Fit) -> Grid:
    """A line an expert: prompts, the share of its gap that is left open, its mean weights. With `keep`, one of the
    base: how far from it the merge is, as a share of the experts' distance."""
    meta = fit.meta
    head = ["expert", "prompts", "held out", "left open: base", "start", "end", "mean weight: heads", "neurons", "rest"]
    lines = [head]
    for k, expert in enumerate(meta.experts):
        left = meta.unrecovered[k]
        shares = [f"{share:.3f}" for share in (left.base, left.start, left.end)]
        weights = [f"{float(tensor[k].mean()):.3f}" for tensor in (fit.heads, fit.neurons, fit.rest)]
        lines.append([expert.name, *_counts(meta.prompts[k]), *shares, *weights])
    if meta.keep is not None:
        away = [f"{share:.3f}" for share in (0.0, meta.keep.start, meta.keep.end)]
        lines.append([f"the base on {meta.keep.pairs}", *_counts(meta.keep.prompts), *away, "", "", ""])
    return lines


def _counts(prompts: FittedPrompts) -> list[str]:
    return [str(prompts.fitted + prompts.held_out), str(prompts.held_out)]


def of_curve(fit: Fit) -> Grid:
    """A line a look at the loss; the one whose weights are in the file is marked."""
    lines = [["step", "loss: fitted", "held out", "kept"]]
    for point in fit.meta.curve:
        held_out = "" if point.held_out is None else f"{point.held_out:.4f}"
        kept = _KEPT if point.step == fit.meta.best_step else ""
        lines.append([str(point.step), f"{point.fitted:.4f}", held_out, kept])
    return lines


def of_layers(fit: Fit) -> Grid:
    """A line a layer: of every expert, the mean weight of its heads and of its neurons there."""
    names = [expert.name for expert in fit.meta.experts]
    lines = [["layer", *(f"{name}: {kind}" for name in names for kind in Kind)]]
    means = {kind: mean_weights(fit, kind) for kind in Kind}
    for layer in range(fit.meta.geometry.layers):
        lines.append([str(layer), *(f"{float(means[kind][k, layer]):.3f}" for k in range(len(names)) for kind in Kind)])
    return lines


def mean_weights(fit: Fit, kind: Kind) -> torch.Tensor:
    """[K, L]: over the heads, or the neurons, of each layer; float64."""
    table: torch.Tensor = getattr(fit, kind)
    return table.double().mean(-1)


def as_data(found: Mapping[str, Fit]) -> dict[str, Any]:
    """The same as numbers: the file's document, and mean weights by kind, expert and layer."""
    return {
        "fits": {
            name: {
                "meta": json.loads(fit.meta.to_json()),
                "mean_weights": {kind: mean_weights(fit, kind).tolist() for kind in Kind} | {"rest": fit.rest.tolist()},
            }
            for name, fit in found.items()
        }
    }
