"""The score files that a study has made: each by a run of wp-score of its own, before the parts, as a step of a
pipeline is (`execute`): not again while its job, the models, the prompts and the file are what they were.

    OUT/scoring/NAME.yaml         the job as wp-score reads it
    OUT/scores/NAME.safetensors   its scores
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mergekit_wp.checkpoint.hub import folder_of
from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.errors import BadInput
from mergekit_wp.execute import Step
from mergekit_wp.files import write_text
from mergekit_wp.foreign import file_parts
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.study.study_spec import Study


@dataclass(frozen=True)
class ToScore:
    """One score file that is made, under its name in the study; `field` is where that has its job."""

    name: str
    field: str
    job: ScoringJob
    job_file: Path
    text: str
    scores: Path

    def step(self) -> Step:
        """The run of wp-score."""
        sources = [s for model in (self.job.base, self.job.expert) for s in read_reference(model).sources]
        read = [path for path in self.job.reads() if os.path.exists(path)]  # else a set that is built in, or a Hub name
        inputs = dict.fromkeys([self.job_file, *map(folder_of, sources), *map(Path, read)])
        command = ("wp-score", str(self.job_file), "--out", str(self.scores))
        title = f"Score for {self.field}"
        return Step(f"score-{self.scores.stem}", "score", title, command, tuple(inputs), (self.scores,), ("scoring",))


def to_score(study: Study, out: Path) -> list[ToScore]:
    """Those of a study, in its order. Raises `BadInput`, naming the field."""
    wanted = study.jobs()
    made = []
    for file, ((field, name), values) in zip(file_parts(name for _, name in wanted), wanted.items(), strict=True):
        where, text = f"{field}.{name}", yaml.safe_dump(values, sort_keys=False, width=110)
        job = ScoringJob.from_mapping(values, f"`{where}`")
        path = out / "scores" / f"{file}.safetensors"
        made.append(ToScore(name, where, job, out / "scoring" / f"{file}.yaml", text, path))
    return made


def with_files(study: Study, made: Collection[ToScore], absent: Collection[ToScore] = ()) -> Study:
    """The study with score files in the place of jobs; without those that are not there yet."""
    files = {each.name: str(each.scores) for each in made}
    gone = {each.name for each in absent}

    def placed(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {name: files.get(name, entry) for name, entry in entries.items() if name not in gone}

    return replace(study, scores=placed(study.scores), others=placed(study.others))


def write_jobs(made: Collection[ToScore]) -> None:
    """Write the jobs that have another content than on the disk."""
    for each in made:
        if not each.job_file.is_file() or each.job_file.read_text(encoding="utf-8") != each.text:
            write_text(each.job_file, each.text)


def check_jobs(due: Collection[ToScore]) -> None:
    """As wp-score would before it loads weights. Raises `BadInput`, naming the field."""
    from mergekit_wp.scoring.score import prepare

    for each in due:
        try:
            prepare(each.job)
        except BadInput as error:
            raise BadInput(f"`{each.field}`: {error.message}") from error
