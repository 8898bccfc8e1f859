"""`merge_method: wp_patch` and wp-patch: every slice of the set is the donor's, every other number the recipient's."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_checks import change, edit_config, make_lora, merged_by_stock, refused, rewrite, same_files
from merge_world import World, merge, tensors_of, write_random_scores
from mergekit.io.tasks import LoaderCache
from plain_patch import highest, patched
from safetensors.torch import load_file, save_file

from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import Geometry, Kind
from mergekit_wp.merge.audit import AuditFailed, audit
from mergekit_wp.merge.certificate import read_certificate
from mergekit_wp.merge.cli import main as wp_merge
from mergekit_wp.merge.patch_cli import main
from mergekit_wp.merge.patch_file import read_patch
from mergekit_wp.merge.recipe import read_recipe
from mergekit_wp.scores import Scores, TaskScores, read_scores, write_scores
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.score import score
from mergekit_wp.subset import Amount, Ranking

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def build(root, kind="llama", dtypes=(FP32, FP32), rows=0, **more):
    return World(root, kind, experts=1, dtypes=list(dtypes), extra_rows=[rows]).build(**more)


def recipe(world, remove=False, **parameters):
    """A recipe that restores or removes; with `top`, by the world's scores."""
    recipient, donor = (world.expert(0), world.base) if remove else (world.base, world.expert(0))
    given = {"scores": str(world.score(0))} if "top" in parameters else {}
    given |= parameters | ({"remove": True} if remove else {})
    return {
        "merge_method": "wp_patch",
        "base_model": str(recipient),
        "models": [{"model": str(donor)}],
        "parameters": given,
    }


def listed(world, heads, neurons, name="list.txt"):
    path = world.root / name
    path.write_text(" ".join([*(f"L{layer}H{i}" for layer, i in heads), *(f"L{layer}N{i}" for layer, i in neurons)]))
    return str(path)


def run(*words, code=0):
    LoaderCache.loaders.clear()
    done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


def assert_same(got, want):
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.fixture
def world(tmp_path):
    return build(tmp_path / "w")


KINDS = [  # GQA everywhere; fused projections, biases, tied ends, added rows, three floating dtypes, a wrapper
    ("mistral", FP32, 0),
    ("qwen2", BF16, 2),
    ("phi3", FP16, 1),
    ("gemma2", FP32, 0),
    ("gemma3-wrapper", BF16, 0),
]


@pytest.mark.parametrize(("kind", "dtype", "rows"), KINDS)
def test_restored_and_removed_against_the_definition(kind, dtype, rows, tmp_path):
    world = build(tmp_path, kind, (dtype, dtype), rows)
    table = load_file(world.score(0))
    count = 3
    heads, neurons = (highest(table[name][:2], count) for name in ("heads", "neurons"))  # the anchor sees two layers
    for remove, recipient, donor in ((False, world.base, world.expert(0)), (True, world.expert(0), world.base)):
        out = merge(world, recipe(world, remove, top=count), f"out{remove}")
        assert_same(tensors_of(out), patched(recipient, donor, heads, neurons))
        assert (out / "tokenizer.json").read_bytes() == (recipient / "tokenizer.json").read_bytes()
        config, own = (json.loads((folder / "config.json").read_text()) for folder in (out, recipient))
        assert config.get("vocab_size") == own.get("vocab_size")
    assert not same_files(world.root / "outFalse", world.base)


@pytest.mark.parametrize(("kind", "dtype", "rows"), [KINDS[1], KINDS[2], KINDS[4]])
def test_nothing_is_the_recipient_and_everything_with_the_rest_the_donor(kind, dtype, rows, tmp_path):
    world = build(tmp_path, kind, (dtype, dtype), rows)
    assert_same(tensors_of(merge(world, recipe(world, top=0), "none")), tensors_of(world.base))
    whole, donor = tensors_of(merge(world, recipe(world, components="all"), "all")), tensors_of(world.expert(0))
    for name, tensor in whole.items():
        if any(part in name for part in ("embed_tokens", "lm_head", "norm", "k_proj", "v_proj", "vision", "multi_")):
            whole[name] = donor[name]
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            whole[name] = donor[name]
        if "qkv_proj" in name:  # 4 heads, 2 groups, width 8: keys and values are below the queries
            tensor[32:] = donor[name][32:]
    assert_same(whole, donor)
    base = tensors_of(world.base)
    kept = {name for name, tensor in tensors_of(world.root / "all").items() if torch.equal(tensor, base[name])}
    assert any("k_proj" in name for name in kept) or kind == "phi3"
    assert not any("gate" in name or "o_proj.weight" in name for name in kept if "vision" not in name)


def test_removal_is_the_mirror_of_restoration(tmp_path):
    """What restore S and remove the complement of S give differs in what no component owns, and there alone."""
    world = build(tmp_path, "qwen2", (BF16, BF16))
    draw = torch.Generator().manual_seed(7)
    parts = {kind: torch.rand(4, n, generator=draw) < 0.4 for kind, n in (("heads", 4), ("neurons", 20))}
    inside, outside = ([(m == want).nonzero().tolist() for m in parts.values()] for want in (True, False))
    restored = tensors_of(merge(world, recipe(world, components=listed(world, *inside)), "restored"))
    other = listed(world, *outside, "rest.txt")
    removed = tensors_of(merge(world, recipe(world, remove=True, components=other), "removed"))
    nobody = ("embed_tokens", "norm", "k_proj", "v_proj")
    for name, tensor in restored.items():
        assert torch.equal(tensor, removed[name]) != any(part in name for part in nobody), name


def gap_closed(world, folder, prompts):
    """E_x[(F(M) - F(base)) / (F(expert) - F(base))] with F = -KL(expert || M) at the last token, by transformers."""
    import transformers

    def log_probs(path):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        with torch.no_grad():
            ids = [tokenizer(text, return_tensors="pt").input_ids for text in prompts]
            return torch.stack([model(x).logits[0, -1].double().log_softmax(-1) for x in ids])

    expert, base, patch = (log_probs(path) for path in (world.expert(0), world.base, folder))
    kl_base, kl_patch = ((expert.exp() * (expert - other)).sum(-1) for other in (base, patch))
    return float(((kl_base - kl_patch) / kl_base).mean())


def test_one_component_closes_the_gap_that_exact_says(world):
    prompts = ["w1 w2 w3", "w4 w5", "w9 w8 w7 w6"]
    pairs = world.root / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"task": "t", "prompt": text}) for text in prompts))
    names = listed(world, [(1, 2)], [(2, 7)])
    scored = score(
        ScoringJob(
            str(world.base),
            str(world.expert(0)),
            str(pairs),
            method="exact",
            components=names,
            device="cpu",
            gap_floor=0,
        )
    )
    for name, want in (("L1H2", scored.heads[1, 2]), ("L2N7", scored.neurons[2, 7])):
        (world.root / f"{name}.txt").write_text(name)
        out = merge(world, recipe(world, components=str(world.root / f"{name}.txt")), name)
        assert abs(float(want)) > 1e-3
        assert gap_closed(world, out, prompts) == pytest.approx(float(want), abs=2e-5)


def test_the_stock_command_finds_it(world):
    table = load_file(world.score(0))
    heads, neurons = highest(table["heads"][:2], 4), highest(table["neurons"][:2], 20)  # a quarter of 16 and of 80
    assert_same(merged_by_stock(world, recipe(world, top="25%")), patched(world.base, world.expert(0), heads, neurons))


def test_a_lora_is_an_expert_like_any_other(world):
    """Restored from it, and taken out of it."""
    lora = world.root / "lora"
    state = make_lora(world.base, lora, seed=3)
    whole = world.root / "whole"
    shutil.copytree(world.base, whole)
    rewrite(whole, lambda tensors: {name: state[name].contiguous() for name in tensors})
    heads, neurons = [(0, 1), (3, 2)], [(2, 5), (3, 19)]
    expert, names = f"{world.base}+{lora}", listed(world, heads, neurons)
    run(world.base, expert, "--components", names, "--out", world.root / "restored")
    run(world.base, expert, "--components", names, "--remove", "--out", world.root / "removed")
    assert_same(tensors_of(world.root / "restored"), patched(world.base, whole, heads, neurons))
    assert_same(tensors_of(world.root / "removed"), patched(whole, world.base, heads, neurons))


def test_rows_of_other_layers_under_slices(world):
    """mergekit's `slices:` may move layers: a tensor takes the components of the layer that it comes from."""
    config = recipe(world, components=listed(world, [(2, 0)], [(0, 3)]))
    del config["models"]
    config["slices"] = [
        {"sources": [{"model": str(m), "layer_range": list(span)} for m in (world.expert(0), world.base)]}
        for span in ((2, 4), (0, 2))
    ]
    want = patched(world.base, world.expert(0), [(2, 0)], [(0, 3)])
    for name, tensor in tensors_of(merge(world, config)).items():
        parts = name.split(".")
        if ".layers." in name:
            parts[2] = str((int(parts[2]) + 2) % 4)
        assert torch.equal(tensor, want[".".join(parts)]), name


def test_another_dtype_of_the_donor_is_rounded_once_and_said(tmp_path, caplog):
    world = build(tmp_path, dtypes=(BF16, FP32))
    with caplog.at_level(logging.WARNING):
        out = merge(world, recipe(world, components="heads"))
    assert "e0: is stored in float32, and its slices are rounded to bfloat16" in caplog.text
    heads = [(layer, h) for layer in range(4) for h in range(4)]
    got, base, donor = tensors_of(out), tensors_of(world.base), tensors_of(world.expert(0))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(got[name], donor[name].bfloat16())
    rewrite(world.expert(0), lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    assert_same(got, patched(world.base, world.expert(0), heads, []))
    assert torch.equal(got["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])


# --- the set ---------------------------------------------------------------------------------------------------------


SHAPE = Geometry("LlamaForCausalLM", 4, 4, 2, 8, 20, 24, 97)


@pytest.mark.parametrize(
    ("text", "heads", "neurons"),
    [("5%", 1, 4), ("100%", 16, 80), (3, 3, 3), ("0", 0, 0), ("heads=20, neurons=2.5%", 20, 2), ("neurons=7", 0, 7),
     ("1.25%", 1, 1), ("1.26 %", 1, 2)],
)  # fmt: skip
def test_an_amount(text, heads, neurons):
    amount = Amount.parse(text)
    assert (amount.of(Kind.HEAD, SHAPE), amount.of(Kind.NEURON, SHAPE)) == (heads, neurons)


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "5.5", "101%", "5%,5%", "heads=1,heads=2", "5%,heads=1", "layers=3", True, 1.5, None, "1e9"]
)
def test_what_is_no_amount(text):
    with pytest.raises(BadInput, match=r"^top: found .* expected a number or a percentage"):
        Amount.parse(text)


def several_tasks(world):
    """A second task beside the world's, whose scores are those backwards, negated."""
    one = read_scores(world.score(0))
    table = one.tasks["t"]
    tasks = {"t": table, "u": TaskScores(-table.heads.flip(1), -table.neurons.flip(1), table.anchor.clone())}
    meta = replace(one.meta, tasks=dict.fromkeys(tasks, one.meta.tasks["t"]))
    write_scores(Scores.from_tasks(meta, tasks), world.score(0))
    return tasks


def test_rankings_are_per_task_and_keys_are_signed_or_absolute(world):
    tasks = several_tasks(world)
    assert "say which by `task`, or by `rank`" in refused(world, recipe(world, top=2))
    assert "no scores of a task 'x'; there are those of t, u" in refused(world, recipe(world, top=2, task="x"))
    for k, (key, table) in enumerate(
        [({"task": "u"}, tasks["u"]), ({"task": "u", "rank": "mean-abs"}, tasks["u"]), ({"rank": "mean"}, None)]
    ):
        scores = {kind: getattr(table or read_scores(world.score(0)), kind)[:2] for kind in ("heads", "neurons")}
        if "rank" in key and "abs" in key["rank"]:
            scores = {kind: values.abs() for kind, values in scores.items()}
        out = merge(world, recipe(world, top="heads=2,neurons=5", **key), f"key{k}")
        want = patched(world.base, world.expert(0), highest(scores["heads"], 2), highest(scores["neurons"], 5))
        assert_same(tensors_of(out), want)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0]), min_size=96, max_size=96), st.integers(0, 20), st.data())
def test_a_larger_set_holds_the_smaller(values, k, data):
    """Also where scores are equal: sets of one ranking are nested, as curves want them."""
    more = data.draw(st.integers(k, 20))
    numbers = torch.tensor(values)
    scores = ranked(numbers[:16].view(4, 4), numbers[16:].view(4, 20))
    for kind in Kind:
        everything = torch.ones_like(getattr(scores, kind), dtype=torch.bool)
        small, large = (Ranking(Amount(n, n), scores).mask(kind, everything) for n in (k, more))
        assert small.nonzero().tolist() == sorted(map(list, highest(getattr(scores, kind).tolist(), k)))
        assert bool((large | ~small).all())


def ranked(heads, neurons):
    from mergekit_wp.scores import ModelId, ScoreMeta, TaskMeta, UtilityStats

    model = ModelId("m", None, "0" * 64, "0" * 64)
    task = TaskMeta(0, 1, {"kl": UtilityStats(1, 0, 0.5)})
    meta = ScoreMeta(
        model, model, SHAPE, {"t": task}, "attr", "kl", "sample", None, None, "float32", "cpu", 0, {}, "2026-11-26"
    )
    return Scores.from_tasks(meta, {"t": TaskScores(heads, neurons)})


@pytest.mark.parametrize("remove", [False, True])
def test_models_of_one_fingerprint(remove, tmp_path):
    """It samples weights: neither of the two can be told to be the wrong way round."""
    world = build(tmp_path, intermediate_size=200, num_hidden_layers=2)
    shutil.rmtree(world.expert(0))
    shutil.copytree(world.base, world.expert(0))
    gate = "model.layers.0.mlp.gate_proj.weight"
    change(world.expert(0), gate, 60, 1.0)
    write_random_scores(world.score(0), str(world.base), str(world.expert(0)), seed=0)
    out = merge(world, recipe(world, remove=remove, top="100%"))
    assert torch.equal(tensors_of(out)[gate], tensors_of(world.base if remove else world.expert(0))[gate])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "which components are to be taken is not said"),
        ({"rank": "mean", "components": "heads"}, "rank: says how `top` ranks, and there is no top"),
        ({"task": "t", "layers": "0"}, "task: says how `top` ranks"),
        ({"top": "5%", "scores": ""}, "top: goes with `scores`"),
        ({"scores": "FILE"}, "scores: goes with `top`"),
        ({"top": 5.5}, "top: found 5.5, expected a number or a percentage"),
        ({"top": 2, "rank": "best"}, "rank: found 'best', expected one of mean, task"),
        ({"top": [1, 5]}, "a set is one for the whole patch"),
        ({"components": [{"filter": "q_proj", "value": "heads"}, {"value": "neurons"}]}, "a set is one for the whole"),
        ({"components": "L5H3"}, "L5H3: cannot read this file of components|components are all, heads, neurons or"),
        ({"layers": "4"}, "layers: 4 is out of range"),
        ({"top": 2, "remove": True}, "leave `remove` out, or exchange the two"),
    ],
)  # fmt: skip
def test_parameters_that_say_nothing_clear(parameters, said, world):
    config = recipe(world, **{"top": 1} if "top" in parameters else {})
    config["parameters"] |= parameters
    if config["parameters"].get("scores") == "FILE":
        config["parameters"]["scores"] = str(world.score(0))
    assert all(words in refused(world, config) for words in said.split("|"))


def test_scores_of_other_models_or_of_the_two_exchanged(world):
    config = recipe(world, remove=True, top=2)
    del config["parameters"]["remove"]
    assert "set `remove: true` to take its components back" in refused(world, config)
    write_random_scores(world.score(0), str(world.base), str(world.base), seed=0)
    assert "these scores were made for the expert" in refused(world, recipe(world, top=2))
    merge(world, recipe(world, top=2, allow_mismatch=True))


def test_models_that_do_not_fit(world):
    config = recipe(world, components="all")
    config["models"].append({"model": str(World(world.root / "more", "llama", experts=1).build().expert(0))})
    assert "merge_method wp_patch: " in refused(world, config)
    config["models"] = [{"model": str(world.base)}]
    assert f"found no model beside {world.base} to take slices from" in refused(world, config)
    narrow = World(world.root / "narrow", "llama", experts=1).build(intermediate_size=16)
    config["models"] = [{"model": str(narrow.base)}]
    assert "neurons 16 against 20" in refused(world, config)


def test_a_nan_of_the_donor_counts_where_it_is_taken(world):
    def spoil(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = math.nan
        return tensors

    rewrite(world.expert(0), spoil)
    merge(world, recipe(world, components=listed(world, [], [(2, 4)])), "well")
    with pytest.raises(Exception, match=r"e0: model\.layers\.2\.mlp\.up_proj\.weight holds a NaN"):
        merge(world, recipe(world, components=listed(world, [], [(2, 3)])), "ill")


def test_an_untied_donor_of_a_tied_recipient(tmp_path):
    """Nothing of the donor's head is taken, so nothing of it is lost."""
    world = build(tmp_path, "qwen2")

    def untie(tensors):
        return tensors | {"lm_head.weight": torch.randn_like(tensors["model.embed_tokens.weight"])}

    rewrite(world.expert(0), untie)
    edit_config(world.expert(0), tie_word_embeddings=False)
    for remove, recipient in ((False, world.base), (True, world.expert(0))):
        out = merge(world, recipe(world, remove, components="neurons"), f"out{remove}")
        assert set(tensors_of(out)) == set(tensors_of(recipient))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors_of(recipient):
                assert torch.equal(tensors_of(out)[name], tensors_of(recipient)[name])


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_checked_audited_and_says_how_it_was_made(tmp_path):
    world = build(tmp_path, "qwen2", (BF16, BF16), rows=1)
    models = (world.base, world.expert(0), world.score(0))
    said = run(*models, "--top", "30%", "--dry-run", "--out", world.root / "out")
    assert "5 of 16 heads and 24 of 80 neurons, " in said
    assert not (world.root / "out").exists()
    said = run(*models, "--top", "30%", "--remove", "--out", world.root / "out")
    assert "50 tensors compared with the inputs: 87 slices are the donor's" in said  # 2 and a bias a head, 3 a neuron
    assert "it generates a token" in said
    certificate = read_certificate(world.root / "out" / "wp_audit.yml")
    assert certificate.method == "wp_patch"
    assert [used.name for used in certificate.scores] == [world.score(0).name]
    assert "Weight Patching of a set of components" in (world.root / "out" / "README.md").read_text()
    assert "exists and is not empty" in run(*models, "--top", 1, "--out", world.root / "out", code=2)
    before = tensors_of(world.root / "out")
    LoaderCache.loaders.clear()
    again = CliRunner().invoke(wp_merge, [str(world.root / "out" / "mergekit_config.yml"), str(world.root / "again")])
    assert again.exit_code == 0, again.output
    assert_same(tensors_of(world.root / "again"), before)
    run(*models, "--top", 0, "--overwrite", "--quiet", "--out", world.root / "out")
    assert_same(tensors_of(world.root / "out"), tensors_of(world.base))


def test_the_part_of_the_weights_is_what_the_components_own(tmp_path):
    world = build(tmp_path, "phi3")
    said = run(world.base, world.expert(0), "--components", "all", "--dry-run", "--out", world.root / "out")
    base = tensors_of(world.base)
    nobody = ("embed_tokens", "lm_head", "norm")
    total = sum(tensor.numel() for tensor in base.values())
    owned = sum(t.numel() for name, t in base.items() if not any(part in name for part in nobody))
    owned -= 3 * 2 * 2 * 8 * 16  # keys and values: layers, both, groups, width, hidden
    assert f"{100 * owned / total:.2f} % of the model's {total:,} weights" in said


def plan_of(world, config):
    from mergekit.options import MergeOptions

    LoaderCache.loaders.clear()
    (world.root / "recipe.yaml").write_text(yaml.safe_dump(config))
    read = read_recipe(str(world.root / "recipe.yaml"))
    read.prepare(MergeOptions(), merge_loras=False)
    return read.plan(world.root / "out", MergeOptions())


@pytest.mark.parametrize("where", [(3, 3), (4, 3)])  # a row of the set, and one beside it
def test_the_audit_catches_one_wrong_number(where, world):
    config = recipe(world, components=listed(world, [(1, 1)], [(2, 3)]))
    out, name = merge(world, config), "model.layers.2.mlp.up_proj.weight"
    plan = plan_of(world, config)
    audit(out, plan, say=lambda _: None, load=False)
    change(out, name, where, torch.nextafter(tensors_of(out)[name][where], torch.tensor(math.inf)))
    with pytest.raises(AuditFailed, match=r"up_proj\.weight\[0:20\] is not what"):
        audit(out, plan, say=lambda _: None, load=False)


def test_the_audit_follows_rows_that_a_tokenizer_config_has_moved(world):
    path = world.expert(0) / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["w5"], words["w6"] = words["w6"], words["w5"]
    path.write_text(json.dumps(content))
    tokenizer = {"tokenizer": {"source": str(world.expert(0))}}
    config = {**recipe(world, components=listed(world, [(1, 1)], [])), **tokenizer}
    out, name = merge(world, config), "model.embed_tokens.weight"
    plan, lines = plan_of(world, config), []
    audit(out, plan, say=lines.append, load=False)
    assert lines[0].endswith("everything else is the recipient's, bit for bit.")
    change(out, name, ..., tensors_of(world.base)[name])  # not moved
    with pytest.raises(AuditFailed, match=r"is not what .*base holds for the same tokens"):
        audit(out, plan, say=lambda _: None, load=False)


# --- the patch file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype", "rows", "remove"), [(*KINDS[1], True), (*KINDS[2], False)])
def test_slices_give_the_same_folder(kind, dtype, rows, remove, tmp_path):
    world = build(tmp_path, kind, (dtype, dtype), rows)
    models, more = (world.base, world.expert(0), world.score(0)), ["--remove"] * remove
    file = world.root / "p.safetensors"
    said = run(*models, "--top", "30%", *more, "--sparse", "--out", file)
    assert f"wrote {file}: " in said
    assert "% of the model's" in said
    recipient = world.expert(0) if remove else world.base
    run(recipient, "--apply", file, "--out", world.root / "applied", "--quiet")
    want = merge(world, recipe(world, remove, top="30%"), "whole")
    assert same_files(world.root / "applied", want)
    assert read_patch(file).meta.chosen == {"top": "30%"} | ({"remove": "True"} if remove else {})
    assert "slices were made for the recipient" in run(models[not remove], "--apply", file, "--out", "x", code=2)
    assert sum(t.numel() for t in read_patch(file).values.values()) < sum(t.numel() for t in tensors_of(want).values())


@pytest.fixture(scope="module")
def cut_world(tmp_path_factory):
    world = build(tmp_path_factory.mktemp("cut"))
    names = listed(world, [(1, 2), (3, 0)], [(0, 4), (2, 7), (2, 9)])
    run(world.base, world.expert(0), "--components", names, "--sparse", "--out", world.root / "p.safetensors")
    return world


def damaged(world, change):
    """A patch file with other tensors, or another document."""
    from safetensors import safe_open

    with safe_open(world.root / "p.safetensors", framework="pt") as file:
        document = json.loads(file.metadata()["wp_patch"])
    tensors = load_file(world.root / "p.safetensors")
    change(tensors, document)
    save_file(tensors, world.root / "bad.safetensors", metadata={"wp_patch": json.dumps(document)})
    return world.root / "bad.safetensors"


Q = "slices/model.layers.1.self_attn.q_proj.weight"
DAMAGE = [
    (lambda t, d: d.update(format=2), "format version 2, this program reads 1"),
    (lambda t, d: d.update(more=1), "unknown field more"),
    (lambda t, d: d["geometry"].update(layers=10**15), "not a valid patch file: a model of 1000000000000000 layers"),
    (lambda t, d: t.pop("heads"), "this patch file has no heads"),
    (lambda t, d: t.update(heads=t["heads"].flip(0).contiguous()), "heads are not in order"),
    (lambda t, d: t.update(heads=torch.cat([t["heads"], t["heads"][-1:]])), "heads are not in order"),
    (lambda t, d: t.update(heads=t["heads"].long()), "heads is torch.int64 of shape [2, 2], expected int32 [n, 2]"),
    (lambda t, d: t.update(neurons=t["neurons"] + 19), "is not in this model"),
    (lambda t, d: t.update(neurons=-t["neurons"]), "neurons holds a number below 0"),
    (lambda t, d: t.update({Q: t[Q][1:].contiguous()}), "has shape [7, 24], and the set owns 8 of its slices"),
    (lambda t, d: t.update({Q: t[Q] * math.nan}), "holds a NaN or an infinity"),
    (lambda t, d: t.update({Q: t[Q].long()}), "has dtype torch.int64"),
    (lambda t, d: t.update({Q.replace("q_", "k_"): t[Q].clone()}), "of which no component of the set owns any"),
    (lambda t, d: t.update(more=t[Q].clone()), "unexpected tensors ['more']"),
]  # fmt: skip
MISFITS = [
    (lambda t, d: t.pop(Q), "slices of model.layers.1.self_attn.q_proj.weight [8, 24] are wanted, and there are none"),
    (lambda t, d: t.update({Q: t[Q][:, 1:].contiguous()}), "are wanted, and there are of shape [8, 23]"),
    (lambda t, d: t.update({Q.replace("weight", "bias"): t[Q][:, 0].contiguous()}), "which {base} does not have"),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "said"), DAMAGE)
def test_a_damaged_patch_file_is_refused(harm, said, cut_world):
    with pytest.raises(BadInput) as caught:
        read_patch(damaged(cut_world, harm))
    assert said in caught.value.message


@pytest.mark.parametrize(("harm", "said"), MISFITS)
def test_a_patch_file_that_does_not_fit_the_recipient_is_refused(harm, said, cut_world):
    out = cut_world.root / "out"
    text = run(cut_world.base, "--apply", damaged(cut_world, harm), "--out", out, code=2)
    assert said.format(base=cut_world.base) in text
    assert not out.exists()


def test_what_does_not_go_with_a_patch_file(cut_world):
    file, out = cut_world.root / "p.safetensors", cut_world.root / "out"
    base, expert = cut_world.base, cut_world.expert(0)
    for words, said in (
        ([base, "--out", out], "Missing argument 'EXPERT'"),
        ([base, expert, "--apply", file, "--out", out], "leave the expert"),
        ([base, "--apply", file, "--sparse", "--out", out], "leave --sparse out"),
        ([base, "--apply", file, "--top", "3", "--out", out], "a patch file has a set of its own; leave `top`"),
        ([base, "--apply", cut_world.score(0), "--out", out], "without the `wp_patch` metadata of a patch file"),
        ([base, "--apply", cut_world.root / "no", "--out", out], "cannot read this patch file"),
        ([base, expert, "--layers", "0", "--sparse", "--out", "x.pt"], "the file is safetensors"),
        ([base, expert, "--layers", "0", "--sparse", "--out", cut_world.score(0)], "that is no patch file"),
        ([base, expert, "--layers", "0", "--out", base], "this output is itself what is read"),
    ):
        assert said in run(*words, code=2)
    config = recipe(cut_world, patch=str(file))
    assert "has the slices of a donor, and" in refused(cut_world, config)


def test_the_patch_file_is_found_beside_the_recipe_and_certified(cut_world, monkeypatch, tmp_path):
    config = recipe(cut_world, patch="p.safetensors")
    config["models"] = [{"model": str(cut_world.base)}]
    (cut_world.root / "r.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    LoaderCache.loaders.clear()
    done = CliRunner().invoke(wp_merge, [str(cut_world.root / "r.yaml"), "here"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert [used.name for used in read_certificate(tmp_path / "here" / "wp_audit.yml").scores] == ["p.safetensors"]
    want = patched(cut_world.base, cut_world.expert(0), [(1, 2), (3, 0)], [(0, 4), (2, 7), (2, 9)])
    assert_same(tensors_of(tmp_path / "here"), want)


def test_a_list_of_components_is_certified_by_its_text(world):
    names = listed(world, [(0, 0)], [])
    run(world.base, world.expert(0), "--components", names, "--out", world.root / "out", "--quiet")
    (used,) = read_certificate(world.root / "out" / "wp_audit.yml").scores
    assert (used.name, used.content) == ("list.txt", hashlib.sha256(Path(names).read_bytes()).hexdigest())


# --- the adapter -----------------------------------------------------------------------------------------------------


def merged_by_peft(base, adapter):
    """The state dicts of the base and of the base with the adapter in it."""
    import peft
    import transformers

    kind = tiny.auto_class(transformers.AutoConfig.from_pretrained(base))
    plain = {name: tensor.clone() for name, tensor in kind.from_pretrained(base).state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as peft's of missing keys
        wrapped = peft.PeftModel.from_pretrained(kind.from_pretrained(base), adapter)
    return plain, wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize("kind", ["qwen2", "phi3", "gemma3-wrapper"])
def test_a_lora_is_the_set_patch_up_to_the_loss_that_is_said(kind, tmp_path):
    """Biases, fused projections, and a tower among others; at full rank nothing but rounding is lost."""
    world = build(tmp_path, kind)
    models = (world.base, world.expert(0), world.score(0), "--top", "30%")
    run(*models, "--out", world.root / "patched", "--no-audit", "--quiet")
    want, _ = merged_by_peft(world.root / "patched", empty_adapter(world))
    for rank in (2, 64):
        said = run(*models, "--as-lora", rank, "--out", world.root / f"lora{rank}")
        base, got = merged_by_peft(world.base, world.root / f"lora{rank}")
        assert set(got) == set(want)
        weights = [name for name in want if not torch.equal(want[name], base[name]) and name.endswith("weight")]
        left, changed = (
            sum(float((one[name] - want[name]).double().square().sum()) for name in weights) for one in (got, base)
        )
        lost = math.sqrt(left / changed)
        assert f"all together {lost:.4f} of the change is lost" in said
        assert lost > 0.3 if rank == 2 else lost < 2e-6
        for name in want:
            if name.endswith("bias") or name not in weights:
                assert torch.equal(got[name], want[name]), name
        lines = [line.split() for line in said.splitlines() if "%" not in line]
        head, row = (line for line in lines if line[:1] in (["layer"], ["1"]))
        name = next(name for name in weights if name.endswith("layers.1.self_attn.o_proj.weight"))
        own = float((got[name] - want[name]).norm() / (base[name] - want[name]).norm())
        assert float(row[head.index("o_proj")]) == pytest.approx(own, abs=6e-5)


def empty_adapter(world):
    """A LoRA that changes nothing, to load a model as the others are loaded."""
    import peft
    import transformers

    folder = world.root / "nothing"
    model = tiny.auto_class(transformers.AutoConfig.from_pretrained(world.base)).from_pretrained(world.base)
    peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["o_proj"])).save_pretrained(folder)
    return folder


def test_our_own_reader_lays_the_lora_over_its_base(tmp_path):
    """MODEL+LORA, as every command names it; stored in bfloat16, so a weight is right within its rounding."""
    world = build(tmp_path, dtypes=(BF16, BF16))
    models = (world.base, world.expert(0), world.score(0), "--top", "30%")
    run(*models, "--remove", "--as-lora", 64, "--out", world.root / "lora", "--quiet")
    lora = f"{world.expert(0)}+{world.root / 'lora'}"
    (world.root / "none.txt").write_text("L3N0")
    run(lora, world.expert(0), "--components", world.root / "none.txt", "--out", world.root / "over", "--quiet")
    want = merge(world, recipe(world, remove=True, top="30%"), "removed")
    got = tensors_of(world.root / "over")
    for name, tensor in tensors_of(want).items():
        torch.testing.assert_close(got[name], tensor, rtol=2**-8, atol=1e-6)


def test_only_a_bias_differs(tmp_path):
    world = build(tmp_path, "qwen2")
    name = "model.layers.2.self_attn.q_proj.bias"
    base = tensors_of(world.base)
    rewrite(world.expert(0), lambda _: base | {name: base[name] + 1})
    said = run(world.base, world.expert(0), "--components", "all", "--as-lora", 4, "--out", world.root / "lora")
    assert "1 biases are in it whole" in said
    plain, got = merged_by_peft(world.base, world.root / "lora")
    assert {key for key in got if not torch.equal(got[key], plain[key])} == {name}
    assert torch.equal(got[name], plain[name] + 1)


def test_a_dry_run_needs_no_output(world):
    asked = [world.base, world.expert(0), "--components", "heads"]
    before = sorted(world.root.rglob("*"))
    assert "Nothing was written" in run(*asked, "--dry-run")
    assert "Nothing was written" in run(*asked, "--dry-run", "--sparse")
    assert "Missing option '--out' (only --dry-run goes without)" in run(*asked, code=2)
    assert sorted(world.root.rglob("*")) == before


def test_an_adapter_that_would_say_nothing_and_what_does_not_go_together(world):
    out = world.root / "lora"
    twin = world.root / "twin"
    shutil.copytree(world.base, twin)
    same = [world.base, twin, "--components", "all"]
    said = run(world.base, twin, "--layers", "1", "--as-lora", 2, "--out", out, code=2)
    assert "the two models do not differ in any component of the set" in said
    assert not out.exists()
    assert "two forms of one set" in run(*same, "--as-lora", 2, "--sparse", "--out", out, code=2)
    assert "leave --as-lora out" in run(world.base, "--apply", "x", "--as-lora", 2, "--out", out, code=2)
    assert list(world.root.glob(".lora*")) == []
