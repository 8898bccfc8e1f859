"""The Python API: `patch` against slices copied by hand, `steer`, prompts of every form, the examples of docstrings."""

from __future__ import annotations

import copy
import doctest
import json
from contextlib import suppress

import datasets
import pytest
import tiny
import torch
import transformers

import mergekit_wp
from mergekit_wp import load_pair, patch, score, steer
from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import Component, Geometry, Kind
from mergekit_wp.scoring.pairs import Pair
from mergekit_wp.scoring.prompts import prompts_of
from mergekit_wp.scoring.resume import Resume

ALL = (*tiny.VARIANTS, *tiny.FAMILIES, *tiny.WRAPPERS)
SMALL = {"num_hidden_layers": 2, "intermediate_size": 8}


def decoder(model):
    return getattr(model.model, "language_model", model.model).layers


def copy_head(base, expert, layer, head):
    """By hand: rows of q, its bias, columns of o. Phi-3 has the queries on top of one projection."""
    ours, theirs = decoder(base)[layer].self_attn, decoder(expert)[layer].self_attn
    rows = slice(head * ours.head_dim, (head + 1) * ours.head_dim)
    q, other_q = (getattr(m, "q_proj", None) or m.qkv_proj for m in (ours, theirs))
    q.weight[rows] = other_q.weight[rows]
    if q.bias is not None:
        q.bias[rows] = other_q.bias[rows]
    ours.o_proj.weight[:, rows] = theirs.o_proj.weight[:, rows]


def copy_neuron(base, expert, layer, j):
    """By hand: row j of gate and up and their biases, column j of down. Phi-3 has the gates on top of the ups."""
    ours, theirs = decoder(base)[layer].mlp, decoder(expert)[layer].mlp
    count = ours.down_proj.in_features
    if hasattr(ours, "gate_up_proj"):
        for row in (j, count + j):
            ours.gate_up_proj.weight[row] = theirs.gate_up_proj.weight[row]
    else:
        for name in ("gate_proj", "up_proj"):
            getattr(ours, name).weight[j] = getattr(theirs, name).weight[j]
            if getattr(ours, name).bias is not None:
                getattr(ours, name).bias[j] = getattr(theirs, name).bias[j]
    ours.down_proj.weight[:, j] = theirs.down_proj.weight[:, j]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ALL)
def test_patch_is_slices_copied_by_hand_and_undone(kind):
    base = tiny.random_model(kind, seed=1)
    expert = tiny.fine_tuned(base, seed=2)
    wanted, before = copy.deepcopy(base), state(base)
    with torch.no_grad():
        copy_head(wanted, expert, 1, 3)
        copy_head(wanted, expert, 0, 0)
        copy_neuron(wanted, expert, 1, 2)
    with patch(base, expert, ["L1H3", Component(Kind.NEURON, 1, 2), "L0H0", "L1N2"]) as patched:
        assert patched is base
        assert same(state(base), state(wanted))
        assert not same(state(base), before)
    assert same(state(base), before)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3-wrapper"])
def test_the_expert_may_be_a_folder_or_a_state_dict(kind, tmp_path):
    base = tiny.random_model(kind, seed=1)
    expert = tiny.fine_tuned(base, seed=2)
    folder = tiny.save(expert, tmp_path / "expert")
    with patch(base, expert, ["L1H1", "L0N4"]):
        wanted = state(base)
    for other in (str(folder), folder, expert.state_dict()):
        with patch(base, other, ["L1H1", "L0N4"]):
            assert same(state(base), wanted)


def test_patch_is_undone_after_an_error_and_generates_inside():
    base = tiny.random_model("llama", seed=1)
    expert = tiny.fine_tuned(base, seed=2, size=0.5)
    before, ids = state(base), torch.tensor([[5, 6, 7]])
    everything = [Component(Kind.HEAD, layer, i) for layer in range(4) for i in range(4)]
    plain = base(ids).logits
    with suppress(RuntimeError), patch(base, expert, everything):
        assert base.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)
        assert not torch.equal(base(ids).logits, plain)
        raise RuntimeError("on purpose")
    assert same(state(base), before)
    assert torch.equal(base(ids).logits, plain)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_patch_refuses_before_it_writes(tmp_path):
    base = tiny.random_model("llama", seed=1)
    expert, before = tiny.fine_tuned(base, seed=2), state(base)
    wide = tiny.random_model("llama", seed=1, intermediate_size=24)
    cut = {name: tensor for name, tensor in expert.state_dict().items() if "layers.3" not in name}
    for bad, components, said in [
        (expert, ["L0H0", "L4H0"], "L4H0 is not in this model"),
        (expert, ["5"], "found '5', expected a head"),
        (wide, ["L0H0"], "not of the base's shape: neurons 24 against 20"),
        (cut, ["L0H0", "L3H1"], r"expert: has no tensor model\.layers\.3\.self_attn\.q_proj"),
        (str(tmp_path / "none"), ["L0H0"], "no such model folder"),
    ]:
        with pytest.raises(BadInput, match=said), patch(base, bad, components):
            raise AssertionError
        assert same(state(base), before)
    with pytest.raises(BadInput, match="base: found 'str', expected a model folder"), patch("base", expert, ["L0H0"]):
        raise AssertionError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    base = tiny.random_model("llama", seed=1, **SMALL)
    return str(tiny.save(base, root / "base")), str(tiny.save(tiny.fine_tuned(base, seed=2), root / "expert"))


def test_a_loaded_pair_is_scored_as_its_folders(folders):
    pair = load_pair(*folders)
    assert not any(parameter.requires_grad for model in pair[:2] for parameter in model.parameters())
    options = {"progress": False, "gap_floor": 0.0}
    found, wanted = (score(*models, ["w1 w2", "w5"], **options) for models in (pair[:2], folders))
    assert torch.equal(found.neurons, wanted.neurons)
    assert (found.meta.base, found.meta.expert) == (wanted.meta.base, wanted.meta.expert)


def test_the_score_file_is_written_and_inputs_are_not(folders, tmp_path):
    out = tmp_path / "s.safetensors"
    found = score(*folders, ["w1 w2", "w5"], out=out, progress=False, gap_floor=0.0)
    again = mergekit_wp.read_scores(out)
    assert torch.equal(again.heads, found.heads)
    assert again.meta == found.meta
    with pytest.raises(BadInput, match="lies inside what is read"):
        score(*folders, ["w1"], out=f"{folders[0]}/s.safetensors", progress=False)


def test_a_run_with_an_output_goes_on_after_a_kill(folders, tmp_path, monkeypatch):
    out, options = tmp_path / "s.safetensors", {"method": "exact", "progress": False, "gap_floor": 0.0}
    pair, save, steps = load_pair(*folders), Resume.save, []

    def saved(self, *args):
        steps.append(args[1])
        save(self, *args)
        if len(steps) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Resume, "save", saved)
    with pytest.raises(KeyboardInterrupt):
        score(*pair[:2], ["w1 w2", "w5"], out=out, **options)
    assert list(tmp_path.glob(".s.safetensors.resume/*/*.safetensors"))
    found = score(*pair[:2], ["w1 w2", "w5"], out=out, **options)
    assert len(steps) == len(set(steps)) == 2, "a layer each, none of them twice"
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    assert torch.equal(found.neurons, score(*folders, ["w1 w2", "w5"], **options).neurons)


def test_steer_clamps_every_prompt_and_goes(folders):
    """After the anchor layer <z, v^> is alpha at each prompt position: of a second answer as of the first."""
    pair = load_pair(*folders)
    contrasts = [("w1 w2 w3", "w2 w3"), ("w4 w5", "w5")]
    scores = score(*folders, contrasts, utility="anchor", layer=0, progress=False, gap_floor=0.0)
    task = scores.meta.tasks["prompts"]
    unit_D = torch.nn.functional.normalize(scores.tasks["prompts"].anchor, dim=0)
    seen = []
    handle = pair.base.model.layers[1].register_forward_pre_hook(lambda _m, args: seen.append(args[0] @ unit_D))
    ids = torch.tensor([[5, 6, 7]])
    with steer(pair.base, scores["prompts"]):
        for _ in range(2):
            pair.base.generate(ids, max_new_tokens=3, do_sample=False)
    assert [tuple(each.shape) for each in seen] == [(1, 3), (1, 1), (1, 1)] * 2
    for prompt in (seen[0], seen[3]):
        assert torch.allclose(prompt, torch.full((1, 3), task.alpha), atol=1e-5)
    assert (seen[1] - task.alpha).abs().min() > 1e-3
    seen.clear()
    with steer(pair.base, scores, positions="all", alpha=2.0):
        pair.base.generate(ids, max_new_tokens=3, do_sample=False)
    assert all(torch.allclose(each, torch.full_like(each, 2.0), atol=1e-5) for each in seen)
    handle.remove()
    assert not pair.base.model.layers[0]._forward_hooks
    with pytest.raises(BadInput, match="read along no direction"), steer(pair.base, score(
        *folders, ["w1"], progress=False, gap_floor=0.0
    )):  # fmt: skip
        raise AssertionError
    other = tiny.random_model("llama", seed=1, num_hidden_layers=3)
    with pytest.raises(BadInput, match=r"of another shape .* layers 3 against 2"), steer(other, scores):
        raise AssertionError


def pairs(prompts, **options):
    given = {"task": "t", "column": None, "samples": None, "seed": 0} | options
    return prompts_of(prompts, *given.values())


def test_prompts_of_every_form(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"task": "f", "prompt": "from a file"}) + "\n")
    assert pairs(["one", "two"]) == [Pair("t", "one"), Pair("t", "two")]
    assert pairs([("with", "without")]) == [Pair("t", "with", "without")]
    rows = [{"prompt": "a", "chat": True}, {"task": "u", "prompt": "b"}]
    assert pairs(rows) == [Pair("t", "a", chat=True), Pair("u", "b")]
    assert pairs([str(file), file]) == [Pair("f", "from a file")] * 2
    assert pairs(str(file)) == pairs(file) == [Pair("f", "from a file")]
    both = pairs(["builtin:maths", "builtin:code"], samples=2)
    assert [pair.task for pair in both] == ["maths", "maths", "code", "code"]


def test_prompts_of_data_sets():
    data = datasets.Dataset.from_dict({"question": ["q1", "q2"], "answer": ["1", "2"]})
    assert pairs(data, column="question") == [Pair("t", "q1"), Pair("t", "q2")]
    same_fields = datasets.Dataset.from_dict({"prompt": ["p"], "contrast": ["c"], "note": ["left out"]})
    assert pairs(same_fields) == [Pair("t", "p", "c")]
    with pytest.raises(BadInput, match=r"has no column 'prompt'; .* one of question, answer"):
        pairs(data)
    with pytest.raises(BadInput, match="holds the splits train, test; give one"):
        pairs(datasets.DatasetDict(train=data, test=data), column="question")


def test_a_data_set_of_the_hub(monkeypatch):
    data = datasets.Dataset.from_dict({"question": [f"q{i}" for i in range(150)]})
    asked = []

    def load(name, revision=None):
        asked.append((name, revision))
        if name != "alice/maths":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return datasets.DatasetDict(train=data)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = pairs("hf://datasets/alice/maths@v2", column="question")
    assert asked == [("alice/maths", "v2")]
    assert len({pair.prompt for pair in found}) == 100
    assert len(pairs("hf://datasets/alice/maths", column="question", samples=120)) == 150  # drawn of all, later
    with pytest.raises(BadInput, match="bob/none: the data set could not be loaded"):
        pairs("hf://datasets/bob/none", column="question")


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "prompts: there are none"),
        ([["a", "b"]], r"prompts\[0\]: found 'list'"),
        ([("a", "b", "c")], r"prompts\[0\]: found \('a', 'b', 'c'\), expected \(prompt, contrast\)"),
        (["a", ""], r"prompts\[1\]: the field prompt must be a non-empty string"),
        ([{"prompt": "a", "answer": "b"}], r"prompts\[0\]: unknown field 'answer'"),
        ([("a", "b"), "c"], "task t mixes rows with and without a contrast"),
        (7, "prompts: found 'int'"),
        ("none.jsonl", "none.jsonl: cannot read the pairs"),
        (["none.jsonl"], "none.jsonl: cannot read the pairs"),
        ("hf://datasets/alone", "expected hf://datasets/OWNER/NAME"),
    ],
)
def test_other_prompts_are_refused(prompts, said):
    with pytest.raises(BadInput, match=said):
        pairs(prompts)


def test_the_examples_of_docstrings_are_true(folders, tmp_path):
    """With a pair of tiny models, in a folder and in memory, as `base`, `expert`, `base_folder`, ..."""
    import mergekit_wp.api
    import mergekit_wp.geometry
    import mergekit_wp.merge.merging

    base, expert = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    other = tiny.fine_tuned(base, seed=3)
    prompts = ["w1 w2 w3", "w4 w5"]
    options = {"progress": False, "gap_floor": 0.0, "tokenizer": tiny.tokenizer()}
    known = {
        "base": base, "expert": expert, "other": other, "base_folder": folders[0], "expert_folder": folders[1],
        "score": score, "torch": torch, "s": score(base, expert, prompts, **options),
        "s_other": score(base, other, prompts, **options),
    }  # fmt: skip
    for module in (mergekit_wp.api, mergekit_wp.geometry, mergekit_wp.merge.merging):
        done = doctest.testmod(module, extraglobs=known)
        assert done.attempted
        assert not done.failed


def test_what_is_offered_is_there_and_light():
    assert {"score", "read_scores", "load_pair", "patch", "steer", "merge"} <= set(dir(mergekit_wp))
    for name in mergekit_wp.__all__:
        assert callable(getattr(mergekit_wp, name)), name
    with pytest.raises(AttributeError, match="no attribute 'scored'"):
        mergekit_wp.scored  # noqa: B018
    assert Geometry.__module__ == "mergekit_wp.geometry"
