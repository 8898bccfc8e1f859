"""lm-eval's official code of the six benchmarks, unchanged, on small files in the official schemas.

A stand-in for a model answers right or wrong on purpose: right must give 1 and wrong 0, in each metric of each
task of both suites.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import nltk
import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from official_world import (
    FOLLOWED,
    GSM8K,
    HUMANEVAL,
    IFEVAL,
    IGNORED,
    MATH,
    MBPP,
    SUBJECTS,
    write_published,
    write_punkt_tab,
    write_world,
)

from mergekit_wp.errors import BadInput
from mergekit_wp.eval import tasks
from mergekit_wp.eval.suite import Suite, SuiteTask, read_suite
from mergekit_wp.eval.tasks import ReadyTask, leaves, ready_tasks, task_manager
from mergekit_wp.files import shipped

SUITES = ["lm-eval", "paper"]
COLUMNS = ["HumanEval", "MBPP", "MMLU", "MATH", "GSM8K", "IFEval"]
ITEMS = {"HumanEval": len(HUMANEVAL), "MBPP": len(MBPP), "MMLU": 57, "MATH": sum(map(len, MATH.values())),
         "GSM8K": len(GSM8K), "IFEval": len(IFEVAL)}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, caches and NLTK data for all tests here: nothing comes from the Hub."""
    folder = write_world(tmp_path_factory.mktemp("official"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setenv("HF_ALLOW_CODE_EVAL", "1")
        patch.setattr(nltk.data, "path", [str(folder / "nltk")])
        (folder / "nltk").mkdir()
        write_punkt_tab(folder / "nltk")
        yield folder


@pytest.fixture(scope="module")
def ready(world: Path) -> Iterator[dict[str, dict[str, ReadyTask]]]:
    """The tasks of both suites by column, out of one index of lm-eval's, which takes seconds to read."""
    suites = {name: read_suite(shipped(f"eval/{name}.yaml")) for name in SUITES}
    index = task_manager([task.task for suite in suites.values() for task in suite.tasks], None)
    with mock.patch.object(tasks, "task_manager", return_value=index):
        yield {
            name: {task.spec.column: task for task in ready_tasks(suite, None, allow_code=True)}
            for name, suite in suites.items()
        }


@pytest.mark.parametrize("name", SUITES)
def test_published_files_give_what_the_hub_gives(
    ready: dict[str, dict[str, ReadyTask]], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--data`: rows, types, order, shots and prompts, of every task; and no cache of the Hub is looked at."""
    write_published(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "no such cache")
    suite = replace(read_suite(shipped(f"eval/{name}.yaml")), data=tmp_path / "data")
    for task in ready_tasks(suite, None, allow_code=True):
        other = ready[name][task.spec.column]
        assert list(task.loaded["tasks"]) == list(other.loaded["tasks"])
        assert task.key != other.key
        for leaf, twin in zip(task.loaded["tasks"].values(), other.loaded["tasks"].values(), strict=True):
            assert list(leaf.eval_docs) == list(twin.eval_docs)
            for each in (leaf, twin):
                each.set_fewshot_seed(seed=1234)
            shots = leaf.get_config("num_fewshot")
            for doc in leaf.eval_docs:
                assert leaf.fewshot_context(doc, num_fewshot=shots) == twin.fewshot_context(doc, num_fewshot=shots)


@dataclass
class StandIn(LM):
    """Answers a request by `answer(task, doc, item)`; like a real model, it stops where it is told to."""

    answer: Callable[[str, dict[str, Any], int], str]
    asked: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.asked += requests
        return [self._stopped(request) for request in requests]

    def _stopped(self, request: Any) -> str:
        text = self.answer(request.task_name, request.doc, request.doc_id)
        for stop in request.args[1]["until"]:
            text = text.split(stop)[0]
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.asked += requests
        chosen = [self.answer(r.task_name, r.doc, r.doc_id) == r.args[1].strip() for r in requests]
        return [(-0.5 if ok else -3.0, ok) for ok in chosen]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


def measure(task: ReadyTask, model: StandIn) -> dict[str, float]:
    """Every metric of the task, by its key."""
    found: Any = evaluate(model, task.loaded, log_samples=False, confirm_run_unsafe_code=True)
    results = found["results"][task.spec.task]
    return {key: value for key, value in results.items() if "," in key and "_stderr" not in key}


def right(task: str, doc: dict[str, Any], item: int) -> str:
    """The right answer, in the words of an expert for the task; maths in several ways."""
    if task == "humaneval":
        return doc["canonical_solution"]
    if task == "mbpp":
        return doc["code"] + "\n[DONE]\nand more"
    if task.startswith("mmlu"):
        return "ABCD"[doc["answer"]]
    if task == "ifeval":
        return FOLLOWED[doc["key"]]
    if task == "gsm8k":
        return " " + doc["answer"] + "\n\nQuestion: and more"
    if task == "wp_gsm8k":
        number = doc["answer"].split("#### ")[1]
        ways = ["{}", "${}.", "{} dollars.\nI am sure of it.", "**{}**."]
        return " We count: 3 + 4 = 7.\nThe answer is: " + ways[item % 4].format(number)
    if task.startswith("hendrycks_math"):
        return f" We find ${doc['answer']}$."
    assert task.startswith("wp_math"), task
    ways = ["Thus 7 + 1 = 8.\n\n# Answer\n\n\\boxed{{{}}}", "Thus 7 + 1 = 8.\nThe answer is: ${}$."]
    return " " + ways[item % 2].format(doc["answer"])


def wrong(task: str, doc: dict[str, Any], item: int, outside: Path) -> str:
    """A wrong answer; programs that are right but for what they may not do."""
    if task == "humaneval":
        solution = doc["canonical_solution"]
        return [
            "    return 'wrong'\n",
            "    while True:\n        pass\n",
            solution + "\nimport os\nos._exit(0)\n",
            "    import socket\n    socket.socket()\n" + solution,
            f"    open({str(outside)!r}, 'w').write('x')\n" + solution,
        ][item]
    if task == "mbpp":
        code = doc["code"]
        return [
            code.replace("return", "return not"),
            "import sys\r\nsys.exit(0)\r\n" + code,
            "print('passed')\r\n",
            code + "\r\nimport os\r\nos.kill(os.getppid(), 9)",
        ][item]
    if task.startswith("mmlu"):
        return "ABCD"[(doc["answer"] + 1) % 4]
    if task == "ifeval":
        return IGNORED[doc["key"]]
    if "gsm8k" in task:
        return " So it is 12345.\n#### 12345"
    return [" The answer is: $98765$.", " It is $x$ and so \\boxed{98765}."][item % 2]


def drawn(task: str, item: int) -> bool:
    return zlib.crc32(f"{task} {item} 0".encode()) % 2 == 0


@pytest.mark.parametrize("name", SUITES)
def test_a_model_that_is_right_gets_one_in_every_metric(ready: dict[str, dict[str, ReadyTask]], name: str) -> None:
    assert list(ready[name]) == COLUMNS
    for column, task in ready[name].items():
        model = StandIn(right)
        found = measure(task, model)
        assert found == dict.fromkeys(found, 1.0), column
        assert task.spec.metric in found
        assert len({(request.task_name, request.doc_id) for request in model.asked}) == ITEMS[column]


@pytest.mark.parametrize("name", SUITES)
def test_a_model_that_is_wrong_gets_none(ready: dict[str, dict[str, ReadyTask]], name: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    outside = tmp_path / "written"
    for column, task in ready[name].items():
        found = measure(task, StandIn(lambda *asked: wrong(*asked, outside=outside)))
        assert found == dict.fromkeys(found, 0.0), column
        assert task.spec.metric in found
    assert not outside.exists()


@pytest.mark.parametrize("name", SUITES)
def test_a_model_that_is_right_at_times_gets_its_share(
    ready: dict[str, dict[str, ReadyTask]], name: str, tmp_path: Path
) -> None:
    def mixed(task: str, doc: dict[str, Any], item: int) -> str:
        return right(task, doc, item) if drawn(task, item) else wrong(task, doc, item, tmp_path / "written")

    for column, task in ready[name].items():
        model = StandIn(mixed)
        share = measure(task, model)[task.spec.metric]
        places = {(request.task_name, request.doc_id) for request in model.asked}
        assert share == pytest.approx(sum(drawn(*place) for place in places) / ITEMS[column]), column
        assert 0 < share < 1, column


def test_the_papers_tasks_are_asked_as_aim_asks_them(ready: dict[str, dict[str, ReadyTask]]) -> None:
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{}\n\n### Response: Let's think step by step."
    )
    for column, field_name in (("MATH", "problem"), ("GSM8K", "question")):
        model = StandIn(right)
        measure(ready["paper"][column], model)
        for request in model.asked:
            text, how = request.args
            assert text == prompt.format(request.doc[field_name])
            assert how["max_gen_toks"] == 1024
            assert not how["do_sample"]
            assert set(how["until"]) >= {"</s>", "\n\nQuestion:"}
    for column, shots in (("HumanEval", 0), ("MBPP", 3), ("MMLU", 0), ("IFEval", 0)):
        task = ready["paper"][column]
        assert not task.spec.apply_chat_template
        assert {leaf.get_config("num_fewshot") for leaf in task.loaded["tasks"].values()} == {shots}


def test_lm_evals_own_tasks_have_room_to_answer(ready: dict[str, dict[str, ReadyTask]]) -> None:
    """Left alone, lm-eval cuts MBPP, MATH and GSM8K off at 256 tokens."""
    shots = {"HumanEval": 0, "MBPP": 3, "MATH": 0, "GSM8K": 5, "IFEval": 0}
    for column, task in ready["lm-eval"].items():
        if column == "MMLU":
            continue
        model = StandIn(right)
        measure(task, model)
        assert all(request.args[1]["max_gen_toks"] >= 1024 for request in model.asked), column
        assert {leaf.get_config("num_fewshot") for leaf in task.loaded["tasks"].values()} == {shots[column]}


def test_the_suite_shows_the_metric_that_understands_wizardmath(ready: dict[str, dict[str, ReadyTask]]) -> None:
    """strict-match wants "#### N"; flexible-extract takes the last number."""
    task = ready["lm-eval"]["GSM8K"]
    number = lambda doc: doc["answer"].split("#### ")[1]  # noqa: E731
    found = measure(task, StandIn(lambda name, doc, item: f" Step 1: add.\nThe answer is: {number(doc)}."))
    assert found == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    assert task.spec.metric == "exact_match,flexible-extract"


def test_mbpp_instruct_is_in_no_suite_since_it_loses_right_code(ready: dict[str, dict[str, ReadyTask]]) -> None:
    from lm_eval.tasks.mbpp.utils import extract_code_blocks

    code = "def f(x):\n    return x"
    assert extract_code_blocks(f"{code}\n```") != code  # "def" is taken for the name of a language
    for name in SUITES:
        assert "mbpp_instruct" not in {task.spec.task for task in ready[name].values()}


def test_without_punkt_tab_ifeval_fails_only_when_it_grades(
    ready: dict[str, dict[str, ReadyTask]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading and generating work without it: hence the check beforehand."""
    from lm_eval.tasks.ifeval import instructions_util
    from nltk.tokenize import _get_punkt_tokenizer

    monkeypatch.setattr(nltk.data, "path", [])
    instructions_util._get_sentence_tokenizer.cache_clear()
    nltk.data.clear_cache()
    _get_punkt_tokenizer.cache_clear()
    model = StandIn(right)
    with pytest.raises(LookupError, match="punkt_tab"):
        measure(ready["paper"]["IFEval"], model)
    assert len(model.asked) == len(IFEVAL)


def test_a_change_of_the_sandbox_measures_programs_anew(
    ready: dict[str, dict[str, ReadyTask]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mergekit_wp.eval import code_eval

    changed = tmp_path / "code_eval.py"
    changed.write_text(Path(code_eval.__file__).read_text() + "\n# changed\n")
    monkeypatch.setattr(code_eval, "__file__", str(changed))
    suite = read_suite(shipped("eval/lm-eval.yaml"))
    suite = replace(suite, tasks=tuple(task for task in suite.tasks if task.column != "MMLU"))
    for task in ready_tasks(suite, None, allow_code=True):
        column = task.spec.column
        assert (task.key == ready["lm-eval"][column].key) == (column not in ("HumanEval", "MBPP")), column


def test_a_task_that_runs_code_by_itself_is_refused(ready: dict[str, dict[str, ReadyTask]]) -> None:
    """lm-eval's cruxeval forks the process that holds the model, and knows nothing of the sandbox."""
    suite = Suite("s", (SuiteTask("cruxeval_output", "C", "pass@1,create_test"),))
    with pytest.raises(BadInput, match=r"cruxeval_output: .*utils\.py runs model-written code by means of its own"):
        ready_tasks(suite, None, allow_code=True)
    with pytest.raises(BadInput, match="--allow-code-execution"):
        ready_tasks(suite, None, allow_code=False)


def test_our_tasks_are_found_without_reading_lm_evals_fourteen_thousand(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        manager = task_manager(["wp_gsm8k", "wp_math"], folder)
        assert len(manager.all_tasks) < 100
        assert [leaf["task"] for leaf in leaves(manager, "wp_math")] == [f"wp_math_{name}" for name in SUBJECTS]


def test_a_suites_own_task_wins_over_ours(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: wp_gsm8k\ndataset_path: json\n")
    assert [leaf["dataset_path"] for leaf in leaves(task_manager(["wp_gsm8k"], tmp_path), "wp_gsm8k")] == ["json"]
