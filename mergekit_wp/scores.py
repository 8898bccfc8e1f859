"""The score file: what `wp-score` writes and everything later reads.

A safetensors file, all tensors float32:

    heads [L, H]                  mean over tasks of the heads' scores
    neurons [L, F]                mean over tasks of the neurons' scores
    tasks/<task>/heads [L, H]     scores of one task; likewise tasks/<task>/neurons [L, F]
    tasks/<task>/anchor [D]       the anchor direction v of the task, at the anchor layer; not for the utility kl
    parts/<part> [L, H] or [L, F] with --parts: what each of q, o (heads), gate, up, down (neurons) adds to the
                                  score, mean over tasks; likewise tasks/<task>/parts/<part>
    scored/heads, scored/neurons  if a subset was scored: 1 where it was, 0 where the score 0 means "not asked"
    tasks/<task>/shuffled/heads [S, L, H], .../neurons [S, L, F]   with --shuffles: scores of S shuffled updates
    chance/heads, chance/neurons  with --sample: with which chance each came into the subset (`missed`), 1 for leaders
    tasks/<task>/prompts/heads [P, L, H], .../neurons [P, L, F]   with --per-prompt: what each scoring prompt gives; a
                                  score is their sum over the prompts, divided by how many were used
    tasks/<task>/prompts/gaps/<metric> [P], .../used/<metric> [P]   the gap of each prompt, and 1 where it was used

with a JSON document under the metadata key `wp` (`ScoreMeta`). A score is the share of the gap between base
and expert that the component alone restores (1 = all of it); it has no unit.

Legend: L layers, H query heads, F neurons a layer, D residual width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from mergekit_wp import ranking
from mergekit_wp.checkpoint.folder import Fingerprint
from mergekit_wp.checkpoint.hub import score_file
from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.choices import GAPS, METHODS, OBJECTS, SPLITS, UTILITIES
from mergekit_wp.documents import Count, Date, Number, Positive, Sha256, Text, Versions, one_of, read_document, strict
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import read_tensors, write_tensors
from mergekit_wp.geometry import Component, Geometry
from mergekit_wp.prompt_scores import PromptScores
from mergekit_wp.recovery import RecoveryCurve

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


FORMAT = 3  # 1 knew neither parts nor subsets, and is read as a file without them; 2 always had an anchor, and
ANCHORED = 2  # is what a file with one still says, so that programs which know no other read it
PER_PROMPT = 4  # has tensors of single prompts
CONTROLLED = 5  # has chances of a sample, or scores of shuffled updates; and perhaps tensors of single prompts
_LEFT_OUT = (
    "prompts",
    "object",
    "answer_tokens",
    "at",
    "prompt_ids",
    "shuffles",
)  # where they are None, for the same reason
METRICS = ("anchor", "kl", "projection")  # what a utility reads (`scoring.metrics`)
DTYPES = ("float32", "bfloat16", "float16", "float64")
METADATA_KEY = "wp"
_MEAN_TOLERANCE = 1e-5  # of the mean size: float32 sums, in another order on another machine
PART_KIND = {"q": "heads", "o": "heads", "gate": "neurons", "up": "neurons", "down": "neurons"}


@strict
@dataclass(frozen=True)
class ModelId:
    """Which model: the name as the user wrote it, and its fingerprint (see `checkpoint.Fingerprint`)."""

    name: Text
    revision: Text | None
    config: Sha256
    tensors: Sha256

    @classmethod
    def of(cls, name: str, fingerprint: Fingerprint) -> ModelId:
        """A model by the name that the user wrote. A Hub name is parted from its revision; one with a LoRA is not,
        since it holds two models, each perhaps with a revision."""
        reference = read_reference(name)
        hub = reference.lora is None and reference.model.kind == "hub"
        path, revision = (reference.model.path, reference.model.revision) if hub else (name, None)
        return cls(path, revision, fingerprint.config, fingerprint.tensors)

    @property
    def called(self) -> str:
        """Name and revision, for people."""
        return self.name + (f"@{self.revision}" if self.revision else "")


@strict
@dataclass(frozen=True)
class UtilityStats:
    """One utility on one task: scoring prompts used, dropped for a gap below the floor, mean gap of the used.

    The gap of `anchor` is a difference of cosines, that of `kl` is in nats.
    """

    used: Count
    dropped: Count
    mean_gap: Number


@strict
@dataclass(frozen=True)
class TaskMeta:
    """How many prompts a task had for the direction (`extraction`) and for the scores (`scoring`).

    alpha: the expert's mean projection on the unit anchor direction, the target of steering (Eq. 35); None where there
    is no direction.
    """

    extraction: Count
    scoring: Count
    utilities: dict[Annotated[str, one_of(METRICS)], UtilityStats]
    alpha: Number | None = None

    def __post_init__(self) -> None:
        for name, stats in self.utilities.items():
            if stats.used + stats.dropped > self.scoring:
                raise ValueError(f"{name} has {stats.used} prompts used and {stats.dropped} dropped of {self.scoring}")


@strict
@dataclass(frozen=True)
class PromptStyle:
    """How prompts were put: the text around each; if in a chat template, its SHA-256, whose, and the system prompt."""

    template: str
    chat_template: Sha256 | None = None
    chat_owner: Text | None = None
    system: str | None = None


@strict
@dataclass(frozen=True)
class ScoredAt:
    """The merge, of the base with some experts, that stood in the base's place.

    recipe: its YAML as it was read. weights: the SHA-256 of what it takes of every expert
    (`fit_file.FusionWeights.digest`).
    """

    recipe: dict[str, Any]
    method: Text
    experts: tuple[ModelId, ...]
    weights: Sha256

    @property
    def called(self) -> str:
        """For people."""
        return f"the {self.method} merge of {', '.join(expert.called for expert in self.experts)}"


@strict
@dataclass(frozen=True)
class ScoreMeta:
    """Everything about a score file that is not a tensor; `date` is ISO 8601 UTC.

    split, anchor_layer: None where the utility reads along no direction (kl).
    object: what ap and atp put in a component's place; None by other methods, and in files from before it was kept,
        when it was `activation`.
    subset: the components, layers and top that were asked for, where not all were scored.
    recovery: how the anchor layer was chosen, where it was looked for.
    prompts: how prompts were put, where not as they are.
    answer_tokens: where `kl` and `projection` are means over the expert's answers, the most tokens that these have;
        None: of the next token alone.
    at: the merge that stood in the base's place, whose gap to the expert the scores are shares of; None: the base did.
    prompt_ids: where single prompts are kept, what tells them apart: the beginning of the SHA-256 of their tokens.
    shuffles: how many shuffled updates were scored as well, by `seed`; None: none.
    """

    base: ModelId
    expert: ModelId
    geometry: Geometry
    tasks: dict[Text, TaskMeta]
    method: Annotated[str, one_of(METHODS)]
    utility: Annotated[str, one_of(UTILITIES)]
    gap: Annotated[str, one_of(GAPS)]
    split: Annotated[str, one_of(SPLITS)] | None
    anchor_layer: Count | None
    dtype: Annotated[str, one_of(DTYPES)]
    device: Text
    seed: Count
    versions: Versions
    date: Date
    format: Count = FORMAT
    subset: dict[str, Any] | None = None
    recovery: RecoveryCurve | None = None
    prompts: PromptStyle | None = None
    object: Annotated[str, one_of(OBJECTS)] | None = None
    answer_tokens: Positive | None = None
    at: ScoredAt | None = None
    prompt_ids: dict[Text, tuple[Text, ...]] | None = None
    shuffles: Positive | None = None

    def layers_run(self, layer: int) -> int:
        """From a layer's components up to where their scores are read, with the layer itself; 0 where nothing is."""
        metric = self.metric_of(next(iter(self.tasks)), layer)
        top = self.anchor_layer if metric == "anchor" and self.anchor_layer is not None else self.geometry.layers - 1
        return max(0, top - layer + 1)

    def metric_of(self, task: str, layer: int) -> str:
        """By which metric a task's scores of a layer were read."""
        names = list(self.tasks[task].utilities)
        if len(names) == 1 or self.anchor_layer is None:
            return names[0]
        below = layer <= self.anchor_layer
        return next(name for name in names if (name == "anchor") == below)

    @property
    def read_at(self) -> int | None:
        """The anchor layer, if any score was read off the anchor there; by other utilities it decides nothing."""
        return self.anchor_layer if any("anchor" in task.utilities for task in self.tasks.values()) else None

    @classmethod
    def from_json(cls, text: str) -> ScoreMeta:
        """Parse and check; raises ValueError (`read_scores` makes it a BadInput)."""
        return read_document(cls, text, range(1, CONTROLLED + 1))

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps(
            {k: v for k, v in asdict(self).items() if k not in _LEFT_OUT or v is not None}, sort_keys=True
        )


@dataclass(frozen=True)
class TaskScores:
    """heads [L, H], neurons [L, F], anchor [D] or None, parts as `PART_KIND` says, float32; single prompts or None;
    by kind, the scores of shuffled updates [S, L, H] and [S, L, F]."""

    heads: torch.Tensor
    neurons: torch.Tensor
    anchor: torch.Tensor | None = None
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    prompts: PromptScores | None = None
    shuffled: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Scores:
    """A whole score file; checks itself, so a `Scores` that exists is valid (raises ValueError)."""

    meta: ScoreMeta
    heads: torch.Tensor
    neurons: torch.Tensor
    tasks: dict[str, TaskScores]
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    scored: dict[str, torch.Tensor] = field(default_factory=dict)
    chance: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def from_tasks(
        cls,
        meta: ScoreMeta,
        tasks: dict[str, TaskScores],
        scored: dict[str, torch.Tensor] | None = None,
        chance: dict[str, torch.Tensor] | None = None,
    ) -> Scores:
        """The file of one scoring run: overall scores are the mean over its tasks.

        `scored`: masks (heads [L, H], neurons [L, F]) of what was scored, where that is not everything. `chance`: where
        some of it was drawn, with which chance.
        """
        every = list(tasks.values())
        heads = torch.stack([task.heads for task in every]).mean(0)
        neurons = torch.stack([task.neurons for task in every]).mean(0)
        parts = {part: torch.stack([task.parts[part] for task in every]).mean(0) for part in every[0].parts}
        masks = {k: mask.float() for k, mask in (scored or {}).items()}
        return cls(meta, heads, neurons, tasks, parts, masks, chance or {})

    @property
    def complete(self) -> bool:
        """Whether every component was scored, as a merge needs it."""
        return not self.scored

    def __getitem__(self, task: str) -> Scores:
        """The scores of one task alone, as a `Scores`: all that can be asked of the mean can be asked of it.

        Raises `BadInput` for a task that was not scored.
        """
        if task not in self.tasks:
            raise BadInput(f"there are no scores of a task {shown(task)}; there are those of {', '.join(self.tasks)}.")
        ids = self.meta.prompt_ids and {name: own for name, own in self.meta.prompt_ids.items() if name == task}
        meta = replace(self.meta, tasks={task: self.meta.tasks[task]}, prompt_ids=ids)
        return Scores.from_tasks(meta, {task: self.tasks[task]}, self.scored, self.chance)

    def __iter__(self) -> Iterator[str]:
        """The names of the tasks."""
        return iter(self.tasks)

    def top(self, k: int = 10, kind: str | None = None) -> list[Component]:
        """The `k` components with the highest scores, highest first; each has its `score`.

        kind: "heads" or "neurons"; None ranks them together (of either, a score is a share of the gap).
        What was not scored is left out. Raises `BadInput` for a `k` below 1 and for another kind.
        """
        return ranking.top(self, k, kind)

    def to_frame(self, kind: str | None = None) -> pandas.DataFrame:
        """A row a component: kind, layer, index, score (mean over the tasks), and `tasks/<task>` for each task.

        What was not scored is NaN. Raises `BadInput` where pandas is not installed.
        """
        return ranking.frame(self, kind)

    def compare(self, other: Scores, k: int | None = None, *, any_base: bool = False) -> list[ranking.Agreement]:
        """How far two score files agree, by task and kind: overlap of their top `k` (None: of 20 and of 1 %), and
        Spearman's rank correlation, over the components that both have scored. The same as `wp-scores ONE OTHER`.

        Raises `BadInput` for models of different shapes and, unless `any_base`, of different bases.
        """
        ranking.check_comparable({"these scores": self, "the other scores": other}, any_base)
        return ranking.compare(self, other, k)

    def save(self, path: str | Path) -> None:
        """Write the score file, as wp-score does (`write_scores`)."""
        write_scores(self, path)

    def plot(self) -> Figure:
        """A matplotlib figure: a map of the heads and one of the neurons by layer. A notebook shows it, `savefig`
        writes it.
        """
        from mergekit_wp.pictures import maps_figure

        return maps_figure({self.meta.expert.name: self})

    def __repr__(self) -> str:
        about, shape = self.meta, self.meta.geometry
        against = about.base.name + (f", at {about.at.called}" if about.at else "")
        return (
            f"Scores({about.expert.name} against {against}, {about.method}, {about.utility}; "
            f"tasks {', '.join(self.tasks)}; heads [{shape.layers}, {shape.heads}], "
            f"neurons [{shape.layers}, {shape.neurons}])"
        )

    def seen(self, kind: str) -> torch.Tensor:
        """Which heads [L, H] or neurons [L, F] have a score, bool; elsewhere 0 means that nobody asked.

        Nobody can ask for what lies above the anchor layer if the utility is `anchor`.
        """
        table: torch.Tensor = getattr(self, kind)
        mask = self.scored[kind].bool() if kind in self.scored else torch.ones_like(table, dtype=torch.bool)
        return self._visible(mask)

    def population(self, kind: str) -> torch.Tensor:
        """Of which heads [L, H] or neurons [L, F] those that have a score are a sample, bool; without one, these."""
        return self._visible(self.chance[kind] > 0) if kind in self.chance else self.seen(kind)

    def _visible(self, mask_Ln: torch.Tensor) -> torch.Tensor:
        if self.meta.utility != "anchor" or self.meta.anchor_layer is None:
            return mask_Ln
        return mask_Ln & (torch.arange(len(mask_Ln)) <= self.meta.anchor_layer)[:, None]

    def __post_init__(self) -> None:
        if not self.tasks or set(self.tasks) != set(self.meta.tasks):
            raise ValueError(f"tensors of tasks {sorted(self.tasks)}, metadata of {sorted(self.meta.tasks)}")
        layer = self.meta.anchor_layer
        if layer is not None and not 0 <= layer < self.meta.geometry.layers:
            raise ValueError(f"anchor layer {layer} of {self.meta.geometry.layers} layers")
        for task, scores in self.tasks.items():
            if (scores.anchor is None) != (layer is None):
                raise ValueError(
                    f"anchor layer {layer}, and {'no' if scores.anchor is None else 'an'} anchor of {task}"
                )
            if set(scores.shuffled) != ({"heads", "neurons"} if self.meta.shuffles else set()):
                raise ValueError(f"{self.meta.shuffles or 'no'} shuffles, and of {task} {sorted(scores.shuffled)}")
        for name, tensor in self.tensors().items():
            check_table(name, tensor, self._shape(name))
        self._check_means()
        self._check_prompts()
        for kind, mask in self.scored.items():
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError(f"scored/{kind} holds other values than 0 and 1")
        for kind, chance_Ln in self.chance.items():
            scored_Ln = self.scored[kind].bool() if kind in self.scored else torch.ones_like(chance_Ln).bool()
            possible = (chance_Ln >= 0) & (chance_Ln <= 1) & ((chance_Ln > 0) | ~scored_Ln)
            if not bool((possible & ((chance_Ln < 1) | scored_Ln)).all()):
                raise ValueError(f"chance/{kind} is not how likely what was scored came to be")

    def _check_means(self) -> None:
        """What is said over all tasks is the mean over them; within the rounding of another machine's float32."""
        every = list(self.tasks.values())
        for name, task in self.tasks.items():
            if set(task.parts) != set(self.parts):
                raise ValueError(f"{name} has the parts {sorted(task.parts)}, all tasks {sorted(self.parts)}")
        pairs = [(self.heads, [t.heads for t in every]), (self.neurons, [t.neurons for t in every])]
        pairs += [(table, [task.parts[part] for task in every]) for part, table in self.parts.items()]
        for name, (mean, own) in zip(("heads", "neurons", *self.parts), pairs, strict=True):
            stacked = torch.stack(own)
            if ((mean - stacked.mean(0)).abs() > _MEAN_TOLERANCE * stacked.abs().mean(0)).any():
                raise ValueError(f"{name} is not the mean over the tasks")

    def _check_prompts(self) -> None:
        ids = self.meta.prompt_ids or {}
        for name, task in self.tasks.items():
            if (task.prompts is None) != (name not in ids):
                raise ValueError(f"{name} has {'no ' if task.prompts is None else ''}tensors of single prompts")
            if task.prompts is not None:
                counts = {metric: stats.used for metric, stats in self.meta.tasks[name].utilities.items()}
                task.prompts.check(name, len(ids[name]), counts)
                for kind in ("heads", "neurons"):
                    table_Ln = getattr(task, kind)
                    used_L = [counts[self.meta.metric_of(name, layer)] for layer in range(len(table_Ln))]
                    task.prompts.check_mean(name, kind, table_Ln, used_L)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors under the names that they have in the file."""
        named = {"heads": self.heads, "neurons": self.neurons}
        named |= {f"scored/{kind}": mask for kind, mask in self.scored.items()}
        named |= {f"chance/{kind}": table for kind, table in self.chance.items()}
        named |= {f"parts/{part}": table for part, table in self.parts.items()}
        for task, scores in self.tasks.items():
            named |= {f"tasks/{task}/heads": scores.heads, f"tasks/{task}/neurons": scores.neurons}
            if scores.anchor is not None:
                named[f"tasks/{task}/anchor"] = scores.anchor
            named |= {f"tasks/{task}/parts/{part}": table for part, table in scores.parts.items()}
            named |= {f"tasks/{task}/shuffled/{kind}": table for kind, table in scores.shuffled.items()}
            if scores.prompts is not None:
                named |= {f"tasks/{task}/{name}": table for name, table in scores.prompts.tensors().items()}
        return named

    def _shape(self, name: str) -> tuple[int, ...]:
        geometry, last = self.meta.geometry, name.rsplit("/", 1)[-1]
        _tasks, task, what, *_rest = (*name.split("/"), "", "")
        if what == "prompts":  # which may also be the name of a task
            count = self.meta.tasks[task].scoring
            return (count, *self._shape(last)) if last in ("heads", "neurons") else (count,)
        if what == "shuffled":
            return (self.meta.shuffles or 0, *self._shape(last))
        return {
            "heads": (geometry.layers, geometry.heads),
            "neurons": (geometry.layers, geometry.neurons),
            "anchor": (geometry.d_model,),
        }[PART_KIND.get(last, last)]


def write_scores(scores: Scores, path: str | Path) -> None:
    """Write the file atomically. Raises `BadInput` when the folder cannot be written."""
    write_tensors(path, scores.tensors(), METADATA_KEY, scores.meta.to_json())


def read_scores(path: str | Path) -> Scores:
    """Read and validate a whole score file: of this machine, or of the Hub (`alice/model`, `hf://alice/model/FILE`; see
    `hub.score_file`).

    Raises `BadInput`, naming the file, when it is missing, is not safetensors, has no `wp` metadata, has an
    unknown format version, misses a tensor or has one too many, or holds a wrong shape, a wrong dtype, a NaN
    or an infinity.
    """
    path = score_file(str(path))
    text, tensors = read_tensors(path, METADATA_KEY, "score", "wp-score")
    try:
        meta = ScoreMeta.from_json(text)
        tasks = {task: _take_task(tensors, f"tasks/{task}/", meta.anchor_layer is not None) for task in meta.tasks}
        scored, chance = (
            {k: tensors.pop(f"{what}/{k}") for k in ("heads", "neurons") if f"{what}/{k}" in tensors}
            for what in ("scored", "chance")
        )
        parts = _take_parts(tensors, "")
        scores = Scores(meta, tensors.pop("heads"), tensors.pop("neurons"), tasks, parts, scored, chance)
        if tensors:
            raise ValueError(f"unexpected tensors {sorted(tensors)}")
        return scores
    except KeyError as error:
        raise BadInput(f"{path}: this score file has no {error.args[0]}; make it again with wp-score.") from error
    except (ValueError, TypeError, AttributeError, BadInput) as error:
        reason = error.message if isinstance(error, BadInput) else str(error)
        raise BadInput(f"{path}: not a valid score file: {reason}.") from error


def _take_task(tensors: dict[str, torch.Tensor], prefix: str, anchored: bool) -> TaskScores:
    heads, neurons = tensors.pop(f"{prefix}heads"), tensors.pop(f"{prefix}neurons")
    anchor = tensors.pop(f"{prefix}anchor") if anchored else None
    parts, prompts = _take_parts(tensors, prefix), PromptScores.taken(tensors, f"{prefix}prompts/")
    shuffled = {kind: f"{prefix}shuffled/{kind}" for kind in ("heads", "neurons")}
    found = {kind: tensors.pop(name) for kind, name in shuffled.items() if name in tensors}
    return TaskScores(heads, neurons, anchor, parts, prompts, found)


def _take_parts(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {part: tensors.pop(f"{prefix}parts/{part}") for part in PART_KIND if f"{prefix}parts/{part}" in tensors}


def check_table(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """A table of a score or fit file. Raises ValueError for another dtype or shape, a NaN or an infinity."""
    if tensor.dtype != torch.float32:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected torch.float32")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds a NaN or an infinity")
