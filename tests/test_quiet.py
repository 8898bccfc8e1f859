"""--quiet is quiet: nothing on stderr, of ours or of any library, by any command; and progress where nobody watches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partialmethod
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner
from pipeline_world import build, content, pipeline_of
from tqdm import tqdm

from mergekit_wp import console
from mergekit_wp.console import ProgressBars, ProgressLines, duration
from mergekit_wp.eval.compare import main as wp_compare
from mergekit_wp.pipeline.cli import main as wp_run
from mergekit_wp.scores_cli import main as wp_scores
from mergekit_wp.scoring.cli import main as wp_score


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("quiet"))


def test_no_command_says_a_word(world):
    """One after the other in one interpreter, to import torch once; wp-run's own wp-score is a process, as ever."""
    pipeline_of(world, experts={"one": content()["experts"]["one"]}, merges={"wp": {}}, evaluate=None)
    (world / "texts.txt").write_text("w1 w2 w3\n\n" * 8)
    (world / "anchored.yaml").write_text("{base: base, expert: one, pairs: one.jsonl, utility: anchor, layer: 1}")
    recipe = {
        "merge_method": "wp",
        "base_model": "base",
        "models": [{"model": "one", "parameters": {"scores": "out/scores/one.safetensors"}}],
    }
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    experts = [{"expert": name, "pairs": f"{name}.jsonl"} for name in ("one", "two")]
    (world / "fit.yaml").write_text(yaml.safe_dump({"base": "base", "experts": experts, "steps": 1}))
    study = {"base": "base", "expert": "one", "scores": ["out/scores/one.safetensors"]}
    (world / "study.yaml").write_text(yaml.safe_dump(study))
    (world / "rows.csv").write_text('q\nw1 w2\n""\n')
    commands = [
        ["scoring.convert", "rows.csv", "--prompt", "q", "--out", "converted.jsonl"],
        ["pipeline.cli", "out.yaml", "--until", "score"],
        ["scoring.cli", "anchored.yaml", "--out", "anchored.safetensors"],
        ["scores_cli", "out/scores/one.safetensors"],
        ["study.cli", "study.yaml", "--out", "study"],
        ["eval.greedy_answers", "anchored.yaml", "--utility", "kl", "--answer-tokens", "2", "--out", "said.jsonl"],
        ["fit.cli", "fit.yaml", "--out", "fit.safetensors"],
        ["merge.cli", "recipe.yaml", "merged"],
        ["merge.patch_cli", "base", "one", "out/scores/one.safetensors", "--top", "5%", "--out", "patched"],
        ["eval.cli", "suite.yaml", "wp=merged", "--out", "eval"],
        ["eval.compare", "eval", "--out", "compared"],
        ["push.cli", "merged", "alice/wp", "--results", "eval", "--dry-run", "--license", "mit"],
        ["scoring.anchor.cli", "anchored.yaml", "--out", "a.safetensors"],
        ["calibrate", "base", "--texts", "texts.txt", "--tokens", "4", "--out", "aim.safetensors"],
    ]
    assert {f"mergekit_wp.{module}" for module, *_ in commands} == set(console.MODULES.values())
    code = (
        "from importlib import import_module\n"
        "if __name__ == '__main__':\n"
        f"    for module, *words in {commands}:\n"
        "        import_module('mergekit_wp.' + module).main([*words, '--quiet'], standalone_mode=False)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=world, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.count("Suite tiny") == 2  # the tables of wp-eval and wp-compare


def test_json_for_scripts(world, monkeypatch):
    """Of what the test before this one wrote."""
    monkeypatch.chdir(world)
    compared = json.loads(CliRunner().invoke(wp_compare, ["eval", "--json"]).stdout)
    assert compared["rows"] == json.loads((world / "eval/results.json").read_text())["rows"]
    plan = json.loads(CliRunner().invoke(wp_run, ["out.yaml", "--plan", "--json"]).stdout)
    assert [(step["stage"], step["why"]) for step in plan][:2] == [("score", None), ("merge", "not run yet")]
    assert plan[0]["command"][0] == "wp-score"
    done = CliRunner().invoke(wp_score, ["anchored.yaml", "--out", "again.safetensors", "--json"])
    found = json.loads(done.stdout)
    assert json.loads(CliRunner().invoke(wp_scores, ["again.safetensors", "--json"]).stdout) == found
    assert "Anchor layer 1 of" in done.stderr
    done = CliRunner().invoke(wp_score, ["anchored.yaml", "--utility", "kl", "--out", "kl.safetensors"])
    assert "nchor" not in done.stderr.partition("Scoring")[2].replace("anchored", "")


def test_silence_ends(monkeypatch):
    """What a quiet command turned off is as before when it has ended: another may run in the same process."""
    import logging
    import warnings

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with console.silence():
        assert os.environ["TQDM_DISABLE"] == "1"
        assert not logging.getLogger("some.library").isEnabledFor(logging.WARNING)
        assert logging.getLogger("some.library").isEnabledFor(logging.ERROR)
    assert "TQDM_DISABLE" not in os.environ
    assert logging.getLogger("some.library").isEnabledFor(logging.WARNING)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_lines_come_though_nothing_moves(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINES_EVERY_S", 0.05)
    with ProgressBars(True) as start:
        tick = start(8, "measuring", "layer")
        tick(2)
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("measuring: 25 %, about ") and line.endswith(" left") for line in lines)


def test_time_left():
    part = ProgressLines(10, "p", print)
    part.begun -= 60
    assert part.line() == "p: 0 %, time left not known yet"
    part.advance(2.5)
    assert part.line() == "p: 25 %, about 3 min left"
    part.advance(99)
    assert part.line() == "p: 100 %, about 0 s left"
    part.close()
    assert [duration(s) for s in (12.4, 95, 3600 * 5 + 600)] == ["12 s", "2 min", "5 h 10 min"]


def test_wp_eval_tells_how_far_a_task_is(world, tmp_path, monkeypatch):
    """In this process: every request is counted when lm-eval has its answer."""
    from mergekit_wp.eval import measure
    from mergekit_wp.eval.models import open_model
    from mergekit_wp.eval.suite import read_suite
    from mergekit_wp.eval.tasks import ready_tasks

    seen = []

    class Told(ProgressLines):
        def close(self):
            seen.append((self.what, self.done, self.total))
            super().close()

    monkeypatch.setattr(measure, "ProgressLines", Told)
    suite = read_suite(world / "suite.yaml")
    tasks = ready_tasks(suite, suite.include_path, False)
    settings = measure.Settings("cpu", "float32", 4, None, False, False, progress_bars=False)
    measure.measure(open_model("m", str(world / "one"), False), tasks, settings, print, lambda *_: None)
    assert {what for what, _, _ in seen} == {f"m: {task.spec.task}" for task in tasks}
    assert all(done == total for _, done, total in seen), json.dumps(seen)


class BatchEngine:
    """Answers as vLLM's LLM does: all at once, with a bar that moves whenever one has ended."""

    def __init__(self, ended):
        self.ended = ended

    def generate(self, prompts, use_tqdm=True):
        ready = list(use_tqdm(prompts, desc="Rendering prompts"))
        bar = use_tqdm(total=len(ready), desc="Processed prompts", dynamic_ncols=True, postfix="0.00 toks/s")
        for number, _ in enumerate(ready, 1):
            bar.postfix = f"{number / bar.format_dict['elapsed']:.2f} toks/s"
            bar.update(1)
            self.ended(number)
        assert bar.n == len(ready)
        bar.refresh()
        bar.close()
        return ready


def test_answers_on_the_way_make_way_for_those_that_are_known():
    from mergekit_wp.eval.measure import _AnswerCounter

    found, lines = [], []
    counter = _AnswerCounter(SimpleNamespace(add_partial=lambda *answer: found.append(answer)))
    for total in (3, 2):
        lines.append(ProgressLines(total, "task", print))
        counter.begin(lines[-1])
        counter.on_the_way(0.5)
        counter.on_the_way(1.5)
        assert lines[-1].done == 1.5
        counter.add_partial("generate_until", "answer")
        assert lines[-1].done == 1
        counter.add_partial("generate_until", "other")
        counter.on_the_way(0.1)
        assert lines[-1].done == 2.1
        lines[-1].close()
    assert len(found) == 4


def test_by_transformers_tokens_count_until_their_batch_has_answered(world):
    """Of a batch of 2 with room for 6 tokens: 2/6 of an answer a token, and the answers are what they were."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation import MaxLengthCriteria, StoppingCriteriaList

    from mergekit_wp.eval.backends import telling_of_tokens

    model = AutoModelForCausalLM.from_pretrained(world / "one", dtype=torch.float32)
    asked = {"input_ids": torch.tensor([[1, 5, 7], [1, 6, 4]]), "max_length": 9, "pad_token_id": 0, "use_cache": True}
    asked |= {"eos_token_id": [], "do_sample": False}
    told, stopped = [], StoppingCriteriaList([MaxLengthCriteria(7)])
    for criteria, tokens in ((StoppingCriteriaList(), 6), (stopped, 4)):
        told.clear()
        plain = model.generate(stopping_criteria=criteria, **asked)
        found = telling_of_tokens(model.generate, told.append)(stopping_criteria=criteria, **asked)
        assert torch.equal(found, plain)
        assert found.shape == (2, 3 + tokens)
        assert told == [pytest.approx(2 * n / 6) for n in range(1, tokens + 1)]


def test_copies_of_a_model_by_vllm_are_asked_without_a_count(capfd):
    """With `data_parallel_size`, lm-eval's class has no engine in this process."""
    from mergekit_wp.eval import measure
    from mergekit_wp.eval.backends import Backend

    lm = SimpleNamespace(cache_hook=None, **dict.fromkeys(measure._REQUESTS, lambda requests: requests))
    backend = Backend("vllm", {"data_parallel_size": 2})
    settings = measure.Settings("cuda", "auto", "auto", None, False, False, progress_bars=False, backend=backend)
    with measure._told(lm, "m: task", settings, print):
        assert lm.generate_until(["a"]) == ["a"]
    assert capfd.readouterr().out == ""


def test_by_vllm_an_answer_counts_when_it_ends_and_once(monkeypatch, capfd):
    from mergekit_wp.eval import measure
    from mergekit_wp.eval.backends import Backend

    # As TQDM_DISABLE has it, which is read when tqdm is imported.
    monkeypatch.setattr(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))
    parts, moments, kept = [], [], []

    class Told(ProgressLines):
        def __init__(self, *about):
            super().__init__(*about)
            parts.append(self)

    monkeypatch.setattr(measure, "ProgressLines", Told)

    class Model:
        cache_hook = SimpleNamespace(add_partial=lambda *answer: kept.append(answer))
        loglikelihood_rolling = None

        def __init__(self):
            self.model = BatchEngine(lambda number: moments.append((number, parts[-1].done)))

        def generate_until(self, requests):
            for answer in self.model.generate(requests, use_tqdm=False):
                self.cache_hook.add_partial("generate_until", answer)

        loglikelihood = generate_until

    settings = measure.Settings("cpu", "float32", 4, None, False, False, progress_bars=False, backend=Backend("vllm"))
    model = Model()
    with measure._told(model, "m: task", settings, print):
        model.generate_until(["a", "b", "c"])
        model.loglikelihood(["d", "e"])
    assert moments == [(1, 1), (2, 2), (3, 3), (1, 1), (2, 2)]
    assert [(part.done, part.total) for part in parts] == [(3, 3), (2, 2)]
    assert len(kept) == 5
    model.model.ended = lambda _number: None
    with pytest.raises(TypeError):  # as it was: the bar that it is given, which is none
        model.generate_until(["a"])
    assert not capfd.readouterr().err
