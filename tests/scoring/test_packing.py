"""Prompts in one row: the same scores as each prompt by itself, from fewer tokens."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_jobs import job_for

from mergekit_wp.scores import Scores
from mergekit_wp.scoring.batching import Batch, Lengths, pick
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.packing import PackedBatch, pack
from mergekit_wp.scoring.passes import PatchPlan
from mergekit_wp.scoring.score import score

ALIKE = 12  # words that every prompt begins with, more than a prompt's own
NO_WINDOW = ("gemma2", "gemma3", "mistral", "olmo3", "smollm3", "phi3", "ministral", "gemma3-wrapper")


def pairs_file(path: Path, alike: int = ALIKE) -> str:
    rng = random.Random(0)
    system = rng.choices(tiny.WORDS, k=alike)
    rows = [{"task": "t", "prompt": " ".join(system + rng.choices(tiny.WORDS, k=1 + n % 5))} for n in range(14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def job_of(tmp_path: Path, kind: str, **options: Any) -> ScoringJob:
    shape = {"sliding_window": 64} if kind in NO_WINDOW else {}
    job = job_for(tmp_path, kind, shape=shape, layer=1, contrast=False, **options)
    return replace(job, pairs=pairs_file(tmp_path / "alike.jsonl"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that a model was started on."""
    found: list[Batch] = []
    start = Stack.start
    monkeypatch.setattr(Stack, "start", lambda self, batch: found.append(batch) or start(self, batch))  # type: ignore[func-returns-value]
    return found


def assert_close(got: Scores, wanted: Scores, tolerance: float = 3e-5) -> None:
    for name, tensor in wanted.tensors().items():
        assert (got.tensors()[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


KINDS = (*tiny.ARCHITECTURES, *tiny.FAMILIES, *tiny.WRAPPERS)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, "writeback") for kind in KINDS),
        ("qwen3", "attr"),
        ("gemma2", "attr"),
        ("qwen3", "atp"),
        ("llama", "exact"),
        ("gemma2", "exact"),
        ("olmo2", "exact"),
        ("qwen3", "ap"),
    ],
)
def test_scores_are_those_of_each_prompt_by_itself(
    tmp_path: Path, started: list[Batch], kind: str, method: str
) -> None:
    job = job_of(tmp_path, kind, method=method, utility="staged")
    together = score(replace(job, batch_size=7))
    packed = [batch for batch in started if isinstance(batch, PackedBatch)]
    assert packed
    for batch in packed:
        assert batch.ids_BT.numel() < 0.7 * len(batch.last_B) * (batch.positions_S.max() + 1)
    started.clear()
    alone = score(replace(job, batch_size=1))
    assert not any(isinstance(batch, PackedBatch) for batch in started)
    assert_close(together, alone)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_over_whole_answers_streamed_and_at_a_merge(tmp_path: Path, started: list[Batch], kind: str) -> None:
    job = job_of(tmp_path, kind, utility="kl", answer_tokens=3)
    recipe = tmp_path / "at.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n- {{model: {job.base}, parameters: {{weight: 0.5}}}}\n"
        f"- {{model: {job.expert}, parameters: {{weight: 0.5}}}}\nbase_model: {job.base}\n"
    )
    for change in ({}, {"offload": "stream"}, {"at": str(recipe)}):
        started.clear()
        together = score(replace(job, batch_size=7, **change))
        packed = [batch for batch in started if isinstance(batch, PackedBatch)]
        assert packed
        assert {batch.reads_BA.shape[1] for batch in packed} == {3}
        assert_close(together, score(replace(job, batch_size=1, **change)), 1e-4)


def test_in_sixteen_bits_the_mask_is_one_that_attention_takes(tmp_path: Path, started: list[Batch]) -> None:
    for kind in ("llama", "gemma2"):  # sdpa, eager
        (tmp_path / kind).mkdir()
        job = job_of(tmp_path / kind, kind, dtype="bfloat16")
        together, alone = score(replace(job, batch_size=7)), score(replace(job, batch_size=1))
        assert any(isinstance(batch, PackedBatch) for batch in started)
        assert_close(together, alone, 0.1)
        started.clear()


def test_patched_one_by_one_and_kept_by_prompt(tmp_path: Path, started: list[Batch]) -> None:
    job = replace(job_of(tmp_path, "qwen3", utility="kl"), method="exact", per_prompt=True)
    together = score(replace(job, batch_size=7))
    assert any(isinstance(batch, PackedBatch) for batch in started)
    assert_close(together, score(replace(job, batch_size=1)))


def test_left_as_they_are(tmp_path: Path, started: list[Batch]) -> None:
    """First order by prompt, and under a window that a prompt is longer than."""
    job = replace(job_of(tmp_path, "llama", utility="kl"), batch_size=7)
    score(replace(job, per_prompt=True))
    (tmp_path / "window").mkdir()
    sliding = job_for(tmp_path / "window", "mistral", contrast=False, utility="kl", batch_size=7)
    score(replace(sliding, pairs=job.pairs))
    assert started
    assert not any(isinstance(batch, PackedBatch) for batch in started)


def stack(window: int | None = None, rope: str = "default", attention: str = "sdpa") -> Any:
    """What `pack` asks of a model: 64 wide, a token costs 40,000 operations in a layer's weights."""
    config = SimpleNamespace(sliding_window=window, _attn_implementation=attention)
    lengths = Lengths({"rope_parameters": {"rope_type": rope}, "max_position_embeddings": 512})
    layer = torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"o_proj": torch.nn.Linear(64, 625)})})
    return SimpleNamespace(tower=SimpleNamespace(config=config, layers=[layer]), lengths=lengths)


@given(
    prefix=st.integers(0, 9),
    own=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_a_row_holds_what_each_prompt_reads(prefix: int, own: list[tuple[int, int]], seed: int) -> None:
    rng = random.Random(seed)
    head, longest = [rng.randrange(1, 4) for _ in range(prefix)], max(answer for _, answer in own)
    rows = [head + [rng.randrange(1, 4) for _ in range(n + answer - 1)] for n, answer in own]
    ids_BT = torch.zeros(len(own), prefix + max(n for n, _ in own) - 1 + longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids_BT[i, : len(row)] = torch.tensor(row)
    last_B = torch.tensor([prefix + n - 1 for n, _ in own])
    batch = Batch(ids_BT, last_B, torch.tensor([answer for _, answer in own]))
    found = pack(batch, stack())
    if not isinstance(found, PackedBatch):
        assert found is batch
        return
    assert found.ids_BT.numel() < 0.9 * ids_BT.numel()
    assert torch.equal(pick(found.ids_BT[..., None], found.reads_BA), pick(ids_BT[..., None], batch.reads_BA))
    assert torch.equal(found.weights_BA, batch.weights_BA)
    # What the last token read attends to, in the order of positions, is its prompt.
    for i, row in enumerate(rows):
        place = int(found.reads_BA[i, own[i][1] - 1])
        seen = found.allowed_SS[place].nonzero()[:, 0]
        seen = seen[found.positions_S[seen].argsort()]
        assert found.ids_BT[0, seen].tolist() == row
        assert found.positions_S[seen].tolist() == list(range(len(row)))


def test_when_it_is_packed() -> None:
    def batch(prompts: int, alike: int, own: int) -> Batch:
        ids_BT = torch.cat([torch.ones(prompts, alike), torch.arange(prompts * own).reshape(prompts, own)], 1).long()
        return Batch(ids_BT, torch.full((prompts,), alike + own - 1), torch.ones(prompts, dtype=torch.long))

    def packed(of: Batch, *stacks: Any) -> bool:
        return isinstance(pack(of, *stacks), PackedBatch)

    assert packed(batch(8, 40, 20), stack())
    assert packed(batch(8, 40, 20), stack(), stack(window=60))
    assert not packed(batch(8, 1, 59), stack()), "nothing is shared or padded"
    assert not packed(batch(1, 40, 20), stack()), "alone"
    assert packed(batch(3, 10, 20), stack())
    assert not packed(batch(150, 10, 20), stack()), "attention over the whole row costs more"
    assert not packed(batch(8, 4000, 50), stack()), "a long row"
    assert not packed(batch(8, 40, 20), stack(), stack(window=59))
    assert not packed(batch(8, 40, 20), stack(rope="dynamic"))
    assert not packed(batch(8, 40, 20), stack(attention="flash_attention_2"))


def test_logits_of_all_prompts_of_a_row_fit_into_the_room() -> None:
    ids_BT = torch.cat([torch.ones(8, 40), torch.arange(160).reshape(8, 20)], 1).long()
    row = pack(Batch(ids_BT, torch.full((8,), 59), torch.ones(8, dtype=torch.long)), stack())
    assert len(row.ids_BT) == 1
    shape = SimpleNamespace(heads=1, head_dim=1, kv_heads=1, d_model=1, neurons=1, vocabulary=100_000)
    pair: Any = SimpleNamespace(geometry=shape, base=stack())
    logits = 4 * 8 * shape.vocabulary  # bytes, of one component
    plan = PatchPlan(None, 20 * logits, 10**9, None, lambda _done: None)  # type: ignore[arg-type]
    assert 1 < plan.width(pair, row) <= 20
