"""Steering, generation and the recovery curve, against transformers, lm-eval's steered model and slow references."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from score_jobs import job_for
from torch.nn import functional

from mergekit_wp.documents import read_record
from mergekit_wp.errors import BadInput
from mergekit_wp.recovery import RecoveryCurve, TaskRecovery
from mergekit_wp.scoring.anchor import search as recovery
from mergekit_wp.scoring.anchor.cli import Anchor, write_pt
from mergekit_wp.scoring.anchor.directions import Directions, extract_all
from mergekit_wp.scoring.anchor.graders import cut
from mergekit_wp.scoring.anchor.search import Search, candidate_layers, choose, find_anchor, kl_levels, locate
from mergekit_wp.scoring.anchor.steering import SteeredRows, Steering, steered
from mergekit_wp.scoring.batching import TaskTokens
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.greedy import Greedy, generate_answers
from mergekit_wp.scoring.models.layerwise import ResidentStack
from mergekit_wp.scoring.models.load import check_pair, load_pair

LAYER, LENGTH = 1, 9
PROMPTS = [[5, 17, 40], [9, 4, 33, 21, 8, 60], [7, 7, 90, 12]]


def stack(model):
    return ResidentStack(model.requires_grad_(False), torch.device("cpu"), torch.float32)


def some_direction(seed=0):
    return torch.randn(tiny.SHAPE["hidden_size"], generator=torch.Generator().manual_seed(seed))


def greedy(*models, **options):
    rules = Greedy.of(models, tiny.tokenizer(models[0].config.model_type), LENGTH, batch_size=2)
    return dataclasses.replace(rules, **options)


def said(rules, model, prompts=PROMPTS, ways=(None,), of_N=None, until=()):
    """Texts of the answers, each prompt steered in its way."""
    rows = SteeredRows(ways, of_N or [0] * len(prompts))
    answers = generate_answers(
        stack(model), rules, prompts, ended=lambda _number, answer: rules.holds(answer, until), change=rows
    )
    return [cut(rules.text(*both), until) for both in zip(prompts, answers, strict=True)]


def alone(model, prompt, clamp, steer, layer=LAYER):
    """Greedy ids of one prompt, without padding or a cache: `steer(position)` says where the stream is clamped."""
    ids = list(prompt)

    def hook(_module, _args, output):
        z = output[0] if isinstance(output, tuple) else output
        changed = z.clone()
        for position in filter(steer, range(z.shape[1])):
            changed[0, position] = clamp(z[0, position])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.model.layers[layer].register_forward_hook(hook)
    for _ in range(LENGTH):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tiny.SHAPE["eos_token_id"]:
            break
    handle.remove()
    return ids[len(prompt) :]


@pytest.mark.parametrize("positions", ["prompt", "all", "anchor", "answer"])
@pytest.mark.parametrize("kind", tiny.VARIANTS)
@torch.no_grad()
def test_rows_steered_at_several_layers_answer_as_each_prompt_does_alone(kind, positions):
    """Every prompt as it is, and steered at three layers, the last among them: all in ragged batches of seven rows."""
    model, alpha = tiny.random_model(kind), 30.0
    layers = [None, 0, LAYER, 3]
    directions = {layer: some_direction(layer) for layer in layers[1:]}
    rules, wanted = greedy(model, batch_size=7, tokenizer=tiny.tokenizer(), vocabulary=97), []
    for layer in layers:
        unit_D = directions.get(layer, torch.zeros(tiny.SHAPE["hidden_size"]))
        unit_D = unit_D / unit_D.norm()
        for prompt in PROMPTS:
            last = len(prompt) - 1
            steer = {
                "prompt": lambda t, last=last: t <= last,
                "all": lambda t: True,
                "anchor": lambda t, last=last: t == last,
                "answer": lambda t, last=last: t >= last,
            }[positions] if layer is not None else lambda t: False  # fmt: skip
            clamp = lambda z_D, unit_D=unit_D: z_D + (alpha - z_D @ unit_D) * unit_D  # noqa: E731
            wanted.append(rules.text(prompt, alone(model, prompt, clamp, steer, layer or 0)))
    ways = [None if layer is None else Steering(layer, directions[layer], alpha, positions) for layer in layers]
    of_N = [way for way in range(len(ways)) for _prompt in PROMPTS]
    shuffled = torch.randperm(len(of_N), generator=torch.Generator().manual_seed(1)).tolist()
    every = PROMPTS * len(ways)
    found = said(rules, model, [every[i] for i in shuffled], ways, [of_N[i] for i in shuffled])
    assert found == [wanted[i] for i in shuffled]
    assert len(set(wanted)) > len(PROMPTS)


@pytest.mark.parametrize("kind", tiny.VARIANTS)
def test_the_pt_file_makes_lm_eval_steer_as_we_do_at_all_positions(tmp_path, kind):
    """lm-eval's own SteeredModel, loaded from disk with our file: same answers, same logits."""
    from lm_eval.models.hf_steered import SteeredModel

    model, v_D, alpha = tiny.random_model(kind, seed=1), some_direction(1), 25.0
    folder = tiny.save(model, tmp_path / "model")
    write_pt(Anchor("task", LAYER, alpha, v_D, "base", "expert"), tmp_path / "anchor.pt")
    theirs = SteeredModel(str(folder), str(tmp_path / "anchor.pt"), device="cpu", dtype="float32", batch_size=1)
    # The tiny Qwen2's own tokenizer has no name for most ids.
    rules = greedy(model, tokenizer=tiny.tokenizer(), vocabulary=tiny.SHAPE["vocab_size"])
    steering = Steering(LAYER, v_D, alpha, "all")
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad(), steered(model, steering):
        ours = model(ids, use_cache=False).logits
    torch.testing.assert_close(theirs._model_call(ids), ours, rtol=1e-4, atol=1e-5)
    generated = theirs._model_generate(
        ids, max_length=len(PROMPTS[0]) + LENGTH, stop=[], do_sample=False, attention_mask=torch.ones_like(ids)
    )[0, len(PROMPTS[0]) :]
    (ours,) = said(rules, model, PROMPTS[:1], [steering])
    assert ours == rules.text(PROMPTS[0], generated.tolist())
    assert said(rules, model, PROMPTS[:1]) != [ours]
    assert not model.model.layers[LAYER]._forward_hooks


@torch.no_grad()
def test_steering_sets_the_projection_and_nothing_else():
    z_BTD, v_D = torch.randn(2, 3, 24), some_direction()
    unit_D = v_D / v_D.norm()
    out_BTD = Steering(0, v_D, 4.0, "all").at(z_BTD, torch.tensor([2, 1]))
    torch.testing.assert_close(out_BTD @ unit_D, torch.full((2, 3), 4.0))
    rest = torch.eye(24) - torch.outer(unit_D, unit_D)
    torch.testing.assert_close(out_BTD @ rest, z_BTD @ rest)
    anchor_BTD = Steering(0, v_D, 4.0, "anchor").at(z_BTD, torch.tensor([2, 1]))
    torch.testing.assert_close(anchor_BTD[0, 2], out_BTD[0, 2])
    torch.testing.assert_close(anchor_BTD[1, 1], out_BTD[1, 1])
    assert torch.equal(anchor_BTD[1, 2], z_BTD[1, 2])


def test_answers_end_at_any_end_of_text_and_at_stop_texts():
    model = tiny.random_model("llama", seed=3)
    rules = greedy(model, eos=frozenset())
    (whole,) = said(rules, model, PROMPTS[:1])
    words = whole.split()
    assert len(words) > 3
    third = tiny.tokenizer().get_vocab()[words[2]]
    first = next(i for i, word in enumerate(words) if word == words[2])
    ended = said(dataclasses.replace(rules, eos=frozenset({95, third})), model, PROMPTS[:1])
    stopped = said(rules, model, PROMPTS[:1], until=[words[2]])
    assert [text.split() for text in (*ended, *stopped)] == [words[:first]] * 2
    over_two = " ".join(words[1:3])
    answers = generate_answers(
        stack(model), rules, PROMPTS[:1], ended=lambda _number, answer: rules.holds(answer, [over_two])
    )
    assert [over_two in rules.text(PROMPTS[0], ids) for ids in (answers[0][:-1], answers[0])] == [False, True]


def test_rules_come_from_both_models_and_the_tokenizer():
    base, expert = tiny.random_model("llama"), tiny.add_rows(tiny.random_model("llama"), 3)
    expert.generation_config.eos_token_id = [2, 33]
    rules = greedy(base, expert)
    assert rules.eos == {2, 33}
    assert rules.vocabulary == tiny.SHAPE["vocab_size"]
    assert rules.context == 128


def test_ids_unknown_to_the_tokenizer_are_never_chosen():
    model = tiny.add_rows(tiny.random_model("llama"), 5)
    model.lm_head.weight.data[-5:] = 50 * model.lm_head.weight.data[40]  # the new rows would always win or always lose
    model.lm_head.weight.data[-4:] *= -1
    rules = greedy(model)
    assert all(text.split() for text in said(rules, model))
    assert rules.vocabulary == 97


def test_greedy_whatever_the_generation_config_says():
    model = tiny.random_model("llama", seed=3)
    wanted = said(greedy(model), model)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, max_new_tokens=2)
    assert said(greedy(model), model) == wanted
    assert model.generation_config.repetition_penalty == 9.0


def test_a_prompt_that_fills_the_context_is_refused():
    model = tiny.random_model("llama")
    with pytest.raises(BadInput, match="leaves no room to answer"):
        said(greedy(model), model, [[5] * 129])
    assert len(said(greedy(model, eos=frozenset()), model, [[5] * 126])[0].split()) <= 3


def random_tasks(base, checks=True, names=("first", "second")):
    generator = torch.Generator().manual_seed(4)

    def prompts(count):
        return [torch.randint(4, 97, (3 + row % 3,), generator=generator).tolist() for row in range(count)]

    passing = {"number": "1"}
    return [TaskTokens(name, prompts(4), prompts(4), prompts(4), [passing] * 4 if checks else []) for name in names]


@pytest.mark.parametrize("positions", ["prompt", "anchor"])
@pytest.mark.parametrize("kind", tiny.VARIANTS)
@torch.no_grad()
def test_next_token_levels_against_one_hooked_run_a_layer(kind, positions):
    base = tiny.random_model(kind, seed=1)
    expert = tiny.add_rows(tiny.fine_tuned(base, seed=2), 0 if kind == "qwen2" else 2)
    tasks, layers = random_tasks(base), (0, 2, 3)
    found = extract_all(stack(base), stack(expert), tasks, 4, 2)
    got = kl_levels(stack(base), stack(expert), [t.scoring for t in tasks], found, layers, positions, batch_size=3)
    for task, along, (base_level, levels) in zip(tasks, found, got, strict=True):
        for layer, level in [(None, base_level), *zip(layers, levels, strict=True)]:
            wanted = torch.stack([slow_level(base, expert, ids, along, layer, positions) for ids in task.scoring])
            assert level == pytest.approx(float(wanted.mean()), rel=1e-4)


def slow_level(base, expert, prompt, along, layer, positions):
    """-KL(expert || base steered after `layer`) of one prompt, from whole forward passes of transformers."""
    ids = torch.tensor([prompt])
    target = functional.log_softmax(expert(ids, use_cache=False).logits[0, -1, : base.config.vocab_size], -1)

    def hook(_module, _args, output):
        z = (output[0] if isinstance(output, tuple) else output).clone()
        unit = along.v_LD[layer] / along.v_LD[layer].norm()
        alpha = along.mean_LD[layer] @ unit
        for t in range(z.shape[1]) if positions == "prompt" else [z.shape[1] - 1]:
            z[0, t] += (alpha - z[0, t] @ unit) * unit
        return (z, *output[1:]) if isinstance(output, tuple) else z

    handle = None if layer is None else base.model.layers[layer].register_forward_hook(hook)
    log_p = functional.log_softmax(base(ids, use_cache=False).logits[0, -1], -1)
    if handle:
        handle.remove()
    return -(target.exp() * (target - log_p)).sum()


def test_streamed_weights_give_the_same_curve_and_every_layer_is_read_once(tmp_path, monkeypatch):
    job = job_for(tmp_path, "qwen3", extra_rows=1)
    checked, tasks = check_pair(job), random_tasks(None, checks=False)
    curves = []
    for offload in ("none", "stream"):
        models = load_pair(dataclasses.replace(job, offload=offload), checked)
        read = {"base": [], "expert": []}
        for name, seen in read.items():
            layers = getattr(models, name).layers

            def watched(order, layers=layers, seen=seen):
                seen.extend(order)
                return layers(order)

            monkeypatch.setattr(getattr(models, name), "layers", watched)
        directions = extract_all(models.base, models.expert, tasks, 4, 4)
        for seen in read.values():
            seen.clear()
        curves.append(find_anchor(models.base, models.expert, tiny.tokenizer(), tasks, directions, Search()))
        if offload == "stream":  # nothing is read of what is in memory
            assert read == {"base": [0, 1, 2, 3], "expert": [0, 1, 2, 3]}
    for task, streamed_task in zip(*(curve.tasks.values() for curve in curves), strict=True):
        assert task.recovery == pytest.approx(streamed_task.recovery, rel=1e-4, abs=1e-6)


@pytest.fixture
def pair():
    base = tiny.random_model("llama", seed=1)
    return stack(base), stack(tiny.fine_tuned(base, seed=2, size=0.3))


def answering(monkeypatch, tell):
    """Replace generation: `tell(model, layer, number)` is what a model, steered at a layer or not, says to the prompt
    of that number among those it is asked; returns how often each was."""
    runs = Counter()

    def answers(asked, rules, prompts, tick, ended, change, rows):
        tick(rules.max_tokens * len(prompts))
        layers = [way and way.layer for way in change.ways]
        runs.update((asked.model, layers[way]) for way in change.of_N)
        counted = [change.of_N[:n].count(way) for n, way in enumerate(change.of_N)]
        return [tell(asked.model, layers[way], number) for way, number in zip(change.of_N, counted, strict=True)]

    monkeypatch.setattr(recovery, "generate_answers", answers)
    monkeypatch.setattr(recovery.Greedy, "text", lambda _rules, _prompt, answer: answer)
    return runs


def graded_by(monkeypatch, shares):
    """Replace generation: the run of each model, and of each steered layer, passes this share of 4 checks."""

    def tell(model, layer, number):
        share = shares[layer if layer is not None else ("base" if model is shares["model"] else "expert")]
        return "The answer is: 1" if number < 4 * share else "no"

    return answering(monkeypatch, tell)


def test_the_layer_that_recovers_most_is_chosen(monkeypatch, pair):
    base, expert = pair
    tasks = random_tasks(base)
    graded_by(monkeypatch, {"model": base.model, "base": 0.25, "expert": 0.75, 0: 0.25, 1: 0.75, 2: 0.5})
    done = []

    def start(total, _what, _unit):
        done.append([total])
        return done[-1].append

    layer, directions, curve = locate(base, expert, tiny.tokenizer(), tasks, None, Search(), start=start)
    assert layer == curve.chosen == 1
    assert curve.layers == (0, 1, 2)
    assert curve.mean == (0.0, 1.0, 0.5)
    for task in curve.tasks.values():
        assert (task.grading, task.prompts, task.base, task.expert) == ("behaviour", 4, 0.25, 0.75)
        assert task.steered == (0.25, 0.75, 0.5)
    assert len(directions[0].v_LD) == 4  # the usual layer, 3, is there as well
    assert all(sum(told) == pytest.approx(total) for total, *told in done)
    assert read_record(RecoveryCurve, dataclasses.asdict(curve)) == curve


@dataclasses.dataclass
class Says:
    """A check that an answer is this text, and that ends it at a text."""

    text: str
    until: tuple[str, ...] = ()

    def passes(self, answer):
        return cut(answer, self.until) == self.text


@pytest.mark.parametrize("size", [1, 2, 3])
@torch.no_grad()
def test_every_answer_is_graded_by_the_check_of_its_own_prompt(pair, size):
    """Right is what the base says steered at layer 1, cut at a text of its own: by hooks, a prompt at a time. Several
    processes share answers."""
    base, expert = pair
    ways = [None, *(Steering(layer, some_direction(), 30.0) for layer in (1, 2))]
    rules, rows = greedy(base.model, expert.model), []
    for number, prompt in enumerate(PROMPTS * 2):
        length = len(prompt)
        answer = alone(base.model, prompt, ways[1].clamp, lambda at, length=length: at < length)
        text = rules.text(prompt, answer)
        until = tuple(text.split()[3:4]) if number % 2 else ()
        rows.append((prompt, Says(cut(text, until) if number else "something else", until)))
    told, parts = [], []
    for rank in range(size):
        run = recovery._Behaviour(base, expert, tiny.tokenizer(), Search(max_tokens=LENGTH), ProcessGroup(rank, size))
        with pytest.MonkeyPatch.context() as alone_here:
            alone_here.setattr(ProcessGroup, "add_up", lambda _self, tensor: tensor)
            parts.append(run.levels(base, [(rows, way) for way in ways], told.append))
    plain, right, other = torch.tensor(parts).sum(0).tolist()
    assert right == pytest.approx(5 / 6)
    assert plain < right
    assert other < right
    assert sum(told) == pytest.approx(size * len(rows) * len(ways))


@pytest.mark.parametrize("case", ["no gap", "no check", "streamed", "code"])
def test_without_behaviour_the_next_token_decides_and_the_curve_says_why(monkeypatch, pair, case):
    base, expert = pair
    tasks = random_tasks(base, checks=case != "no check", names=("only",))
    shares = {"model": base.model, "base": 0.5, "expert": 0.5}
    if case == "no gap":
        graded_by(monkeypatch, shares)
    else:
        monkeypatch.setattr(recovery, "generate_answers", lambda *_a, **_k: pytest.fail("nothing is to be generated"))
    if case == "streamed":
        monkeypatch.setattr(base, "streamed", True, raising=False)
    if case == "code":
        code = {"python": "f", "kwargs": {"cases": [[0, 0]]}}
        tasks = [dataclasses.replace(tasks[0], checks=[code] * 4)]
    directions = extract_all(base, expert, tasks, 4, 4)
    curve = find_anchor(base, expert, tiny.tokenizer(), tasks, directions, Search(layers=(1, 3)))
    task = curve.tasks["only"]
    ((level, levels),) = kl_levels(base, expert, [tasks[0].scoring], directions, (1, 3), "prompt", 4)
    assert task.grading == "kl"
    assert task.recovery == pytest.approx([(each - level) / -level for each in levels])
    told = {"no gap": "no gap to recover", "no check": "no check", "streamed": "stream", "code": "--allow-code"}
    assert told[case] in task.note
    assert task.note in curve.summary()


@pytest.mark.parametrize("streams", [False, True])
def test_prompts_go_through_the_layers_together_only_where_these_are_read_for_it(monkeypatch, pair, streams):
    base, expert = pair
    tasks = random_tasks(base)
    directions = extract_all(base, expert, tasks, 4, 4)
    arguments = ([t.scoring for t in tasks], directions, (1, 3), "prompt", 1)
    want, together = kl_levels(base, expert, *arguments), []
    monkeypatch.setattr(base, "streamed", streams, raising=False)
    branches = recovery._branches
    monkeypatch.setattr(recovery, "_branches", lambda *args: together.append(len(args[1])) or branches(*args))
    assert kl_levels(base, expert, *arguments) == want
    prompts = sum(len(t.scoring) for t in tasks)
    assert together == ([prompts] if streams else [1] * prompts)


def test_code_runs_only_with_consent(monkeypatch, pair):
    base, expert = pair
    code = {"python": "f", "kwargs": {"cases": [[2, 4]]}}
    tasks = [dataclasses.replace(task, checks=[code] * 4) for task in random_tasks(base, names=("code",))]

    def tell(model, layer, _number):
        return f"def f(x):\n    return x * {1 if model is base.model and layer is None else 2}"

    answering(monkeypatch, tell)
    directions = extract_all(base, expert, tasks, 4, 4)
    search = Search(layers=(2,), allow_code_execution=True, prompts=2)
    task = find_anchor(base, expert, tiny.tokenizer(), tasks, directions, search).tasks["code"]
    assert (task.grading, task.base, task.expert, task.recovery) == ("behaviour", 0.0, 1.0, (1.0,))


def test_a_task_on_which_the_models_agree_is_left_out(pair):
    base, _expert = pair
    tasks = random_tasks(base, checks=False)
    directions = [Directions(torch.ones(4, 24), torch.ones(4, 24))] * 2
    with pytest.raises(BadInput, match="cannot be told apart on any task"):
        find_anchor(base, base, tiny.tokenizer(), tasks, directions, Search())


def test_a_base_that_answers_better_than_the_expert_is_doubted(monkeypatch, pair, caplog):
    base, expert = pair
    tasks = random_tasks(base, names=("only",))
    graded_by(monkeypatch, {"model": base.model, "base": 0.75, "expert": 0.25})
    find_anchor(base, expert, tiny.tokenizer(), tasks, extract_all(base, expert, tasks, 4, 4), Search(layers=(1,)))
    assert "task only: the base passes 75 % of 4 checks, the expert 25 %; are base and expert swapped?" in caplog.text


@pytest.mark.parametrize(
    "of", [lambda word: Steering(1, torch.ones(2), 0.0, word), lambda word: Search(positions=word)]
)
def test_positions_that_nobody_knows_are_refused(of):
    assert of("anchor").positions == "anchor"
    with pytest.raises(BadInput, match="positions: found 'promt', expected one of prompt, all, anchor, answer"):
        of("promt")


def recovered(*values):
    return TaskRecovery("behaviour", 4, 0.0, 1.0, values, values)


def test_of_equal_layers_the_one_nearest_two_thirds_and_no_task_outweighs_the_others():
    tied = choose((0, 1, 3, 5), {"a": recovered(0.2, 1.0, 1.0, 1.0)}, 6, Search())
    assert tied.chosen == 3
    mixed = choose((0, 1), {"a": recovered(-50.0, 0.0), "b": recovered(1.0, 0.5)}, 6, Search())
    assert (mixed.mean, mixed.chosen) == ((0.0, 0.25), 1)
    skipped = choose((0, 1), {"a": TaskRecovery("none", 4, 0.0, 0.0), "b": recovered(1.0, 0.5)}, 6, Search())
    assert skipped.mean == (1.0, 0.5)


def test_where_nothing_recovers_the_usual_layer_is_taken_and_said():
    curve = choose((0, 1), {"a": recovered(-0.1, 0.0)}, 6, Search())
    assert curve.chosen == 4
    assert "default" in curve.note


@pytest.mark.parametrize(("depth", "most"), [(1, 1), (2, 1), (6, 5), (16, 15), (28, 13), (32, 14), (40, 16), (80, 24)])
def test_every_layer_can_be_chosen_and_few_are_tried(monkeypatch, depth, most):
    """All but the last, in two scans; wherever the peak of the recovery is, it is found."""
    base = SimpleNamespace(depth=depth, streamed=False)
    tasks, directions = [SimpleNamespace(task="t", scoring=[[1]] * 4, checks=[])], [None]
    for peak in candidate_layers(depth):
        tried = []

        def levels(_base, _expert, _sets, _directions, layers, *_rest, peak=peak, tried=tried):
            tried.extend(layers)
            return [(-1.0, tuple(-0.1 - 0.005 * abs(layer - peak) for layer in layers))]

        monkeypatch.setattr(recovery, "kl_levels", levels)
        curve = find_anchor(base, base, None, tasks, directions, Search())
        assert curve.chosen == peak
        assert sorted(tried) == list(curve.layers)
        assert len(tried) == len(set(tried)) <= most
        assert curve.tasks["t"].recovery == pytest.approx([0.9 - 0.005 * abs(at - peak) for at in curve.layers])
    assert set(candidate_layers(depth)) == set(range(max(depth - 1, 1)))


def test_the_second_scan_takes_up_what_the_first_found_by_behaviour(monkeypatch):
    """Levels of base and expert are not generated again, and a task without a gap in behaviour is not tried again."""
    model = tiny.random_model("llama", seed=1, num_hidden_layers=18)
    base, expert = stack(model), stack(tiny.fine_tuned(model, seed=2, size=0.3))
    tasks = random_tasks(base)
    shares = {"model": model, "base": 0, "expert": 1, 7: 0.5, 10: 0.5, 8: 0.75}
    runs = graded_by(monkeypatch, shares | {layer: 0.25 for layer in range(18) if layer not in shares})
    directions = extract_all(base, expert, tasks, 18, 4)
    curve = find_anchor(base, expert, tiny.tokenizer(), tasks, directions, Search())
    assert curve.chosen == 8
    answers = 4 * len(tasks)  # in each run
    assert [runs[each, None] for each in (base.model, expert.model)] == [answers] * 2
    assert all(runs[base.model, layer] == answers for layer in curve.layers)
    assert len(curve.layers) < 17


@pytest.mark.parametrize("layers", [(), (4,), (-1, 2)])
def test_candidates_that_are_not_there(layers):
    with pytest.raises(BadInput, match="layers 0 to 3"):
        Search(layers=layers).layers_of(4)


def test_a_damaged_curve_is_refused():
    raw = dataclasses.asdict(choose((0, 1), {"a": recovered(0.5, 0.0)}, 6, Search()))
    for damaged in ({**raw, "mean": [0.5]}, {**raw, "layers": []}):
        with pytest.raises(ValueError, match="recovery curve"):
            read_record(RecoveryCurve, damaged)
    raw["tasks"]["a"]["grading"] = "taste"
    with pytest.raises(ValueError, match="taste"):
        read_record(RecoveryCurve, raw)
