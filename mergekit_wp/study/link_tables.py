"""What the links of one task say, beside what chance, other heads and noise give (Tables 1 and 8, Eqs. 76-87).

    overlaps   of the K neurons with the largest links to a head, the share that is among the K with the largest attr,
               of all layers up to the anchor (the paper's), or of those below the head alone. Links and attr both hold
               |dtheta| and the size of activations, whatever the need, so that some overlap is no finding
    flow       of the joint attr of the K neurons with the highest one below a layer, the share that runs through a
               head, or through all heads of the layer together; the rest passes by them on the stream
    sources    of a target: components in the top set of the weight side and in that of its links
    circuit    these, their targets, and what carries the answer above the anchor layer (Eq. 84), as nodes and links

Every head has two controls: another head of its layer, and noise in the place of its need.

Legend: L layers up to the anchor, n components of a kind in a layer, K of a top set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from mergekit_wp.geometry import Component, Kind
from mergekit_wp.ranking import table_of
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.link_descent import Target
from mergekit_wp.study.link_run import ACTIVATION_FIRST, WEIGHT_SIDE, TaskLinks, by_method
from mergekit_wp.study.sets import ABSOLUTE, KEYS, keyed, top_among
from mergekit_wp.study.study_spec import Study

HEADS, OTHERS, NOISE, ATTENTION = "AP heads", "other heads", "random need", "all heads"
TABLE_8 = 25
"""The paper's second K is so many times its first (5,000 and 200)."""
_FIVE = 5


def roles(found: TaskLinks) -> Iterator[tuple[str, int, Target]]:
    """(role, number of the head that was chosen, target)"""
    chosen = found.chosen
    for role, targets in ((HEADS, chosen.heads), (OTHERS, chosen.others), (NOISE, chosen.noise)):
        yield from ((role, number, target) for number, target in enumerate(targets) if target is not None)


def _below(like_Ln: torch.Tensor, layer: int) -> torch.Tensor:
    """Components of the layers below one, bool [L, n]."""
    return (torch.arange(len(like_Ln)) < layer)[:, None].expand_as(like_Ln)


def overlaps(task: str, found: TaskLinks, k: int) -> Iterator[dict[str, Any]]:
    """A row for every role, head, K, key and whether attr is ranked in all layers. Where K is more than half of what
    lies below a head there is none, since nothing is chosen then."""
    attr_Ln = found.links.attr(Kind.NEURON)
    for role, number, target in roles(found):
        link_Ln, below_Ln = found.links.link(Kind.NEURON, target), _below(attr_Ln, target.layer)
        components = int(below_Ln.sum())
        for many in (k, TABLE_8 * k):
            if 2 * many > components:
                continue
            for key in KEYS:
                own_Ln = top_among(keyed(link_Ln, key), below_Ln, many)
                for against, among_Ln in (("all layers", torch.ones_like(below_Ln)), ("layers below", below_Ln)):
                    top_Ln = top_among(keyed(attr_Ln, key), among_Ln, many)
                    size, larger = int(own_Ln.sum()), max(int(own_Ln.sum()), int(top_Ln.sum()))
                    if larger:
                        yield {
                            "task": task, "role": role, "number": number, "head": target.component.name, "k": many,
                            "key": key, "against": against, "overlap": int((own_Ln & top_Ln).sum()) / larger,
                            "by_chance": size * int((top_Ln & below_Ln).sum()) / components / larger,
                        }  # fmt: skip


def table_1(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """By task, role, K, key and layers: the largest overlap, the mean of the five largest, the mean over heads."""
    keys = ("task", "role", "k", "key", "against")
    grouped: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[key] for key in keys), []).append(row)
    for place, own in grouped.items():
        shares = sorted((row["overlap"] for row in own), reverse=True)
        yield dict(zip(keys, place, strict=True)) | {
            "heads": len(own),
            "most": shares[0],
            "five": fmean(shares[:_FIVE]),
            "mean": fmean(shares),
            "by_chance": fmean(row["by_chance"] for row in own),
        }


def flow(task: str, found: TaskLinks, k: int) -> Iterator[dict[str, Any]]:
    """A row for every role and head, and for all heads of every layer; `share` of what is below the layer."""
    attr_Ln = found.links.attr(Kind.NEURON)
    every = [*roles(found), *((ATTENTION, layer, target) for layer, target in enumerate(found.chosen.attention))]
    for role, number, target in every:
        below_Ln = _below(attr_Ln, target.layer)
        set_Ln = top_among(attr_Ln, below_Ln, k) & (attr_Ln > 0)
        whole = float(attr_Ln[set_Ln].sum())
        if whole > 0:
            through = float(found.links.link(Kind.NEURON, target)[set_Ln].sum())
            name = None if role == ATTENTION else target.component.name
            yield {
                "task": task, "role": role, "number": number, "head": name, "layer": target.layer,
                "neurons": int(set_Ln.sum()), "effect": whole, "share": through / whole,
            }  # fmt: skip


def source_sets(study: Study, found: TaskLinks, kind: Kind, target: Target) -> tuple[torch.Tensor, float]:
    """(sources of a target, bool [L, n]; how many there would be by chance)."""
    link_Ln = found.links.link(kind, target)
    below_Ln = _below(link_Ln, target.layer + (target.kind == Kind.NEURON and kind == Kind.HEAD))
    k, components = study.top[kind], int(below_Ln.sum())
    linked_Ln = top_among(link_Ln, below_Ln, k) & (link_Ln > 0)
    written_Ln = found.wp[kind].top(k) & below_Ln
    return linked_Ln & written_Ln, int(linked_Ln.sum()) * int(written_Ln.sum()) / max(1, components)


def sources(study: Study, task: str, found: TaskLinks) -> Iterator[dict[str, Any]]:
    """A row for every role, head and kind: how many sources, and by chance."""
    for role, number, target in roles(found):
        for kind in Kind:
            set_Ln, chance = source_sets(study, found, kind, target)
            yield {
                "task": task, "role": role, "number": number, "head": target.component.name, "kind": str(kind),
                "sources": int(set_Ln.sum()), "by_chance": chance,
            }  # fmt: skip


def execution(study: Study, inputs: Inputs, task: str, anchor: int) -> dict[str, Any]:
    """The top sets above the anchor layer by what reads the output (Eq. 84): those of the first score file of the
    weight side, with the scores on the activation side where a file has these."""
    found: dict[str, Any] = {}
    for kind in Kind:
        weights, activations = (
            next((each for each in by_method(inputs, methods) if _reads_output(each[1], task, kind, anchor)), None)
            for methods in (WEIGHT_SIDE, ACTIVATION_FIRST)
        )
        if weights is None:
            continue
        name, scores = weights
        table_Ln = table_of(scores, kind, task)
        above_Ln = scores.seen(kind) & (torch.arange(len(table_Ln)) > anchor)[:, None]
        top_Ln = top_among(table_Ln, above_Ln, study.top[kind]) & (table_Ln > 0)
        other_Ln = None if activations is None else table_of(activations[1], kind, task)
        found[str(kind)] = {
            "scores": name,
            "activation_side": None if activations is None else activations[0],
            "components": [
                [Component(kind, *at).name, float(table_Ln[tuple(at)]),
                 None if other_Ln is None else float(other_Ln[tuple(at)])]
                for at in sorted(top_Ln.nonzero().tolist(), key=lambda at: -float(table_Ln[tuple(at)]))
            ],
        }  # fmt: skip
    return found


def _reads_output(scores: Any, task: str, kind: Kind, anchor: int) -> bool:
    return task in scores and scores.meta.utility in ("kl", "staged") and bool(scores.seen(kind)[anchor + 1 :].any())


def circuit(study: Study, inputs: Inputs, task: str, found: TaskLinks, anchor: int) -> dict[str, Any]:
    """Nodes and links of one task. A link from a source to a target is a share of the gap, as scores are."""
    links, nodes = [], {}
    for target in (*found.chosen.heads, *found.chosen.neurons):
        name = name_of(target)
        own = found.ap[target.kind].table_Ln[target.layer, list(target.indices)]
        nodes[name] = {
            "name": name, "role": "aggregation", "kind": str(target.kind), "layer": target.layer,
            "components": [Component(target.kind, target.layer, index).name for index in target.indices],
            "score": float(own.sum()),
        }  # fmt: skip
        for kind in Kind:
            set_Ln, _chance = source_sets(study, found, kind, target)
            for at in set_Ln.nonzero().tolist():
                source = Component(kind, *at)
                nodes.setdefault(source.name, {
                    "name": source.name, "role": "source", "kind": str(kind), "layer": source.layer,
                    "components": [source.name], "score": float(found.wp[kind].table_Ln[tuple(at)]),
                })  # fmt: skip
                links.append([source.name, name, float(found.links.link(kind, target)[tuple(at)])])
    executed = execution(study, inputs, task, anchor)
    for kind_name, each in executed.items():
        for name, score, _other in each["components"]:
            layer = Component.parse(name).layer
            nodes[name] = {
                "name": name, "role": "execution", "kind": kind_name, "layer": layer, "components": [name],
                "score": score,
            }  # fmt: skip
    return {
        "anchor_layer": anchor,
        "rankings": {
            "aggregation": {str(kind): ranked.source for kind, ranked in found.ap.items()},
            "sources": {str(kind): ranked.source for kind, ranked in found.wp.items()},
            "execution": {kind: each["scores"] for kind, each in executed.items()},
        },
        "nodes": list(nodes.values()),
        "links": sorted(links, key=lambda link: -float(link[2])),
        "execution": executed,
    }


def name_of(target: Target) -> str:
    """`L2H3`; of the neurons of one layer, which are one target, `L2N*`."""
    return target.component.name if target.kind == Kind.HEAD else f"L{target.layer}N*"


def beats(rows: Sequence[Mapping[str, Any]], measure: str, role: str) -> tuple[int, int]:
    """(In how many pairs an AP head has more than its control of this role, pairs in which they differ)."""
    by_place = {(row["task"], row["role"], row["number"]): row[measure] for row in rows}
    pairs = [
        (value, by_place[task, role, number])
        for (task, own, number), value in by_place.items()
        if own == HEADS and (task, role, number) in by_place
    ]
    return sum(one > other for one, other in pairs), sum(one != other for one, other in pairs)


SHOWN = {"key": ABSOLUTE, "against": "all layers"}
"""The paper's reading of Table 1."""
