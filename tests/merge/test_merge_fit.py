"""`fit` of wp: the kernel against the formula, merges through mergekit against METHOD.md 6 written naively."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from fit_example import example
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_checks import assert_merged, change, make_lora, plan_of, refused, rewrite, run, slices
from merge_world import World, merge, reference, tensors_of, write_random_fit

from mergekit_wp import merge as merge_models
from mergekit_wp.checkpoint.folder import content_of, fingerprint_of
from mergekit_wp.errors import BadInput
from mergekit_wp.fit_file import read_fit, write_fit
from mergekit_wp.geometry import slot_of
from mergekit_wp.merge.audit import AuditFailed, audit
from mergekit_wp.merge.certificate import read_certificate
from mergekit_wp.merge.fitted import fitted_weights
from mergekit_wp.merge.kernel import fuse, merge_fitted
from mergekit_wp.merge.recipe import read_recipe
from mergekit_wp.merge.shares import BESIDE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_models(K, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 7, generator=generator).to(dtype) for _ in range(K + 1)]


def allowed(dtype, want, *models):
    """Half a step of the output, and those of float32 sums."""
    return torch.finfo(dtype).eps / 2 * want.abs() + 8 * 2**-23 * sum(m.double().abs() for m in models) + 1e-7


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([0, 1, None]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    st.integers(0, 10**6),
)
def test_the_kernel_follows_the_formula(K, axis, dtype, out, scales, seed):
    base, *experts = random_models(K, dtype, seed)
    n = 1 if axis is None else base.shape[axis]
    weight_Kn = 2 * torch.rand(K, n, generator=torch.Generator().manual_seed(seed))
    got = merge_fitted(base, experts, weight_Kn, axis or 0, scales[:K], out)
    shape = (1, n) if axis == 1 else (n, 1)
    change = sum(
        scale * weight_n.double().reshape(shape) * (expert.double() - base.double())
        for scale, weight_n, expert in zip(scales, weight_Kn, experts, strict=False)
    )
    want = base.double() + change
    assert got.dtype == out
    assert ((got.double() - want).abs() <= allowed(out, want, base, *[16 * e for e in experts])).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.sampled_from(DTYPES), st.integers(0, 10**6))
def test_equal_weights_are_the_average_and_1_for_one_expert_is_that_expert(K, dtype, seed):
    base, *experts = random_models(K, dtype, seed)
    equal = merge_fitted(base, experts, torch.full((K, 5), 1 / K), 0, [1.0] * K, torch.float32).double()
    average = fuse(experts, None, 0, torch.float32).double()
    assert ((equal - average).abs() <= allowed(torch.float32, average, base, *experts)).all()
    one, chosen = torch.zeros(K, 7), seed % K
    one[chosen] = 1.0
    got, want = merge_fitted(base, experts, one, 1, [1.0] * K, dtype), experts[chosen]
    assert ((got - want).double().abs() <= 2 * allowed(dtype, want.double(), base, want)).all()
    assert torch.equal(merge_fitted(base, experts, torch.zeros(K, 1), 0, [1.0] * K, dtype), base)


def test_keys_and_values_take_the_mean_over_their_group():
    fit = example()
    k = slot_of("model.layers.2.self_attn.k_proj.weight")
    got = fitted_weights(fit, (1, 0), k)
    want = fit.heads[:, 2].reshape(2, 2, 2).mean(-1).repeat_interleave(8, -1)[[1, 0]]
    torch.testing.assert_close(got, want)
    assert fitted_weights(fit, (1, 0), None).tolist() == fit.rest[[1, 0], None].tolist()


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "phi3", "mistral3-wrapper"])
def test_against_the_slow_reference(kind, tmp_path):
    """GQA, biases, tied and fused layouts, two towers; rows more; the file has the experts in another order."""
    wrapper = kind.endswith("wrapper")
    world = World(tmp_path, kind, experts=3, extra_rows=[0, 0, 0] if wrapper else [0, 1, 3]).build()
    world.write_fit([2, 0, 1])
    out = merge(world, world.fitted([{"scale": 0.5}, {}, {}]))
    assert_merged(tensors_of(out), reference(world, scales=[0.5, 1, 1], order=[2, 0, 1]))


def test_real_vocabularies(tmp_path):
    """32,000 rows, and one more of an expert's; in 16 bits, each sum rounded once."""
    world = World(tmp_path, "llama", dtypes=[torch.float16, torch.bfloat16, torch.float16], extra_rows=[1, 0])
    world.build(vocab_size=32000, num_hidden_layers=2)
    world.write_fit([0, 1])
    out = merge(world, world.fitted())
    assert_merged(tensors_of(out), reference(world, order=[0, 1]), torch.float16)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"), "llama").build()
    world.write_fit([1, 0])
    return world


@pytest.fixture
def world(built, tmp_path):
    shutil.copytree(built.root, tmp_path / "w")
    return World(tmp_path / "w", "llama")


def test_wp_merge_audits_and_certifies(world):
    config = world.fitted(scale=0.7)
    out = world.root / "out"
    assert "48 slices of 12 kinds" in run(world.recipe(config), out)
    assert_merged(tensors_of(out), reference(world, scales=[0.7, 0.7], order=[1, 0]))
    certificate, fit = read_certificate(out / "wp_audit.yml"), read_fit(world.fit)
    assert [used.name for used in certificate.scores] == ["fit.safetensors"]
    assert certificate.shares["experts"] == ["e0", "e1"]
    for kind in ("heads", "neurons"):
        torch.testing.assert_close(
            torch.tensor(certificate.shares[kind]), getattr(fit, kind)[[1, 0]].mean(-1), atol=1e-4, rtol=0
        )


def test_scores_in_an_experts_folder_are_left_alone(world):
    (world.expert(0) / BESIDE).parent.mkdir()
    shutil.copy(world.score(0), world.expert(0) / BESIDE)
    run(world.recipe(world.fitted()), world.root / "out")
    assert_merged(tensors_of(world.root / "out"), reference(world, order=[1, 0]))


def test_the_audit_sees_another_weight(world):
    out = world.root / "out"
    run(world.recipe(world.fitted()), out)
    plan, fit = plan_of(world, out, world.fitted()), read_fit(world.fit)
    audit(out, plan, say=lambda _: None, load=False)
    for name in ("heads", "neurons", "rest"):
        changed = {n: t.clone() for n, t in fit.tensors().items()}
        changed[name][0] = changed[name][0] * 0.98
        write_fit(type(fit)(fit.meta, **changed), world.fit)
        with pytest.raises(AuditFailed, match="is not what its inputs and wp give"):
            audit(out, plan, say=lambda _: None, load=False)
    write_fit(fit, world.fit)
    change(out, "model.norm.weight", slice(None), 3.0)
    with pytest.raises(AuditFailed, match=r"model\.norm\.weight.*is not what"):
        audit(out, plan, say=lambda _: None, load=False)


@pytest.mark.parametrize("more", [{"dtype": "bfloat16"}, {"out_dtype": "float16"}])
def test_the_audit_knows_what_rounding_allows(world, more):
    """Small weights leave the base nearly as it is: its own rounding is all that there is."""
    fit = read_fit(world.fit)
    write_fit(type(fit)(fit.meta, *(t / 1000 for t in fit.tensors().values())), world.fit)
    assert "48 slices" in run(world.recipe({**world.fitted(), **more}), world.root / "out")


def test_the_dry_run_shows_the_weights(world):
    text = run(world.recipe(world.fitted()), "--dry-run")
    fit = read_fit(world.fit)
    rows = [[float(x) for x in line.split()[1:]] for line in text.splitlines() if re.match(r"\d+ ", line)]
    want = torch.cat([fit.heads[[1, 0]].mean(-1), fit.neurons[[1, 0]].mean(-1)]).T
    torch.testing.assert_close(torch.tensor(rows), want, atol=6e-4, rtol=0)
    assert f"all else: e0 {fit.rest[1]:.3f}, e1 {fit.rest[0]:.3f}" in text


def test_moved_layers_take_the_weights_of_their_source_layer(world):
    config = slices(world, [(2, 4), (0, 2)])
    for piece in config["slices"]:
        for source in piece["sources"]:
            source.pop("parameters", None)
    out = merge(world, {**config, "parameters": {"fit": str(world.fit)}})
    want = {}
    for name, tensor in reference(world, order=[1, 0]).items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        want[name if layer is None else name.replace(f".{layer}.", f".{(layer + 2) % 4}.", 1)] = tensor
    assert_merged(tensors_of(out), want)


def test_mergekits_tokenizer_and_one_file_a_model(world):
    """With `tokenizer:` rows are gathered one level deeper."""
    out = merge(world, {**world.fitted(), "tokenizer": {"source": "base"}})
    assert_merged(tensors_of(out), reference(world, order=[1, 0]))


def test_a_lora_is_known_by_what_was_published(world, tmp_path):
    make_lora(world.base, tmp_path / "lora", seed=3)
    name = f"{world.base}+{tmp_path / 'lora'}"
    write_random_fit(world.fit, str(world.base), [name, str(world.expert(0))])
    config = world.fitted()
    config["models"][1]["model"] = name
    cache = tmp_path / "loras"
    out = merge(world, config, lora_merge_cache=str(cache))
    shutil.rmtree(world.expert(1))
    next(cache.iterdir()).rename(world.expert(1))
    assert_merged(tensors_of(out), reference(world, order=[1, 0]))


def test_an_expert_that_was_saved_again_takes_its_place_in_order(world, caplog):
    rewrite(world.expert(1), lambda tensors: {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    assert "cannot be found among" in refused(world, world.fitted())
    out = merge(world, world.fitted(allow_mismatch=True))
    assert "taking them in order" in caplog.text
    assert_merged(tensors_of(out), reference(world, order=[1, 0]))


def test_what_does_not_fit_is_refused(world, tmp_path):
    fit, scores = str(world.fit), str(world.score(0))
    own = world.fitted([{"scores": scores}])
    assert f"the scores {scores} are given beside the fit {fit}" in refused(world, own)
    assert "`weight` is 0.5 beside the fit" in refused(world, world.fitted([{}, {"weight": 0.5}]))
    assert "`weight` is 2 beside the fit" in refused(world, world.fitted(weight=2))
    assert f"{scores}: a safetensors file, but without the `wp_fit`" in refused(world, world.fitted(fit=scores))
    assert "none.safetensors: cannot read this fit file" in refused(world, world.fitted(fit="none.safetensors"))
    assert "fit: found 5, expected the path of a fit file" in refused(world, world.fitted(fit=5))
    assert "is given for some tensors alone" in refused(
        world, world.fitted(fit=[{"filter": "mlp", "value": fit}, {"value": ""}])
    )
    shutil.copy(fit, tmp_path / "b.safetensors")
    assert "are given; a fit file has" in refused(world, world.fitted(fit=[fit, str(tmp_path / "b.safetensors")]))


def test_other_models_are_refused(world):
    config = world.fitted()
    fewer = {**config, "models": config["models"][:1]}
    said = (
        rf"{world.fit}: these weights were fitted for the experts \S+/e1 and \S+/e0, and \S+/e1 cannot be found among"
    )
    assert re.match(said, refused(world, fewer))
    shutil.copytree(world.expert(0), world.root / "e2")
    rewrite(world.root / "e2", lambda tensors: {name: tensor * 0.5 for name, tensor in tensors.items()})
    more = {**config, "models": [*config["models"], {"model": str(world.root / "e2")}]}
    assert f"{world.root / 'e2'} cannot be found among these; merge all of the fitted experts and no other" in refused(
        world, more
    )
    more["parameters"]["allow_mismatch"] = True
    assert "merge all of the fitted experts and no other" in refused(world, more)
    rewrite(world.base, lambda tensors: {name: tensor * 0.5 for name, tensor in tensors.items()})
    assert "these weights were made for the base" in refused(world, world.fitted())
    assert "whose weights differ" in refused(world, world.fitted())


def test_another_shape_is_refused(world):
    fit = read_fit(world.fit)
    write_fit(example(replace(fit.meta, geometry=replace(fit.meta.geometry, neurons=21))), world.fit)
    assert "fitted for another shape than" in refused(world, world.fitted())
    assert "neurons 21 against 20" in refused(world, world.fitted())


def test_a_fit_under_a_model_is_refused_and_so_is_one_of_another_method(world):
    """mergekit would ignore it where it stands, and merge by something else."""
    for config, said in [
        (world.fitted([{"fit": str(world.fit)}]), "`fit` stands under a model, where mergekit does not look for it"),
        ({**world.fitted(), "merge_method": "widen"}, "unknown parameter fit; merge_method widen knows t, s"),
    ]:
        (world.root / "r.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(BadInput, match=re.escape(said)):
            read_recipe(str(world.root / "r.yaml"))


def test_experts_of_one_fingerprint_are_told_apart_by_their_content(tmp_path):
    """A fingerprint samples weights: a change of one neuron between its windows does not show."""
    world = World(tmp_path / "w", "llama").build(intermediate_size=200, num_hidden_layers=2)
    shutil.rmtree(world.expert(1))
    shutil.copytree(world.expert(0), world.expert(1))
    gate = "model.layers.0.mlp.gate_proj.weight"
    change(world.expert(1), gate, 60, 1.0)
    models = [str(world.expert(k)) for k in range(2)]
    assert fingerprint_of(models[0]) == fingerprint_of(models[1])
    world.write_fit([0, 1])
    backwards = {**world.fitted(), "models": world.fitted()["models"][::-1]}
    assert "e0 and " in (message := refused(world, backwards))
    assert "have one fingerprint" in message
    known = read_fit(world.fit)
    replace(known, meta=replace(known.meta, contents=tuple(map(content_of, models)))).save(world.fit)
    one, other = merge(world, world.fitted(), "one"), merge(world, backwards, "other")
    assert_merged(tensors_of(one), reference(world, order=[0, 1]))
    assert_merged(tensors_of(other), reference(world, order=[0, 1]))
    states = {name: tensors_of(Path(name)) for name in models[::-1]}
    held = merge_models(tensors_of(world.base), states, fit=read_fit(world.fit))
    assert torch.equal(held[gate], tensors_of(other)[gate])
    # Neither of the two, and its fingerprint that of both.
    change(world.expert(1), gate, 60, 2.0)
    assert "and e1 cannot be found among" in refused(world, world.fitted()).replace(f"{world.root}/", "")
