"""What the parts of a study read: its score files, and the two models where a part asks for them.

All is checked before a part works: that score files are of one pair (others: of the same base), and that the models
that the study names are those that were scored.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mergekit_wp.checkpoint.folder import Checkpoint, Fingerprint, fingerprint_of
from mergekit_wp.checkpoint.hub import score_file
from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import Geometry
from mergekit_wp.ranking import check_comparable
from mergekit_wp.scores import ScoreMeta, Scores, read_scores
from mergekit_wp.scoring.anchor.graders import parse_check
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.score import Prepared, pairs_of, prepare
from mergekit_wp.study.study_spec import Study

ALL, UP, DOWN = "all", "up", "down"
"""Sides of a model: all layers; those up to the anchor layer; those above it."""
HOW = ("method", "object", "utility", "answer_tokens")
"""The fields of a score file that say what a score is."""


@dataclass(frozen=True)
class Inputs:
    """`scores` of the pair and of `others`, by the study's names; `files`: where all of them lie.

    kept: the output folder, beside whose parts unfinished work is kept; None: nowhere
    allow_code: whether answers may be graded by running what models wrote, in the sandbox
    """

    study: Study
    scores: Mapping[str, Scores]
    others: Mapping[str, Scores]
    files: Mapping[str, Path]
    kept: Path | None = None
    allow_code: bool = False

    @property
    def geometry(self) -> Geometry:
        return next(iter(self.scores.values())).meta.geometry

    @cached_property
    def sides(self) -> dict[str, torch.Tensor]:
        """Side -> its layers [L], bool. Without an anchor layer in any score file there is only `all`.

        Where files have different anchor layers, what lies between the lowest and the highest is on neither side.
        """
        layers = torch.arange(self.geometry.layers)
        found = {ALL: torch.ones_like(layers, dtype=torch.bool)}
        anchors = [s.meta.read_at for s in (*self.scores.values(), *self.others.values())]
        known = [anchor for anchor in anchors if anchor is not None]
        if known:
            found |= {UP: layers <= min(known), DOWN: layers > max(known)}
        return {side: mask for side, mask in found.items() if mask.any()}

    @cached_property
    def base(self) -> Checkpoint:
        """Raises `BadInput` when it is not there, or not the one that was scored."""
        return Checkpoint.open(self.study.base)

    @cached_property
    def expert(self) -> Checkpoint:
        """Of `MODEL+LORA`, the model under the LoRA."""
        reference = read_reference(self.study.expert)
        reference.check()
        return Checkpoint.of(reference.model)

    @cached_property
    def ready(self) -> tuple[ScoringJob, Prepared]:
        """The job of the study's prompts, and what is made ready for it: prompts as tokens, models that fit each other.

        All pairs are there for extraction and for scoring. Raises `BadInput`.
        """
        job = self.study.job()
        try:
            return job, prepare(job)
        except BadInput as error:
            raise BadInput(f"prompts: {error.message}") from error

    def check_prompts(self) -> None:
        """Raise `BadInput` where the prompts cannot be used with these models."""
        _ = self.ready

    @cached_property
    def code_is_graded(self) -> bool:
        """Whether grading an answer to any of the prompts runs it. Raises `BadInput`."""
        checks = [pair.check for each in pairs_of(self.study.job()) for pair in each.scoring if pair.check]
        return any(parse_check(raw, "prompts").runs_code for raw in checks)

    @cached_property
    def fingerprints(self) -> dict[str, Fingerprint]:
        """Of base and expert. Raises `BadInput` unless they are the models that were scored."""
        found = {"base": self.base.fingerprint, "expert": fingerprint_of(self.study.expert)}
        if different := self.expert.geometry.differences(self.base.geometry):
            raise BadInput(
                f"{self.study.expert}: its shape differs from the base {self.study.base} ({'; '.join(different)}); "
                "an expert must be a fine-tune of the base."
            )
        meta = next(iter(self.scores.values())).meta
        for role, scored in (("base", meta.base), ("expert", meta.expert)):
            if scored.tensors != found[role].tensors:
                raise BadInput(
                    f"`{role}`: the score files are of {scored.called}, whose weights are not those of "
                    f"{getattr(self.study, role)}; name the model that was scored, or score this one."
                )
        return found


def read_inputs(study: Study, kept: Path | None = None, allow_code: bool = False) -> Inputs:
    """The score files, read and compared; the rest as in `Inputs`. Raises `BadInput`, naming the study's field."""
    scores = {name: _read(study, f"scores.{name}", path) for name, path in study.scores.items()}
    others = {name: _read(study, f"others.{name}", path) for name, path in study.others.items()}
    named = {f"`scores.{name}`": found for name, found in scores.items()}
    (first, one), *rest = named.items()
    every = named | {f"`others.{name}`": found for name, found in others.items()}
    check_comparable(every, any_base=True)
    for name, other in every.items():
        if other.meta.base.tensors != one.meta.base.tensors:
            raise BadInput(
                f"{name}: scores on the base {other.meta.base.called}, {first} on {one.meta.base.called}, which is "
                "another model; a study is of one base, so leave the file out."
            )
    for name, other in rest:
        if other.meta.expert.tensors != one.meta.expert.tensors:
            raise BadInput(
                f"{name}: scores of the expert {other.meta.expert.called}, {first} of {one.meta.expert.called}, which "
                "is another model; put files of other experts under `others`."
            )
    for name, other in others.items():
        if not any(alike_scored(found.meta, other.meta) for found in scores.values()):
            raise BadInput(
                f"`others.{name}`: scores by {other.meta.method}, utility {other.meta.utility}, and none of `scores` "
                "was made so; score it as one of them was, or leave it out."
            )
    files = {name: score_file(path) for name, path in {**study.scores, **study.others}.items()}
    return Inputs(study, scores, others, files, kept, allow_code)


def alike_scored(one: ScoreMeta, other: ScoreMeta) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in HOW)


def _read(study: Study, field: str, path: str) -> Scores:
    kind, _, name = field.partition(".")
    try:
        found = score_file(path)
        if not found.exists() and kind == "scores":
            raise BadInput(
                f"no such score file: {path}; make it with `{study.how_to_score(name, path)}`, or name a scoring job "
                "(.yaml) in its place."
            )
        return read_scores(path)
    except BadInput as error:
        raise BadInput(f"`{field}`: {error.message}") from error
