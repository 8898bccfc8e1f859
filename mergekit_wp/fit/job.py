"""A fit job: a base, the experts that are to be merged and the prompts of each, from a YAML file.

base: ./base
experts:
  - {expert: ./maths, pairs: maths.jsonl}
  - {expert: ./code, pairs: "builtin:code", scores: scores/code.safetensors}
family: component
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.choices import FIT_FAMILIES, FIT_STARTS, OFFLOADS
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.fields import (
    Form,
    ValueKind,
    described,
    first_wrong,
    groups,
    json_schema,
    number,
    one_of,
    rows,
    same,
    text,
    whole,
)
from mergekit_wp.files import expand_home, read_yaml_mapping
from mergekit_wp.scoring.config import ScoringJob

_MODELS, _FIT, _PERFORMANCE = "Models and Prompts", "Fit", "Performance"


@dataclass(frozen=True)
class FitExpert:
    """One of the models to be merged, and what shows what it can do."""

    expert: str = described(text(), "Expert fine-tuned from the base; may be `MODEL+LORA`.")
    pairs: str = described(text(), "Its prompts: a file of pairs, or a built-in set such as `builtin:maths`.")
    answers: str | None = described(
        text(), "Its answers to them, made on another machine.", None, unset="generated, and kept beside the fit file"
    )
    scores: str | None = described(text(), "Its score file, for `start: scores`.", None)

    def __post_init__(self) -> None:
        expand_home(self, "pairs", "answers", "scores")


_EXPERTS = ValueKind(
    "a list of at least two mappings with `expert` and `pairs`",
    lambda value: isinstance(value, list | tuple) and len(value) >= 2 and all(isinstance(x, dict) for x in value),
    {"type": "array", "minItems": 2, "items": json_schema(FitExpert)},
    None,
)


@dataclass(frozen=True)
class FitJob:
    """What to fit and how; checks itself (raises `BadInput` naming the field). Every field but `experts` is a flag."""

    base: str = described(text(), "Base model: a folder or a Hub name.", group=_MODELS, metavar="MODEL")
    experts: Sequence[Mapping[str, Any]] = described(
        _EXPERTS, "The models to be merged, each with `expert`, `pairs`, and optionally `answers`, `scores`.",
        group=_MODELS,
    )  # fmt: skip
    template: str = same(ScoringJob, "template")
    chat_template: str | bool = same(ScoringJob, "chat_template")
    system: str | None = same(ScoringJob, "system")
    samples: int | None = same(ScoringJob, "samples")

    family: str = described(
        one_of(*FIT_FAMILIES),
        "What has a weight of its own: the whole (`scale`), each `expert`, each `layer`'s heads and neurons, each "
        "`component`; `cross`: one for each component from what experts do to one another's answers, without steps.",
        "component",
        group=_FIT,
    )
    start: str = described(
        one_of(*FIT_STARTS), "The merge to start from, at its best scale: the plain `average`, or the shares of the "
        "experts' `scores`.", "average", group=_FIT,
    )  # fmt: skip
    answer_tokens: int = described(
        whole(0), "The longest answer of an expert that is read; 0: the token after the prompt alone.", 32, group=_FIT
    )
    keep: str | None = described(
        text(),
        "Prompts on which the base is one more teacher, so that what no expert teaches is not lost: a file of pairs or "
        "a built-in set.", None, group=_FIT, metavar="PAIRS",
    )  # fmt: skip
    hold_out: float = described(
        number(0, 0.9, "a number from 0 to 0.9"),
        "Share of each teacher's prompts that nothing is fitted to: the loss on them ends the fit and picks its best.",
        0.25,
        group=_FIT,
    )
    steps: int = described(whole(1), "Steps of Adam at most.", 50, group=_FIT)
    rate: float = described(number(0, above=True), "How far a step moves a weight, about.", 0.05, group=_FIT)
    prompts_a_step: int = described(whole(1), "Prompts of each teacher in a step, drawn by `seed`.", 32, group=_FIT)
    look_every: int = described(whole(1), "Steps between two looks at the prompts held out.", 5, group=_FIT)
    patience: int = described(whole(1), "Looks without a better loss that end the fit.", 4, group=_FIT)
    seed: int = described(whole(0), "Seed of all draws.", 0, group=_FIT)

    device: str = same(ScoringJob, "device")
    dtype: str = same(ScoringJob, "dtype")
    batch_size: int = same(ScoringJob, "batch_size")
    offload: str = described(
        one_of(*OFFLOADS),
        "`none`: all models and the merge on the device; `stream`: layer by layer from disk; `auto`: by free memory.",
        "auto",
        group=_PERFORMANCE,
    )
    trust_remote_code: bool = same(ScoringJob, "trust_remote_code")

    def __post_init__(self) -> None:
        if not self.base:
            raise BadInput("base: a fit needs this field; give it in the YAML or as --base.")
        if wrong := first_wrong(FitJob, vars(self)):
            name, kind = wrong
            raise BadInput(f"{name}: found {shown(getattr(self, name))}, expected {kind.expected}.")
        expand_home(self, "keep")
        for k, expert in enumerate(self.experts):
            self._check_expert(k, expert)

    def _check_expert(self, k: int, values: Mapping[str, Any]) -> None:
        known = {item.name for item in fields(FitExpert)}
        if unknown := [key for key in values if key not in known]:
            raise BadInput(f"experts, entry {k + 1}: unknown field {shown(unknown[0])}; it has {', '.join(known)}.")
        for name in ("expert", "pairs"):
            if name not in values:
                raise BadInput(f"experts, entry {k + 1}: lacks {name}; give the model and its prompts.")
        if wrong := first_wrong(FitExpert, values):
            name, kind = wrong
            raise BadInput(f"experts, entry {k + 1}, {name}: found {shown(values[name])}, expected {kind.expected}.")
        if self.start == "scores" and not values.get("scores"):
            raise BadInput(f"experts, entry {k + 1}: lacks scores, which start: scores needs; make them with wp-score.")

    @property
    def models(self) -> list[FitExpert]:
        return [FitExpert(**values) for values in self.experts]

    @property
    def teachers(self) -> list[FitExpert]:
        """The experts, and behind them, with `keep`, the base and its prompts."""
        return [*self.models, *([] if self.keep is None else [FitExpert(self.base, self.keep)])]

    def scoring(self, expert: FitExpert) -> ScoringJob:
        """The job that would score this expert on the same prompts, put in the same way."""
        own: dict[str, Any] = {"base": self.base, "expert": expert.expert, "pairs": expert.pairs}
        own |= {} if expert.answers is None else {"answers": expert.answers}
        return ScoringJob(**own, **{name: getattr(self, name) for name in (*_SHARED, *_STYLE)})

    def keeping(self) -> ScoringJob:
        """The same of the base's own prompts, which are put as they are, or in a chat template of the base's."""
        shared = {name: getattr(self, name) for name in _SHARED}
        return ScoringJob(base=self.base, expert=self.base, pairs=str(self.keep), **shared)

    def reads(self) -> list[str]:
        """Everything that the job reads, models too, as it names them."""
        found = [self.base]
        for expert in self.models:
            found += [expert.expert, *map(str, read_reference(expert.expert).sources), expert.pairs]
            found += [path for path in (expert.answers, expert.scores) if path]
        return found if self.keep is None else [*found, self.keep]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> FitJob:
        """Build from YAML content; `where` names the file in errors, if it is not empty."""
        known = [f.name for f in fields(cls)]
        try:
            if unknown := [key for key in values if key not in known]:
                raise BadInput(f"unknown field {shown(unknown[0])}; expected {', '.join(sorted(known))}.")
            return cls(**{"base": "", "experts": (), **values})
        except BadInput as error:
            raise BadInput(f"{where}: {error.message}" if where else error.message) from error


_STYLE = ("template", "chat_template", "system")
_SHARED = ("samples", "seed", "answer_tokens", "device", "dtype", "batch_size", "offload", "trust_remote_code")


def load_fit_job(path: str, flags: Mapping[str, Any]) -> FitJob:
    """A job from a YAML file, with the flags that were given laid over it."""
    return FitJob.from_mapping({**read_yaml_mapping(path, "fit job"), **flags}, where=path)


FORM = Form(
    "fit job",
    "Experts of one base and the prompts of each; every field but experts is a flag of wp-fit too, which overrides it.",
    lambda: json_schema(FitJob),
    {
        **{heading: rows(FitJob, names) for heading, names in groups(FitJob).items()},
        "An entry of experts": rows(FitExpert),
    },
)
