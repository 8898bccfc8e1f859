"""What wp-eval says about vLLM before any weights load, against the vLLM that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import DEVICE
from eval_world import wp_eval
from tiny import random_model, save

from mergekit_wp.eval.backends import vllm_version
from mergekit_wp.eval.preflight import VLLM_CPU_HEAD_SIZES

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the limits of vLLM on a CPU")


def test_the_head_sizes_are_those_of_vllm() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == VLLM_CPU_HEAD_SIZES


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ((), "its attention heads have 8 dimensions, and on a CPU vLLM computes 32, 64"),
        (("--batch-size", "4"), "vLLM forms its batches itself"),
        (("--data-parallel", "2"), "pip install ray"),
        (("--max-model-len", "512"), "its context is 128 tokens, and max_model_len is 512"),
    ],
)
def test_what_vllm_cannot_do_is_one_sentence(world: Path, tmp_path: Path, more: tuple, sentence: str) -> None:
    save(random_model("llama", 1), tmp_path / "model")
    outcome = wp_eval(
        world / "suite.yaml", tmp_path / "model", "--backend", "vllm", *more, "--allow-code-execution",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert outcome.exit_code == 2, outcome.output
    said = outcome.output.rstrip("\n").rsplit("Error: ", 1)[1]
    assert sentence in said
    assert len(said.splitlines()) == 1


def test_the_build_for_cpus_is_known_as_such() -> None:
    assert (vllm_version() or "").endswith("+cpu")
