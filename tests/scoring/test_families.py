"""Families beyond the first five: scores against the definitions, streamed stacks against resident ones."""

from __future__ import annotations

import pytest
import tiny
import torch
from score_jobs import Reference, assert_close, job_for
from streamed_world import assert_same, resident, streamed

from mergekit_wp.scores import METHODS
from mergekit_wp.scoring.score import score

FEW = {"tasks": ("first",), "rows": 2, "gap_floor": 1e-3}  # two prompts, the shorter of which is padded


@pytest.fixture(scope="module", params=[*tiny.FAMILIES, *tiny.WRAPPERS])
def family(request, tmp_path_factory):
    """A kind and the folders of a base and its fine-tune."""
    return request.param, tiny.save_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("method", METHODS)
def test_scores_against_the_definition(tmp_path, family, method):
    """Every head and every neuron, by anchor in the lower layers and kl in the upper."""
    kind, pair = family
    if kind in tiny.WRAPPERS and method not in ("exact", "writeback"):
        pytest.skip("its text tower is a family above")
    job = job_for(tmp_path, kind, pair=pair, **FEW, layer=1, method=method, utility="staged", split="shared")
    reference = Reference(job)
    for model in (reference.base, reference.expert):
        model.double()  # differences of utilities are small
    heads, neurons = reference.scores(getattr(reference, method))
    got = score(job)
    assert_close(got.heads, heads)
    assert_close(got.neurons, neurons)


def test_streamed_equals_resident(family):
    """Weights, streams, logits and tables; under autocast too, where what surrounds the layers runs in float32."""
    _kind, (folder, _expert) = family
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(streamed(folder, dtype), resident(folder, dtype))


def test_streamed_scores_equal_resident_scores(tmp_path, family):
    kind, pair = family
    options = {"pair": pair, **FEW, "layer": 1, "utility": "staged", "split": "shared"}
    streamed_scores, scores = (
        score(job_for(tmp_path, kind, **options, method="writeback", offload=offload)) for offload in ("stream", "none")
    )
    torch.testing.assert_close(streamed_scores.heads, scores.heads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(streamed_scores.neurons, scores.neurons, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mistral3-wrapper", "llava-wrapper"])
def test_wp_eval_asks_the_text_tower(tmp_path, kind):
    """lm-eval alone would load these as plain causal LMs, which fails."""
    from lm_eval.api.instance import Instance

    from mergekit_wp.eval.backends import Backend, load

    model = tiny.random_model(kind)
    lm = load(
        Backend("hf"), tiny.save(model, tmp_path / "m"), device="cpu", dtype="float32", batch_size=1,
        trust_remote_code=False,
    )  # fmt: skip
    ((got, _greedy),) = lm.loglikelihood([Instance("loglikelihood", {}, ("w1 w2", " w3 w4"), 0)], disable_tqdm=True)
    ids = lm.tokenizer("w1 w2 w3 w4")["input_ids"]
    with torch.no_grad():
        log_p_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert got == pytest.approx(float(log_p_TV[-3, ids[-2]] + log_p_TV[-2, ids[-1]]), rel=1e-5)
