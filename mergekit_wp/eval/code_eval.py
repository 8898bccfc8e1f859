"""code_eval of Hugging Face's `evaluate`, run in our sandbox.

lm-eval's HumanEval and MBPP call `evaluate.load("code_eval")`, which needs the Hub and runs each program in a fork
of the process that holds the model. This has the same interface, verdicts and pass@k.
Source: huggingface/evaluate, metrics/code_eval/code_eval.py.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import comb
from typing import Any
from unittest import mock

from mergekit_wp.sandbox import run_programs


class CodeEval:
    """What `evaluate.load("code_eval")` returns, as far as tasks use it."""

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int | None = None,
        timeout: float = 3.0,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k over problems: `predictions[i]` are candidates for the test `references[i]`.

        Returns ({"pass@1": ...}, {i: [(j, {"task_id", "passed", "result", "completion_id"}), ...]}); a k that
        exceeds some problem's number of candidates is left out. `timeout` is seconds of CPU time a program.
        Raises `ValueError` without consent (HF_ALLOW_CODE_EVAL=1, which --allow-code-execution sets).
        """
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("model-written Python runs only with consent: set HF_ALLOW_CODE_EVAL=1")
        places = [(i, j) for i, candidates in enumerate(predictions) for j in range(len(candidates))]
        programs = [f"{predictions[i][j]}\n{references[i]}" for i, j in places]
        results: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        for (i, j), verdict in zip(places, run_programs(programs, max(1, round(timeout)), num_workers), strict=True):
            found = {"task_id": i, "passed": verdict.passed, "result": verdict.result, "completion_id": j}
            results[i].append((j, found))
        counts = [(len(tried), sum(found["passed"] for _, found in tried)) for tried in results.values()]
        possible = [size for size in k if all(total >= size for total, _ in counts)]
        return {f"pass@{size}": _mean([pass_at_k(n, c, size) for n, c in counts]) for size in possible}, results


def pass_at_k(total: int, correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k candidates passes: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al., Evaluating Large Language Models Trained on Code (2021), equation 1.
    """
    return 1.0 - comb(total - correct, k) / comb(total, k)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def sandboxed() -> Iterator[None]:
    """While it lasts, `evaluate.load("code_eval")` gives `CodeEval`; every other name is loaded as ever."""
    import evaluate

    original = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval() if path == "code_eval" else original(path, *arguments, **options)

    with mock.patch.object(evaluate, "load", load):
        yield
