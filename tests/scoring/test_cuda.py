"""What only a GPU can get wrong: copies beside products, memory that a side stream reuses, and what does not fit.

Everything else of the engine runs there too, against references on the CPU, with `WP_TEST_DEVICE=cuda`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fit_world import save_experts
from score_jobs import job_for, write_pairs

from mergekit_wp.choices import METHODS, UTILITIES
from mergekit_wp.errors import BadInput
from mergekit_wp.fit.fit import fit
from mergekit_wp.fit.job import FitJob
from mergekit_wp.scoring.score import score

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
# Layers of 20 MB in float32: a copy of one takes as long as the products of another.
LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 64}  # fmt: skip


def largest_difference(got, wanted) -> float:
    """Of the largest score of each tensor."""
    pairs = ((got.tensors()[name], tensor) for name, tensor in wanted.tensors().items() if tensor.abs().max() > 0)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offload", ["none", "stream"])
def test_a_gpu_scores_as_the_cpu_does(tmp_path, method, offload):
    job = job_for(tmp_path, "llama", method=method, offload=offload, contrast=False, device="cpu")
    assert largest_difference(score(replace(job, device="cuda")), score(job)) < 1e-4


@pytest.mark.parametrize("utility", UTILITIES)
def test_every_utility(tmp_path, utility):
    layer = None if utility == "projection" else 2
    job = job_for(tmp_path, "qwen3", utility=utility, contrast=True, device="cpu", gap="mean", gap_floor=0, layer=layer)
    assert largest_difference(score(replace(job, device="cuda")), score(job)) < 1e-4


@pytest.mark.parametrize("offload", ["none", "stream"])
@pytest.mark.parametrize("options", [{"answer_tokens": 4}, {"utility": "staged", "layer": "auto", "contrast": True}])
def test_generated_answers_and_the_anchor_layer(tmp_path, options, offload):
    if offload == "stream" and options.get("layer") == "auto":
        pytest.skip("steers whole models")
    options = {"contrast": False, **options}
    job = job_for(tmp_path, "llama", method="attr", device="cpu", gap="mean", offload=offload, rows=6, **options)
    wanted = score(job)
    got = score(replace(job, device="cuda"))
    assert got.meta.anchor_layer == wanted.meta.anchor_layer
    assert largest_difference(got, wanted) < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["writeback", "attr"])
def test_products_of_16_bits(tmp_path, method, dtype):
    job = job_for(tmp_path, "llama", method=method, contrast=False, device="cuda", gap="mean")
    short = replace(job, dtype=dtype)
    assert largest_difference(score(short), score(job)) < {"float16": 0.02, "bfloat16": 0.15}[dtype]
    assert largest_difference(score(replace(short, offload="stream")), score(short)) < 1e-2


@pytest.mark.parametrize("method", ["writeback", "exact"])
def test_layers_copied_beside_products_are_whole_and_stay_whole(tmp_path, method):
    """Where a layer was used before its copy had ended, or its memory given to the next too early, numbers differ from
    run to run."""
    limits = {"layers": "0,3,7", "components": "heads"} if method == "exact" else {}
    job = job_for(
        tmp_path, "llama", shape=LARGE, method=method, contrast=False, device="cuda", rows=8, batch_size=4, gap="mean",
        offload="none", **limits,
    )  # fmt: skip
    wanted = score(job)
    for _ in range(6):
        assert largest_difference(score(replace(job, offload="stream")), wanted) < 1e-5


def test_a_streamed_pair_holds_a_few_layers(tmp_path):
    job = job_for(tmp_path, "llama", shape=LARGE, contrast=False, device="cuda", gap="mean")
    peaks = {}
    for offload in ("none", "stream"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        score(replace(job, offload=offload))
        peaks[offload] = torch.cuda.max_memory_allocated() - before
    assert peaks["stream"] < 0.55 * peaks["none"]  # two layers of eight each, and what is held of both


def test_prompts_that_do_not_fit_are_named(tmp_path):
    job = job_for(tmp_path, "llama", shape=LARGE, contrast=False, device="cuda", rows=8, batch_size=8)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e8 / total)
    try:
        with pytest.raises(BadInput, match="does not fit on cuda"):
            score(replace(job, offload="none"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("offload", ["none", "stream"])
def test_a_fit_on_a_gpu_is_that_of_the_cpu(tmp_path, offload):
    folders = save_experts(tmp_path, "llama")
    pairs = [
        write_pairs(tmp_path / f"pairs{k}.jsonl", contrast=False, tasks=(name,), rows=8)
        for k, name in ((0, "x"), (1, "y"))
    ]
    experts = [{"expert": str(folder), "pairs": file} for folder, file in zip(folders[1:], pairs, strict=True)]
    job = FitJob(str(folders[0]), experts, device="cpu", dtype="float32", answer_tokens=3, steps=12,
                 look_every=4, hold_out=0.0, batch_size=4)  # fmt: skip
    wanted, got = fit(job), fit(replace(job, device="cuda", offload=offload))
    for one, other in ((got.heads, wanted.heads), (got.neurons, wanted.neurons), (got.rest, wanted.rest)):
        assert (one - other).abs().max() < 1e-3
    assert (wanted.heads - wanted.heads.mean()).abs().max() > 0.01
