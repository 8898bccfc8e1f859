"""Configs are compared as transformers understands them: one model one fingerprint, another model another.

`config_spellings.jsonl` holds the config.json that releases 4.40.2, 4.45.2, 4.51.3, 4.57.1, 5.0.0 and 5.19.0 of
transformers themselves wrote for the same models (files equal to an earlier release's are left out).
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from merge_world import World
from transformers import AutoConfig, AutoModelForCausalLM

from mergekit_wp import modelconfig
from mergekit_wp.checkpoint import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.modelconfig import differences, digest, resolved

SPELLINGS: dict[str, list[dict]] = defaultdict(list)
for _line in (Path(__file__).parent / "config_spellings.jsonl").read_text().splitlines():
    _entry = json.loads(_line)
    SPELLINGS[_entry["model"]].append(_entry)


def config_of(model: str, **changes: object) -> dict:
    """The newest spelling, with fields changed (... takes one out)."""
    config = {**SPELLINGS[model][-1]["config"], **changes}
    return {name: value for name, value in config.items() if value is not ...}


def rope(model: str, **changes: object) -> dict:
    return {"rope_parameters": {**config_of(model)["rope_parameters"], **changes}}


@pytest.mark.parametrize("model", SPELLINGS)
def test_every_release_s_spelling_is_one_model(model):
    read = {entry["written_by"]: resolved(entry["config"], "config.json") for entry in SPELLINGS[model]}
    assert len({digest(fields) for fields in read.values()}) == 1
    newest = list(read.values())[-1]
    assert [differences(fields, newest) for fields in read.values()] == [[]] * len(read)


def test_the_spellings_do_differ():
    """Else the test above would say nothing."""
    for model, entries in SPELLINGS.items():
        spelled = [{k: v for k, v in e["config"].items() if k != "transformers_version"} for e in entries]
        assert len(spelled) > 1, model
        assert all(a != b for a, b in itertools.pairwise(spelled)), model


SAME = {
    "whole numbers": ("llama", rope("llama", rope_theta=500000)),
    "theta outside": ("llama", {"rope_parameters": ..., "rope_theta": 500000}),
    "type and rope_type": ("llama_linear", rope("llama_linear", type="linear")),
    "type alone": ("llama_linear", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 4}}),
    "scaling by one": ("llama", rope("llama", rope_type="linear", factor=1.0)),
    "float32's own decimals": ("llama", {"rms_norm_eps": 9.999999974752427e-07}),
    "another name of silu": ("llama", {"hidden_act": "swish"}),
    "defaults left out": ("llama", {"hidden_act": ..., "rms_norm_eps": ..., "attention_bias": ..., "mlp_bias": ...}),
    "gemma's defaults left out": (
        "gemma2", {"tie_word_embeddings": ..., "attn_logit_softcapping": ..., "layer_types": ...},
    ),
    "head width left out": ("llama", {"head_dim": ...}),
    "head width said": ("qwen2", {"head_dim": 8}),
    "window switched off": ("qwen2", {"sliding_window": 4, "layer_types": ..., "max_window_layers": 1}),
    "window of no layer": (
        "qwen2", {"sliding_window": 4, "use_sliding_window": True, "layer_types": ..., "max_window_layers": 9},
    ),
    "yarn's defaults said": (
        "qwen2_yarn", rope("qwen2_yarn", beta_fast=32, beta_slow=1, truncate=True, attention_factor=1.1386294361119891),
    ),
    "a limit": ("llama", {"max_position_embeddings": 4096}),
    "all rotary": ("llama", {"partial_rotary_factor": 1.0}),
    "left from training": (
        "llama", {"use_cache": False, "attention_dropout": 0.1, "unsloth_version": "2024.9", "_name_or_path": "/x",
                  "torch_dtype": "float16", "initializer_range": 0.5, "auto_map": {"AutoConfig": "a.B"}},
    ),
    "special tokens": ("llama", {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}),
    "neither type nor class known, but the architecture": ("llama", {"model_type": "acme"}),
}  # fmt: skip
OTHER = {
    "theta": ("llama", rope("llama", rope_theta=10000.0)),
    "eps": ("llama", {"rms_norm_eps": 1e-5}),
    "activation": ("llama", {"hidden_act": "gelu"}),
    "linear factor": ("llama_linear", rope("llama_linear", factor=2.0)),
    "llama3's low factor": ("llama_llama3", rope("llama_llama3", low_freq_factor=2.0)),
    "llama3's original length": ("llama_llama3", rope("llama_llama3", original_max_position_embeddings=64)),
    "where dynamic scaling begins": ("llama_dynamic", {"max_position_embeddings": 20}),
    "yarn's factor": ("qwen2_yarn", rope("qwen2_yarn", factor=2.0)),
    "yarn's attention": ("qwen2_yarn", rope("qwen2_yarn", attention_factor=1.5)),
    "window": ("mistral", {"sliding_window": 8}),
    "no window": ("mistral", {"sliding_window": None}),
    "window of qwen2": ("qwen2_window", {"sliding_window": 8}),
    "window off": ("qwen2_window", {"use_sliding_window": False, "layer_types": ...}),
    "layers with a window": ("qwen2_window", {"max_window_layers": 3, "layer_types": ...}),
    "which layers": ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    "logit cap": ("gemma2", {"final_logit_softcapping": 1.0}),
    "no attention cap": ("gemma2", {"attn_logit_softcapping": None}),
    "query scale": ("gemma2", {"query_pre_attn_scalar": 2}),
    "multiplier": ("granite", {"residual_multiplier": 1.0}),
    "attention multiplier": ("granite", {"attention_multiplier": 1.0}),
    "layers without rotary": ("smollm3", {"no_rope_layers": [0, 1, 1, 1]}),
    "theta of one kind of layer": (
        "gemma3_text", {"rope_parameters": {
            **config_of("gemma3_text")["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": 99.0},
        }},
    ),
    "long factors": ("phi3", rope("phi3", long_factor=[3.0] * 4)),
    "original length": ("phi3", {"original_max_position_embeddings": 16}),
}  # fmt: skip


@pytest.fixture(scope="module")
def logits():
    """The logits of a model by its config: one set of random weights a family, whatever the config says."""
    weights: dict[str, dict[str, torch.Tensor]] = {}

    def compute(model: str, config: dict) -> torch.Tensor:
        kind = config_of(model)["model_type"]
        # An unknown type is custom code to transformers; its architecture's own is what resolves it.
        made = AutoConfig.for_model(**{**config, "model_type": kind, "torch_dtype": ..., "dtype": "float32"})
        made.torch_dtype = torch.float32
        net = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
        if model not in weights:
            torch.manual_seed(0)
            weights[model] = {
                name: torch.randn_like(w) / w.shape[-1] ** 0.5 + (w.ndim == 1) for name, w in net.state_dict().items()
            }
        net.load_state_dict(weights[model])
        with torch.no_grad():
            return net(torch.arange(40)[None] % 60, use_cache=False).logits

    return compute


@pytest.mark.parametrize(("model", "changes", "same"), [
    *(pytest.param(*case, True, id=name) for name, case in SAME.items()),
    *(pytest.param(*case, False, id=name) for name, case in OTHER.items()),
])  # fmt: skip
def test_the_digest_changes_when_the_logits_do(model, changes, same, logits):
    """The judge is transformers: two configs are one model if they compute the same with the same weights."""
    plain, changed = config_of(model), config_of(model, **changes)
    told = differences(resolved(changed, "x"), resolved(plain, "x"))
    assert (digest(resolved(changed, "x")) == digest(resolved(plain, "x")), told == []) == (same, same)
    assert torch.equal(logits(model, changed), logits(model, plain)) == same


def test_fields_are_those_that_the_models_read():
    """A field that model code reads and that the class does not declare would be overlooked by `resolved`."""
    helpers = {"get_text_config", "_attn_implementation", "rope_parameters", "layer_type"}
    for model in SPELLINGS:
        kind = config_of(model)["model_type"]
        package = kind.removesuffix("_text")
        module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        source = inspect.getsource(module)
        read = set(re.findall(r"(?<!\w)config\.([a-z]\w*)", source))
        read |= set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', source))
        known = {f.name for f in dataclasses.fields(type(AutoConfig.for_model(kind)))} | helpers
        if package == "gemma3":  # its multimodal half is in the same file
            known |= {f.name for f in dataclasses.fields(type(AutoConfig.for_model("gemma3")))} | {"image_token_id"}
        assert read - known - set(modelconfig._SHARED) == set(), kind


@pytest.mark.parametrize(("changes", "told"), [
    ({"num_hidden_layers": "32"}, "num_hidden_layers"),
    ({"rope_parameters": "x"}, "rope_parameters"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ({"rope_parameters": {"rope_type": 3}}, "rope_type 3"),
    ({"rope_parameters": {"rope_type": ["linear"], "rope_theta": 1e4}}, "rope_type ['linear']"),
    ({"rope_parameters": {"rope_type": "su", "factor": 2.0}}, "rope_type 'su'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "2", "rope_theta": 1e4}}, "factor '2'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "8"}}, "'str'"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1], "long_factor": [1],
                          "original_max_position_embeddings": 1}}, "longrope"),
    ({"rope_parameters": ..., "rope_theta": None}, "rope_theta None"),
    ({"rope_parameters": ..., "rope_theta": "x"}, "rope_theta 'x'"),
    ({"rope_parameters": ..., "rope_theta": float("inf")}, "rope_theta inf"),
    ({"hidden_size": None}, "hidden_size"),
    ({"vocab_size": 0}, "vocab_size 0"),
    ({"num_attention_heads": 0}, "zero"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"hidden_act": "sillu"}, "hidden_act 'sillu'"),
    ({"dtype": "float7"}, "float7"),
    ({"pad_token_id": 64}, "pad_token_id 64"),
    ({"model_type": 7, "architectures": ["AcmeForCausalLM"]}, "model_type 7"),
    ({"model_type": "acme", "architectures": 1}, "architectures 1"),
])  # fmt: skip
def test_a_config_of_which_no_model_can_be_built(changes, told):
    with pytest.raises(BadInput) as caught:
        resolved(config_of("llama", **changes), "m/config.json")
    assert caught.value.message.startswith("m/config.json: ")
    assert told in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("architectures", [1, "LlamaForCausalLM", {"a": 1}])
def test_architectures_of_the_wrong_type(architectures, tmp_path):
    folder = tiny.save(tiny.random_model("llama"), tmp_path / "m")
    edit(folder, architectures=architectures)
    with pytest.raises(BadInput, match=r"config\.json: found architectures"):
        _ = Checkpoint.open(str(folder)).fingerprint


# What `Checkpoint.fingerprint.config` was for these files at 7d94668, before configs were resolved.
OLD = {
    ("llama", "4.40.2"): "6ee681ba88b2ce077ad64ed65fdcb1a8bcf7d464b58c03c2232c8f2c844057af",
    ("llama_llama3", "5.0.0"): "82dafdb8ef8ff001131489082abebbc0664c6b19f19248444bb2b79cdfdc2b50",
    ("gemma2", "4.45.2"): "58b815838607cf22d774472d7b258ab4f8a545247bec80b31a6ba4943ed0e866",
}


@pytest.mark.parametrize("which", OLD)
def test_old_hashes_are_computed_as_they_were(which, tmp_path):
    model, release = which
    (tmp_path / "config.json").write_text(
        json.dumps(next(e["config"] for e in SPELLINGS[model] if e["written_by"] == release))
    )
    checkpoint = Checkpoint("m", tmp_path)
    assert modelconfig.spelled_digest(checkpoint.config, checkpoint.geometry) == OLD[which]


def test_scores_of_either_hash_serve_every_spelling(tmp_path):
    """Old score files go on being used with the base as it was; new ones also with the base saved again."""
    from mergekit.io.tasks import LoaderCache

    from mergekit_wp.merge.cli import main
    from mergekit_wp.scorefile import read_scores, write_scores

    world = World(tmp_path, "llama", experts=1).build()
    scores = read_scores(world.score(0))
    base, expert = (Checkpoint.open(str(folder)).fingerprint for folder in (world.base, world.expert(0)))
    old = dataclasses.replace(
        scores.meta,
        base=dataclasses.replace(scores.meta.base, config=base.spelled),
        expert=dataclasses.replace(scores.meta.expert, config=expert.spelled),
    )
    assert (old.base.config, old.expert.config) != (scores.meta.base.config, scores.meta.expert.config)
    spelled = (world.base / "config.json").read_text()
    for meta, changes, code in (
        (old, {}, 0),
        (scores.meta, {"rope_parameters": ..., "rope_theta": 10000}, 0),
        (old, {"rms_norm_eps": 1e-3}, 2),
        (scores.meta, {"rms_norm_eps": 1e-3}, 2),
    ):
        write_scores(dataclasses.replace(scores, meta=meta), world.score(0))
        (world.base / "config.json").write_text(spelled)
        edit(world.base, **changes)
        LoaderCache.loaders.clear()
        run = CliRunner().invoke(main, [str(world.recipe()), "--dry-run"])
        assert (run.exit_code, "whose config differ" in run.output) == (code, code == 2), run.output


def edit(folder: Path, **changes: object) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        (kind, rope)
        for kind in [*tiny.VARIANTS, *tiny.FAMILIES]
        for rope in ("default", "linear")
        if (kind, rope) != ("phi3", "linear")  # its class takes no linear scaling
    ],
)
def test_a_part_of_each_head_counts_where_the_model_turns_a_part(kind, rope):
    """A stray field makes equal models equal, and no others: by the frequencies that the model's own code computes."""
    found = []
    for part in (1.0, 0.5):
        config = tiny._config(kind, {}).to_dict() | {"architectures": [type(tiny.random_model(kind)).__name__]}
        group = {"rope_type": rope, "rope_theta": 100.0, "partial_rotary_factor": part}
        group |= {} if rope == "default" else {"factor": 2.0}
        nested = config["rope_parameters"].keys() & {"full_attention", "sliding_attention"}
        config["rope_parameters"] = dict.fromkeys(nested, group) if nested else group
        built = AutoModelForCausalLM.from_config(modelconfig._build(config, "c"))
        tables = {name: table for name, table in built.model.rotary_emb.named_buffers() if "original" not in name}
        found.append((tables, digest(resolved(config, "c"))))
    (one, one_digest), (other, other_digest) = found
    equal = all(table.shape == other[name].shape and torch.equal(table, other[name]) for name, table in one.items())
    assert (one_digest == other_digest) == equal
    if rope == "default":
        assert equal == (kind != "phi3")
