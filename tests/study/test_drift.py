"""Drift against plain float64 arithmetic on whole tensors, cut by hand."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from lora_files import write as write_lora
from safetensors.torch import load_file, save_file

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.in_memory import held
from mergekit_wp.console import no_progress
from mergekit_wp.errors import BadInput
from mergekit_wp.study import drift_sums as module
from mergekit_wp.study.drift_sums import StoredModel, drift_sums, mean_size, opened_expert, relative


def read(folder) -> dict[str, np.ndarray]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: tensor.double().numpy() for name, tensor in load_file(file).items()}
    return tensors


def measured(folder_or_name, base_folder):
    base = Checkpoint(str(base_folder), base_folder)
    with opened_expert(str(folder_or_name)) as expert:
        return drift_sums(StoredModel(base), expert, base.geometry, no_progress)


def reference(base: dict, expert: dict, rows: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """(module by layer, heads, neurons) -> (mean |delta|, ||delta|| / ||W||), of tiny.SHAPE's sizes."""
    pieces: dict = {}
    for name in base:
        words = name.split(".")
        layer = int(words[2]) if words[1] == "layers" else None
        b, e = base[name], expert[name]
        path = words[-2] if layer is not None else name
        if path == "qkv_proj":
            cut = {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}
        elif path == "gate_up_proj":
            cut = {"gate": slice(0, len(b) // 2), "up": slice(len(b) // 2, None)}
        elif path.endswith("_proj"):
            cut = {path.removesuffix("_proj"): slice(None)}
        elif layer is not None:
            cut = {"norms": slice(None)}
        else:
            ends = {"model.embed_tokens.weight": "embeddings", "lm_head.weight": "head"}
            cut = {ends.get(name, "final norm"): slice(0, rows)}
        for key, where in cut.items():
            pieces.setdefault((layer, key), []).append((b[where], e[where], words[-1]))

    def both(parts):
        delta = np.concatenate([(e - b).ravel() for b, e in parts])
        weight = np.concatenate([b.ravel() for b, _ in parts])
        return np.abs(delta).mean(), np.linalg.norm(delta) / np.linalg.norm(weight)

    modules = {key: both([(b, e) for b, e, _ in parts]) for key, parts in pieces.items()}
    layers = 1 + max(layer for layer, _ in pieces if layer is not None)

    def component(layer, ins, outs, where):
        parts = [(b[where], e[where]) for key in ins for b, e, _ in pieces[layer, key]]
        return both(parts + [(b[:, where], e[:, where]) for b, e, what in pieces[layer, outs] if what == "weight"])

    neurons = base["model.layers.0.mlp.down_proj.weight"].shape[1]
    heads = [[component(ell, ["q"], "o", slice(8 * h, 8 * h + 8)) for h in range(4)] for ell in range(layers)]
    mlp = [[component(ell, ["gate", "up"], "down", slice(j, j + 1)) for j in range(neurons)] for ell in range(layers)]
    return modules, np.array(heads), np.array(mlp)


@pytest.mark.parametrize(
    ("kind", "dtype", "rows"),
    [
        ("llama-biased", torch.float32, 0),  # biases everywhere, grouped queries
        ("qwen2", torch.bfloat16, 0),  # biases of q, k, v; tied ends
        ("phi3", torch.float16, 0),  # fused
        ("qwen3", torch.float32, 3),  # norms of heads; added tokens
    ],
)
def test_against_numpy(kind, dtype, rows, tmp_path, monkeypatch) -> None:
    base, expert = tiny.save_pair(tmp_path, kind, dtype=dtype, extra_rows=rows)
    monkeypatch.setattr(module, "_TILE", 100)  # several tiles a tensor, the last one shorter
    monkeypatch.setattr(module, "_BLOCK", 50)
    found = measured(expert, base)
    modules, heads, neurons = reference(read(base), read(expert), 97)
    assert set(found.modules) == set(modules)
    assert ((None, "head") in modules) == (kind != "qwen2")
    for key, want in modules.items():
        got = [float(measure(found.modules[key])) for measure in (mean_size, relative)]
        assert got == pytest.approx(want, rel=1e-6), key
    for sums, want in ((found.heads, heads), (found.neurons, neurons)):
        got = np.stack([mean_size(sums).numpy(), relative(sums).numpy()], -1)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def in_memory(base, expert):
    with held(base, "base") as one, held(expert, "expert") as other:
        return drift_sums(StoredModel(one), StoredModel(other), one.geometry, no_progress)


def test_known_shifts() -> None:
    base = tiny.random_model("llama")
    expert = tiny.fine_tuned(base, seed=0, size=0.0)
    with torch.no_grad():
        expert.model.layers[1].self_attn.q_proj.weight[8:16] += 0.25  # head 1
        expert.model.layers[2].mlp.down_proj.weight[:, 3] -= 0.5
        expert.model.embed_tokens.weight += 2.0
    found = in_memory(base, expert)
    moved = {key: float(mean_size(sums)) for key, sums in found.modules.items() if float(sums[0])}
    assert moved == pytest.approx({(1, "q"): 0.25 / 4, (2, "down"): 0.5 / 20, (None, "embeddings"): 2.0}, rel=1e-5)
    heads, neurons = torch.zeros(4, 4), torch.zeros(4, 20)
    heads[1, 1], neurons[2, 3] = 0.25 / 2, 0.5 / 3  # half of a head's numbers, a third of a neuron's
    torch.testing.assert_close(mean_size(found.heads).float(), heads, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mean_size(found.neurons).float(), neurons, atol=1e-6, rtol=1e-5)
    whole = float(base.model.layers[1].self_attn.q_proj.weight.detach().double().norm())
    assert float(relative(found.modules[1, "q"])) == pytest.approx(0.25 * (8 * 24) ** 0.5 / whole, rel=1e-5)


def test_permuting_layers_permutes_rows() -> None:
    base = tiny.random_model("llama")
    expert = tiny.fine_tuned(base, seed=3)
    before = in_memory(base, expert)
    order = [2, 0, 3, 1]
    for model in (base, expert):
        model.model.layers = torch.nn.ModuleList([model.model.layers[at] for at in order])
    after = in_memory(base, expert)
    assert torch.equal(after.heads, before.heads[:, order])
    assert torch.equal(after.neurons, before.neurons[:, order])
    assert torch.equal(after.modules[0, "norms"], before.modules[2, "norms"])


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["tensor by tensor", "merged whole"])
def test_a_lora_is_what_it_is_when_merged(options, tmp_path, monkeypatch) -> None:
    from mergekit_wp.checkpoint.adapters import merge_lora
    from mergekit_wp.checkpoint.references import read_reference

    base = tiny.save(tiny.random_model("llama", seed=1), tmp_path / "base", torch.bfloat16)
    name = f"{base}+{write_lora(tmp_path / 'lora', base, **options)}"
    merged = merge_lora(read_reference(name), tmp_path, remote_code=False)
    if not options:
        monkeypatch.setattr(module, "merge_lora", None)  # not needed
    found, want = measured(name, base), measured(merged, base)
    assert torch.equal(found.heads, want.heads)
    assert torch.equal(found.neurons, want.neurons)
    assert float(found.modules[0, "q"][0]) > 0 == float(found.modules[0, "k"][0])


def test_models_that_do_not_fit_are_named(tmp_path) -> None:
    base, expert = tiny.save_pair(tmp_path, "llama")
    file = next(f for f in expert.glob("*.safetensors") if "model.norm.weight" in load_file(f))
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": torch.full((24,), float("nan"))}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"model\.norm\.weight .* holds a NaN or an infinity"):
        measured(expert, base)
    save_file({**tensors, "model.norm.weight": torch.ones(25)}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"model\.norm\.weight has the shape \[25\], in .* \[24\]"):
        measured(expert, base)
    biased = tiny.save(tiny.random_model("llama-biased"), tmp_path / "biased")
    with pytest.raises(BadInput, match=r"has no model\.layers\.0\.mlp\.down_proj\.bias"):
        measured(base, biased)
