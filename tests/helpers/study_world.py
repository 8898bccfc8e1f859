"""A pair of tiny models and score files that say they are of it, with made-up scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import yaml
from score_example import example

from mergekit_wp.checkpoint.folder import Checkpoint, fingerprint_of
from mergekit_wp.geometry import Geometry
from mergekit_wp.scores import ModelId, Scores, TaskMeta, TaskScores, UtilityStats, write_scores
from mergekit_wp.study.inputs import Inputs
from mergekit_wp.study.study_spec import Study

SHAPE = Geometry("LlamaForCausalLM", 4, 4, 2, 8, 20, 24, 97)


def scores(
    seed: int = 0,
    tasks: tuple[str, ...] = ("a", "b"),
    geometry: Geometry = SHAPE,
    base: str = "a" * 64,
    expert: str = "b" * 64,
    utility: str = "kl",
    **meta: object,
) -> Scores:
    """Random scores; with another utility than kl, anchored at layer 1."""
    random = torch.Generator().manual_seed(seed)
    anchored = utility != "kl"
    read = {"kl": ("kl",), "anchor": ("anchor",), "staged": ("anchor", "kl")}[utility]
    about = TaskMeta(4, 4, dict.fromkeys(read, UtilityStats(4, 0, 0.5)))
    own = {
        task: TaskScores(
            torch.randn(geometry.layers, geometry.heads, generator=random),
            torch.randn(geometry.layers, geometry.neurons, generator=random),
            torch.randn(geometry.d_model, generator=random) if anchored else None,
        )
        for task in tasks
    }
    fields = {
        "base": ModelId("base", None, "c" * 64, base), "expert": ModelId("expert", None, "c" * 64, expert),
        "geometry": geometry, "tasks": dict.fromkeys(tasks, about), "utility": utility,
        "split": "half" if anchored else None, "anchor_layer": 1 if anchored else None,
    }  # fmt: skip
    return Scores.from_tasks(replace(example().meta, **fields, **meta), own)


def inputs_of(files: dict[str, Scores], others: dict[str, Scores] | None = None, **top: int) -> Inputs:
    """Of score files in memory, for parts that read no file."""
    study = Study("base", "expert", dict.fromkeys(files, ""), top={"heads": 3, "neurons": 8, **top})
    return Inputs(study, files, others or {}, {})


def write_study(folder: Path, files: dict[str, dict], others: dict[str, dict] | None = None, **fields: object) -> Path:
    """folder/study.yaml about folder/base and folder/expert, and its score files; `files`: how each is scored."""
    base, expert = folder / "base", folder / "expert"
    geometry = Checkpoint(str(base), base).geometry
    of_pair = {"geometry": geometry, "base": fingerprint_of(str(base)).tensors}
    paths: dict[str, dict[str, str]] = {"scores": {}, "others": {}}
    for field, listed in (("scores", files), ("others", others or {})):
        for name, how in listed.items():
            own = {"expert": fingerprint_of(str(expert)).tensors} if field == "scores" else {"expert": "d" * 64}
            paths[field][name] = str(folder / f"{name}.safetensors")
            write_scores(scores(**{**of_pair, **own, **how}), paths[field][name])
    content = {"base": str(base), "expert": str(expert), "top": {"heads": 3, "neurons": 8}, **paths, **fields}
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return folder / "study.yaml"
