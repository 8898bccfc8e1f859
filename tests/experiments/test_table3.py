"""The table's planner: resumed, never chosen by test items, frozen worlds; by a grader that is a table of numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import yaml
from waiting import is_gone, wait_for

from experiments.miniature.items import CAPABILITIES
from experiments.miniature.training import WorldConfig
from experiments.miniature.world import build_world
from experiments.table3 import jobs as plan_module
from experiments.table3.frozen import FROZEN, KINDS, Disjoint, TrainedWorld, check_frozen
from experiments.table3.grade import TestGrade, ValidationGrade, choose, choose_unlabelled, suite_of
from experiments.table3.grid import read_variants
from experiments.table3.jobs import AUTHORS, LABELS, ONLY, SECONDS, UNLABELLED, Setup, expected, seconds_of, seed_plan
from experiments.table3.keys import merge_key, recipe, score_key
from experiments.table3.schedule import TableJob, TableProgress, run
from experiments.table3.variants import (
    BASELINE,
    COMBINATIONS,
    SAW_LABELS,
    SAW_NOTHING,
    SAW_PROMPTS,
    VARIANTS,
    Point,
    Variant,
)
from mergekit_wp.errors import BadInput
from mergekit_wp.fit.job import FitJob

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smoke worlds of three seeds: their models know nothing, their items are as those of any world."""
    root = tmp_path_factory.mktemp("worlds")
    for seed in SEEDS:
        build_world(WorldConfig.smoke(seed), root, quiet=True)
    return root


def world_of(worlds: Path, seed: int) -> TrainedWorld:
    return TrainedWorld(seed, worlds / WorldConfig.smoke(seed).hash12)


class Here:
    """Runs a job at once, in this process, and writes down its name; stops as a kill would after `most` jobs."""

    def __init__(self, most: int = 10**9) -> None:
        self.names: list[str] = []
        self.most = most

    def submit(self, function: Any, /, *arguments: Any) -> Future[Any]:
        if len(self.names) == self.most:
            raise KeyboardInterrupt
        task = arguments[1]
        self.names.append(
            str(getattr(task, "result", "")) or str(next(x for x in arguments[3:] if isinstance(x, Path)))
        )
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


GRID = Variant("grid", tuple(Point("task_arithmetic", expert={"weight": w}) for w in (1.0, 0.5, 0.25)), "")
PLAIN = Variant(BASELINE, (Point("linear", expert={"weight": 1.0}, base={"weight": 0.0}),), "")
SCORED = Variant("scored", (Point("wp", scores={"utility": "kl"}),), "")
FITTED = Variant("fitted", (Point("wp", scores={"utility": "kl"}, fit={"family": "scale", "start": "scores"}),), "")


def fake_grader(right: dict[tuple[str, float], float]) -> Any:
    """Instead of merging and grading: the value in `right` for (split, weight), kept as a real result is."""

    def grade_model(task: Any) -> Any:
        weight = 0.0
        if not isinstance(task.model, Path):
            weight = task.model.recipe["models"][0].get("parameters", {}).get("weight", 0.0)
        value = right.get((task.split, weight), 0.1)
        found = dict.fromkeys(task.capabilities, value)
        content = {"split": task.split, "right": found, "items": dict.fromkeys(found, 12)}
        task.result.parent.mkdir(parents=True, exist_ok=True)
        task.result.write_text(json.dumps(content))
        return {"validation": ValidationGrade, "test": TestGrade}[task.split](found, content["items"])

    return grade_model


def fake_score(world: Path, expert: str, settings: Any, file: Path, allow_code: bool) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("scores")
    return file


def fake_loss(task: Any) -> dict[str, float]:
    """Least at 0.25, which is best neither on validation nor on test items."""
    assert all(path.is_file() for path in task.answers)
    weight = task.model.recipe["models"][0]["parameters"]["weight"]
    found = dict.fromkeys(task.experts, abs(weight - 0.25))
    task.result.parent.mkdir(parents=True, exist_ok=True)
    task.result.write_text(json.dumps({"unrecovered": found}))
    return found


def fake_answers(world: Path, expert: str, tokens: int, file: Path) -> Path:
    assert tokens == FitJob.answer_tokens
    return fake_score(world, expert, {}, file, False)


def fake_fit(world: Path, experts: Any, settings: Any, answers: Any, scores: Any, file: Path) -> Path:
    assert set(answers) == set(experts)
    assert set(scores) == (set(experts) if settings.get("start") == "scores" else set())
    assert all(path.is_file() for path in (*answers.values(), *scores.values()))
    return fake_score(world, "", settings, file, False)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, float], float]:
    """The values of the fake grader, to be changed by a test: 0.5 is best on validation, 1.0 by far on test items."""
    right = {("validation", 1.0): 0.3, ("validation", 0.5): 0.6, ("validation", 0.25): 0.4,
             ("test", 1.0): 0.99, ("test", 0.5): 0.2, ("test", 0.25): 0.98}  # fmt: skip
    monkeypatch.setattr(plan_module, "grade_model", fake_grader(right))
    monkeypatch.setattr(plan_module, "measure_loss", fake_loss)
    monkeypatch.setattr(plan_module, "write_score", fake_score)
    monkeypatch.setattr(plan_module, "write_answers", fake_answers)
    monkeypatch.setattr(plan_module, "write_fit_file", fake_fit)
    return right


def setup_of(worlds: Path, out: Path, **changes: Any) -> Setup:
    return Setup(out, worlds, **{"variants": (PLAIN, GRID, SCORED, FITTED), "kind": "smoke", **changes})


def execute(setup: Setup, runner: Any, seeds: tuple[int, ...] = (0,)) -> list[Any]:
    disjoint = Disjoint()
    plans = [seed_plan(seed, setup, disjoint) for seed in seeds]
    return run(plans, runner, TableProgress(SECONDS, {}, 1, quiet=True))


def test_the_points_that_validation_items_and_the_loss_choose_are_tested_whatever_the_test_items_say(
    worlds: Path, tmp_path: Path, fakes: Any
) -> None:
    (result,) = execute(setup_of(worlds, tmp_path), Here())
    for combination in COMBINATIONS:
        mine = [e for e in result.test if e.variant == "grid" and e.combination == combination]
        assert {e.role: (e.setting, e.grade.right["code"], e.saw) for e in mine} == {
            LABELS: ("weight 0.5", 0.2, SAW_LABELS),
            UNLABELLED: ("weight 0.25", 0.98, SAW_PROMPTS),
            AUTHORS: ("weight 1", 0.99, SAW_NOTHING),
        }
    assert {e.role for e in result.test if e.variant != "grid"} == {ONLY}
    assert {e.variant for e in result.test if e.saw == SAW_PROMPTS} == {"grid", "scored", "fitted"}
    assert all(isinstance(e.grade, ValidationGrade) for e in result.validation)
    assert all(isinstance(e.grade, TestGrade) for e in result.test)


@pytest.mark.parametrize(("choose_by", "roles", "kinds"), [
    ((LABELS,), {LABELS, AUTHORS}, {"seed0", "validation", "test"}),
    ((UNLABELLED,), {UNLABELLED, AUTHORS}, {"seed0", "test"}),
    ((), {AUTHORS}, {"seed0", "test"}),
])  # fmt: skip
def test_only_the_choices_that_were_asked_for_are_made(
    worlds: Path, tmp_path: Path, fakes: Any, choose_by: tuple[str, ...], roles: set[str], kinds: set[str]
) -> None:
    runner, setup = Here(), setup_of(worlds, tmp_path, choose=choose_by)
    before = expected(setup, (0,))
    (result,) = execute(setup, runner)
    assert {e.role for e in result.test if e.variant == "grid"} == roles
    assert {Path(name).parent.name for name in runner.names} == kinds
    assert any("/losses/" in name for name in runner.names) == (UNLABELLED in choose_by)
    assert sum(before.values()) == len(runner.names)
    assert expected(setup, (0,)).total() == 0


def test_a_method_that_cannot_merge_so_many_is_left_out(worlds: Path, tmp_path: Path, fakes: Any) -> None:
    pairs_alone = Variant("pairs alone", GRID.points, "", most=2)
    setup = setup_of(worlds, tmp_path, variants=(PLAIN, pairs_alone))
    before, runner = expected(setup, (0,)), Here()
    (result,) = execute(setup, runner)
    found = {e.combination for e in result.test if e.variant == "pairs alone"}
    assert found == set(COMBINATIONS) - {"all three"}
    assert sum(before.values()) == len(runner.names)


def test_the_least_loss_is_the_mean_over_what_was_merged() -> None:
    assert (
        choose_unlabelled([{"code": 0.2, "maths": 0.4}, {"code": 0.5, "maths": 0.0}, {"code": 0.3, "maths": 0.3}]) == 1
    )
    assert choose_unlabelled([{"code": 0.2, "maths": 0.4}, {"code": 0.4, "maths": 0.2}]) == 0


def test_the_choice_takes_validation_grades_alone_and_looks_at_what_was_merged() -> None:
    def grade(code: float, maths: float) -> ValidationGrade:
        return ValidationGrade({"code": code, "maths": maths}, {"code": 6, "maths": 6})

    assert choose([grade(0.5, 0.5), grade(0.9, 0.3), grade(0.6, 0.6)], ("code", "maths")) == 1
    assert choose([grade(0.5, 0.5), grade(0.9, 0.3), grade(0.6, 0.6)], ("maths",)) == 2
    assert choose([grade(0.5, 0.5), grade(0.5, 0.5)], ("code",)) == 0
    with pytest.raises(TypeError):
        choose([TestGrade({"code": 1.0}, {"code": 6})], ("code",))  # type: ignore[list-item]


def test_no_job_on_test_items_is_made_before_the_last_validation_result_is_there(
    worlds: Path, tmp_path: Path, fakes: Any
) -> None:
    runner = Here()
    execute(setup_of(worlds, tmp_path), runner)
    kinds = [Path(name).parent.name for name in runner.names]
    assert set(kinds) == {"seed0", "validation", "test"}
    assert "validation" not in kinds[kinds.index("test") :]


def test_validation_only_leaves_the_test_items_alone(worlds: Path, tmp_path: Path, fakes: Any) -> None:
    runner = Here()
    (result,) = execute(setup_of(worlds, tmp_path, validation_only=True), runner)
    assert result.test == ()
    assert result.validation
    assert not any("/test/" in name for name in runner.names)


def test_a_run_that_was_killed_does_nothing_twice_and_ends_the_same(worlds: Path, tmp_path: Path, fakes: Any) -> None:
    whole = Here()
    results = execute(setup_of(worlds, tmp_path / "whole"), whole, SEEDS[:2])
    parts: list[Here] = []
    for most in (7, 1, 30, 10**9):
        parts.append(Here(most))
        if most < 10**9:
            with pytest.raises(KeyboardInterrupt):
                execute(setup_of(worlds, tmp_path / "parts"), parts[-1], SEEDS[:2])
        else:
            resumed = execute(setup_of(worlds, tmp_path / "parts"), parts[-1], SEEDS[:2])
    done = [str(Path(name).relative_to(tmp_path / "parts")) for part in parts for name in part.names]
    assert Counter(done) == Counter(str(Path(name).relative_to(tmp_path / "whole")) for name in whole.names)
    assert max(Counter(done).values()) == 1
    assert resumed == results
    last = Here()
    assert execute(setup_of(worlds, tmp_path / "parts"), last, SEEDS[:2]) == results
    assert last.names == []


def test_a_damaged_result_is_made_again(worlds: Path, tmp_path: Path, fakes: Any) -> None:
    first = Here()
    execute(setup_of(worlds, tmp_path), first)
    damaged = next(name for name in first.names if "/validation/" in name)
    Path(damaged).write_text('{"split": "test", "right": {}, "items": {}}')
    second = Here()
    execute(setup_of(worlds, tmp_path), second)
    assert second.names == [damaged]


def test_a_changed_input_redoes_what_depends_on_it(worlds: Path, tmp_path: Path, fakes: Any) -> None:
    own = tmp_path / "worlds"
    shutil.copytree(worlds / WorldConfig.smoke(0).hash12, own / WorldConfig.smoke(0).hash12)
    first = Here()
    execute(setup_of(own, tmp_path / "out"), first)
    with (own / WorldConfig.smoke(0).hash12 / "pairs" / "code.jsonl").open("a") as pairs:
        pairs.write(json.dumps({"task": "code", "prompt": "Request: something new\nAnswer:\n"}) + "\n")
    second = Here()
    execute(setup_of(own, tmp_path / "out"), second)
    scored = [name for name in second.names if name.endswith((".safetensors", ".jsonl"))]
    for folder in ("scores", "answers"):
        assert [Path(name).name.split("-")[0] for name in scored if f"/{folder}/" in name] == ["code"]
    assert len(scored) == 2 + 3  # and the fits that start from them
    # The loss of every merge is read on the prompts of its experts, and then the same setting is chosen as before.
    with_code = {"code-instruction", "code-maths", "all-three"}
    weighed = [name for name in second.names if "/losses/" in name]
    assert {Path(name).name.split("-task-arithmetic-")[0] for name in weighed} == with_code
    graded = [name for name in second.names if name not in (*scored, *weighed)]
    assert {Path(name).name.split("-wp-")[0] for name in graded} == with_code
    assert all("-wp-" in name for name in graded)


def test_keys_change_with_all_that_decides_a_merge(worlds: Path) -> None:
    world, other = world_of(worlds, 0), world_of(worlds, 1)
    point = Point("dare_ties", {"rescale": True}, {"weight": 1.0, "density": 0.8})
    both = ("code", "maths")
    keys = [
        merge_key(point, both, world),
        merge_key(point, both, other),
        merge_key(point, ("maths", "code"), world),
        merge_key(Point("dare_ties", {"rescale": True}, {"weight": 1.0, "density": 0.5}), both, world),
        merge_key(Point("dare_ties", {"rescale": False}, {"weight": 1.0, "density": 0.8}), both, world),
        merge_key(Point("dare_linear", {"rescale": True}, {"weight": 1.0, "density": 0.8}), both, world),
        merge_key(Point("wp", scores={"utility": "kl"}), both, world),
        merge_key(Point("wp", scores={"utility": "anchor"}), both, world),
        merge_key(Point("wp", fit={"family": "layer"}), both, world),
        merge_key(Point("wp", fit={"family": "expert"}), both, world),
        merge_key(Point("wp", fit={"family": "expert"}, scores={"utility": "kl"}), both, world),
        merge_key(Point("wp", fit={"family": "expert"}, scores={"utility": "anchor"}), both, world),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == merge_key(point, both, world_of(worlds, 0))
    assert score_key({"gap": "mean"}, "code", world) != score_key({"gap": "mean"}, "maths", world)


def test_the_same_merge_under_two_names_is_made_once(worlds: Path, tmp_path: Path, fakes: Any) -> None:
    twice = (PLAIN, GRID, Variant("again", GRID.points[1:2], ""))
    runner = Here()
    (result,) = execute(setup_of(worlds, tmp_path, variants=twice), runner)
    assert max(Counter(runner.names).values()) == 1
    assert len([e for e in result.test if e.variant == "again"]) == len(COMBINATIONS)


def test_the_forecast_counts_what_is_left(worlds: Path, tmp_path: Path, fakes: Any) -> None:
    setup = setup_of(worlds, tmp_path)
    before = expected(setup, (0,))
    assert dict(before) == {"score": 3, "answers": 3, "fit": 4, "validation": 12, "loss": 12, "test": 4 * 6 + 4}
    runner = Here()
    execute(setup, runner)
    assert len(runner.names) <= sum(before.values())
    after = expected(setup, (0,))
    assert after.total() == 0
    (setup.out / "grades" / "seed0" / "test").rename(tmp_path / "moved")
    assert dict(expected(setup, (0,))) == {"test": 4 * 6 + 4}
    assert dict(expected(setup, (5,))) == {"world": 1, **before}
    searching = setup_of(worlds, tmp_path / "search", validation_only=True)
    assert dict(expected(searching, (0,))) == {"score": 3, "answers": 3, "fit": 4, "validation": 24}


def test_what_a_job_raises_comes_out(worlds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(task: Any) -> None:
        raise BadInput("mini_code: no.")

    monkeypatch.setattr(plan_module, "grade_model", fails)
    with pytest.raises(BadInput, match="mini_code"):
        execute(setup_of(worlds, tmp_path, variants=(PLAIN,)), Here())


def test_two_plans_that_want_the_same_job_share_it() -> None:
    calls = []

    def plan() -> Any:
        results = yield [TableJob("one", "score", "one", calls.append, (1,), lambda: None)]
        return results

    class Now:
        def submit(self, function: Any, /, *arguments: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(function(*arguments))
            return future

    assert run([plan(), plan()], Now(), TableProgress({}, {}, 1, quiet=True)) == [[None], [None]]
    assert calls == [1]


# The worlds


def test_the_worlds_of_the_table_are_the_frozen_ones() -> None:
    """Fails when a change of the world would change the table: see CHANGES in table3/world.py."""
    assert set(FROZEN) | {"smoke", "real", "real-far", "real-smoke"} == set(KINDS)
    for kind, seeds in FROZEN.items():
        for seed, frozen in seeds.items():
            assert KINDS[kind](seed).hash12 == frozen
            check_frozen(kind, seed, frozen)
        with pytest.raises(BadInput, match="frozen"):
            check_frozen(kind, 0, "0" * 12)
        check_frozen(kind, max(seeds) + 1, "0" * 12)
    check_frozen("smoke", 0, "0" * 12)


def test_a_worker_is_not_given_torch_by_what_it_imports_first() -> None:
    """It has one thread only if `prepare` comes before torch."""
    code = "import sys, experiments.table3.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_test_items_validation_items_and_scoring_prompts_are_disjoint_over_all_seeds(worlds: Path) -> None:
    disjoint = Disjoint()
    for seed in SEEDS:
        disjoint.add(world_of(worlds, seed))
    config = WorldConfig.smoke()
    assert len(disjoint.seen["test"]) > 2 * len(CAPABILITIES) * config.test_items
    assert len(disjoint.seen["validation"]) > 2 * len(CAPABILITIES) * config.validation_items
    assert disjoint.seen["scoring"]


@pytest.mark.parametrize(("into", "row"), [
    ("tasks/data/mini_maths_val.jsonl", "tasks/data/mini_maths.jsonl"),
    ("pairs/code.jsonl", "tasks/data/mini_code.jsonl"),
    ("pairs/maths.jsonl", "tasks/data/mini_maths_val.jsonl"),
])  # fmt: skip
def test_an_item_in_two_uses_is_refused(worlds: Path, tmp_path: Path, into: str, row: str) -> None:
    """Even where the scoring prompt goes on into the answer, as those of maths and code do, and across seeds."""
    tampered = shutil.copytree(world_of(worlds, 1).folder, tmp_path / "tampered")
    stolen = json.loads((world_of(worlds, 0).folder / row).read_text().splitlines()[0])
    stolen["prompt"] += "and a beginning of the answer" if "pairs" in into else ""
    with (tampered / into).open("a") as file:
        file.write(json.dumps(stolen) + "\n")
    disjoint = Disjoint()
    disjoint.add(world_of(worlds, 0))
    with pytest.raises(BadInput, match="must not be chosen or scored"):
        disjoint.add(TrainedWorld(1, tampered))


# What is merged


def test_the_authors_settings_are_those_of_the_13b_recipes() -> None:
    table = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "table.yaml").read_text())["methods"]
    seen = set()
    for variant in VARIANTS:
        first = variant.points[0]
        given = table.get(first.method)
        if first.method != "wp" and given is not None:
            assert dict(first.expert) == given.get("expert", {})
            assert dict(first.shared) == given.get("shared", {})
            assert (first.base and dict(first.base)) == given.get("base")
        assert len(variant.points) <= 4
        seen.add(first.method)
    assert seen >= set(table)


def test_a_recipe_reads_as_a_person_would_write_it(worlds: Path) -> None:
    world = world_of(worlds, 0)
    stock = recipe(VARIANTS[0].points[0], ("code", "maths"), world, {})
    assert [model.get("parameters") for model in stock["models"]] == [{"weight": 1.0}, {"weight": 1.0}, {"weight": 0.0}]
    assert [Path(model["model"]).name for model in stock["models"]] == ["code", "maths", "base"]
    assert (stock["tokenizer"], stock["dtype"], stock["out_dtype"]) == ({"source": "base"}, "float32", "bfloat16")
    ours = recipe(Point("wp", {"scale": 2.0}, scores={}), ("code",), world, {"code": Path("/s/code.safetensors")})
    assert ours["models"][0]["parameters"] == {"scores": "/s/code.safetensors"}
    assert ours["parameters"] == {"scale": 2.0}
    fitted = recipe(Point("wp", scores={}, fit={}), ("code",), world, {"code": Path("/s/c")}, Path("/f/a.safetensors"))
    assert fitted["parameters"] == {"fit": "/f/a.safetensors"}
    assert "parameters" not in fitted["models"][0]
    assert "dtype" not in ours
    assert "tokenizer" not in ours


def test_variants_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "v.yaml"
    file.write_text(
        "variants:\n"
        "  - {name: a, method: wp, shared: {power: 2.0},\n"
        "     grid: {shared.scale: [1.0, 2.0], scores.utility: [kl, staged]}}\n"
        "  - {name: b, method: task_arithmetic, expert: {weight: 0.9}}\n"
        "  - {name: c, method: wp, fit: {family: layer}, grid: {fit.steps: [10, 20]}}\n"
    )
    a, b, c = read_variants(file)
    assert [(p.fit, p.scores) for p in c.points] == [
        ({"family": "layer", "steps": 10}, None), ({"family": "layer", "steps": 20}, None),
    ]  # fmt: skip
    assert [(p.shared["power"], p.shared["scale"], p.scores and p.scores["utility"]) for p in a.points] == [
        (2.0, 1.0, "kl"), (2.0, 1.0, "staged"), (2.0, 2.0, "kl"), (2.0, 2.0, "staged"),
    ]  # fmt: skip
    assert b.points == (Point("task_arithmetic", expert={"weight": 0.9}),)


@pytest.mark.parametrize(("text", "says"), [
    ("variants: []", "must be a list"),
    ("variants: [{name: a}]", "`method`"),
    ("variants: [{name: a, method: wp, weight: 1}]", "unknown field 'weight'"),
    ("variants: [{name: a, method: wp, scores: {utilty: kl}}]", "utilty"),
    ("variants: [{name: a, method: wp, scores: {utility: none}}]", "utility"),
    ("variants: [{name: a, method: wp, scores: {base: x}}]", "scores.base"),
    ("variants: [{name: a, method: wp, fit: {experts: []}}]", "fit.experts"),
    ("variants: [{name: a, method: wp, fit: {family: heads}}]", "family"),
    ("variants: [{name: a, method: wp, grid: {scale: [1]}}]", "shared.scale"),
    ("variants: [{name: a, method: wp, grid: 3}]", "shared.scale"),
    ("variants: [{name: a, method: wp}, {name: a, method: ties}]", "two variants"),
])  # fmt: skip
def test_bad_variants_are_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "v.yaml"
    file.write_text(text)
    with pytest.raises(BadInput, match=says) as error:
        read_variants(file)
    assert str(file) in error.value.message


def test_the_two_suites_differ_in_their_items_alone(tmp_path: Path) -> None:
    test, validation = suite_of("test", tmp_path), suite_of("validation", tmp_path)
    assert [task.task + "_val" for task in test.tasks] == [task.task for task in validation.tasks]
    assert [task.metric for task in test.tasks] == [task.metric for task in validation.tasks]
    assert {task.task for task in test.tasks} == {f"mini_{name}" for name in CAPABILITIES}


def test_a_killed_run_leaves_no_worker_behind() -> None:
    program = (
        "import os, time\n"
        "from experiments.table3.schedule import pool\n"
        "if __name__ == '__main__':\n"
        "    runner = pool(1, os.getpid)\n"
        "    print(runner.submit(os.getpid).result(), flush=True)\n"
        "    runner.submit(time.sleep, 600)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    wait_for(lambda: is_gone(worker), f"worker {worker} to end", 10)


def test_jobs_of_a_pretrained_model_are_not_reckoned_as_those_of_the_miniature() -> None:
    small, large = seconds_of("far"), seconds_of("real-far")
    assert small.keys() == large.keys()
    assert all(large[what] > small[what] for what in small)
