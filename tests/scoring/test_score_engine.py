"""How a run is carried out must not change its numbers: streaming, subsets, parts, killing it, several processes."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from company import ENVIRONMENT, launched, two_processes
from safetensors import safe_open
from safetensors.torch import save_file
from score_jobs import job_for, write_pairs
from warm import COMMAND, warm

from mergekit_wp.errors import BadInput
from mergekit_wp.scores import METHODS, Scores, read_scores, write_scores
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.score import score
from mergekit_wp.subset import Subset, parse_layers


def assert_same(got, wanted, tolerance=1e-6):
    """Relative to the largest score of each tensor."""
    for name, tensor in wanted.tensors().items():
        assert (got.tensors()[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama-biased", "gemma2"])
def test_streaming_changes_nothing(tmp_path, kind, method):
    job = job_for(tmp_path, kind, method=method, offload="none", contrast=False)
    resident, streamed = score(job), score(replace(job, offload="stream"))
    # Differences of F, divided by the gap of each prompt: the smallest decides how far rounding is seen.
    assert_same(streamed, resident, 3e-5)


def test_streaming_a_lora(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny.random_model("llama", seed=1)
    tiny.save(base, tmp_path / "base")
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "lora")
    job = replace(
        job_for(tmp_path / "other", "llama", contrast=False, gap_floor=1e-4),
        base=str(tmp_path / "base"),
        expert=f"{tmp_path / 'base'}+{tmp_path / 'lora'}",
    )
    assert_same(score(replace(job, offload="stream")), score(replace(job, offload="none")), 1e-4)


@pytest.mark.parametrize("method", ["writeback", "attr", "exact"])
def test_subset_scores_equal_the_whole_runs(tmp_path, method):
    job = job_for(tmp_path, "qwen3", method=method)
    whole = score(job)
    assert whole.complete
    part = score(replace(job, components="neurons", layers="1-2"))
    assert not part.complete
    assert not part.heads.any()
    assert not part.neurons[[0, 3]].any()
    torch.testing.assert_close(part.neurons[1:3], whole.neurons[1:3], rtol=1e-5, atol=1e-7)
    assert part.scored["neurons"].sum() == 2 * tiny.SHAPE["intermediate_size"]


def test_top_takes_the_leaders_of_an_earlier_file(tmp_path):
    job = job_for(tmp_path, "llama")
    first = score(job)
    write_scores(first, tmp_path / "first.safetensors")
    validated = score(replace(job, method="exact", top=(3, str(tmp_path / "first.safetensors"))))
    whole = score(replace(job, method="exact"))
    for kind in ("heads", "neurons"):
        leaders = set(getattr(first, kind).flatten().topk(3).indices.tolist())
        mask = validated.scored[kind].flatten()
        assert set(mask.nonzero()[:, 0].tolist()) == leaders
        wanted = getattr(whole, kind).flatten() * mask
        torch.testing.assert_close(getattr(validated, kind).flatten(), wanted, rtol=1e-4, atol=1e-5)
    write_scores(validated, tmp_path / "top.safetensors")
    assert not read_scores(tmp_path / "top.safetensors").complete


def leaders(table, count):
    """The `count` largest entries, as a set of (layer, index)."""
    order = sorted(torch.cartesian_prod(*map(torch.arange, table.shape)).tolist(), key=lambda at: -table[tuple(at)])
    return {tuple(at) for at in order[:count]}


@pytest.mark.parametrize("by", ["mean", "task", "mean-abs", "task-abs"])
def test_rank_says_what_top_ranks_by(tmp_path, by):
    job = job_for(tmp_path, "llama", method="attr")
    first = score(job)
    write_scores(first, tmp_path / "first.safetensors")
    again = score(replace(job, top=(3, str(tmp_path / "first.safetensors")), rank=by))
    assert again.meta.subset == {
        "components": "all", "layers": None, "top": (3, str(tmp_path / "first.safetensors")), "rank": by,
        "sample": None,
    }  # fmt: skip
    for kind in ("heads", "neurons"):
        tables = [getattr(each, kind) for each in ([first] if "mean" in by else first.tasks.values())]
        wanted = set().union(*(leaders(table.abs() if "abs" in by else table, 3) for table in tables))
        assert {tuple(at) for at in again.scored[kind].nonzero().tolist()} == wanted


def test_top_ranks_only_what_was_scored(tmp_path):
    """Neurons that nobody asked for, and layers that the anchor does not see, have 0: above what works against it."""
    job = job_for(tmp_path, "llama", method="attr", utility="anchor", layer=1)
    write_scores(score(replace(job, components="heads")), tmp_path / "first.safetensors")
    again = score(replace(job, utility="kl", top=(16, str(tmp_path / "first.safetensors"))))
    assert not again.scored["neurons"].any()
    assert again.scored["heads"].sum(1).tolist() == [4, 4, 0, 0]


def test_components_from_a_list(tmp_path):
    job = job_for(tmp_path, "llama", method="attr")
    whole = score(job)
    (tmp_path / "list.txt").write_text("L0H3, L2H0  # a remark, L9H9\n\nL1N19\tL1N0\nL1N0\n")
    some = score(replace(job, components=str(tmp_path / "list.txt")))
    assert some.scored["heads"].nonzero().tolist() == [[0, 3], [2, 0]]
    assert some.scored["neurons"].nonzero().tolist() == [[1, 0], [1, 19]]
    for kind in ("heads", "neurons"):
        wanted = getattr(whole, kind) * some.scored[kind]
        torch.testing.assert_close(getattr(some, kind), wanted, rtol=1e-5, atol=1e-7)
    lower = score(replace(job, components=str(tmp_path / "list.txt"), layers="0-1"))
    assert lower.scored["heads"].nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("L0H3\nL5X3", "line 2: found 'L5X3', expected a head"),
        ("l0h3", "line 1: found 'l0h3'"),
        ("L0H-1", "line 1: found 'L0H-1'"),
        ("L4H0", "line 1: L4H0 is not in this model, which has layers 0 to 3, heads 0 to 3 and neurons 0 to 19"),
        ("L0H4", "line 1: L0H4 is not in this model"),
        ("L0N20", "line 1: L0N20 is not in this model"),
        ("L0H" + "9" * 5000, "line 1: found 'L0H99"),
        ("# nothing\n", "names no component"),
        (None, "expected all, heads, neurons or a file"),
    ],
)
def test_a_bad_list_of_components_is_refused(tmp_path, text, said):
    path = tmp_path / "list.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput) as caught:
        Subset.choose(score_geometry(), str(path))
    assert said in caught.value.message


def test_what_the_anchor_cannot_see_is_refused(tmp_path):
    with pytest.raises(BadInput, match="lies above the anchor layer 2"):
        score(job_for(tmp_path, "llama", utility="anchor", layers="3"))


def test_rank_without_top_is_refused(tmp_path):
    with pytest.raises(BadInput, match="rank: task says how --top ranks"):
        job_for(tmp_path, "llama", rank="task")


def test_top_of_another_pair_is_refused(tmp_path):
    write_scores(score(job_for(tmp_path / "a", "llama")), tmp_path / "a.safetensors")
    job = job_for(tmp_path / "b", "llama-biased")
    with pytest.raises(BadInput, match="another base"):
        score(replace(job, top=(3, str(tmp_path / "a.safetensors"))))


@pytest.mark.parametrize("method", ["attr", "writeback"])
def test_parts_add_up(tmp_path, method):
    job = job_for(tmp_path, "llama-biased", method=method, parts=True)
    scores = score(job)
    write_scores(scores, tmp_path / "parts.safetensors")
    read = read_scores(tmp_path / "parts.safetensors")
    assert set(read.parts) == {"q", "o", "gate", "up", "down"}
    assert all(table.any() for table in read.parts.values())
    torch.testing.assert_close(read.parts["q"] + read.parts["o"], read.heads)
    torch.testing.assert_close(sum(read.parts[p] for p in ("gate", "up", "down")), read.neurons)
    torch.testing.assert_close(
        read.tasks["first"].parts["q"] + read.tasks["first"].parts["o"], read.tasks["first"].heads
    )


def test_a_part_is_the_score_when_only_its_tensor_differs(tmp_path):
    """With only gate_proj fine-tuned, the gate part is everything, in both methods."""
    for method in ("attr", "writeback"):
        job = job_for(tmp_path / method, "llama", method=method, parts=True, contrast=False, gap_floor=1e-5)
        base, expert = tiny.random_model("llama", seed=1), tiny.random_model("llama", seed=1)
        for layer in expert.model.layers:
            layer.mlp.gate_proj.weight.data += 0.05 * torch.randn(layer.mlp.gate_proj.weight.shape)
        tiny.save(base, Path(job.base))
        tiny.save(expert, Path(job.expert))
        scores = score(job)
        torch.testing.assert_close(scores.parts["gate"], scores.neurons)
        assert not scores.parts["up"].any()
        assert not scores.heads.any()


@pytest.mark.parametrize(
    ("text", "wanted"), [(None, [0, 1, 2, 3]), ("0", [0]), ("0-1,3", [0, 1, 3]), (" 2 , 1-2", [1, 2])]
)
def test_layers_text(text, wanted):
    assert parse_layers(text, 4) == wanted


@pytest.mark.parametrize("text", ["", "a", "1-", "4", "3-1", "-1", "0,,1"])
def test_bad_layers_text(text):
    with pytest.raises(BadInput, match="layers"):
        parse_layers(text, 4)


def test_subset_of_nothing_is_refused():
    geometry = score_geometry()
    empty = Subset.choose(geometry, "heads").heads
    assert empty.all()
    with pytest.raises(BadInput, match="out of range"):
        Subset.choose(geometry, "heads", "9")


def score_geometry():
    from mergekit_wp.geometry import Geometry

    return Geometry("LlamaForCausalLM", 4, 4, 2, 8, 20, 24, 97)


def command(job, out, *more):
    flags = ["--base", job.base, "--expert", job.expert, "--pairs", job.pairs, "--layer", "2", "--device", "cpu"]
    return ["mergekit_wp.scoring.cli", *flags, "--gap-floor", "0.001", "--out", str(out), *more]


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    """kill -9 once some layers are done; the second run takes those up and writes the undisturbed run's file."""
    job = job_for(tmp_path, "llama")
    write_pairs(tmp_path / "pairs.jsonl", rows=10)
    undisturbed, killed = tmp_path / "undisturbed.safetensors", tmp_path / "killed.safetensors"
    exact = ("--method", "exact", "--batch-size", "1")
    assert warm().command(*command(job, undisturbed, *exact), **ENVIRONMENT).returncode == 0
    root = tmp_path / ".killed.safetensors.resume"
    module, *arguments = command(job, killed, *exact)
    process = warm().start(COMMAND.format(module), *arguments, **ENVIRONMENT)
    deadline = time.monotonic() + 120
    while len(list(root.glob("*/task-*.safetensors"))) < 2:
        assert not killed.exists(), "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    done = {file: file.stat().st_mtime_ns for file in root.glob("*/task-*.safetensors")}
    assert len(done) < 8, "nothing was left to do"
    again = warm().command(*command(job, killed, *exact), **ENVIRONMENT)
    assert again.returncode == 0, again.stderr
    assert f"Going on after {len(done)} finished layers" in again.stderr
    assert killed.read_bytes() == undisturbed.read_bytes()
    assert not root.exists()


def write_layer(file, tensors):
    """A finished layer as a run leaves it, with this content."""
    number, layer = (int(part) for part in file.stem.replace("task-", "").split("-layer-"))
    run = Resume(file.parent)
    run.folder = file.parent
    run.save(number, layer, tensors)


class TestResume:
    """Nothing is forgotten here: that is the caller's part, after writing. So every run below is an interrupted one."""

    @pytest.fixture
    def job(self, tmp_path):
        return job_for(tmp_path, "llama", method="exact", layers="2-3")

    @pytest.fixture
    def out(self, tmp_path):
        return tmp_path / "out.safetensors"

    @staticmethod
    def found(job, out):
        """How many finished layers a run takes up; its scores must be those of a run alone."""
        resume = Resume(out)
        assert_same(score(job, resume=resume), score(job), 0)
        return resume.found

    def test_other_settings_do_not_use_finished_layers_and_do_not_lose_them(self, job, out):
        assert self.found(job, out) == 0
        for other in (replace(job, seed=1, samples=2), replace(job, method="ap"), replace(job, method="writeback")):
            assert self.found(other, out) == 0
        assert self.found(job, out) == 4

    def test_a_ranking_made_anew_under_its_name_starts_afresh(self, job, out, tmp_path):
        ranking = tmp_path / "first.safetensors"
        first = score(replace(job, method="attr", layers=None))
        top = replace(job, top=(2, str(ranking)))
        write_scores(first, ranking)
        assert self.found(top, out) == 0
        tasks = {name: replace(task, heads=-task.heads, neurons=-task.neurons) for name, task in first.tasks.items()}
        write_scores(Scores.from_tasks(first.meta, tasks), ranking)
        assert self.found(top, out) == 0

    def test_pairs_changed_under_their_name_start_afresh(self, job, out):
        assert self.found(job, out) == 0
        write_pairs(job.pairs, rows=4)
        assert self.found(job, out) == 0

    def test_damaged_layers_are_computed_again(self, job, out, caplog):
        """Whatever became of one: bytes, a bit that safetensors does not see, and files like it with other content."""
        assert self.found(job, out) == 0
        first, *others = sorted(out.parent.rglob("task-*.safetensors"))
        with safe_open(others[0], framework="pt") as file:
            said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        first.write_bytes(first.read_bytes()[:-1] + bytes([first.read_bytes()[-1] ^ 1]))
        others[0].write_bytes(others[0].read_bytes()[:-9])
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, others[1], metadata=said)
        write_layer(others[2], {name: tensor.float() for name, tensor in tensors.items()})
        with caplog.at_level("WARNING", logger="mergekit_wp"):
            assert self.found(job, out) == 4
        assert all(f"{file}: damaged" in caplog.text for file in (first, *others))
        caplog.clear()
        wrong = (
            {"heads": tensors["heads"]},
            {**tensors, "more": torch.zeros(1)},
            {**tensors, "heads": tensors["heads"][:-1]},
            {**tensors, "heads": tensors["heads"] / 0},
        )
        for file, content in zip((first, *others), wrong, strict=True):
            write_layer(file, content)
        with caplog.at_level("WARNING", logger="mergekit_wp"):
            assert self.found(job, out) == 4
        assert caplog.text.count(": damaged") == 4
        caplog.clear()
        self.found(job, out)
        assert "damaged" not in caplog.text

    def test_few_are_kept_and_it_says_where(self, out, caplog):
        for seed in range(6):
            run = Resume(out)
            run.begin({"seed": seed}, "2026-11-25T10:00:00+00:00")
            run.save(0, 0, {"heads": torch.zeros(1)})
            os.utime(run.folder, (seed, seed))
        with caplog.at_level("INFO", logger="mergekit_wp"):
            run.spare_others()
        assert "3 finished layers of runs with other settings" in caplog.text
        assert str(run.root) in caplog.text
        assert len(list(run.root.iterdir())) == 4
        run.forget()
        assert len(list(run.root.iterdir())) == 3
        again = Resume(out)
        again.begin({"seed": 4}, "2026-11-25T11:00:00+00:00")
        assert again.found == 1


def test_processes_that_cannot_share_do_not_all_do_the_job(monkeypatch):
    import accelerate

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "PartialState", lambda **_options: SimpleNamespace(num_processes=1))
    with pytest.raises(BadInput, match="2 processes, which cannot share work on cpu"):
        ProcessGroup.join("cpu")


@pytest.mark.parametrize("method", ["writeback", "exact"])
def test_two_processes_write_what_one_writes(tmp_path, method):
    job = job_for(tmp_path, "llama")
    write_pairs(tmp_path / "pairs.jsonl", rows=5)
    flags = ("--method", method, "--batch-size", "2", "--answer-tokens", "3" if method == "exact" else "0")
    alone, together = tmp_path / "alone.safetensors", tmp_path / "together.safetensors"
    assert warm().command(*command(job, alone, *flags), **ENVIRONMENT).returncode == 0
    asked = command(job, together, *flags)
    if method == "writeback":  # where there is no GPU, auto is the CPU for accelerate as well
        asked[asked.index("--device") + 1] = "auto"
    if method == "writeback":
        done = launched(*asked)
    else:  # chunks of few components, so that there are some for both
        done = two_processes(*asked, before="from mergekit_wp.scoring import score; score.MOST_TOKENS['cpu'] = 40; ")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Shared by 2 processes.") == done.stderr.count("Written:") == 1
    one, two = read_scores(alone), read_scores(together)
    # Products of fewer components at a time may round otherwise: where a CPU has AVX-512, they do.
    assert_same(two, one, 1e-5 if method == "exact" else 1e-6)
    assert json.dumps({k: str(v) for k, v in vars(one.meta.tasks["first"]).items() if k != "alpha"}) == json.dumps(
        {k: str(v) for k, v in vars(two.meta.tasks["first"]).items() if k != "alpha"}
    )
    if method == "exact":
        kept = [(tmp_path / f"{name}.answers.jsonl").read_text().splitlines()[1:] for name in ("alone", "together")]
        assert sorted(kept[0]) == sorted(kept[1])
        assert kept[0]
