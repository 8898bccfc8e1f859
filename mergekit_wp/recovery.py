"""The recovery curve of `--layer auto`, which a score file keeps: how much of the expert's capability steering the base
brings back, R(l) = (level of the base steered after layer l - level of the base) / (level of the expert - that of the
base).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mergekit_wp.console import percent
from mergekit_wp.documents import Count, Number, Text, strict

GRADINGS = ("behaviour", "kl", "none")


@strict
@dataclass(frozen=True)
class TaskRecovery:
    """One task; `steered` and `recovery` have an entry for each layer that was tried.

    grading        behaviour: levels are shares of answers that pass their check; kl: levels are means of
                   -KL(expert || model) of the next token, in nats, the expert's being 0; none: R is undefined
    prompts        how many prompts the levels are means of
    base, expert   levels of the models as they are
    note           why the task was not graded by behaviour, or not at all
    """

    grading: str
    prompts: Count
    base: Number
    expert: Number
    steered: tuple[Number, ...] = ()
    recovery: tuple[Number, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if self.grading not in GRADINGS:
            raise ValueError(f"grading {self.grading!r} of a recovery, expected one of {', '.join(GRADINGS)}")

    def joined(self, layers: tuple[int, ...], other: TaskRecovery, more: tuple[int, ...]) -> TaskRecovery:
        """This, of `layers`, and `other`, the same of `more` layers: in order of the layers."""
        if self.grading == "none":
            return self
        rows = zip(
            layers + more, self.steered + other.steered, self.recovery + other.recovery, strict=True
        )  # fmt: skip
        _layers, steered, recovery = zip(*sorted(rows), strict=True)
        return replace(self, steered=steered, recovery=recovery)


@strict
@dataclass(frozen=True)
class RecoveryCurve:
    """Of one expert: the layers tried, R of every task at each, their mean, and the layer chosen.

    mean        over the tasks whose R is defined, each cut to -1..1, so that no task outweighs the others
    positions   what was steered (see `steering`)
    max_tokens  longest answer that was generated
    note        how the choice was made, where it is not simply the best mean
    """

    layers: tuple[Count, ...]
    tasks: dict[Text, TaskRecovery]
    mean: tuple[Number, ...]
    chosen: Count
    positions: Text
    max_tokens: Count
    note: str = ""

    def __post_init__(self) -> None:
        wanted = len(self.layers)
        if not wanted or len(self.mean) != wanted:
            raise ValueError(f"a recovery curve of {wanted} layers with {len(self.mean)} means")
        for name, task in self.tasks.items():
            if task.grading != "none" and (len(task.recovery) != wanted or len(task.steered) != wanted):
                raise ValueError(f"the recovery of task {name} has {len(task.recovery)} layers, expected {wanted}")

    def summary(self) -> str:
        """A few lines for the terminal: every layer's mean, the chosen one marked, and what was not graded."""
        tried = ", ".join(
            f"{'*' if layer == self.chosen else ''}{layer}: {percent(value)}"
            for layer, value in zip(self.layers, self.mean, strict=True)
        )
        lines = [f"Recovery by layer: {tried}", *([self.note] if self.note else [])]
        notes: dict[str, list[str]] = {}
        for name, task in self.tasks.items():
            if task.note:
                notes.setdefault(task.note, []).append(name)
        return "\n".join([*lines, *(f"  {', '.join(names)}: {note}" for note, names in notes.items())])
