"""Fit files: what is written is read back, and nothing damaged is read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from fit_example import example, meta
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from score_example import example as scores_example

from mergekit_wp.errors import BadInput
from mergekit_wp.fit_file import METADATA_KEY, MOST, Fit, FittedPrompts, Kept, LossAt, read_fit, write_fit
from mergekit_wp.scores import PromptStyle, read_scores, write_scores


def damage(path, change):
    """Rewrite a fit file through `change(tensors, meta)`."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()[METADATA_KEY])
    change(tensors, about)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(about)})


def test_round_trip(tmp_path):
    about = replace(
        meta(),
        keep=Kept("neutral.jsonl", FittedPrompts(5, 1, PromptStyle("{prompt}", "a" * 64, "base")), 0.4, 0.25),
        prompts=(FittedPrompts(12, 4, PromptStyle("Q: {prompt}")), FittedPrompts(3, 0)),
        curve=(LossAt(0, 0.5, None),),
        best_step=0,
        contents=("d" * 64, None),
    )
    written = example(about)
    written.save(tmp_path / "f.safetensors")
    got = read_fit(tmp_path / "f.safetensors")
    assert got.meta == about
    assert all(torch.equal(tensor, getattr(written, name)) for name, tensor in got.tensors().items())
    assert repr(got) == "Fit(user/one, two against base, component; heads [2, 3, 4], neurons [2, 3, 10])"


def test_metadata_is_plain_json(tmp_path):
    write_fit(example(), tmp_path / "f.safetensors")
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["wp_fit"])
    assert said | {"contents": []} == json.loads(json.dumps(asdict(meta())))
    assert said["curve"][1] == {"step": 10, "fitted": 0.25, "held_out": 0.3}


@given(st.floats(width=32), st.sampled_from(["heads", "neurons", "rest"]), st.integers(0, 10**6))
def test_a_weight_is_from_0_to_2_or_there_is_no_fit(weight, name, place):
    fit = example()
    tensor = getattr(fit, name).clone()
    tensor.view(-1)[place % tensor.numel()] = weight
    if 0 <= weight <= MOST:
        assert isinstance(replace(fit, **{name: tensor}), Fit)
    else:
        with pytest.raises(ValueError, match=f"{name} holds"):
            replace(fit, **{name: tensor})


def _set(key, index, value):
    return lambda tensors, _meta: tensors[key].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("heads", (0, 0, 0), float("nan")), "heads holds a NaN or an infinity"),
        (_set("neurons", (1, 2, 3), -0.5), "neurons holds weights from -0.5 to"),
        (_set("rest", 1, 2.5), "to 2.5, expected 0 to 2"),
        (lambda t, m: t.update(neurons=t["neurons"][:, :, :9].clone()), "neurons has shape [2, 3, 9], expected [2, 3,"),
        (lambda t, m: t.update(heads=t["heads"][:1].clone()), "heads has shape [1, 3, 4], expected [2, 3, 4]"),
        (lambda t, m: t.update(rest=torch.ones(3)), "rest has shape [3], expected [2]"),
        (lambda t, m: t.update(heads=t["heads"].half()), "heads has dtype torch.float16"),
        (lambda t, m: t.pop("rest"), "has no rest"),
        (lambda t, m: t.update(more=torch.zeros(1)), "unexpected tensors ['more']"),
        (lambda t, m: m.update(format=2), "format version 2, this program reads 1"),
        (lambda t, m: m.update(experts=[]), "experts: there are none"),
        (lambda t, m: m["experts"].pop(), "prompts: found 2 entries for 1 experts"),
        (lambda t, m: m["unrecovered"].pop(), "unrecovered: found 1 entries for 2 experts"),
        (lambda t, m: m["experts"][1].pop("tensors"), "the field experts.1.tensors is missing"),
        (lambda t, m: m.update(curve=[]), "best_step: found 10, which is no step of the curve"),
        (lambda t, m: m.update(curve=m["curve"][::-1]), "curve: its steps do not ascend"),
        (lambda t, m: m["curve"].append(m["curve"][-1]), "curve: its steps do not ascend"),
        (lambda t, m: m["curve"][1].update(fitted="0.25"), "curve.1.fitted: found '0.25'"),
        (lambda t, m: m.update(best_step=11), "best_step: found 11"),
        (lambda t, m: m.update(family="neuron"), "family: found 'neuron', expected one of scale, expert"),
        (lambda t, m: m["prompts"][0].update(fitted=0), "prompts.0.fitted: found 0"),
        (lambda t, m: m["geometry"].update(architecture="GPT2LMHeadModel"), "GPT2LMHeadModel"),
        (lambda t, m: m.update(surprise=1), "surprise"),
        (lambda t, m: m.pop("start"), "the field start is missing"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_in_one_sentence(tmp_path, change, said):
    path = tmp_path / "f.safetensors"
    write_fit(example(), path)
    damage(path, change)
    with pytest.raises(BadInput) as caught:
        read_fit(path)
    assert str(path) in caught.value.message
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_of_another_kind_is_told(tmp_path):
    """Scores and a fit are both safetensors of a merge: one in the place of the other is easily given."""
    write_fit(example(), tmp_path / "f.safetensors")
    write_scores(scores_example(), tmp_path / "s.safetensors")
    with pytest.raises(BadInput, match="without the `wp_fit` metadata of a fit file"):
        read_fit(tmp_path / "s.safetensors")
    with pytest.raises(BadInput, match="without the `wp` metadata of a score file"):
        read_scores(tmp_path / "f.safetensors")
    with pytest.raises(BadInput, match="no such fit file; make it with wp-fit"):
        read_fit(tmp_path / "none.safetensors")
