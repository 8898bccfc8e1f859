"""What each prompt gives, as the file keeps it, against jobs of that prompt alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from company import two_processes
from score_jobs import job_for

from mergekit_wp.errors import BadInput
from mergekit_wp.scores import read_scores, write_scores
from mergekit_wp.scoring import score as scoring
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.score import score

KINDS = ("heads", "neurons")


def alone(job, tmp_path):
    """The scores of every prompt of the job's one task, from jobs that have no other."""
    for number, line in enumerate(Path(job.pairs).read_text().splitlines()):
        file = tmp_path / f"alone{number}.jsonl"
        file.write_text(line + "\n")
        yield score(replace(job, pairs=str(file), per_prompt=False))


@pytest.mark.parametrize(
    ("kind", "method", "offload"),
    [
        ("llama-biased", "attr", "stream"),
        ("llama-biased", "writeback", "none"),
        ("phi3", "writeback", "stream"),
        ("olmo2", "writeback", "none"),  # whose heads mix
        ("gemma2", "atp", "none"),
        ("qwen3", "exact", "stream"),
        ("llama", "ap", "none"),
    ],
)
def test_each_prompt_gives_what_it_gives_alone(tmp_path, kind, method, offload):
    job = job_for(tmp_path, kind, method=method, utility="kl", contrast=False, tasks=("one",), rows=5, gap_floor=0,
                  offload=offload, batch_size=2, per_prompt=True)  # fmt: skip
    found = score(job).tasks["one"].prompts
    for number, single in enumerate(alone(job, tmp_path)):
        for of in KINDS:
            got_Ln, wanted_Ln = getattr(found, of)[number], getattr(single, of)
            assert (got_Ln - wanted_Ln).abs().max() <= 2e-4 * wanted_Ln.abs().max()
        assert float(found.gaps["kl"][number]) == pytest.approx(
            single.meta.tasks["one"].utilities["kl"].mean_gap, rel=1e-4
        )


def test_the_scores_are_those_without_and_the_file_is_read_back(tmp_path):
    """Two metrics, of which one drops a prompt; and a mean gap, by which a prompt's share is of the mean."""
    job = job_for(tmp_path, "llama", utility="staged", rows=6, gap_floor=0, parts=True, method="attr", per_prompt=True)
    gaps = torch.cat([task.prompts.gaps["anchor"].abs() for task in score(job).tasks.values()])
    for gap, floor in (("sample", float(gaps.min()) * 1.01), ("mean", 0.0)):
        plain, kept = (score(replace(job, gap=gap, gap_floor=floor, per_prompt=on)) for on in (False, True))
        if gap == "sample":
            assert any(stats.dropped for task in plain.meta.tasks.values() for stats in task.utilities.values())
        for name, wanted in plain.tensors().items():
            # Sums over prompts in another order: shares of a small gap, so that CPUs differ by some 1e-6.
            torch.testing.assert_close(kept.tensors()[name], wanted, rtol=1e-5, atol=1e-5)
        write_scores(kept, tmp_path / f"{gap}.safetensors")
        again = read_scores(tmp_path / f"{gap}.safetensors")
        assert again.meta.format == 4
        assert again.meta.prompt_ids == kept.meta.prompt_ids
        assert set(again.tensors()) == set(kept.tensors())
        assert len({*again.meta.prompt_ids["first"], *again.meta.prompt_ids["second"]}) == 6  # half are scored
        assert again["first"].tasks["first"].prompts is not None


def test_a_task_may_be_called_prompts(tmp_path):
    job = job_for(tmp_path, "llama", method="attr", contrast=False, tasks=("prompts",), per_prompt=True)
    for kept in (True, False):
        write_scores(score(replace(job, per_prompt=kept)), tmp_path / "s.safetensors")
        found = read_scores(tmp_path / "s.safetensors")
        assert (found.tasks["prompts"].prompts is not None) == kept


def test_a_part_is_kept_of_a_part_alone(tmp_path):
    job = job_for(tmp_path, "llama", method="writeback", contrast=False, components="neurons", per_prompt=True)
    found = score(job).tasks["first"].prompts
    assert not found.heads.any()
    assert found.neurons.any()


def test_a_run_that_was_stopped_goes_on_to_the_same_scores(tmp_path, monkeypatch):
    job = job_for(tmp_path, "llama", method="exact", contrast=False, per_prompt=True)
    wanted, patch_layer, left = score(job), scoring.patch_layer, [5]

    def stopped(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        patch_layer(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "patch_layer", stopped)
        with pytest.raises(KeyboardInterrupt):
            score(job, resume=Resume(tmp_path / "out.safetensors"))
    resume = Resume(tmp_path / "out.safetensors")
    got = score(job, resume=resume)
    assert resume.found == 5
    assert all(torch.equal(got.tensors()[name], tensor) for name, tensor in wanted.tensors().items())


@pytest.mark.parametrize("method", ["writeback", "exact"])
def test_two_processes_keep_what_one_keeps(tmp_path, method):
    shuffles = 1 if method == "writeback" else None
    job = job_for(tmp_path, "llama", method=method, contrast=False, rows=5, batch_size=1, per_prompt=True,
                  shuffles=shuffles)  # fmt: skip
    wanted = score(job)
    flags = ["--base", job.base, "--expert", job.expert, "--pairs", job.pairs, "--device", "cpu", "--method", method,
             "--batch-size", "1", "--per-prompt", "--dtype", "float32", "--gap-floor", "0.03",
             *(["--shuffles", "1"] if shuffles else [])]  # fmt: skip
    done = two_processes("mergekit_wp.scoring.cli", *flags, "--out", str(tmp_path / "two.safetensors"))
    assert done.returncode == 0, done.stderr
    got = read_scores(tmp_path / "two.safetensors")
    for name, tensor in wanted.tensors().items():
        torch.testing.assert_close(got.tensors()[name], tensor, rtol=1e-4, atol=1e-6)


def _fewer(tensors, meta):
    tensors["tasks/first/prompts/heads"] = tensors["tasks/first/prompts/heads"][1:]


def _other(tensors, meta):
    tensors["tasks/first/prompts/neurons"][0] += 1.0


def _unused(tensors, meta):
    tensors["tasks/first/prompts/used/kl"][0] = 0.0


def _missing(tensors, meta):
    del tensors["tasks/first/prompts/gaps/kl"]


def _gone(tensors, meta):
    for name in [name for name in tensors if name.startswith("tasks/first/prompts/")]:
        del tensors[name]


def _nameless(tensors, meta):
    meta["prompt_ids"]["first"] = meta["prompt_ids"]["first"][1:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_fewer, r"tasks/first/prompts/heads has shape \[2, 4, 4\], expected \[3, 4, 4\]"),
        (_other, "first: neurons is not the mean over its prompts"),
        (_unused, "first marks other prompts as used than it counts"),
        (_missing, "unexpected tensors of single prompts"),
        (_gone, "first has no tensors of single prompts"),
        (_nameless, "first does not say of every prompt"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, change, said):
    from test_scores import damage

    job = job_for(tmp_path, "llama", method="attr", contrast=False, per_prompt=True)
    write_scores(score(job), tmp_path / "s.safetensors")
    damage(tmp_path / "s.safetensors", change)
    with pytest.raises(BadInput, match=said):
        read_scores(tmp_path / "s.safetensors")
