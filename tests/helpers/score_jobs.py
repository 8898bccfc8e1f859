"""Scoring jobs on tiny models, and the brute-force reference that every method is held against."""

from __future__ import annotations

import itertools
import json

import tiny
import torch
from torch.nn import functional
from where import DEVICE

from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.pairs import load_pairs, split_pairs

LAYER = 2  # of 4, so that staged scoring has layers on both sides


def write_pairs(path, contrast=True, tasks=("first", "second"), rows=3):
    generator = torch.Generator().manual_seed(0)
    with open(path, "w") as file:
        for task in tasks:
            for row in range(rows):
                words = [tiny.WORDS[int(i)] for i in torch.randint(len(tiny.WORDS), (3 + row,), generator=generator)]
                entry = {"task": task, "prompt": " ".join(words)}
                if contrast:
                    entry["contrast"] = " ".join(words[1:])
                file.write(json.dumps(entry) + "\n")
    return str(path)


def job_for(tmp_path, kind, **options):
    """`shape`: of the models' config, where it is not that of all tiny models."""
    shape = {"extra_rows": options.pop("extra_rows", 0), **options.pop("shape", {})}
    base, expert = options.pop("pair", None) or tiny.save_pair(tmp_path, kind, **shape)
    contrast = options.pop("contrast", True)
    defaults = {"layer": LAYER, "batch_size": 2, "device": DEVICE, "dtype": "float32", "gap_floor": 0.03}
    pairs = write_pairs(
        tmp_path / "pairs.jsonl", contrast, options.pop("tasks", ("first", "second")), options.pop("rows", 3)
    )
    return ScoringJob(base=str(base), expert=str(expert), pairs=pairs, **{**defaults, **options})


class Reference:
    """Base, expert and everything that one prompt needs, computed in the plainest way."""

    def __init__(self, job):
        from transformers import AutoConfig, AutoTokenizer

        def load(folder):
            auto = tiny.auto_class(AutoConfig.from_pretrained(folder))
            return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

        self.base, self.expert = load(job.base), load(job.expert)
        self.job, self.config = job, self.base.config.get_text_config()
        self.inside = "model.language_model" if hasattr(self.base.config, "vision_config") else "model"
        self.anchor = self.config.num_hidden_layers - 1 if job.utility == "projection" else job.layer
        self.tokenizer = AutoTokenizer.from_pretrained(job.base)
        self.answers = {}

    def layers(self, model):
        return model.get_submodule(f"{self.inside}.layers")

    def run(self, model, text):
        """(z after every layer [L, D] at the anchor position, next-token log-probabilities over the base's rows)."""
        ids = torch.tensor([self.tokenizer(text)["input_ids"]])
        kept = []
        handles = [
            layer.register_forward_hook(lambda _m, _a, out: kept.append(out[0] if isinstance(out, tuple) else out))
            for layer in self.layers(model)
        ]
        logits = model(input_ids=ids, use_cache=False).logits[0, -1, : self.config.vocab_size]
        for handle in handles:
            handle.remove()
        return torch.stack([z[0, -1] for z in kept]), functional.log_softmax(logits, -1)

    def direction(self, task):
        with torch.no_grad():
            differences = []
            for pair in task.extraction:
                other = (self.expert, pair.contrast) if pair.contrast else (self.base, pair.prompt)
                differences.append(self.run(self.expert, pair.prompt)[0] - self.run(*other)[0])
        return torch.stack(differences).mean(0)

    def utility(self, name, model, text, direction):
        z_LD, log_p = self.run(model, text)
        if name in ("anchor", "projection"):
            layer = self.anchor if name == "anchor" else -1
            z, direction = z_LD[layer], direction[layer]
            return (z @ direction) / (z.norm() * direction.norm())
        target = self.answer(text)
        return -(target.exp() * (target - log_p)).sum()

    @torch.no_grad()
    def answer(self, text):
        """The expert's log-probabilities, which nothing here changes."""
        if text not in self.answers:
            self.answers[text] = self.run(self.expert, text)[1]
        return self.answers[text]

    def gap(self, name, text, direction):
        with torch.no_grad():
            return self.utility(name, self.expert, text, direction) - self.utility(name, self.base, text, direction)

    def components(self, layer):
        """Every component of a layer as (kind, index, [(tensor name, rows or columns)])."""
        width, neurons = self.layers(self.base)[layer].self_attn.head_dim, self.config.intermediate_size
        prefix = f"{self.inside}.layers.{layer}"
        for head in range(self.config.num_attention_heads):
            rows = list(range(head * width, (head + 1) * width))
            q, o = f"{prefix}.self_attn.q_proj", f"{prefix}.self_attn.o_proj.weight"
            # Phi-3 has the queries on top of keys and values.
            names = [f"{q}.weight", f"{q}.bias", f"{prefix}.self_attn.qkv_proj.weight"]
            yield "heads", head, [*((name, 0, rows) for name in names), (o, 1, rows)]
        for j in range(neurons):
            mlp = [(f"{prefix}.mlp.{m}_proj.{w}", 0, [j]) for m in ("gate", "up") for w in ("weight", "bias")]
            mlp += [(f"{prefix}.mlp.gate_up_proj.weight", 0, [j, neurons + j])]  # gates on top of ups
            yield "neurons", j, [*mlp, (f"{prefix}.mlp.down_proj.weight", 1, [j])]

    def scores(self, score_prompt):
        """Mean over tasks of mean over prompts of what `score_prompt(text, direction, utility)` gives / G."""
        split = None if self.job.utility == "kl" else self.job.split
        tasks = split_pairs(load_pairs(self.job.pairs, None, self.job.seed), split, self.job.seed)
        heads = torch.zeros(self.config.num_hidden_layers, self.config.num_attention_heads)
        neurons = torch.zeros(self.config.num_hidden_layers, self.config.intermediate_size)
        for task in tasks:
            direction = self.direction(task) if task.extraction else None
            for name, layers in self.stages().items():
                gaps = torch.tensor([self.gap(name, pair.prompt, direction) for pair in task.scoring])
                keep = (gaps.abs() >= self.job.gap_floor).float()
                ratios = keep / gaps / keep.sum()
                weights = ratios if self.job.gap == "sample" else torch.ones_like(gaps) / gaps.sum()
                self.wanted = layers
                for pair, weight in zip(task.scoring, weights, strict=True):
                    one = score_prompt(pair.prompt, direction, name)
                    for layer in layers:
                        heads[layer] += weight * one["heads"][layer] / len(tasks)
                        neurons[layer] += weight * one["neurons"][layer] / len(tasks)
        return heads, neurons

    def stages(self):
        every, cut = range(self.config.num_hidden_layers), self.anchor + 1
        return {
            "anchor": {"anchor": every[:cut]},
            "kl": {"kl": every},
            "projection": {"projection": every},
            "staged": {"anchor": every[:cut], "kl": every[cut:]},
            "staged-projection": {"anchor": every[:cut], "projection": every[cut:]},
        }[self.job.utility]

    def attr(self, text, direction, name):
        """Autograd on the weights themselves."""
        self.base.zero_grad()
        self.utility(name, self.base, text, direction).backward()
        expert, base = dict(self.expert.named_parameters()), dict(self.base.named_parameters())
        found = self.empty()
        for layer in range(self.config.num_hidden_layers):
            for kind, index, slices in self.components(layer):
                for tensor, axis, where in slices:
                    if tensor in base and base[tensor].grad is not None:
                        product = (expert[tensor] - base[tensor]).detach() * base[tensor].grad
                        found[kind][layer, index] += product.index_select(axis, torch.tensor(where)).sum()
        return found

    def writeback(self, text, direction, name):
        """Swap one component, take the difference of what its layer's projection writes, dot with the gradient."""
        writes, gradients = {}, {}
        handles = self.watch_writes(writes, gradients)
        self.utility(name, self.base, text, direction).backward()
        before = {key: value.detach().clone() for key, value in writes.items()}
        found = self.empty()
        with torch.no_grad():
            for kind, layer, index, restore in self.each_swapped():
                self.run(self.base, text)
                restore()
                key = (layer, kind)
                if key in gradients:
                    found[kind][layer, index] = ((writes[key] - before[key]) * gradients[key]).sum()
        for handle in handles:
            handle.remove()
        return found

    def each_swapped(self):
        """Every component of the layers wanted in turn, its slices in the base replaced by the expert's: (kind, layer,
        index, undo)."""
        expert, base = dict(self.expert.named_parameters()), dict(self.base.named_parameters())
        for layer in self.wanted:
            for kind, index, slices in self.components(layer):
                present = [(t, axis, torch.tensor(where)) for t, axis, where in slices if t in base]
                saved = {tensor: base[tensor].detach().clone() for tensor, _, _ in present}
                for tensor, axis, where in present:
                    base[tensor].index_copy_(axis, where, expert[tensor].index_select(axis, where))

                def undo(saved=saved):
                    for tensor, old in saved.items():
                        base[tensor].copy_(old)

                yield kind, layer, index, undo

    @torch.no_grad()
    def exact(self, text, direction, name):
        """Replace the weights, run the whole model, restore (Eq. 10)."""
        before, found = self.utility(name, self.base, text, direction), self.empty()
        for kind, layer, index, undo in self.each_swapped():
            found[kind][layer, index] = self.utility(name, self.base, text, direction) - before
            undo()
        return found

    def activations(self, model, text, change=None):
        """Inputs of o_proj and down_proj of every layer; `change(key, x)` may replace what the projection reads."""
        kept, handles = {}, []

        def watch(key):
            def hook(_module, args):
                kept[key] = args[0]
                return None if change is None else (change(key, args[0]),)

            return hook

        for index, layer in enumerate(self.layers(model)):
            for kind, module in (("heads", layer.self_attn.o_proj), ("neurons", layer.mlp.down_proj)):
                handles.append(module.register_forward_pre_hook(watch((index, kind))))
        return kept, handles

    def columns(self, layer, kind, index):
        width = self.layers(self.base)[layer].self_attn.head_dim if kind == "heads" else 1
        return slice(index * width, (index + 1) * width)

    def projection(self, model, layer, kind):
        layer = self.layers(model)[layer]
        return layer.self_attn.o_proj if kind == "heads" else layer.mlp.down_proj

    def written(self, model, layer, kind, index, x):
        """What one component writes where the input of its projection is `x`."""
        where = self.columns(layer, kind, index)
        return x[..., where] @ self.projection(model, layer, kind).weight[:, where].T

    @torch.no_grad()
    def ap(self, text, direction, name):
        """Put the expert's activation of one component into the base run (Eq. 12); by default its columns with it."""
        theirs, handles = self.activations(self.expert, text)
        self.run(self.expert, text)
        for handle in handles:
            handle.remove()
        before, found = self.utility(name, self.base, text, direction), self.empty()
        for kind in found:
            for layer, index in itertools.product(self.wanted, range(found[kind].shape[1])):
                where = self.columns(layer, kind, index)

                def put(key, x, wanted=(layer, kind), where=where):
                    if key == wanted:
                        x = x.clone()
                        x[..., where] = theirs[key][..., where]
                    return x

                weights = [self.projection(model, layer, kind).weight for model in (self.base, self.expert)]
                saved = weights[0].clone()
                if self.job.object != "activation":
                    weights[0][:, where] = weights[1][:, where]
                _, handles = self.activations(self.base, text, put)
                # Through `run`, which reads the base with the hooks on; the target of kl is the expert's, without.
                found[kind][layer, index] = self.utility(name, self.base, text, direction) - before
                for handle in handles:
                    handle.remove()
                weights[0].copy_(saved)
        return found

    def atp(self, text, direction, name):
        """(what the expert's component writes, or its activation would through the base - what the base's writes) .
        gradient at what is written (Eq. 58)."""
        theirs, handles = self.activations(self.expert, text)
        with torch.no_grad():
            self.run(self.expert, text)
        for handle in handles:
            handle.remove()
        writes, gradients = {}, {}
        ours, handles = self.activations(self.base, text)
        handles += self.watch_writes(writes, gradients)
        self.utility(name, self.base, text, direction).backward()
        for handle in handles:
            handle.remove()
        found, writer = self.empty(), self.base if self.job.object == "activation" else self.expert
        with torch.no_grad():
            for (layer, kind), gradient in gradients.items():
                for index in range(found[kind].shape[1]):
                    change = self.written(writer, layer, kind, index, theirs[layer, kind])
                    change = change - self.written(self.base, layer, kind, index, ours[layer, kind])
                    found[kind][layer, index] = (change * gradient).sum()
        return found

    def watch_writes(self, writes, gradients):
        def watch(key):
            def hook(_module, _args, output):
                writes[key] = output
                if output.requires_grad:
                    output.register_hook(lambda gradient: gradients.__setitem__(key, gradient.clone()))

            return hook

        handles = []
        for index, layer in enumerate(self.layers(self.base)):
            handles.append(layer.self_attn.o_proj.register_forward_hook(watch((index, "heads"))))
            handles.append(layer.mlp.down_proj.register_forward_hook(watch((index, "neurons"))))
        return handles

    def empty(self):
        layers = self.config.num_hidden_layers
        return {
            "heads": torch.zeros(layers, self.config.num_attention_heads),
            "neurons": torch.zeros(layers, self.config.intermediate_size),
        }


def assert_close(got, wanted):
    """Relative to the largest score of the tensor: 1e-4 of it, the issue's bound in float32."""
    assert wanted.abs().max() > 0
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
