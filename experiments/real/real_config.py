"""What decides the world of a pretrained model, and the hash that names it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.miniature.items import CAPABILITIES
from experiments.miniature.training import Schedule
from mergekit_wp.errors import BadInput
from mergekit_wp.hashing import digest

# Part of the hash: raise it whenever items, training or layout change what a configuration builds.
RECIPE = 3
OFFICIAL = ("gsm8k-train.jsonl", "mbpp.jsonl")

_EXPERT = Schedule(steps=120, batch_size=12, learning_rate=5e-5)
_FAR_EXPERT = Schedule(steps=160, batch_size=12, learning_rate=6e-4)


@dataclass(frozen=True)
class RealConfig:
    """Three experts of the pretrained base: how long they are trained, and how many items each use has.

    data              SHA-256 by name of the official files whose training rows are mixed in; none by default
    scoring_prompts   a capability, the kinds of it taking turns
    requests          plain ones, whose answers by the base are what instructions are learnt from
    answer_tokens     of the longest answer that is graded
    lora              train the maths expert a second time, as a LoRA
    """

    seed: int = 0
    expert: Schedule = _EXPERT
    data: tuple[tuple[str, str], ...] = ()
    test_items: int = 240
    validation_items: int = 120
    scoring_prompts: int = 30
    requests: int = 396
    answer_tokens: int = 96
    lora: bool = True

    def __post_init__(self) -> None:
        for name in ("test_items", "validation_items", "scoring_prompts", "requests", "answer_tokens"):
            if getattr(self, name) < 1:
                raise BadInput(f"World: {name} must be at least 1, found {getattr(self, name)}.")

    @classmethod
    def far(cls, seed: int = 0) -> RealConfig:
        """Experts that went further from the base."""
        return cls(seed=seed, expert=_FAR_EXPERT, lora=False)

    @classmethod
    def smoke(cls, seed: int = 0) -> RealConfig:
        """The same steps in minutes: experts that learn next to nothing, four items each; for tests."""
        schedule = Schedule(steps=2, batch_size=2, learning_rate=5e-5)
        return cls(seed, schedule, test_items=4, validation_items=4, scoring_prompts=4, requests=4, answer_tokens=16)

    @property
    def hash12(self) -> str:
        """Twelve hex digits that change with any field and with `RECIPE`."""
        text = json.dumps({"recipe": RECIPE, "real": CAPABILITIES, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def data_digests(folder: Path | None) -> tuple[tuple[str, str], ...]:
    """(name, SHA-256) of the official files of a folder. Raises `BadInput` where one is missing."""
    if folder is None:
        return ()
    if missing := [name for name in OFFICIAL if not (folder / name).is_file()]:
        raise BadInput(f"--data {folder}: lacks {missing[0]}; it must hold {' and '.join(OFFICIAL)}, as published.")
    return tuple((name, digest(folder / name)) for name in OFFICIAL)
