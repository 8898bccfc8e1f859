"""From what models said to rows: shares of right answers with intervals, curves with their controls, means over tasks,
the matrix across tasks.

    right           the share of a task's prompts whose answer passes its check; low, high: Wilson's interval, 95 %
    gained          right beyond that of the recipient: the base where the top is restored, the expert where it is
                    removed (then it is negative where something is lost)
    beyond_matched  right beyond the mean of the sets drawn in the same layers

Of a mean over tasks Wilson's interval is that of as many prompts as would give its variance. Intervals of differences
are bootstraps over prompts, drawn for all models of a task together, so that what is hard about a prompt cancels; those
beyond random sets hold what other sets would have given, too (`Beyond`), which two sets of one task hardly say. An
interval of 0 to 0 says that no prompt changed its verdict.

Legend: N prompts, R resamples, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from statistics import fmean
from typing import Any

import numpy as np

from mergekit_wp.intervals import widened
from mergekit_wp.scores import Scores
from mergekit_wp.study.answer_plan import BASE, EXPERT, Model
from mergekit_wp.study.answer_run import GradedTask, Said
from mergekit_wp.study.set_effects import RESAMPLES, Beyond
from mergekit_wp.study.set_plan import MATCHED, RANDOM, TOP, WHOLE
from mergekit_wp.study.set_rows import REMOVED, RESTORED

Row = dict[str, Any]
_Z = 1.959964  # of the normal distribution, 95 %
_MOST_PERMUTATIONS = 5040


def wilson(share: float, count: float) -> tuple[float, float]:
    """The interval (95 %) of a share of `count` answers."""
    spread = _Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Answers:
    """Of one task: the question, the models that it was put to, and what each said, by its key."""

    question: GradedTask
    models: Sequence[Model]
    said: Mapping[str, Said]

    def passed_N(self, model: Model) -> np.ndarray:
        return np.array(self.said[model.key].passed, dtype=float)

    def find(self, what: str, removed: bool, scores: str = "", kinds: str = "", share: float = 0.0) -> list[Model]:
        """By the task's own ranking; of random sets, all draws."""
        wanted = (what, removed, scores, kinds, share)
        own = [model for model in self.models if model.of in ("", self.question.task)]
        return [m for m in own if (m.what, m.removed, m.scores, m.kinds, m.share) == wanted]

    @property
    def ends(self) -> tuple[Model, Model]:
        """Base and expert."""
        (base,), (expert,) = self.find(BASE, False), self.find(EXPERT, True)
        return base, expert


@dataclass
class AnswerRows:
    """All rows. models: one a task and model; curves: one a task, direction, file, kind and share; means: of these."""

    seed: int
    models: list[Row] = field(default_factory=list)
    curves: list[Row] = field(default_factory=list)
    _drawn: list[dict[str, Beyond]] = field(default_factory=list)

    def add(self, answers: Answers) -> None:
        """Take the rows of a task."""
        question, count = answers.question, len(answers.question.prompts)
        self.models += [_model_row(answers, model) for model in answers.models]
        # Tasks have prompts of their own, so their resamples must not go together.
        random = np.random.default_rng([self.seed, *question.task.encode()])
        drawn_RN = random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
        base, expert = answers.ends
        for model in (m for m in answers.models if m.what in (TOP, WHOLE) and m.of == question.task):
            place = (model.removed, model.scores, model.kinds, model.share)
            drawn, matched = answers.find(RANDOM, *place), answers.find(MATCHED, *place)
            right_N, recipient_N = answers.passed_N(model), answers.passed_N(expert if model.removed else base)
            found = {"gained": _over(right_N, [recipient_N], drawn_RN, random_sets=False)}
            if matched:
                others = [answers.passed_N(each) for each in matched]
                found["beyond_matched"] = _over(right_N, others, drawn_RN, random_sets=True)
            self._drawn.append(found)
            self.curves.append({
                "task": question.task, **_where(model), "size": model.subset.count, "prompts": count,
                "base": float(answers.passed_N(base).mean()), "expert": float(answers.passed_N(expert).mean()),
                "right": float(right_N.mean()),
                **dict(zip(("right_low", "right_high"), wilson(float(right_N.mean()), count), strict=True)),
                **_estimates(found), RANDOM: _rights(answers, drawn), MATCHED: _rights(answers, matched),
            })  # fmt: skip

    def means(self) -> list[Row]:
        """Means over the tasks of a file, with the intervals of the means."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, row in enumerate(self.curves):
            groups.setdefault(tuple(row[key] for key in ("direction", "scores", "kinds", "share")), []).append(number)
        return [self._mean(numbers) for numbers in groups.values()]

    def _mean(self, numbers: Sequence[int]) -> Row:
        rows, drawn = [self.curves[n] for n in numbers], [self._drawn[n] for n in numbers]
        found = {key: rows[0][key] for key in ("direction", "scores", "kinds", "share")}
        found |= {"tasks": len(rows), "size": fmean(row["size"] for row in rows)}
        found |= {key: fmean(row[key] for row in rows) for key in (BASE, EXPERT, "right")}
        count = len(rows) ** 2 / sum(1 / row["prompts"] for row in rows)
        found |= dict(zip(("right_low", "right_high"), wilson(found["right"], count), strict=True))
        for name in ("gained", "beyond_matched"):
            known = [each[name] for each in drawn if name in each]
            found |= _estimate(name, Beyond.mean(known) if known else None)
        for name in (RANDOM, MATCHED):
            each = [row[name] for row in rows if row[name] is not None]
            found[name] = np.mean(each, axis=0).tolist() if each else None
        return found


def _where(model: Model) -> Row:
    direction = REMOVED if model.removed else RESTORED
    return {"direction": direction, "scores": model.scores, "kinds": model.kinds, "share": model.share}


def _model_row(answers: Answers, model: Model) -> Row:
    said, count = answers.said[model.key], len(answers.question.prompts)
    low, high = wilson(sum(said.passed) / count, count)
    own = {} if model.what in (BASE, EXPERT) else _where(model)
    empty = dict.fromkeys(("direction", "scores", "kinds", "share"))
    return {
        "task": answers.question.task, "model": model.what, **{**empty, **own}, "of": model.of or None,
        "draw": model.draw, "size": model.subset.count, "prompts": count, "right": sum(said.passed) / count,
        "low": low, "high": high, "empty": sum(said.empty) / count, "loops": sum(said.loops) / count,
        "tokens": fmean(map(len, said.answers)),
    }  # fmt: skip


def _over(right_N: np.ndarray, others_DN: Sequence[np.ndarray], drawn_RN: np.ndarray, *, random_sets: bool) -> Beyond:
    """Right answers beyond those of another model, or beyond the mean of models with random sets."""
    part_N, count = right_N - np.mean(others_DN, axis=0), len(right_N)
    # One prompt cannot be resampled.
    drawn_R = widened(drawn_RN @ part_N, part_N.mean(), count) if count > 1 else np.full(len(drawn_RN), np.nan)
    if random_sets:
        return Beyond.of(float(right_N.mean()), np.mean(others_DN, axis=1), drawn_R)
    return Beyond(float(part_N.mean()), drawn_R, (), ())


def _estimates(found: Mapping[str, Beyond]) -> Row:
    """Differences, each with its interval."""
    return _estimate("gained", found["gained"]) | _estimate("beyond_matched", found.get("beyond_matched"))


def _estimate(name: str, found: Beyond | None) -> Row:
    low, high = (None, None) if found is None else found.interval
    return {name: None if found is None else found.value, f"{name}_low": low, f"{name}_high": high}


def _rights(answers: Answers, models: Sequence[Model]) -> list[float] | None:
    """Of each draw."""
    return [float(answers.passed_N(model).mean()) for model in models] or None


def across_tasks(every: Sequence[Answers], files: Mapping[str, Scores], kinds: str, share: float) -> list[Row]:
    """Of each file and direction the matrix over tasks: right answers to the prompts of one task by the model with the
    top set of another; none where a file ranks one task alone.

    own      mean of right - recipient's right, each task by its own set; others: by the sets of the other tasks
    p        how often tasks drawn anew for the sets have as much of it by "their own" sets, of all permutations of the
             tasks (of more than seven tasks, 5,000 drawn): how surely a set serves the task that it was ranked for
    """
    found = []
    for name, scores in files.items():
        own = [each for each in every if each.question.task in scores.tasks]
        tasks = [each.question.task for each in own]
        if len(tasks) < 2:
            continue
        for removed in (False, True):
            right_TT = [[_right(each, name, of, removed, kinds, share) for each in own] for of in tasks]
            if any(value is None for line in right_TT for value in line):
                continue
            recipient_T = np.array([each.passed_N(each.ends[removed]).mean() for each in own])
            gained_TT = np.array(right_TT, dtype=float) - recipient_T
            found.append({
                "scores": name, "direction": REMOVED if removed else RESTORED, "kinds": kinds, "share": share,
                "tasks": tasks, "right": right_TT, "recipient": recipient_T.tolist(), **_diagonal(gained_TT, removed),
            })  # fmt: skip
    return found


def _right(answers: Answers, scores: str, of: str, removed: bool, kinds: str, share: float) -> float | None:
    for model in answers.models:
        if (model.what, model.scores, model.of, model.removed, model.kinds, model.share) == (
            TOP, scores, of, removed, kinds, share,
        ):  # fmt: skip
            return float(answers.passed_N(model).mean())
    return None


def _diagonal(gained_TT: np.ndarray, removed: bool) -> Row:
    """The diagonal beside the rest, and the permutation test: more of it restored, less removed."""
    count = len(gained_TT)
    sign, columns = -1 if removed else 1, np.arange(count)
    own = float(np.trace(gained_TT)) / count
    others = float(gained_TT.sum() - np.trace(gained_TT)) / (count * (count - 1))
    if math.factorial(count) <= _MOST_PERMUTATIONS:
        orders = np.array(list(permutations(range(count))))
    else:
        random = np.random.default_rng(0)
        orders = np.stack([columns, *(random.permutation(count) for _ in range(_MOST_PERMUTATIONS - 1))])
    drawn = sign * gained_TT[orders, columns].mean(1)
    return {"own": own, "others": others, "p": float((drawn >= sign * own - 1e-12).mean())}


def steered(files: Mapping[str, Scores]) -> list[Row]:
    """Fig. 34: what steering the base along a direction brings, where score files looked for their anchor layer by
    answers (`layer: auto`): right answers of base, expert and the base steered at the best layer."""
    found = []
    for name, scores in files.items():
        curve = scores.meta.recovery
        for task, each in (curve.tasks if curve else {}).items():
            if curve and each.grading == "behaviour":
                right, layer = max(zip(each.steered, curve.layers, strict=True), key=lambda both: both[0])
                found.append({
                    "scores": name, "task": task, "prompts": each.prompts, "base": each.base, "expert": each.expert,
                    "steered": right, "layer": layer,
                })  # fmt: skip
    return found
