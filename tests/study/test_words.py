"""Words against numpy on whole tensors, the models of transformers with hooks, and planted directions."""

from __future__ import annotations

import csv
import json
from itertools import combinations

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from study_world import inputs_of, scores
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.console import no_progress
from mergekit_wp.geometry import Component, Kind
from mergekit_wp.scoring.batching import TaskTokens
from mergekit_wp.scoring.models.layerwise import ResidentStack
from mergekit_wp.scoring.models.load import ModelPair
from mergekit_wp.study import readout as module
from mergekit_wp.study.at_anchor import anchor_activity, halved_directions
from mergekit_wp.study.drift_sums import StoredModel
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.parts import write_part
from mergekit_wp.study.readings import _against, _others
from mergekit_wp.study.readout import Readout, TokenNames
from mergekit_wp.study.study_spec import Study
from mergekit_wp.study.words import PART, work

CPU = torch.device("cpu")


@pytest.mark.parametrize(("layers", "heads", "count"), [(6, 8, 10), (4, 4, 5)])
def test_a_ranking_that_says_nothing_of_peaks_is_seldom_sure(layers, heads, count) -> None:
    """Nominally 5 %; of others that were drawn with return it was 12."""
    random, sure = torch.Generator().manual_seed(0), 0
    for _world in range(300):
        peak_LH = torch.randn(layers, heads, generator=random)
        score_LH = torch.randn(layers, heads, generator=random) + 2 * torch.randn(layers, 1, generator=random)
        top_LH = score_LH >= score_LH.flatten().topk(count).values[-1]
        others = _others(top_LH, Kind.HEAD, random)
        assert len({(c.layer, c.index) for c in others}) == len(others)
        assert not any(top_LH[c.layer, c.index] for c in others)
        peak_N = torch.cat([peak_LH[top_LH], torch.tensor([peak_LH[c.layer, c.index] for c in others])])
        p = _against(peak_N, count)["p"]
        sure += p is not None and p < 0.05
    assert sure / 300 < 0.08


def readout(folder, tokens=None) -> Readout:
    return Readout(StoredModel(Checkpoint(str(folder), folder)), tokens)


def stack(model) -> ResidentStack:
    return ResidentStack(model.requires_grad_(False), CPU, torch.float32)


def ends(model) -> tuple[np.ndarray, np.ndarray]:
    """What the final norm multiplies by, and the head, of a model in memory."""
    text = getattr(model.model, "language_model", model.model)
    gemma = type(text).__name__.startswith("Gemma")
    gain = text.norm.weight.detach().double().numpy() + (1 if gemma else 0)
    return gain, model.lm_head.weight.detach().double().numpy()


@pytest.mark.parametrize(
    ("kind", "rows"),
    [("llama", 3), ("qwen2", 0), ("gemma2", 0), ("granite", 0), ("phi3", 0), ("llava-wrapper", 0)],
)
def test_a_vector_reads_as_its_definition_says(kind, rows, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_TILE", 24 * 10)  # several tiles of the head, the last one shorter
    monkeypatch.setattr(module, "_LOGITS", 300)  # several portions of vectors
    model = tiny.random_model(kind)
    model = tiny.add_rows(model, rows) if rows else model
    folder = tiny.save(model, tmp_path / "m")
    known = range(2, 97)  # rows without a token are not ranked
    x_ND = 7 * torch.randn(9, getattr(model.config, "text_config", model.config).hidden_size)
    share_GN = torch.rand(2, 9)
    found = readout(folder, [*known, 5, 1000]).read(x_ND, share_GN=share_GN)
    gain, head = ends(model)
    x = x_ND.double().numpy()
    raw = (x / np.sqrt((x**2).mean(1, keepdims=True)) * gain) @ head[2:97].T
    order = np.argsort(-raw, 1)
    assert found.high_NK.tolist() == (order[:, :10] + 2).tolist()
    assert found.low_NK.tolist() == (order[:, ::-1][:, :10] + 2).tolist()
    np.testing.assert_allclose(found.peak_N, (raw.max(1) - raw.mean(1)) / raw.std(1, ddof=1), rtol=1e-4)
    logits = {"gemma2": 4 * np.tanh(raw / 4), "granite": raw / 0.5}.get(kind, raw)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found.size_Gn, share_GN.double().numpy() @ chances, rtol=1e-4)


def test_the_sign_that_peaks_higher_is_that_of_the_vector_turned(tmp_path) -> None:
    reader = readout(tiny.save(tiny.random_model("gemma2"), tmp_path / "m"))
    x_ND = torch.randn(12, 24)
    x_ND[5] = 0
    both = [reader.read(sign * x_ND) for sign in (1, -1)]
    found = reader.read(x_ND, either=torch.arange(12) < 10, share_GN=torch.ones(1, 12))
    turned = (both[1].peak_N > both[0].peak_N) & (torch.arange(12) < 10)
    assert turned.any()
    assert not turned.all()
    assert torch.equal(found.sign_N, 1 - 2 * turned.float())
    assert torch.equal(found.high_NK, torch.where(turned[:, None], both[1].high_NK, both[0].high_NK))
    assert found.peak_N[5].isnan()  # no vector, no words
    again = reader.read(found.sign_N[:, None] * x_ND, share_GN=torch.ones(1, 12))
    torch.testing.assert_close(found.size_Gn, again.size_Gn)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2"])
def test_planted_words(kind, tmp_path) -> None:
    """A neuron and a head whose column is W_U[t] / gamma, also behind a norm after the block."""
    model = tiny.random_model(kind, vocab_size=16)
    gain, _ = ends(model)
    width = len(gain)
    head = torch.linalg.qr(torch.randn(width, width)).Q[:16]
    layer = model.model.layers[2]
    after = {"llama": (1.0, 1.0), "gemma2": tuple(
        1 + getattr(layer, n).weight.detach() for n in ("post_attention_layernorm", "post_feedforward_layernorm")
    ) if kind == "gemma2" else (), "olmo2": tuple(
        getattr(layer, n).weight.detach() for n in ("post_attention_layernorm", "post_feedforward_layernorm")
    ) if kind == "olmo2" else ()}[kind]  # fmt: skip
    model.lm_head.weight = torch.nn.Parameter(head)
    model.config.tie_word_embeddings = False
    layer.mlp.down_proj.weight.data[:, 3] = head[7] / torch.tensor(gain) / after[1]
    layer.self_attn.o_proj.weight.data[:, 8:16] = 0
    layer.self_attn.o_proj.weight.data[:, 10] = head[9] / torch.tensor(gain) / after[0]
    reader = readout(tiny.save(model, tmp_path / "m"))
    geometry = reader.stored.checkpoint.geometry
    wanted = [
        (Component(Kind.NEURON, 2, 3), torch.ones(1)),
        (Component(Kind.HEAD, 2, 1), torch.tensor([0.0, 0, 0.5, 0, 0, 0, 0, 0])),
        (Component(Kind.NEURON, 2, 3), -torch.ones(1)),
    ]
    written_ND = reader.written(geometry, wanted)
    planted = head[[7, 9]] / torch.tensor(gain).float()
    torch.testing.assert_close(written_ND[:2] / planted, (written_ND[:2, :1] / planted[:, :1]).expand(2, width))
    found = reader.read(written_ND)
    assert found.high_NK[:2, 0].tolist() == [7, 9]
    assert found.low_NK[2, 0] == 7


def test_words_are_the_logits_that_grow(tmp_path) -> None:
    """Differences of the model's own logits, about a stream at right angles, where the norm's scale is held: it is the
    same on both sides."""
    model = tiny.random_model("gemma2", final_logit_softcapping=None)
    reader = readout(tiny.save(model, tmp_path / "m"))
    written_D = reader.written(reader.stored.checkpoint.geometry, [(Component(Kind.NEURON, 1, 4), torch.ones(1))])[0]
    w = written_D
    z = torch.randn(24)
    z -= (z @ w) / (w @ w) * w
    at = [model.lm_head(model.model.norm(z + step * w)) for step in (1, -1)]
    assert reader.read(written_D[None]).high_NK[0].tolist() == (at[0] - at[1]).topk(10).indices.tolist()


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [20, 21, 22, 23], [30, 31, 32]]


@pytest.mark.parametrize("kind", ["llama-biased", "gemma2", "phi3"])
def test_activity_is_what_hooks_see(kind) -> None:
    model = tiny.random_model(kind)
    seen: dict[str, list] = {}
    for name, part in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            part.register_forward_hook(lambda _m, x, _y, name=name: seen.setdefault(name, []).append(x[0][0, -1]))
    with torch.no_grad():
        for ids in PROMPTS:
            model(torch.tensor([ids]))
    own, _empty = anchor_activity(
        stack(model), [TaskTokens("a", [], None, PROMPTS), TaskTokens("b", [], None, PROMPTS[:1])], 2, lambda _n: None
    )
    for name, rows in seen.items():
        layer, key = int(name.split(".")[2]), Kind.HEAD if "o_proj" in name else Kind.NEURON
        torch.testing.assert_close(own.tables[key][layer], torch.stack(rows[:5]).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("contrasts", [PROMPTS[::-1], None])
def test_halves_of_a_direction(contrasts) -> None:
    base = tiny.random_model("llama")
    expert = tiny.fine_tuned(base, seed=4)

    def last(model, ids) -> torch.Tensor:
        kept: list = []
        hooks = [x.register_forward_hook(lambda _m, _x, y: kept.append(y[0, -1])) for x in model.model.layers]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        return torch.stack(kept)

    with_ = torch.stack([last(expert, ids) for ids in PROMPTS])
    without = torch.stack([last(expert, ids) if contrasts else last(base, ids) for ids in contrasts or PROMPTS])
    tasks = [TaskTokens("a", PROMPTS, contrasts, []), TaskTokens("b", PROMPTS[:1], None, [])]
    pair = ModelPair(stack(base), stack(expert), None, CPU, torch.float32)
    found, single = halved_directions(pair, tasks, 3, 0, lambda _n: None)
    torch.testing.assert_close(found.v_LD, (with_ - without).mean(0), rtol=1e-4, atol=1e-5)
    one, other = found.halves
    torch.testing.assert_close((2 * one + 3 * other) / 5, found.v_LD, rtol=1e-4, atol=1e-5)
    halves = [list(chosen) for chosen in combinations(range(5), 2)]
    close = [torch.allclose((with_ - without)[half].mean(0), one, atol=1e-4) for half in halves]
    half = halves[close.index(True)]
    rest = [i for i in range(5) if i not in half]
    torch.testing.assert_close(found.noise_LD, with_[half].mean(0) - with_[rest].mean(0), rtol=1e-4, atol=1e-5)
    assert single.halves is None
    assert single.v_LD.shape == (4, 24)


ODD = ["<script>alert(1)</script>", "=1+1", "$x$", "a\nb", "\u202eabc", "|", "_x", "&amp;", "\u4e2d", "\ud7ff"]


def test_odd_tokens_stay_text(tmp_path) -> None:
    """Through the whole part: JSON, CSV, pictures and page of an expert with a tokenizer of its own."""
    base, expert = tiny.save_pair(tmp_path, "llama", extra_rows=4)
    words = ["<pad>", "<s>", "</s>", "<unk>", *ODD, *(f"w{i}" for i in range(86))]  # 100 tokens for 101 rows
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(expert)
    _only(expert, range(4, 14))
    found = scores(utility="anchor")
    found.tasks["b"].anchor.zero_()  # no direction, no words
    files = {"wp": found, "same": found, "kl": scores(1)}
    inputs = inputs_of(files)
    study = Study(str(base), str(expert), dict.fromkeys(files, ""), top={"heads": 3, "neurons": 8})
    inputs = Inputs(study, inputs.scores, {}, {})
    inputs.__dict__["fingerprints"] = {"base": "x", "expert": "y"}  # these score files are made up
    result = work(study, inputs, no_progress)
    write_part(PART, tmp_path / "out", {}, result)
    data = json.loads((tmp_path / "out/words/words.json").read_text())
    assert data["tokens"] == {"named": 100, "rows": 101}
    assert [(row["source"], row["task"], row["layer"]) for row in data["directions"]] == [("wp", "a", 1)]
    rankings = {(row["file"], row["task"]): row for row in data["rankings"]}
    assert {key: row["side"] for key, row in rankings.items()} == {
        (file, task): "down" if file == "kl" else "all" for file in files for task in "ab"
    }
    told = [each["name"] for each in rankings["kl", "a"]["components"]]
    assert all(name[1] in "23" for name in told)
    assert len(told) <= 8
    said = {word for row in data["rankings"] for each in row["components"] for word in each["words"]}
    assert set(ODD) <= said
    page = (tmp_path / "out/words/section.html").read_text()
    assert "<script" not in page
    assert "alert(1)" in page
    assert "\u202e" not in page
    for table in (tmp_path / "out/words").glob("*.csv"):
        lines = list(csv.reader(table.open()))
        assert len({len(line) for line in lines}) == 1
        assert not any(cell.startswith(("=", "\u202e")) for line in lines for cell in line)
    assert not any("<script" in picture.read_text() for picture in (tmp_path / "out/words").glob("*.svg"))


def _only(folder, rows) -> None:
    """Make these rows of the head far longer than all others, so that they are the words of anything."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][list(rows)] *= 50
            save_file(tensors, file, metadata={"format": "pt"})


class _Spelt:
    """A tokenizer by its vocabulary alone."""

    def __init__(self, *tokens: str, decode=lambda text: text) -> None:
        self.tokens, self.decode = tokens, decode

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.tokens[token]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.decode(tokens[0])


def test_how_tokens_read() -> None:
    pieces = TokenNames(_Spelt("\u2581the", "the", "<0x0A>", decode=lambda text: text.replace("<0x0A>", "\n")))
    assert [pieces.name(i) for i in range(3)] == ["\u2423the", "the", "\n"]
    bpe = TokenNames(_Spelt("\u0120the", "\u00c3", decode=lambda text: {"\u0120the": " the"}.get(text, "\ufffd")))
    assert [bpe.name(i) for i in range(2)] == ["\u2423the", "\u00c3"]
    real = tiny.tokenizer("qwen2")
    real.backend_tokenizer.decoder = decoders.ByteLevel()
    assert [TokenNames(real).name(i) for i in (1, 4, 5)] == ["<s>", "\u2423", "w"]
