"""Links against autograd on plain models of transformers: by weights, through one head or neuron, or past all heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from score_jobs import LAYER, Reference, job_for

from mergekit_wp.console import no_progress
from mergekit_wp.geometry import Kind
from mergekit_wp.scoring.anchor.directions import extract_all
from mergekit_wp.scoring.models.load import load_pair
from mergekit_wp.scoring.pairs import load_pairs, split_pairs
from mergekit_wp.scoring.score import prepare, score
from mergekit_wp.study import link_descent
from mergekit_wp.study.link_descent import LinkTables, Target
from mergekit_wp.study.link_run import link_tables

HEADS = [Target(Kind.HEAD, layer, (h,)) for layer in (1, LAYER) for h in range(4)]


def links(job, targets) -> list[LinkTables]:
    """Of every task, the same targets."""
    ready = prepare(job)
    pair = load_pair(job, ready.checked)
    anchor = ready.asked
    directions = extract_all(pair.base, pair.expert, ready.tasks, anchor + 1, job.batch_size)
    return link_tables(job, pair, ready.tasks, anchor, directions, [targets] * len(ready.tasks), no_progress)


def example(tmp_path, kind, **options):
    defaults = {"utility": "anchor", "method": "attr", "gap": "mean", "contrast": False, "gap_floor": 1e-6, "rows": 2}
    return job_for(tmp_path, kind, **({"tasks": ("first",)} | defaults | options))


class Plain(Reference):
    """Products of updates and weight gradients of a scalar that is read off the base while it runs."""

    def found(self, scalar_of) -> list[dict[str, torch.Tensor]]:
        """By task, of the sum over prompts of scalar / gap, by component."""
        tasks = split_pairs(load_pairs(self.job.pairs, None, self.job.seed), self.job.split, self.job.seed)
        expert, base = dict(self.expert.named_parameters()), dict(self.base.named_parameters())
        tables = []
        for task in tasks:
            direction = self.direction(task)
            gap = sum(float(self.gap("anchor", pair.prompt, direction)) for pair in task.scoring)
            self.tolerance = 3e-5 + 1e-6 / abs(gap)  # a gap is a difference of cosines, rounded like these
            self.base.zero_grad()
            for pair in task.scoring:
                (scalar_of(pair.prompt, direction) / gap).backward()
            own = self.empty()
            for layer in range(LAYER + 1):
                for kind, index, slices in self.components(layer):
                    for name, axis, where in slices:
                        if name in base and base[name].grad is not None:
                            product = (expert[name] - base[name]).detach() * base[name].grad
                            own[kind][layer, index] += product.index_select(axis, torch.tensor(where)).sum()
            tables.append(own)
        return tables

    def through(self, target: Target, text, direction) -> torch.Tensor:
        """<stream, need>, the need taken off this very run and held."""
        layer, seen = self.layers(self.base)[target.layer], {}
        projection = layer.self_attn.o_proj if target.kind == Kind.HEAD else layer.mlp.down_proj
        width = layer.self_attn.head_dim if target.kind == Kind.HEAD else 1

        def stream(_m, args, kwargs):
            seen["stream"] = args[0] if args else kwargs["hidden_states"]

        reader = layer
        if target.kind == Kind.NEURON:  # what reads the stream between attention and MLP: a norm, or of OLMo the MLP
            names = ("pre_feedforward_layernorm", *(() if "Olmo" in type(layer).__name__ else NORMS), "mlp")
            reader = next(getattr(layer, name) for name in names if hasattr(layer, name))
        handles = [
            reader.register_forward_pre_hook(stream, with_kwargs=True),
            projection.register_forward_pre_hook(lambda _m, args: seen.update(read=args[0])),
        ]
        value = self.utility("anchor", self.base, text, direction)
        for handle in handles:
            handle.remove()
        (delta,) = torch.autograd.grad(value, seen["read"], retain_graph=True)
        kept = torch.zeros_like(delta)
        for index in target.indices:
            columns = slice(index * width, (index + 1) * width)
            kept[..., columns] = delta[..., columns]
        (need,) = torch.autograd.grad(seen["read"], seen["stream"], kept, retain_graph=True)
        return (seen["stream"] * need.detach()).sum()

    def past(self, layer: int, text, direction) -> torch.Tensor:
        """F, with what the attention of a layer writes held fixed."""
        handle = self.layers(self.base)[layer].self_attn.o_proj.register_forward_pre_hook(
            lambda _m, args: (args[0].detach(),)
        )
        value = self.utility("anchor", self.base, text, direction)
        handle.remove()
        return value


def close(got, wanted, tolerance) -> None:
    if not len(got):
        return
    assert (got - wanted).abs().max() <= tolerance * max(1e-9, float(wanted.abs().max()))


NORMS = ("post_attention_layernorm",)
KINDS = (*tiny.ARCHITECTURES, "llama-biased", "olmo2", "phi3", "granite")


@pytest.mark.parametrize("kind", KINDS)
def test_links_are_autograd_by_weights(tmp_path, kind) -> None:
    """Of heads under the anchor layer and in it, where it is read alone, and of neurons; all heads of a layer, and what
    passes them by, make up attr. Ragged prompts in batches of two."""
    job = example(tmp_path, kind, shape={"num_hidden_layers": 4}, rows=3, split="shared")
    some = [
        Target(Kind.HEAD, 1, (2,)), Target(Kind.HEAD, LAYER, (3,)), Target(Kind.NEURON, LAYER, (1, 4)),
        Target(Kind.NEURON, 1, (2,)), Target(Kind.NEURON, 0, (0,)),
    ]  # fmt: skip
    whole = [Target(Kind.HEAD, layer, (0, 1, 2, 3)) for layer in (1, LAYER)]
    (found,) = links(job, [*HEADS, *some[2:], *whole])
    plain = Plain(job)
    for target in some:
        (wanted,) = plain.found(lambda text, v, target=target: plain.through(target, text, v))
        for each in Kind:
            got, own = found.link(each, target), wanted[str(each)][: LAYER + 1]
            reached = target.layer + (target.kind == Kind.NEURON and each == Kind.HEAD)
            close(got[:reached], own[:reached], plain.tolerance)
            assert got[:reached].any() == (reached > 0)
            assert not got[reached:].any()
    for target in whole:
        layer = target.layer
        (skipped,) = plain.found(lambda text, v, layer=layer: plain.past(layer, text, v))
        for each in Kind:
            together = sum(found.link(each, head) for head in HEADS if head.layer == layer)
            close((together + skipped[str(each)][: LAYER + 1])[:layer], found.attr(each)[:layer], plain.tolerance)
            assert together[:layer].abs().max() > 1e-3 * found.attr(each)[:layer].abs().max()
            close(found.link(each, target), together, 1e-5)


def test_attr_comes_along_and_streaming_changes_nothing(tmp_path) -> None:
    job = example(tmp_path, "gemma2", tasks=("first", "second"), rows=3, split="shared", offload="none")
    targets = [*HEADS[3:6], Target(Kind.NEURON, 2, (0, 5)), Target(Kind.HEAD, 2, (1,), "seed")]
    resident, streamed = links(job, targets), links(replace(job, offload="stream"), targets)
    scored = score(job)
    for (task, own), one, other in zip(scored.tasks.items(), resident, streamed, strict=True):
        for kind in Kind:
            close(one.attr(kind).float(), getattr(own, kind)[: LAYER + 1], 1e-5)
            assert scored.tasks[task].heads[:LAYER].any()
            close(other.tables[kind], one.tables[kind], 1e-5)
            for row in one.tables[kind][1:]:
                assert row.any()


def test_noise_is_as_long_as_the_need_and_comes_again(tmp_path, monkeypatch) -> None:
    job, seen = example(tmp_path, "llama", rows=3, split="shared"), []
    real = link_descent._Step._noise

    def kept(self, seed, like_BTD):
        seen.append((like_BTD, real(self, seed, like_BTD)))
        return seen[-1][1]

    monkeypatch.setattr(link_descent._Step, "_noise", kept)
    noise = [Target(Kind.HEAD, 2, (1,), seed) for seed in ("a", "b")]
    (one,), (other,) = links(job, noise), links(job, noise[::-1])
    for need_BTD, drawn_BTD in seen:
        torch.testing.assert_close(drawn_BTD.norm(dim=-1), need_BTD.norm(dim=-1), rtol=1e-5, atol=1e-9)
        at = need_BTD.norm(dim=-1) > 1e-6
        assert torch.cosine_similarity(drawn_BTD, need_BTD, dim=-1)[at].abs().mean() < 0.5
    (_, one_BTD), _, (_, next_BTD), _ = seen[:4]  # of two batches, by one seed
    assert torch.cosine_similarity(one_BTD[0, 0], next_BTD[0, 0], dim=0).abs() < 0.9
    for kind in Kind:
        close(one.link(kind, noise[0]), other.link(kind, noise[0]), 1e-6)
        assert not torch.allclose(one.link(kind, noise[0]), one.link(kind, noise[1]))


def test_a_planted_chain_is_found(tmp_path) -> None:
    """Neuron 3 of layer 0 alone moved: the one source, also of a relay head, which moved nothing itself."""
    base = tiny.random_model("llama", seed=1)
    expert = tiny.fine_tuned(base, seed=2, size=0.0)
    with torch.no_grad():
        expert.model.layers[0].mlp.down_proj.weight[:, 3] *= 1.5
        expert.model.layers[0].mlp.gate_proj.weight[3] += 0.2
    pair = tiny.save(base, tmp_path / "base"), tiny.save(expert, tmp_path / "expert")
    (found,) = links(example(tmp_path, "llama", pair=pair), HEADS)
    for target in HEADS:
        assert not found.link(Kind.HEAD, target).any()
        assert found.link(Kind.NEURON, target).nonzero().tolist() == [[0, 3]]
    assert found.attr(Kind.NEURON).nonzero().tolist() == [[0, 3]]
