"""What models say to a study's prompts, and whether it is right.

A model with a set of the other's components is never written (`exchanged`): the recipient's layers with the donor's
slices. So without a component it is the recipient, with its own vocabulary and end tokens. Answers are greedy, end
where base or expert would end, or at a text that the check names, and are graded by the pair's `check`, strictly.

Small models answer many at a time, in the rows of one batch (`ExchangedRows`): there a pass of one is mostly calls.
Answers and verdicts are kept a model and task at a time (`Resume`); models that answer together are asked again
together, so that a run that goes on writes what an unbroken one does, to the byte.

Legend: N prompts, A tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from mergekit_wp.console import StartProgress, Tick
from mergekit_wp.documents import now, versions
from mergekit_wp.foreign import logger
from mergekit_wp.scores import Scores
from mergekit_wp.scoring.anchor.graders import Check, parse_check, preflight
from mergekit_wp.scoring.batching import Tokens
from mergekit_wp.scoring.greedy import Greedy, generate_answers, rows_worth
from mergekit_wp.scoring.models.exchanged import Exchange, ExchangedRows
from mergekit_wp.scoring.models.load import ModelPair, load_pair
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.score import pairs_of
from mergekit_wp.study.answer_plan import Model
from mergekit_wp.study.held_out import check_tasks, unseen
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.study_spec import Answering
from mergekit_wp.subset import Subset

LOG = logger(__name__)
CODE = (
    "study/answer_plan.py", "study/answer_run.py", "study/set_plan.py", "study/set_effects.py", "study/held_out.py",
    "study/sets.py", "scoring/models/exchanged.py", "scoring/models/merged.py", "scoring/greedy.py",
    "scoring/anchor/graders.py", "scoring/metrics.py", "geometry.py",
)  # fmt: skip
"""What answers and verdicts depend on, for the parts that have models answer."""
_REPEATS = 4
"""Tokens in a row of which a loop has few distinct ones."""


@dataclass(frozen=True)
class GradedTask:
    """The prompts of a task that can be graded, [N], in their order: as text, as tokens, and how answers are graded."""

    task: str
    texts: list[str]
    prompts: Tokens
    checks: list[Check]
    held_out: bool
    known: bool


@dataclass(frozen=True)
class Said:
    """What a model said to a task's prompts, [N]; a loop: fewer than half of the runs of 4 tokens are distinct."""

    answers: Tokens
    texts: list[str]
    passed: list[bool]

    @cached_property
    def loops(self) -> list[bool]:
        return [_loops(answer) for answer in self.answers]

    @property
    def empty(self) -> list[bool]:
        return [not text.strip() for text in self.texts]


def _loops(answer: Sequence[int]) -> bool:
    runs = [tuple(answer[i : i + _REPEATS]) for i in range(len(answer) - _REPEATS + 1)]
    return len(set(runs)) < len(runs) / 2


def questions_of(inputs: Inputs, files: Mapping[str, Scores], how: Answering) -> tuple[list[GradedTask], list[str]]:
    """Of every task that one of the files scores; and what is left out, in sentences. Raises `BadInput`."""
    job, ready = inputs.ready
    check_tasks(inputs, [task.task for task in ready.tasks], job.pairs)
    metas = (scores.meta for scores in inputs.scores.values())
    chosen = unseen(job, metas, ready.tasks, ready.style)
    found, left_out = [], []
    for pairs, task in zip(pairs_of(job), ready.tasks, strict=True):
        if not any(task.task in scores.tasks for scores in files.values()):
            continue
        checks = {i: parse_check(raw, f"task {task.task}") for i, raw in enumerate(task.checks) if raw}
        graded = [i for i in chosen[task.task].numbers if i in checks]
        may = [i for i in graded if inputs.allow_code or not checks[i].runs_code]
        if not graded:
            left_out.append(f"{task.task}: its pairs carry no check; give them one to have answers graded.")
        elif len(may) < len(graded):
            left_out.append(
                f"{task.task}: grading {len(graded) - len(may)} of {len(graded)} prompts would run code that models "
                "wrote; --allow-code-execution permits it."
            )
        if may := may[: how.prompts]:
            found.append(GradedTask(
                task.task, [pairs.scoring[i].prompt for i in may], [task.scoring[i] for i in may],
                [checks[i] for i in may], chosen[task.task].held_out, chosen[task.task].known,
            ))  # fmt: skip
            preflight(found[-1].checks, task.task)
    return found, left_out


@dataclass(frozen=True)
class Speakers:
    """The two models, and how they answer."""

    inputs: Inputs
    pair: ModelPair
    rules: Greedy

    @classmethod
    def of(cls, inputs: Inputs, how: Answering) -> Speakers:
        """Loads them. Raises `BadInput` as `load_pair`."""
        job, ready = inputs.ready
        pair = load_pair(job, ready.checked)
        LOG.info(pair.reason)
        models = [pair.base.model, pair.expert.model]
        rules = Greedy.of(models, ready.tokenizer, how.tokens, job.batch_size)
        vocabulary = min(rules.vocabulary, ready.checked.vocabulary)
        return cls(inputs, pair, replace(rules, vocabulary=vocabulary, context=ready.checked.context_limit))

    def decides(self, questions: Sequence[GradedTask]) -> dict[str, object]:
        """All that answers and verdicts depend on, beside the model that gives them, for `Resume`."""
        pair, rules = self.pair, self.rules
        return {
            "models": [asdict(print_) for print_ in self.inputs.fingerprints.values()],
            "prompts": [(each.task, each.prompts, [asdict(check) for check in each.checks]) for each in questions],
            "rules": [sorted(rules.eos), rules.vocabulary, rules.context, rules.max_tokens],
            "ran": [str(pair.device.type), str(pair.dtype), pair.offload],
            "versions": versions(),
        }

    def stack(self, removed: bool) -> ExchangedRows:
        """What takes exchanges: the base, or the expert."""
        ends = (self.pair.expert, self.pair.base) if removed else (self.pair.base, self.pair.expert)
        return ExchangedRows(*ends, self.pair.geometry)

    def rows(self, stack: ExchangedRows, question: GradedTask) -> int:
        """How many prompts a pass takes, of whatever models."""
        return rows_worth(stack, self.rules, max(map(len, question.prompts)))

    def answer(
        self, stack: ExchangedRows, question: GradedTask, sets: Sequence[Subset], rows: int,
        tick: Tick = lambda _n: None,
    ) -> list[Tokens]:  # fmt: skip
        """What the model with each of the sets says to the prompts, `rows` a pass; `tick` hears of answers."""
        count = len(question.prompts)
        stack.set_each(
            [Exchange(subset) for subset in sets], [model for model in range(len(sets)) for _ in range(count)]
        )
        found = generate_answers(
            stack, self.rules, [*question.prompts] * len(sets),
            lambda n: tick(n / self.rules.max_tokens),
            ended=lambda number, answer: self.rules.holds(answer, question.checks[number % count].until),
            rows=rows,
        )  # fmt: skip
        return [found[begin : begin + count] for begin in range(0, len(found), count)]

    def texts(self, question: GradedTask, answers: Tokens) -> list[str]:
        return [self.rules.text(*both) for both in zip(question.prompts, answers, strict=True)]


Asked = Mapping[str, Model]
"""The models that a question is put to, by their keys."""


def answered(
    speakers: Speakers, questions: Sequence[GradedTask], asked: Sequence[Asked], resume: Resume, progress: StartProgress
) -> list[dict[str, Said]]:
    """What each model said to each question, by its key. Raises `BadInput` where memory does not suffice."""
    plan = [_by_size(models) for models in asked]
    resume.begin({**speakers.decides(questions), "asked": plan}, now())
    resume.spare_others()
    total = sum(len(models) * len(each.prompts) for models, each in zip(asked, questions, strict=True))
    tick, found = progress(total, "answering", "answer"), [dict[str, Said]() for _ in questions]
    graders = [_Grader(each) for each in questions]
    for removed in (False, True):
        stack = speakers.stack(removed)
        for number, question in enumerate(questions):
            steps = [step for step, key in enumerate(plan[number]) if asked[number][key].removed == removed]
            rows = speakers.rows(stack, question)
            size = max(1, rows // len(question.prompts))
            blank = _packed(question, speakers.rules.max_tokens, [], [])
            for some in (steps[begin : begin + size] for begin in range(0, len(steps), size)):
                kept = [resume.load(number, step, blank) for step in some]
                known = [each for each in kept if each is not None]
                if len(known) == len(some):
                    tick(len(known) * len(question.prompts))
                    said = [_unpacked(each) for each in known]
                else:
                    sets = [asked[number][plan[number][step]].subset for step in some]
                    answers = speakers.answer(stack, question, sets, rows, tick)
                    said = [(each, graders[number](speakers.texts(question, each))) for each in answers]
                    for step, each in zip(some, said, strict=True):
                        resume.save(number, step, _packed(question, speakers.rules.max_tokens, *each))
                for step, (answers_N, passed) in zip(some, said, strict=True):
                    found[number][plan[number][step]] = Said(answers_N, speakers.texts(question, answers_N), passed)
    return found


def _by_size(asked: Asked) -> list[str]:
    """Sets of about one size answer together: what only some of them have costs all of them."""
    return sorted(asked, key=lambda key: (asked[key].subset.count, key))


class _Grader:
    """Grades a question's answers, equal ones once: running code takes a process."""

    def __init__(self, question: GradedTask):
        self.question, self.known = question, dict[tuple[int, str], bool]()

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        for at in enumerate(texts):
            if at not in self.known:
                self.known[at] = self.question.checks[at[0]].passes(at[1])
        return [self.known[at] for at in enumerate(texts)]


def _packed(question: GradedTask, tokens: int, answers: Tokens, passed: Sequence[bool]) -> dict[str, torch.Tensor]:
    """As tensors: answers [N, A], -1 behind their ends; passed [N]."""
    count = len(question.prompts)
    ids_NA = torch.full((count, tokens), -1, dtype=torch.int32)
    for row, answer in enumerate(answers):
        ids_NA[row, : len(answer)] = torch.tensor(answer)
    return {"answers": ids_NA, "passed": torch.tensor([*passed] or [False] * count, dtype=torch.uint8)}


def _unpacked(kept: Mapping[str, torch.Tensor]) -> tuple[Tokens, list[bool]]:
    return [row[row >= 0].tolist() for row in kept["answers"]], kept["passed"].bool().tolist()
