"""`quantization_config` over plain weights is left aside; weights that are quantised are refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from streamed_world import CPU, assert_same, resident, streamed
from test_merge_bad_input import edit_config, rewrite
from test_scoring import job_for

from mergekit_wp.checkpoint import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.quantised import check_plain
from mergekit_wp.scoring.engine import score
from mergekit_wp.scoring.models import check_pair, load_one

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
MARKS = {
    "bitsandbytes": {"quantization_config": BNB},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "compressed": {"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("role", "offload"), [("base", "none"), ("expert", "stream")])
def test_scores_are_those_without_the_mark(tmp_path, role, offload):
    job = replace(job_for(tmp_path, "llama", contrast=False), offload=offload)
    wanted = score(job)
    edit_config(Path(getattr(job, role)), **MARKS["bitsandbytes"])
    got = score(job)
    for name, tensor in wanted.tensors().items():
        assert torch.equal(got.tensors()[name], tensor), name
    assert (got.meta.base, got.meta.expert) == (wanted.meta.base, wanted.meta.expert)


@pytest.mark.parametrize("kind", ["llama", "llava-wrapper"])
@pytest.mark.parametrize("mark", MARKS)
def test_a_model_alone(tmp_path, kind, mark):
    """As wp-aim loads it; of a wrapper the mark may be in text_config."""
    folder = tiny.save(tiny.random_model(kind, seed=1), tmp_path / "m", torch.bfloat16)
    wanted = resident(folder)
    nested = Checkpoint.open(str(folder)).config.get("text_config")
    edit_config(folder, **({"text_config": {**nested, **MARKS[mark]}} if nested else MARKS[mark]))
    for stack in (streamed(folder), load_one(Checkpoint.open(str(folder)), torch.float32, CPU, "none", False)):
        assert_same(stack, wanted)


def test_a_lora_over_it(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny.random_model("llama", seed=1)
    folder = tiny.save(base, tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    job = replace(job_for(tmp_path / "o", "llama", contrast=False, gap_floor=1e-4), base=str(folder),
                  expert=f"{folder}+{tmp_path / 'lora'}", offload="none")  # fmt: skip
    wanted = score(job)
    edit_config(folder, **MARKS["bitsandbytes"])
    got = score(job)
    for name, tensor in wanted.tensors().items():
        assert torch.equal(got.tensors()[name], tensor), name


def packed(tensors):
    return tensors | {UP: torch.zeros(240, 1, dtype=torch.uint8), f"{UP}.absmax": torch.ones(8)}


def float8(tensors):
    return tensors | {UP: tensors[UP].to(torch.float8_e4m3fn), f"{UP}_scale_inv": torch.ones(1, 1)}


def scaled(tensors):
    return tensors | {f"{UP}_scale": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "mark", "said"),
    [
        (packed, BNB, rf"{UP}, stored as U8, config.json names the method 'bitsandbytes'"),
        (float8, None, rf"{UP}, stored as F8_E4M3\)"),
        (scaled, {"quant_method": "compressed-tensors"}, rf"{UP}_scale, stored as F32, .*'compressed-tensors'"),
        # Weights as trained, which the model rounds at every call: not those that are computed with.
        (dict, {"quant_method": "bitnet", "quantization_mode": "online"}, r"config.json names the method 'bitnet'"),
    ],
)
def test_quantised_weights_are_refused(tmp_path, change, mark, said):
    job = job_for(tmp_path, "llama", contrast=False)
    folder = Path(job.expert)
    rewrite(folder, change)
    if mark:
        edit_config(folder, quantization_config=mark)
    checkpoint = Checkpoint.open(str(folder))
    for refuses in (
        lambda: check_pair(job),
        lambda: load_one(checkpoint, torch.float32, CPU, "none", False),
        lambda: streamed(folder),
    ):
        with pytest.raises(BadInput, match=rf"expert: its weights are quantised \(.*{said}.*dequantise"):
            refuses()
    check_plain(Checkpoint.open(job.base))
