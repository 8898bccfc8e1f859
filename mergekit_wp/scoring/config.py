"""A scoring job: one expert against its base, from a YAML file or from flags."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import click

from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.choices import (
    ACTIVATION_SIDE,
    COMPONENTS,
    GAPS,
    METHODS,
    OBJECTS,
    OFFLOADS,
    RANKS,
    RUN_DTYPES,
    SPLITS,
    UTILITIES,
)
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
    switch,
    text,
    whole,
)
from mergekit_wp.files import expand_home, read_yaml_mapping

PLAIN = "{prompt}"

_MODELS, _METHOD, _COMPONENTS = "Models and Prompts", "Method", "Components"
_PERFORMANCE, _DANGEROUS = "Performance", "Dangerous Options"
_LAYERS = ValueKind("text such as 0-5,7", lambda value: type(value) in (str, int), {"type": ["string", "integer"]})


class _FileOfTop(click.ParamType):
    """The second value of --top, which would swallow the next flag where it is forgotten."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if str(value).startswith("--"):
            self.fail(f"K and FILE are wanted, and {value} follows K; name the score file that ranks.", param, ctx)
        return str(value)


_TOP = ValueKind(
    "a number of at least 1 and a score file: [20, FILE]",
    lambda value: (
        isinstance(value, list | tuple)
        and len(value) == 2
        and type(value[0]) is int
        and value[0] >= 1
        and isinstance(value[1], str)
    ),
    {
        "type": "array",
        "prefixItems": [{"type": "integer", "minimum": 1}, {"type": "string"}],
        "minItems": 2,
        "maxItems": 2,
    },
    (int, _FileOfTop()),
)
_SAMPLE = ValueKind(
    "a number or a percentage, such as 500, 10% or heads=100%,neurons=5%",
    lambda value: (type(value) is int and value >= 1) or (isinstance(value, str) and bool(value.strip())),
    {"type": ["string", "integer"], "minimum": 1, "pattern": r"\S"},
)
# YAML reads on and off as true and false.
_CHAT = ValueKind(
    "text",
    lambda value: isinstance(value, str) and bool(value.strip()),
    {"type": ["string", "boolean"], "pattern": r"\S"},
)


@dataclass(frozen=True)
class ScoringJob:
    """What to score and how; checks itself (raises `BadInput` naming the field).

    Every field is a flag of wp-score too. What the methods and utilities compute is in docs/method.md; the equations of
    the paper are named where each is computed.
    """

    base: str = described(text(), "Base model: a folder or a Hub name.", group=_MODELS, metavar="MODEL")
    expert: str = described(
        text(), "Expert fine-tuned from it; may be `MODEL+LORA`.", group=_MODELS, metavar="MODEL[+LORA]"
    )
    pairs: str = described(
        text(),
        "A file of pairs, or a built-in set: `builtin:instructions`, `builtin:maths`, `builtin:code`.",
        group=_MODELS,
        metavar="FILE.jsonl",
    )
    at: str | None = described(
        text(),
        "A mergekit recipe: score in its merge, which need not be written, in the place of the base that it merges "
        "into (`kl`).",
        None,
        group=_MODELS,
        metavar="RECIPE.yaml",
    )
    template: str = described(
        text("text that contains {prompt}", "{prompt}"),
        "Text around every prompt; `{prompt}` stands for it.",
        PLAIN,
        group=_MODELS,
        metavar="TEXT",
    )
    chat_template: str | bool = described(
        _CHAT,
        "Put prompts into the tokenizer's chat template (the expert's, else the base's): `on`, `off`, the name of one "
        "of several, or `auto`: those whose pairs say `chat`.",
        "auto",
        group=_MODELS,
        metavar="auto|on|off|NAME",
    )
    system: str | None = described(text(), "System prompt of every chat.", None, group=_MODELS, metavar="TEXT")
    samples: int | None = described(
        whole(1),
        "Pairs a task, drawn by `seed`; one with fewer is refused.",
        None,
        unset="all; 100 of a built-in set",
        group=_MODELS,
    )
    seed: int = described(whole(0), "Seed of the draw and of the split.", 0, group=_MODELS)

    layer: int | str | None = described(
        whole(0, word="auto"),
        "Anchor layer, from 0, or `auto`: where steering the base recovers most of what the expert does. Without "
        "meaning for `kl`.",
        None,
        unset="two thirds of the depth",
        group=_METHOD,
    )
    anchor_layers: str | int | None = described(
        _LAYERS,
        "Candidates of `layer: auto`, such as `10-38`.",
        None,
        unset="a spread, then around its best",
        group=_METHOD,
        metavar="10-38",
    )
    anchor_prompts: int = described(whole(1), "Prompts a task that `layer: auto` has answered.", 32, group=_METHOD)
    anchor_tokens: int = described(whole(1), "The longest of those answers.", 256, group=_METHOD)
    method: str = described(
        one_of(*METHODS),
        "First order: `writeback` (ours), `attr` (the paper's), `atp` (activation side); one component at a time: "
        "`exact`, `ap` (activation side).",
        "writeback",
        group=_METHOD,
    )
    object: str | None = described(
        one_of(*OBJECTS),
        "What `ap` and `atp` patch: what the expert's component writes, or its `activation`, through the base's "
        "projection.",
        None,
        unset="`write`",
        group=_METHOD,
    )
    answer_tokens: int = described(
        whole(0),
        "Read `kl` and `projection` over the expert's own greedy answers of at most so many tokens; 0: of the next "
        "token alone.",
        0,
        group=_METHOD,
    )
    answers: str | None = described(
        text(),
        "Answers that another run or machine made.",
        None,
        unset="generated, and kept beside the score file",
        group=_METHOD,
        metavar="FILE.jsonl",
    )
    utility: str = described(
        one_of(*UTILITIES),
        "What recovery means: `kl` of the next token, `anchor` (the paper's), `projection`, `staged` (`anchor` up to "
        "the anchor layer, `kl` above), `staged-projection`.",
        "kl",
        group=_METHOD,
    )
    split: str = described(
        one_of(*SPLITS),
        "`half`: prompts for the direction and for the scores are disjoint; `shared`: the same. Without meaning for "
        "`kl`.",
        "half",
        group=_METHOD,
    )
    gap: str = described(
        one_of(*GAPS),
        "`sample`: mean of ratios to each prompt's gap (the paper); `mean`: ratio of means.",
        "sample",
        group=_METHOD,
    )
    gap_floor: float = described(
        number(0), "Prompts whose gap is smaller are dropped (cosine, or nats for `kl`).", 1e-3, group=_METHOD
    )

    components: str = described(
        text("all, heads, neurons or a file that names some"),
        "`all`, `heads`, `neurons`, or a file that names some: `L5H3 L5N97`.",
        "all",
        group=_COMPONENTS,
        metavar="all|heads|neurons|FILE",
    )
    layers: str | int | None = described(
        _LAYERS, "Score these layers alone: `0-5,7`.", None, unset="all", group=_COMPONENTS, metavar="0-5,7"
    )
    top: Sequence[Any] | None = described(
        _TOP,
        "`[K, FILE]`: the K best heads and K best neurons of an earlier score file alone.",
        None,
        group=_COMPONENTS,
        metavar="K FILE",
    )
    rank: str = described(
        one_of(*RANKS),
        "By what `top` ranks: `mean` over tasks, `task` (leaders of each), `mean-abs`, `task-abs` (absolute values).",
        "mean",
        group=_COMPONENTS,
    )
    sample: str | int | None = described(
        _SAMPLE,
        "Beside `top`, so many of the others of each kind, drawn by `seed`, which says how many of the best `top` can "
        "have missed (`exact`, `ap`).",
        None,
        group=_COMPONENTS,
        metavar="N|10%|heads=100%,neurons=5%",
    )
    parts: bool = described(
        switch(),
        "Keep what `q` and `o`, `gate`, `up` and `down` add to each score (`attr`, `writeback`).",
        False,
        group=_COMPONENTS,
    )
    per_prompt: bool = described(
        switch(),
        "Keep what each prompt gives, for intervals (4 bytes a prompt and component: 0.2 GB a task of 100 for a 13B).",
        False,
        group=_COMPONENTS,
    )

    shuffles: int | None = described(
        whole(1),
        "Score so many shuffled updates too, for a noise floor (`attr`, `writeback`); each costs as the way down does.",
        None,
        group=_COMPONENTS,
    )

    device: str = described(
        text("auto, cpu or cuda:N"),
        "`cpu`, `cuda`, `cuda:1`; `auto` is a GPU if there is one.",
        "auto",
        group=_PERFORMANCE,
    )
    dtype: str = described(
        one_of(*RUN_DTYPES),
        "Of products: `float32`, `bfloat16`, `float16`; `auto` is as stored, on a CPU float32.",
        "auto",
        group=_PERFORMANCE,
    )
    batch_size: int = described(whole(1), "Prompts a forward pass.", 16, group=_PERFORMANCE)
    offload: str = described(
        one_of(*OFFLOADS),
        "`none`: both models on the device; `stream`: layer by layer from disk; `auto`: by free memory.",
        "auto",
        group=_PERFORMANCE,
    )
    trust_remote_code: bool = described(switch(), "Run Python that comes with a model folder.", False, group=_DANGEROUS)
    allow_code_execution: bool = described(
        switch(), "With `layer: auto`: grade code by running it, in a limited process.", False, group=_DANGEROUS
    )

    def __post_init__(self) -> None:
        for name in ("base", "expert", "pairs"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise BadInput(f"{name}: a scoring job needs this field; give it in the YAML or as --{name}.")
        if isinstance(self.chat_template, bool):
            object.__setattr__(self, "chat_template", "on" if self.chat_template else "off")
        if wrong := first_wrong(ScoringJob, vars(self)):
            name, kind = wrong
            raise BadInput(f"{name}: found {shown(getattr(self, name))}, expected {kind.expected}.")
        expand_home(self, "pairs", "at", "answers", "components")
        if self.top is not None and (file := os.path.expanduser(self.top[1])) != self.top[1]:
            object.__setattr__(self, "top", [self.top[0], file])
        self._check_together()

    @property
    def directed(self) -> bool:
        """Whether the utility reads along a direction, so that there is one to extract and an anchor to place."""
        return self.utility != "kl"

    def reads(self) -> list[str]:
        """Everything that the job reads, models too, as it names them: paths, and names that are no paths here."""
        ranking = [str(self.top[1])] if self.top else []
        listed = [] if self.components in COMPONENTS else [self.components]
        answers = [] if self.answers is None else [self.answers]
        models = [self.base, self.expert, *map(str, read_reference(self.expert).sources)]
        merge = []
        if self.at is not None:
            from mergekit_wp.merge.recipe import read_recipe

            merge = [self.at, *read_recipe(self.at).reads()]
        return [*models, *merge, self.pairs, *answers, *ranking, *listed]

    def _check_together(self) -> None:
        """What only shows when several fields are seen."""
        if self.rank != "mean" and self.top is None:
            raise BadInput(f"rank: {self.rank} says how --top ranks, and there is no top; give one, or leave rank out.")
        if self.sample is not None and self.top is None:
            raise BadInput("sample: is drawn from what --top leaves, and there is no top; give one, or leave it out.")
        if self.sample is not None and self.method not in ("exact", "ap"):
            raise BadInput(f"sample: {self.method} scores everything for the price of one; leave it out, or use exact.")
        if self.object is not None and self.method not in ACTIVATION_SIDE:
            raise BadInput(f"object: {self.method} patches weights; only ap and atp have an object, leave it out.")
        if self.parts and self.method not in ("attr", "writeback"):
            raise BadInput(f"parts: a score by {self.method} has no parts; use attr or writeback.")
        if self.shuffles is not None and self.method not in ("attr", "writeback"):
            raise BadInput(f"shuffles: {self.method} has no noise floor; use attr or writeback, or leave shuffles out.")
        if self.utility == "projection" and self.layer is not None:
            raise BadInput("layer: the projection utility reads the last layer; leave the layer out.")
        if self.at is not None and self.directed:
            raise BadInput(
                f"at: the {self.utility} utility reads along a direction that is made of base and expert, not of a "
                "merge; use kl, or write the merge and give its folder as the base."
            )
        if self.answers is not None and not self.answer_tokens:
            raise BadInput("answers: are read only with answer_tokens, which says how much of each; give that too.")
        if self.answer_tokens and self.utility == "anchor":
            raise BadInput(
                "answer_tokens: the anchor utility reads the prompt's last token alone, whatever is answered; use kl, "
                "projection or staged, or leave answer_tokens out."
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> ScoringJob:
        """Build from YAML content; `where` names the file in errors, if it is not empty."""
        known = {f.name for f in fields(cls)}
        try:
            if unknown := [key for key in values if key not in known]:
                raise BadInput(f"unknown field {shown(unknown[0])}; expected {', '.join(sorted(known))}.")
            return cls(**{"base": "", "expert": "", "pairs": "", **values})
        except BadInput as error:
            raise BadInput(f"{where}: {error.message}" if where else error.message) from error


def load_job(path: str | None, flags: Mapping[str, Any]) -> ScoringJob:
    """A job from a YAML file (or none), with the flags that were given laid over it."""
    values = read_yaml_mapping(path, "scoring job") if path else {}
    return ScoringJob.from_mapping({**values, **flags}, where=path or "")


FORM = Form(
    "scoring job",
    "One expert against its base; every field is also a flag of wp-score, which overrides it.",
    lambda: json_schema(ScoringJob),
    {heading: rows(ScoringJob, names) for heading, names in groups(ScoringJob).items()},
)
