"""Scores of shuffled updates, against a shuffled model written to disk by hand and read by the plain reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from score_jobs import Reference, assert_close, job_for
from transformers import AutoModelForCausalLM

from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.score import score
from mergekit_wp.scoring.shuffled import shuffle

MODULES = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
           "down": "mlp.down_proj"}  # fmt: skip


def write_shuffled(job, folder, number):
    """A model like the expert, its update in each projection in the order of shuffle `number`."""
    model = AutoModelForCausalLM.from_pretrained(job.expert, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32).state_dict()
    state = model.state_dict()
    for layer in range(model.config.num_hidden_layers):
        for key, module in MODULES.items():
            for what in ("weight", "bias"):
                name = f"model.layers.{layer}.{module}.{what}"
                if name in state:
                    change = state[name] - base[name]
                    seed = f"{job.seed}/shuffle/{number}/{layer}/{key}/{what}"
                    state[name] = base[name] + shuffle(change, seed)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return folder


class Shuffled(Reference):
    """Scores what another model has in a component's place, by the gap and the answers of the expert."""

    def __init__(self, job, folder):
        super().__init__(job)
        self.source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def one(self, text, direction, name):
        self.answer(text)
        expert, self.expert = self.expert, self.source
        try:
            return getattr(self, self.job.method)(text, direction, name)
        finally:
            self.expert = expert


@pytest.mark.parametrize(
    ("kind", "method", "utility"),
    [("llama-biased", "attr", "kl"), ("qwen3", "writeback", "staged")],
)
def test_it_is_what_a_shuffled_model_on_disk_gives(tmp_path, kind, method, utility):
    job = job_for(tmp_path, kind, method=method, utility=utility, tasks=("one",), gap_floor=0, shuffles=2, seed=3)
    found = score(job)
    assert found.meta.format == 5
    reference = Shuffled(job, write_shuffled(job, tmp_path / "shuffled", number=1))
    for table_SLn, wanted_Ln in zip(found.tasks["one"].shuffled.values(), reference.scores(reference.one), strict=True):
        assert_close(table_SLn[1], wanted_Ln)
    plain = score(replace(job, shuffles=None))
    for name, table in plain.tensors().items():
        assert table.equal(found.tensors()[name])
    assert not found.tasks["one"].shuffled["heads"][0].equal(found.tasks["one"].shuffled["heads"][1])


def test_a_shuffle_has_the_same_numbers_in_another_order():
    change = torch.randn(40, 30)
    other = shuffle(change, "a")
    assert other.flatten().sort().values.equal(change.flatten().sort().values)
    assert other.equal(shuffle(change, "a"))
    assert not other.equal(shuffle(change, "b"))
    assert (other == change).double().mean() < 0.02


@pytest.mark.parametrize("kind", ["phi3", "olmo2"])
def test_streamed_and_by_prompt_it_is_the_same(tmp_path, kind):
    job = job_for(tmp_path, kind, contrast=False, rows=5, gap_floor=0, offload="none", shuffles=2, components="neurons")
    wanted = score(job)
    got = score(replace(job, offload="stream", per_prompt=True, batch_size=1))
    for task in wanted:
        assert not got.tasks[task].shuffled["heads"].any()
        for kind_, table in wanted.tasks[task].shuffled.items():
            torch.testing.assert_close(got.tasks[task].shuffled[kind_], table, rtol=1e-4, atol=1e-6)


def test_methods_without_a_floor_say_so(tmp_path):
    job = job_for(tmp_path, "llama", contrast=False)
    with pytest.raises(BadInput, match="shuffles: exact has no noise floor"):
        replace(job, method="exact", shuffles=1)
