"""wp-fit from its command: what it writes, what it refuses, and that a kill or company changes nothing."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict

import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from company import two_processes
from fit_world import geometry_of, save_experts
from merge_world import write_random_scores
from safetensors import safe_open
from score_jobs import write_pairs
from streamed_world import resident
from where import DEVICE

import mergekit_wp.fit.fit as module
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.fit.cli import main
from mergekit_wp.fit.descent import Descent
from mergekit_wp.fit.fit import check, fit
from mergekit_wp.fit.job import FitJob, load_fit_job
from mergekit_wp.fit.objective import Lesson, hold_out
from mergekit_wp.fit_file import FittedPrompts, Kept, LossAt, read_fit
from mergekit_wp.scoring.batching import batches
from mergekit_wp.scoring.models.merged import MergedStack
from mergekit_wp.scoring.packing import PackedBatch
from mergekit_wp.scoring.pairs import read_pairs
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.sweep import forward_sweep


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with base, two experts, prompts of each, a job, and score files."""
    root = tmp_path_factory.mktemp("fit")
    folders = save_experts(root, "llama", extra_rows=1)
    for k, folder in enumerate(folders[1:]):
        write_pairs(root / f"pairs{k}.jsonl", contrast=False, tasks=(f"t{k}",), rows=8)
        write_random_scores(root / f"scores{k}.safetensors", str(folders[0]), str(folder), k, geometry_of(folders[0]))
    write_pairs(root / "neutral.jsonl", contrast=False, tasks=("neutral",), rows=6)
    return root


def job_of(world, **changes):
    experts = [
        {"expert": str(world / f"expert{k}"), "pairs": str(world / f"pairs{k}.jsonl"),
         "scores": str(world / f"scores{k}.safetensors")} for k in range(2)
    ]  # fmt: skip
    defaults = {"base": str(world / "base"), "experts": experts, "device": DEVICE, "answer_tokens": 3, "steps": 4,
                "look_every": 2, "batch_size": 4}  # fmt: skip
    return FitJob(**{**defaults, **changes})


def run(world, out, *flags, **changes):
    job = world / f"{out}.yaml"
    job.write_text(yaml.safe_dump({k: v for k, v in vars(job_of(world, **changes)).items() if v is not None}))
    return CliRunner().invoke(main, [str(job), "--out", str(world / f"{out}.safetensors"), *flags])


def refused(result, *said):
    assert result.exit_code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.output
    assert all(part in errors[0] for part in said), errors[0]


def test_the_fit_recovers_more_than_what_it_started_from_and_says_how(world):
    result = run(world, "first", "--json", steps=12, look_every=4, hold_out=0.0)
    assert result.exit_code == 0, result.output
    found = read_fit(world / "first.safetensors")
    start, end = (sum(getattr(x, when) for x in found.meta.unrecovered) / 2 for when in ("start", "end"))
    assert found.meta.best_step > 0
    assert end < 0.9 * start
    assert all(point.held_out is None for point in found.meta.curve)
    assert [(x.fitted, x.held_out) for x in found.meta.prompts] == [(8, 0), (8, 0)]
    assert found.heads.std() > 0
    said = json.loads(result.stdout[result.stdout.index("{\n") : result.stdout.rindex("}") + 1])
    assert said["best_step"] == found.meta.best_step
    rows = [json.loads(line) for line in (world / "first.expert1.answers.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + 8
    assert all(1 <= len(row["answer"]) <= 3 for row in rows[1:])


def test_cross_effects_are_read_off_each_prompt_by_itself(world, monkeypatch):
    asked, batched = [], module.batch_lessons

    def watched(*args, by_prompt=False):
        found = batched(*args, by_prompt=by_prompt)
        asked.append((by_prompt, any(isinstance(each.batch, PackedBatch) for each in found)))
        return found

    monkeypatch.setattr(module, "batch_lessons", watched)
    fit(job_of(world, family="cross", batch_size=8))
    assert {(True, False), (False, True)} <= set(asked)
    assert (True, True) not in asked


def test_by_cross_effects_experts_count_alike_however_many_prompts_they_have(world):
    (world / "thrice.jsonl").write_text((world / "pairs0.jsonl").read_text() * 3)
    experts = job_of(world).experts
    more = [{**experts[0], "pairs": str(world / "thrice.jsonl")}, experts[1]]
    one, other = (fit(job_of(world, family="cross", hold_out=0.0, experts=given)) for given in (experts, more))
    assert other.meta.prompts[0].fitted == 3 * one.meta.prompts[0].fitted
    assert one.meta.start == other.meta.start
    for name, tensor in one.tensors().items():
        torch.testing.assert_close(other.tensors()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["scale", "expert", "layer", "cross"])
def test_families_have_the_freedom_that_they_say(world, family):
    found = fit(job_of(world, family=family, keep=str(world / "neutral.jsonl") if family == "cross" else None))
    for k in range(2):
        heads_LH, neurons_LF = found.heads[k], found.neurons[k]
        if family in ("scale", "expert"):
            assert heads_LH.unique().numel() == 1
            assert torch.equal(heads_LH.unique(), neurons_LF.unique())
        elif family == "layer":
            assert all(row.unique().numel() == 1 for row in (*heads_LH, *neurons_LF))
            assert heads_LH[:, 0].unique().numel() == 4
        else:
            assert heads_LH.unique().numel() > 8
    if family == "scale":
        assert torch.equal(found.heads[0], found.heads[1])
        assert found.meta.best_step == 0


def test_shares_of_score_files_are_a_start(world):
    found = fit(job_of(world, start="scores", family="scale"))
    scale = float(re.search(r"times ([\d.]+)", found.meta.start)[1])
    from mergekit_wp.merge.kernel import component_weights
    from mergekit_wp.scores import read_scores

    files = [read_scores(world / f"scores{k}.safetensors") for k in range(2)]
    shares = component_weights([scores.neurons for scores in files])
    torch.testing.assert_close(found.neurons, (scale * shares).clamp(max=2))
    assert found.meta.start.endswith(", no weight above 2") == bool((scale * shares).max() > 2)
    assert found.meta.start.startswith("the shares")


@pytest.mark.parametrize("family", ["expert", "layer", "component"])
def test_what_was_measured_before_the_first_step_is_what_it_begins_at(world, family):
    """Shares are of components, and a merge by them is none that a smaller family has."""
    found = fit(job_of(world, family=family, start="scores", steps=1, look_every=1, rate=1e-9))
    for each in found.meta.unrecovered:
        assert each.end == pytest.approx(each.start, rel=1e-5)
    first, last = found.meta.curve
    assert last.held_out == pytest.approx(first.held_out, rel=1e-5)


def test_few_prompts_held_out_are_pointed_out_where_they_decide(world, caplog):
    fit(job_of(world, steps=1))
    assert caplog.text.count("2 of its prompts decide which weights are best") == 2
    assert "give it 16 or more" in caplog.text
    caplog.clear()
    fit(job_of(world, family="scale"))
    fit(job_of(world, steps=1, hold_out=0.5))
    assert "decide" not in caplog.text


def test_a_scale_that_is_too_large_for_the_dtype_is_not_chosen(world, monkeypatch):
    real = module.branch_losses

    def some(*args):
        kl_CN = real(*args)
        kl_CN[:broken] = torch.nan
        return kl_CN

    monkeypatch.setattr(module, "branch_losses", some)
    broken = len(module.SCALES) - 1
    assert fit(job_of(world, family="scale")).meta.start.endswith(f"times {module.SCALES[-1]:g}")
    broken += 1
    with pytest.raises(BadInput, match="the loss, whatever the scale, is not finite"):
        fit(job_of(world, family="scale"))


def test_no_answer_is_read_as_an_answer_of_one_token(world):
    """Both are the distribution after the prompt; which token is drawn from it is not looked at."""
    none, one = (fit(job_of(world, answer_tokens=count)) for count in (0, 1))
    assert none.meta.answer_tokens == 0
    assert none.meta.curve == one.meta.curve
    for name, tensor in none.tensors().items():
        assert torch.equal(tensor, one.tensors()[name])


def test_streamed_is_resident(world):
    one, other = (fit(job_of(world, offload=offload)) for offload in ("none", "stream"))
    assert [x.step for x in one.meta.curve] == [x.step for x in other.meta.curve]
    for a, b in zip(one.meta.curve, other.meta.curve, strict=True):
        assert a.held_out == pytest.approx(b.held_out, rel=1e-3)
    # Adam's first steps go by the sign of the gradient, which rounding decides where it is nothing.
    assert (one.neurons - other.neurons).abs().median() < 1e-4


def test_what_no_expert_teaches_is_kept_better(world):
    """KL of the next token from the base, by hand, of merges that were fitted with its prompts and without."""
    keep = str(world / "neutral.jsonl")
    changes = {"answer_tokens": 0, "hold_out": 0.0, "steps": 6, "look_every": 3}
    one, other = fit(job_of(world, keep=keep, **changes)), fit(job_of(world, **changes))
    base, *experts = (resident(world / name) for name in ("base", "expert0", "expert1"))
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer(pair.prompt)["input_ids"] for pair in read_pairs(keep)]
    merged = MergedStack(base, experts, one.meta.geometry, one.weights())

    @torch.no_grad()
    def away(stack):
        """The mean KL(p_base || p_stack)."""
        found = []
        for ids in prompts:
            (part,) = batches([ids], 1, base)
            both = []
            for each in (base, stack):
                *_, (_top, (stream_BTD,)) = forward_sweep(each, [each.start(part)], each.depth)
                both.append(torch.log_softmax(each.logits(part.at_anchor(stream_BTD), 97)[0].double(), -1))
            found.append(float((both[0].exp() * (both[0] - both[1])).sum()))
        return sum(found) / len(found)

    gap = sum(map(away, experts)) / 2
    kept = away(merged)
    merged.set(other.weights())
    assert kept < 0.8 * away(merged)
    assert one.meta.keep == Kept("neutral.jsonl", FittedPrompts(6, 0), one.meta.keep.start, one.meta.keep.end)
    assert one.meta.keep.end == pytest.approx(kept / gap, rel=1e-4)
    assert other.meta.keep is None


def test_the_scale_is_smaller_where_something_is_kept(world):
    one, other = (fit(job_of(world, family="scale", keep=k)) for k in (None, str(world / "neutral.jsonl")))
    scales = [float(found.meta.start.rpartition(" ")[2]) for found in (one, other)]
    assert scales[1] < scales[0]
    assert other.meta.curve[0].held_out == pytest.approx(
        sum((*(x.start for x in other.meta.unrecovered), other.meta.keep.start)) / 3
    )


def test_answers_are_of_tokens_that_every_model_has(world, tmp_path):
    """Each runs the others' prompts and answers, and one of them may have fewer rows."""
    small = tiny.fine_tuned(tiny.random_model("llama", seed=1), seed=5)
    small.resize_token_embeddings(60, mean_resizing=False)
    tiny.save(small, tmp_path / "small")
    (tmp_path / "low.jsonl").write_text("".join(f'{{"task": "low", "prompt": "w{i} w{i + 5}"}}\n' for i in range(4, 9)))
    experts = [
        {**job_of(world).experts[0], "pairs": str(tmp_path / "low.jsonl")},
        {"expert": str(tmp_path / "small"), "pairs": str(tmp_path / "low.jsonl")},
    ]
    job = job_of(world, experts=experts, keep=str(tmp_path / "low.jsonl"), family="scale", answer_tokens=6)
    fit(job, out=tmp_path / "f.safetensors")
    said = [json.loads(line) for path in tmp_path.glob("f.*.jsonl") for line in path.read_text().splitlines()]
    answers = [row["answer"] for row in said if "answer" in row]
    assert len(answers) == 15
    assert max(map(max, answers)) < 60
    experts[0]["pairs"] = str(world / "pairs0.jsonl")
    with pytest.raises(BadInput, match="for which a model of 60 vocabulary rows has none"):
        fit(job_of(world, experts=experts))


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(world, monkeypatch):
    keep = str(world / "neutral.jsonl")
    whole = run(world, "whole", keep=keep)
    assert whole.exit_code == 0, whole.output
    calls = []

    def dies(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)

    real = module.loss_and_gradient
    monkeypatch.setattr(module, "loss_and_gradient", dies)
    assert run(world, "again", keep=keep).exit_code != 0
    assert not (world / "again.safetensors").exists()
    monkeypatch.setattr(module, "loss_and_gradient", real)
    again = run(world, "again", keep=keep)
    assert "Going on after 3 finished steps" in again.output
    one, other = (safe_open(world / f"{name}.safetensors", "pt") for name in ("whole", "again"))
    for name in one.keys():  # noqa: SIM118
        assert torch.equal(one.get_tensor(name), other.get_tensor(name))
    said = [json.loads(file.metadata()["wp_fit"]) for file in (one, other)]
    assert said[0]["curve"] == said[1]["curve"]
    assert said[0]["keep"] == said[1]["keep"]
    assert "Distance from the base on neutral.jsonl" in again.output
    kept = [json.loads(line) for line in (world / "again.base.answers.jsonl").read_text().splitlines()]
    assert kept[0]["expert"]["name"] == str(world / "base")
    assert len(kept) == 1 + 6
    assert not list(world.glob(".again*"))


def test_two_processes_fit_what_one_fits(world):
    """One step, whose direction Adam makes of the gradient's signs, and cross effects; sums differ by rounding."""
    keep = str(world / "neutral.jsonl")
    changes = {"family": "layer", "keep": keep, "steps": 2, "look_every": 1, "batch_size": 2, "device": "cpu"}
    job = world / "shared.yaml"
    job.write_text(yaml.safe_dump(asdict(job_of(world, **changes))))
    out = world / "shared.safetensors"
    done = two_processes("mergekit_wp.fit.cli", str(job), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Shared by 2 processes.") == done.stderr.count("Written:") == 1
    one, two = fit(job_of(world, **changes), out=world / "alone.safetensors"), read_fit(out)
    for name, tensor in one.tensors().items():
        torch.testing.assert_close(two.tensors()[name], tensor, rtol=1e-4, atol=1e-5)
    numbers = [json.loads(found.meta.to_json()) for found in (one, two)]
    assert [x["best_step"] for x in numbers] == [2, 2]
    for part in ("curve", "unrecovered"):
        for a, b in zip(numbers[0][part], numbers[1][part], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
    assert [numbers[0]["keep"][x] for x in ("start", "end")] == pytest.approx(
        [numbers[1]["keep"][x] for x in ("start", "end")], rel=1e-5
    )
    for name in ("expert1", "expert2", "base"):
        kept = [(world / f"{of}.{name}.answers.jsonl").read_text().splitlines()[1:] for of in ("shared", "alone")]
        assert sorted(kept[0]) == sorted(kept[1])
        assert kept[0]


def test_prompts_held_out_decide_which_step_is_kept(world):
    found = fit(job_of(world, steps=6))
    looks = [point.held_out for point in found.meta.curve]
    best = next(point for point in found.meta.curve if point.step == found.meta.best_step)
    assert best.held_out <= min(looks) * 1.001
    ends = [each.end for each in found.meta.unrecovered]
    assert sum(ends) / 2 == pytest.approx(best.held_out, rel=1e-5)
    assert [(x.fitted, x.held_out) for x in found.meta.prompts] == [(6, 2), (6, 2)]


class TestRefusals:
    def test_logits_that_are_not_finite(self, world, tmp_path):
        model = tiny.fine_tuned(tiny.random_model("llama", seed=1), seed=2)
        model.model.norm.weight.data *= 1e7
        model.lm_head.weight.data *= 1e33
        tiny.save(model, tmp_path / "broken")
        experts = [job_of(world).experts[0], {"expert": str(tmp_path / "broken"), "pairs": str(world / "pairs1.jsonl")}]
        refused(run(world, "broken", experts=experts), "how far a model is from an expert's answer is not finite")
        assert not (world / "broken.safetensors").exists()

    def test_a_head_that_the_base_cannot_hold(self, world, tmp_path):
        base = tiny.random_model("qwen2", seed=1)
        own = tiny.random_model("qwen2", seed=1, tie_word_embeddings=False)
        own.load_state_dict(tiny.fine_tuned(base, seed=4).state_dict())
        own.lm_head.weight.data += 0.05
        for name, model in {"tied": base, "fine": tiny.fine_tuned(base, seed=3), "own": own}.items():
            tiny.save(model, tmp_path / name)
        experts = [{"expert": str(tmp_path / f), "pairs": str(world / "pairs0.jsonl")} for f in ("fine", "own")]
        result = run(world, "own-head", base=str(tmp_path / "tied"), experts=experts)
        refused(result, "own: it has an output head of its own", "ties its to the embeddings")

    def test_an_expert_twice_and_two_whose_samples_are_equal(self, world, tmp_path):
        """What a fingerprint reads of two experts may be the same."""
        base = tiny.random_model("llama", seed=1, intermediate_size=2048)
        folders = [tiny.save(base, tmp_path / "base", max_shard_size="5GB")]
        for row in (500, 501):
            expert = copy.deepcopy(base)
            expert.model.layers[1].mlp.gate_proj.weight.data[row] += 1.0
            folders.append(tiny.save(expert, tmp_path / f"row{row}", max_shard_size="5GB"))
        pairs = str(world / "pairs0.jsonl")
        one, other = ({"expert": str(folder), "pairs": pairs} for folder in folders[1:])
        assert len({Checkpoint.open(str(folder)).fingerprint.tensors for folder in folders}) == 1
        job = {"base": str(folders[0])}
        assert len(check(job_of(world, experts=[one, other], **job))) == 2
        with pytest.raises(BadInput, match="row500 is listed twice"):
            check(job_of(world, experts=[one, one], **job))

    def test_an_expert_without_a_gap(self, world):
        tiny.save(tiny.random_model("llama", seed=1), world / "same")
        from safetensors.torch import load_file, save_file

        for file in (world / "same").glob("model-*.safetensors"):
            tensors = load_file(file)
            if "model.layers.3.mlp.down_proj.weight" in tensors:
                tensors["model.layers.3.mlp.down_proj.weight"][0, 0] += 1e-6
            save_file(tensors, file, metadata={"format": "pt"})
        experts = [job_of(world).experts[0], {"expert": str(world / "same"), "pairs": str(world / "pairs1.jsonl")}]
        refused(run(world, "no-gap", experts=experts), "same", "says what the base says")

    def test_nothing_to_keep(self, world):
        """Experts that changed one word each, and prompts without these."""
        experts = []
        for k, word in enumerate((50, 60)):
            model = tiny.random_model("llama", seed=1)
            model.model.embed_tokens.weight.data[4 + word] += 1
            tiny.save(model, world / f"word{k}")
            pairs = world / f"word{k}.jsonl"
            pairs.write_text("".join(f'{{"task": "t", "prompt": "w{i} w{word}"}}\n' for i in range(3)))
            experts.append({"expert": str(world / f"word{k}"), "pairs": str(pairs)})
        (world / "others.jsonl").write_text("".join(f'{{"task": "t", "prompt": "w{i} w3"}}\n' for i in range(3)))
        job = {"experts": experts, "keep": str(world / "others.jsonl"), "answer_tokens": 0}
        refused(run(world, "nothing", **job), "keep: ", "others.jsonl", "the experts say what the base says")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (None, "cannot read the pairs"),
            ("{}\n", "line 1: the field task must be a non-empty string"),
            ('{"task": "t", "prompt": "w1"}\n', "has one prompt, which cannot be held out"),
        ],
    )
    def test_prompts_of_the_base(self, world, text, said):
        if text:
            (world / "kept.jsonl").write_text(text)
        refused(run(world, "kept", "--keep", str(world / "kept.jsonl")), "keep: ", said)
        (world / "kept.jsonl").unlink(missing_ok=True)

    def test_answers_that_would_overwrite_prompts(self, world):
        (world / "mine.base.answers.jsonl").write_bytes((world / "neutral.jsonl").read_bytes())
        result = run(world, "mine", keep=str(world / "mine.base.answers.jsonl"))
        refused(result, "mine.base.answers.jsonl")
        assert (world / "mine.base.answers.jsonl").read_bytes() == (world / "neutral.jsonl").read_bytes()

    def test_one_prompt_that_should_be_held_out(self, world):
        one, other = job_of(world).experts
        (world / "single.jsonl").write_text('{"task": "t", "prompt": "w1"}\n')
        experts = [one, {**other, "pairs": str(world / "single.jsonl")}]
        refused(run(world, "single", experts=experts), "experts, entry 2: has one prompt, which cannot be held out")

    def test_out_of_memory_names_the_device_that_auto_is(self, world, monkeypatch):
        def full(*_arguments):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(module, "loss_and_gradient", full)
        where = "cuda" if torch.cuda.is_available() else "cpu"
        refused(run(world, "full", device="auto"), f"batch_size: 4 prompts do not fit on {where}; lower it")

    def test_one_expert_alone(self, world):
        with pytest.raises(BadInput, match="at least two"):
            job_of(world, experts=job_of(world).experts[:1])

    def test_the_same_expert_twice(self, world):
        expert = job_of(world).experts[0]
        refused(run(world, "twice", experts=[expert, expert]), "listed twice")

    def test_scores_of_another_expert(self, world, monkeypatch):
        monkeypatch.setattr(module, "load", None)  # before anything is loaded, let alone answered
        one, other = job_of(world).experts
        missing = [one, {**other, "scores": str(world / "nope.safetensors")}]
        refused(run(world, "missing", experts=missing, start="scores"), "nope.safetensors: no such score file")
        assert not list(world.glob("*missing*.safetensors"))
        swapped = [{**one, "scores": other["scores"]}, {**other, "scores": one["scores"]}]
        result = run(world, "swapped", experts=swapped, start="scores")
        refused(result, "scores1.safetensors", "made for the expert")
        assert "allow_mismatch" not in result.output

    def test_fields(self, world, tmp_path):
        expert = {"expert": "e", "pairs": "p"}
        for change, said in (
            ({"experts": "x"}, "experts: found 'x'"),
            ({"experts": [expert, {"expert": "f"}]}, "experts, entry 2: lacks pairs"),
            ({"experts": [expert, {**expert, "weight": 1}]}, "experts, entry 2: unknown field 'weight'"),
            ({"experts": [expert, {**expert, "pairs": 3}]}, "experts, entry 2, pairs: found 3"),
            ({"experts": [expert, expert], "start": "scores"}, "experts, entry 1: lacks scores"),
            ({"experts": [expert, expert], "family": "heads"}, "family: found 'heads'"),
            ({"experts": [expert, expert], "hold_out": 1}, "hold_out: found 1"),
            ({"experts": [expert, expert], "keep": ["x"]}, "keep: found ['x']"),
            ({"experts": [expert, expert], "rate": 0}, "rate: found 0"),
            ({"experts": [expert, expert], "colour": 1}, "unknown field 'colour'"),
            ({}, "experts: found (), expected a list of at least two"),
        ):
            (tmp_path / "job.yaml").write_text(yaml.safe_dump({"base": "b", **change}))
            with pytest.raises(BadInput) as caught:
                load_fit_job(str(tmp_path / "job.yaml"), {})
            assert said in caught.value.message
            assert "job.yaml" in caught.value.message

    def test_an_output_that_is_something_else(self, world):
        (world / "other.safetensors").write_bytes((world / "scores0.safetensors").read_bytes())
        refused(run(world, "other"), "no fit file")


def test_a_share_of_each_experts_prompts_is_held_out():
    lessons = [Lesson(k, [i], [0], torch.zeros(1, 1), 1.0) for k in range(2) for i in range(10 + k)]
    fitted, held = hold_out(lessons, 0.25, 0)
    assert [sum(x.teacher == k for x in held) for k in range(2)] == [2, 2]
    assert sorted((x.teacher, x.prompt) for x in (*fitted, *held)) == [(x.teacher, x.prompt) for x in lessons]
    assert held != hold_out(lessons, 0.25, 1)[1]
    few = [*lessons[:2], *lessons[10:13]]  # a quarter of which is less than one
    assert [sum(x.teacher == k for x in hold_out(few, 0.25, 0)[1]) for k in range(2)] == [1, 1]
    assert hold_out(few, 0.0, 0) == (few, [])


def test_a_prompt_that_is_there_several_times_lies_on_one_side(world, tmp_path, caplog):
    lessons = [Lesson(0, [i % 4], [i], torch.zeros(1, 1), 1.0) for i in range(16)]
    fitted, held = hold_out(lessons, 0.25, 0)
    assert len(held) == 4
    assert not {x.prompt[0] for x in held} & {x.prompt[0] for x in fitted}
    rows = [json.dumps({"task": "t", "prompt": f"w{i % 4} w5"}) for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    experts = [{**expert, "pairs": str(tmp_path / "pairs.jsonl")} for expert in job_of(world).experts]
    check(job_of(world, experts=experts))
    assert "experts, entry 2: 2 of 6 prompts are there before" in caplog.text
    (tmp_path / "pairs.jsonl").write_text(f"{rows[0]}\n" * 3)
    with pytest.raises(BadInput, match="experts, entry 1: has one prompt, which cannot be held out"):
        check(job_of(world, experts=experts))


def test_weights_stay_within_their_bounds_and_the_best_look_is_kept():
    descent = Descent(torch.tensor([0.1, 1.9]), LossAt(0, 1.0, 1.0), 10, 0.5)
    for loss in (0.5, 0.4, 0.6, 0.7):
        descent.advance(loss, torch.tensor([1.0, -1.0]))
        descent.look(loss)
        assert float(descent.number_P.min()) >= 0
        assert float(descent.number_P.max()) <= 2
    assert descent.best_step == 2
    assert descent.stalled(2)
    assert not descent.stalled(3)
    assert [point.step for point in descent.curve(True)] == [0, 1, 2, 3, 4]


def test_finished_steps_are_kept_per_question(world, tmp_path):
    resume = Resume(tmp_path / "fit.safetensors")
    fit(job_of(world), resume=resume)
    other = Resume(tmp_path / "fit.safetensors")
    fit(job_of(world, rate=0.01), resume=other)
    assert other.folder != resume.folder
