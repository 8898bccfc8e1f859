"""wp-run: pipeline files, the plan, and whole runs of the real commands on tiny models."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from pipeline_world import build, pipeline_of, wp_run
from safetensors.torch import load_file, save_file

from mergekit_wp.checkpoint.references import recipe_models
from mergekit_wp.errors import BadInput
from mergekit_wp.merge.recipe import files_of
from mergekit_wp.outputs import claimed
from mergekit_wp.pipeline.cli import main
from mergekit_wp.pipeline.spec import read_pipeline
from mergekit_wp.pipeline.steps import derived_files, hub_models, pipeline_steps, write_derived
from mergekit_wp.push.cli import main as wp_push
from mergekit_wp.scoring.config import ScoringJob

MINIMAL = {
    "base": "user/base",
    "experts": {"a": {"model": "user/a", "scoring": {"pairs": "builtin:maths", "layer": 2}}, "b": {"model": "user/b"}},
    "merges": {"average": {"merge_method": "linear", "expert_parameters": {"weight": 1.0}}},
}


def write(folder: Path, content: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("pipeline"))


def states(printed: str) -> dict[str, str]:
    """Title -> state, from what --plan printed."""
    lines = [line.partition("] ")[2] for line in printed.splitlines() if line.startswith("[")]
    return dict(line.split(": ", 1) for line in lines)


def test_a_run_does_everything_and_again_nothing_and_then_what_depends_on_a_change(world: Path) -> None:
    file = pipeline_of(world)
    todo = states(wp_run(world, file.name, "--plan"))
    assert list(todo.values()) == ["to do (not run yet)"] * 6
    assert not (world / "out" / "scores").exists()

    wp_run(world, file.name)
    results = json.loads((world / "out/eval/results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["base", "linear", "wp"]
    assert results["baseline"] == "linear"
    printed = wp_run(world, file.name)
    assert printed.count("done before") == 6

    # Other prompts for one expert: its scores, the merge that reads them, and the table.
    prompts = world / "one.jsonl"
    prompts.write_text("\n".join(prompts.read_text().splitlines()[:6]))
    plan = states(wp_run(world, file.name, "--plan"))
    assert plan == {
        "Score the one expert": "to do (one.jsonl has changed)",
        "Score the two expert": "done",
        "Merge linear by linear": "done",
        "Merge wp by wp": "to do (unless out/scores/one.safetensors comes out as it was)",
        "Grade every model": "to do (one.jsonl has changed)",  # whose prompts it looks for among the items
        "Write the report": "to do (unless out/scores/one.safetensors comes out as it was)",
    }
    before = (world / "out/merges/linear/model.safetensors").stat().st_mtime_ns
    printed = wp_run(world, file.name)
    assert printed.count("done before") == 2
    assert (world / "out/merges/linear/model.safetensors").stat().st_mtime_ns == before
    assert not list((world / "out/merges").glob(".*")), "a merge takes the place of the one before"
    assert set(states(wp_run(world, file.name, "--plan")).values()) == {"done"}


def test_the_scores_are_those_of_wp_score(world: Path) -> None:
    """The job that is written says what the pipeline and the job file said, base and expert from the pipeline."""
    pipeline = read_pipeline(pipeline_of(world, "jobs"))
    jobs = {path.stem: yaml.safe_load(text) for path, text in derived_files(pipeline).items() if "scoring" in str(path)}
    assert jobs["one"]["pairs"].endswith("one.jsonl")
    assert jobs["two"]["base"] == pipeline.base
    assert jobs["two"]["expert"] == pipeline.experts["two"].model
    assert Path(jobs["two"]["expert"]).name == "two"
    assert jobs["two"]["layer"] == 1


def test_a_failing_stage_stops_the_run_and_it_goes_on_when_mended(world: Path) -> None:
    index = json.loads((world / "two" / "model.safetensors.index.json").read_text())
    weights = world / "two" / index["weight_map"]["model.norm.weight"]
    good = weights.read_bytes()
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = torch.nan  # what no look at headers can tell
    save_file(tensors, weights, metadata={"format": "pt"})
    file = pipeline_of(world, "failing", evaluate=None)
    printed = wp_run(world, file.name, code=2)
    assert "the step `Score the two expert` failed (exit code 2)" in printed
    assert "holds a NaN" in printed
    assert "Merge" not in printed
    assert not (world / "failing/scores/two.safetensors").exists()
    weights.write_bytes(good)
    printed = wp_run(world, file.name, "--until", "score")
    assert printed.count("done before") == 1
    assert not (world / "failing/merges").exists()


def test_two_runs_in_one_folder_are_one_too_many(world: Path) -> None:
    file = pipeline_of(world, "locked")
    with claimed(world / "locked"):
        for arguments in ((), ("--plan",)):
            assert "another run is writing this" in wp_run(world, file.name, *arguments, code=2)
    assert not (world / "locked/recipes").exists()  # the run at work reads them


def test_every_input_is_there_before_it_is_read(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    pipeline = read_pipeline(pipeline_of(world, "order", push={"merge": "wp", "to": "me/merged"}))
    write_derived(pipeline)
    made: set[Path] = set()
    steps = pipeline_steps(pipeline)
    assert [step.stage for step in steps] == ["score", "score", "merge", "merge", "evaluate", "report", "push"]
    for step in steps:
        for path in step.inputs:
            assert path.exists() or made & {path, *path.parents}, f"{step.name} reads {path}"
        made |= set(step.outputs)
    recipes = [yaml.safe_load((world / f"order/recipes/{name}.yaml").read_text()) for name in ("linear", "wp")]
    assert [recipe["out_dtype"] for recipe in recipes] == ["float32", "float32"]  # as the experts are stored


def test_terms_of_their_own_reach_the_push(tmp_path: Path) -> None:
    terms = {"license": "other", "license_name": "A 'b' licence", "license_link": "https://example.org/b"}
    push = {"merge": "average", "to": "me/x", **terms}
    step = pipeline_steps(read_pipeline(write(tmp_path, {**MINIMAL, "push": push})))[-1]
    with wp_push.make_context("wp-push", list(step.command[1:])) as context:
        found = {name: context.params[name] for name in ("licence", "licence_name", "licence_link")}
    assert list(found.values()) == list(terms.values())


def test_recipes_name_the_stock_fields_only(tmp_path: Path) -> None:
    content = {
        **MINIMAL,
        "experts": {name: {"model": f"user/{name}", "scoring": {"pairs": "builtin:maths"}} for name in "ab"},
        "merges": {"average": MINIMAL["merges"]["average"], "wp": {"experts": ["b", "a"], "parameters": {"scale": 2}}},
    }
    pipeline = read_pipeline(write(tmp_path, content))
    recipes = {
        path.stem: yaml.safe_load(text) for path, text in derived_files(pipeline).items() if "recipes" in str(path)
    }
    assert recipes["wp"]["models"] == [
        {"model": f"user/{name}", "parameters": {"scores": f"runs/pipeline/scores/{name}.safetensors"}} for name in "ba"
    ]
    assert recipes["wp"]["parameters"] == {"scale": 2}
    assert recipes["average"]["tokenizer"] == {"source": "base"}
    assert "out_dtype" not in recipes["wp"]  # not known before the models are here
    assert [model.text for model in recipe_models(recipes["wp"])] == ["user/base", "user/b", "user/a"]
    assert len(files_of(recipes["wp"])) == 2
    assert list(map(str, hub_models(pipeline))) == ["user/base", "user/a", "user/b"]


def test_a_merge_by_a_fit_needs_no_scores_and_is_due_again_with_another_file(tmp_path: Path) -> None:
    """The fit is found beside the pipeline, as a score file is; so are the files of a recipe of one's own."""
    (tmp_path / "fit.safetensors").write_bytes(b"x")
    recipe = {
        "merge_method": "wp",
        "base_model": "x/y",
        "models": [{"model": "x/z"}],
        "parameters": {"fit": "fit.safetensors"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    aim = {"merge_method": "aim", "parameters": {"activations": "fit.safetensors"}}
    own = {"fit": {"parameters": {"fit": "fit.safetensors", "scale": 0.9}}, "aim": aim}
    merges = {**own, "mine": {"recipe": "mine.yaml"}}
    pipeline = read_pipeline(write(tmp_path, {**MINIMAL, "merges": merges}))
    (text,) = [text for path, text in derived_files(pipeline).items() if path.name == "fit.yaml"]
    found = yaml.safe_load(text)
    assert found["models"] == [{"model": "user/a"}, {"model": "user/b"}]
    assert found["parameters"] == {"fit": str(tmp_path / "fit.safetensors"), "scale": 0.9}
    steps = [step for step in pipeline_steps(pipeline) if step.stage == "merge"]
    assert [tmp_path / "fit.safetensors" in step.inputs for step in steps] == [True, True, True]


def test_a_merge_may_be_fitted_first(tmp_path: Path) -> None:
    """Its job has the experts' prompts as they are scored; `scale: auto` is the family scale from the shares."""
    scoring = {"pairs": "builtin:maths", "samples": 8, "method": "attr"}
    merges = {
        "fitted": {"fit": {"family": "layer", "seed": 3, "keep": "neutral.jsonl"}},
        "scaled": {"parameters": {"scale": "auto"}},
    }
    experts = {name: {"model": f"user/{name}", "scoring": {**scoring, "seed": 1}} for name in "ab"}
    (tmp_path / "neutral.jsonl").touch()
    pipeline = read_pipeline(write(tmp_path, {**MINIMAL, "experts": experts, "merges": merges}))
    files = {path: yaml.safe_load(text) for path, text in derived_files(pipeline).items()}
    fits, recipes = Path("runs/pipeline/fits"), Path("runs/pipeline/recipes")
    models = [{"expert": f"user/{name}", "pairs": "builtin:maths"} for name in "ab"]
    shared = {"base": "user/base", "samples": 8}
    kept = {"family": "layer", "seed": 3, "keep": str(tmp_path / "neutral.jsonl")}  # beside the pipeline
    assert files[fits / "fitted.yaml"] == {**shared, "experts": models, **kept}
    scored = [{**entry, "scores": f"runs/pipeline/scores/{name}.safetensors"}
              for name, entry in zip("ab", models, strict=True)]  # fmt: skip
    assert files[fits / "scaled.yaml"] == {
        **shared, "seed": 1, "experts": scored, "family": "scale", "start": "scores"
    }  # fmt: skip
    for name in merges:
        assert files[recipes / f"{name}.yaml"]["parameters"] == {"fit": str(fits / f"{name}.safetensors")}
        assert "parameters" not in files[recipes / f"{name}.yaml"]["models"][0]
    stages = [step.stage for step in pipeline_steps(pipeline)]
    assert stages == ["score", "score", "fit", "fit", "merge", "merge", "report"]
    fit, merge = (next(s for s in pipeline_steps(pipeline) if s.name == f"{kind}-fitted") for kind in ("fit", "merge"))
    assert fit.command == ("wp-fit", str(fits / "fitted.yaml"), "--out", str(fits / "fitted.safetensors"))
    assert set(fit.outputs) <= set(merge.inputs)
    assert tmp_path / "neutral.jsonl" in fit.inputs


def test_the_evaluation_is_told_what_models_were_made_with(tmp_path: Path) -> None:
    """Files of prompts, each once; a built-in set is drawn anew, and holds no items of anybody's."""
    for name in ("a.jsonl", "neutral.jsonl", "suite.yaml"):
        (tmp_path / name).touch()
    experts = {
        name: {"model": f"user/{name}", "scoring": {"pairs": pairs, "answers": "said.jsonl", "answer_tokens": 2}}
        for name, pairs in (("a", "a.jsonl"), ("b", "builtin:maths"), ("c", "a.jsonl"))
    }
    merges = {"fitted": {"fit": {"keep": "neutral.jsonl"}, "experts": ["a", "b"]}}
    content = {**MINIMAL, "experts": experts, "merges": merges, "evaluate": {"suite": "suite.yaml"}}
    step = next(s for s in pipeline_steps(read_pipeline(write(tmp_path, content))) if s.stage == "evaluate")
    told = [after for word, after in pairwise(step.command) if word == "--prompts"]
    assert told == [str(tmp_path / "a.jsonl"), str(tmp_path / "neutral.jsonl")]
    assert set(map(Path, told)) <= set(step.inputs)


def test_a_recipe_of_ones_own_is_used_as_it_is(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        yaml.safe_dump({"merge_method": "slerp", "base_model": "x/y", "models": [{"model": "x/z+x/lora"}]})
    )
    pipeline = read_pipeline(write(tmp_path, {**MINIMAL, "merges": {"mine": {"recipe": "mine.yaml"}}}))
    (step,) = [step for step in pipeline_steps(pipeline) if step.stage == "merge"]
    assert step.command[:2] == ("wp-merge", str(recipe))
    assert set(step.inputs) == {recipe, Path("x/y"), Path("x/z"), Path("x/lora")}
    assert "x/lora" in map(str, hub_models(pipeline))


def test_files_of_a_job_lie_beside_the_pipeline_and_are_inputs_of_the_scores(tmp_path: Path) -> None:
    for name in ("a.jsonl", "list.txt", "old.safetensors"):
        (tmp_path / name).write_text("")
    scoring = {
        "pairs": "builtin:code",
        "answer_tokens": 8,
        "answers": "a.jsonl",
        "components": "list.txt",
        "top": [20, "old.safetensors"],
    }
    experts = {"a": {"model": "user/a", "scoring": scoring}, "b": {"model": "user/b"}}
    pipeline = read_pipeline(write(tmp_path, {**MINIMAL, "experts": experts}))
    step = next(step for step in pipeline_steps(pipeline) if step.stage == "score")
    assert set(step.inputs) >= {tmp_path / name for name in ("a.jsonl", "list.txt", "old.safetensors")}
    for components in ("all", "heads", "neurons"):
        experts["a"]["scoring"] = {**scoring, "components": components, "top": [20, "old.safetensors"]}
        found = read_pipeline(write(tmp_path, {**MINIMAL, "experts": experts})).experts["a"].scoring
        beside = {"answers": str(tmp_path / "a.jsonl"), "top": [20, str(tmp_path / "old.safetensors")]}
        assert found == {**scoring, "components": components, **beside}


def test_the_suites_own_folders_are_inputs_unless_the_pipeline_names_others(tmp_path: Path) -> None:
    for name in ("tasks", "data", "others"):
        (tmp_path / name).mkdir()
    tasks = [{"task": "t", "column": "T", "metric": "acc,none"}]
    suite = {"name": "s", "tasks": tasks, "include_path": "tasks", "data": "data"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))

    def watched(out: str = "out", **more: str) -> set[Path]:
        content = {**MINIMAL, "out": str(tmp_path / out), "evaluate": {"suite": "suite.yaml", **more}}
        step = next(s for s in pipeline_steps(read_pipeline(write(tmp_path, content))) if s.stage == "evaluate")
        return {path for path in step.inputs if tmp_path in path.parents}

    read = {tmp_path / name for name in ("suite.yaml", "tasks", "data")}
    assert watched() >= read
    assert watched(include_path="others") >= read - {tmp_path / "tasks"} | {tmp_path / "others"}
    assert tmp_path / "tasks" not in watched(include_path="others")
    # Where the run itself writes among the tasks, it does not make its own step stale.
    (tmp_path / "tasks" / "one.yaml").touch()
    (tmp_path / "tasks" / "runs" / "out").mkdir(parents=True)
    (tmp_path / "tasks" / "runs" / "note.txt").touch()
    assert watched("tasks/runs/out") & {*(tmp_path / "tasks").rglob("*"), tmp_path / "tasks"} == {
        tmp_path / "tasks" / "one.yaml",
        tmp_path / "tasks" / "runs" / "note.txt",
    }


def test_consent_reaches_the_commands_that_need_it(tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: s")
    content = {**MINIMAL, "evaluate": {"suite": "suite.yaml"}}
    content["experts"] = {"a": {"model": "user/a", "scoring": {"pairs": "builtin:code", "layer": "auto"}}}
    pipeline = read_pipeline(write(tmp_path, content))
    for allow in (False, True):
        steps = {step.stage: step for step in pipeline_steps(pipeline, allow)}
        for stage in ("score", "evaluate"):
            assert ("--allow-code-execution" in steps[stage].command) is allow
        assert "--allow-code-execution" not in steps["merge"].command


def _without(name: str) -> dict:
    return {key: value for key, value in MINIMAL.items() if key != name}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({**MINIMAL, "colour": 1}, "unknown field `colour`; a pipeline has out, base"),
        (_without("base"), "`base`: found None, expected a non-empty text"),
        (_without("experts"), "`experts`: found None, expected a mapping"),
        ({**MINIMAL, "experts": {}}, "`experts` is empty"),
        ({**MINIMAL, "experts": {"a": {"scoring": {"pairs": "x"}}}}, "`experts.a.model` is missing"),
        ({**MINIMAL, "experts": {"a": {"model": "u/a", "size": 3}}}, "`experts.a`: unknown field `size`"),
        ({**MINIMAL, "experts": {"a": "u/a"}}, "`experts.a`: found 'u/a', expected a mapping"),
        ({**MINIMAL, "experts": {"a": {"model": "u/a", "scores": "no.safetensors"}}}, "no.safetensors is neither in"),
        ({**MINIMAL, "experts": {"base": {"model": "u/a"}}}, "two models are named 'base'"),
        ({**MINIMAL, "experts": {"Average": {"model": "u/a"}}}, "two models are named 'Average', capitals aside"),
        *(
            ({**MINIMAL, "experts": {name: {"model": "u/a"}}}, "will be a file's name; choose one")
            for name in ("a/b", "..", ".a", "-a", "a b", "CON", "a.", "n" * 300, "e\u0301")
        ),
        ({**MINIMAL, "merges": {"wp": {}}}, "`merges.wp` is by wp, and `experts.b` has no scores"),
        (
            {**MINIMAL, "merges": {"m": {"parameters": {"fit": "no.safetensors"}}}},
            "`merges.m.parameters.fit`: no.safet",
        ),
        ({**MINIMAL, "merges": {"m": {"fit": {"family": "layer"}}}}, "`merges.m.fit` needs prompts of `experts.b`"),
        ({**MINIMAL, "merges": {"m": {"fit": {"base": "x"}}}}, "`merges.m.fit`: unknown field `base`; it has template"),
        ({**MINIMAL, "merges": {"m": {"merge_method": "linear", "fit": {}}}}, "`merges.m.fit` is for merge_method wp"),
        (
            {**MINIMAL, "merges": {"m": {"fit": {}, "parameters": {"scale": "auto"}}}},
            "`merges.m` has both `fit` and `scale: auto`",
        ),
        ({**MINIMAL, "merges": {"m": {"experts": ["c"]}}}, "`merges.m.experts`: there is no 'c' here"),
        ({**MINIMAL, "merges": {"m": {"parameters": 3}}}, "`merges.m.parameters`: found 3"),
        ({**MINIMAL, "merges": {"m": {"recipe": "no.yaml"}}}, "`merges.m.recipe`: no.yaml is neither in"),
        ({**MINIMAL, "evaluate": {}}, "`evaluate.suite` is missing"),
        ({**MINIMAL, "push": {"merge": "average"}}, "`push.to` is missing"),
        ({**MINIMAL, "push": {"merge": "wp", "to": "me/x"}}, "`push.merge`: there is no 'wp' here; there are average"),
        ({**MINIMAL, "push": {"merge": "average", "to": "m/x", "private": "yes"}}, "expected true or false"),
        ({**MINIMAL, "push": {"merge": "average", "to": "m/x", "license": ""}}, "`push.license`: found '', expected a"),
        ({**MINIMAL, "push": {"merge": "average", "to": "--private"}}, "`push.to`: found '--private', which a command"),
        ({**MINIMAL, "out": "-out"}, "`out`: found '-out', which a command takes for a flag"),
        (
            {**MINIMAL, "push": {"merge": "average", "to": "m/x", "parents": {"c": "u/c"}}},
            "`push.parents`: there is no",
        ),
        ({**MINIMAL, "score": {"device": "cpu"}}, "`score`: found {'device': 'cpu'}, expected {flags: [...]}"),
        ({**MINIMAL, "merge": {"flags": "--cuda"}}, "`merge.flags`: found '--cuda', expected a list"),
    ],
)
def test_bad_input_is_one_sentence_and_no_output(tmp_path: Path, content: dict, sentence: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, content)
    outcome = CliRunner().invoke(main, [str(path)])
    assert outcome.exit_code == 2
    assert sentence in outcome.output
    assert str(path) in outcome.output
    assert len(outcome.output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_pipeline_needs_no_scores_for_other_methods(tmp_path: Path) -> None:
    assert read_pipeline(write(tmp_path, MINIMAL)).experts["b"].scoring is None
    both = {"model": "u/a", "scoring": {"pairs": "x"}, "scores": "pipeline.yaml"}
    path = write(tmp_path, {**MINIMAL, "experts": {"a": both}})
    with pytest.raises(BadInput, match="both `scoring` and `scores`"):
        read_pipeline(path)


def test_the_tutorials_example_is_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (example,) = [part for part in text.split("```") if part.startswith('yaml title="13b.yaml"')]
    (tmp_path / "13b.yaml").write_text(example.partition("\n")[2])
    monkeypatch.chdir(root)
    pipeline = read_pipeline(tmp_path / "13b.yaml")
    assert [step.stage for step in pipeline_steps(pipeline)] == [
        "score",
        "score",
        "merge",
        "merge",
        "evaluate",
        "report",
        "push",
    ]
    jobs = [yaml.safe_load(text) for path, text in derived_files(pipeline).items() if path.parent.name == "scoring"]
    assert [ScoringJob.from_mapping(job, "here").layer for job in jobs] == [27, 27]
