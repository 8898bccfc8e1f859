"""A trained world as the table sees it: its digests, and proof that what is tested was never chosen by.

The worlds of the table are frozen: `FROZEN` was written down before the first merge was graded. A change of the world
needs a reason that has nothing to do with which method wins, and a line in `CHANGES`.

There are two kinds of worlds, which share bases and items. In `near` ones the experts' updates hardly disturb one
another: to add them whole (task arithmetic, weight 1) is best, unlike in the paper's table, where that is worse than
the average by 1.6 points in the mean. In `far` ones the experts were trained longer and at a higher rate.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from experiments.miniature.items import CAPABILITIES
from experiments.miniature.lm_eval_tasks import task_name
from experiments.miniature.training import WorldConfig
from experiments.real.real_config import RealConfig, data_digests
from experiments.table3.grade import prefix_of, suite_of
from mergekit_wp.errors import BadInput
from mergekit_wp.hashing import digest

KINDS: Mapping[str, Callable[[int], WorldConfig | RealConfig]] = {
    "near": WorldConfig,
    "far": WorldConfig.far,
    "smoke": WorldConfig.smoke,
    "real": RealConfig,
    "real-far": RealConfig.far,
    "real-smoke": RealConfig.smoke,
}
"""How the world of a seed is trained; `smoke` in seconds, for tests; `real` from a pretrained model."""
FROZEN: Mapping[str, Mapping[int, str]] = {
    "near": {
        0: "023a35260726",
        1: "02406af946a9",
        2: "ee76bad1411d",
        3: "340afb581199",
        4: "519344ff4084",
        5: "c990f39d8080",
    },
    "far": {
        0: "544898c68613",
        1: "5ffcc11c2403",
        2: "c580f164af48",
        3: "8172e5e8628c",
        4: "f87a1cef017d",
        5: "f8799ee7e14b",
    },
}
"""Configuration hash (`WorldConfig.hash12`) of the world of each kind and seed."""
CHANGES: tuple[str, ...] = (
    "2026-11-21: near worlds frozen, recipe 3, before the first merge of the table was graded.",
    "2026-11-21: far worlds frozen. Of three trainings of the experts (240 steps at 5e-4, 320 at 1e-3, 240 at 2e-3) "
    "the one was taken whose sum of updates does, against the average, most like the paper's on Llama-2-13B (there "
    "-0.1, +3.6, -6.0 and -3.9 points in the four combinations; here, on validation items of seed 0, 0.0, -14.2, +0.8 "
    "and -14.1). No other method had been run on such worlds.",
    "2026-11-25: seeds 3, 4 and 5 of both kinds frozen, of the same recipes. No method had been run on them: they were "
    "never looked at while the fit was developed, and are run once at the end.",
)
"""What was changed in the worlds since, when, and why: never because of how the methods ranked."""


SPLITS = ("test", "validation")
MODELS = ("base", *CAPABILITIES)
# A request ends where the answer begins; scoring prompts of maths and code go on a little further.
_ANSWER = "Answer:\n"


def world_config(kind: str, seed: int, data: Path | None = None) -> WorldConfig | RealConfig:
    """How the world of a kind and seed is trained; `data` is a folder of official files for the real kinds.

    Raises `BadInput` for `data` with a kind that reads none, and for a frozen world that has changed.
    """
    config = KINDS[kind](seed)
    if data is not None:
        if not isinstance(config, RealConfig):
            raise BadInput(f"--data: a world of the kind {kind} reads no official files; leave it out.")
        config = replace(config, data=data_digests(data))
    check_frozen(kind, seed, config.hash12)
    return config


@dataclass(frozen=True)
class TrainedWorld:
    """One world on disk. `hash12` is its configuration's, the digests are of what training made of it."""

    seed: int
    folder: Path

    @property
    def hash12(self) -> str:
        return self.folder.name

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each model folder, of each pairs file and of all tasks."""
        found = {name: digest(self.folder / name) for name in (*MODELS, "tasks")}
        return found | {f"pairs/{name}": digest(self.pairs(name)) for name in CAPABILITIES}

    @property
    def digest(self) -> str:
        """One SHA-256 over all of it."""
        return hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()

    def pairs(self, expert: str) -> Path:
        return self.folder / "pairs" / f"{expert}.jsonl"

    @property
    def prefix(self) -> str:
        """What the names of its tasks begin with."""
        return prefix_of(suite_of("test", self.folder).tasks[0].task)

    @property
    def dtype(self) -> str:
        """In which dtype its models are stored, as a recipe's `out_dtype` says it."""
        return str(json.loads((self.folder / "base" / "config.json").read_text(encoding="utf-8"))["dtype"])

    def requests(self) -> dict[str, set[str]]:
        """The requests that each use of the world reads: test, validation, scoring (with its contrasts)."""
        data = self.folder / "tasks" / "data"
        found = {
            split: {
                r["prompt"] for c in CAPABILITIES for r in _rows(data / f"{task_name(c, split, self.prefix)}.jsonl")
            }
            for split in SPLITS
        }
        rows = [row for name in CAPABILITIES for row in _rows(self.pairs(name))]
        found["scoring"] = {row[key] for row in rows for key in ("prompt", "contrast") if key in row}
        return {use: {text.partition(_ANSWER)[0] for text in texts} for use, texts in found.items()}


class Disjoint:
    """Sees one world after the other, and refuses the first whose uses overlap, with its own or an earlier one's.

    Across seeds too: a setting chosen on one world's validation items may be tested on another world.
    """

    def __init__(self) -> None:
        self.seen: dict[str, set[str]] = {}

    def add(self, world: TrainedWorld) -> None:
        """Raises `BadInput` naming a request that two uses share."""
        for use, requests in world.requests().items():
            self.seen.setdefault(use, set()).update(requests)
        for one, other in itertools.combinations(self.seen, 2):
            if shared := self.seen[one] & self.seen[other]:
                raise BadInput(
                    f"{world.folder}: {len(shared)} requests are both {one} and {other} items, such as "
                    f"{min(shared)!r}; a method must not be chosen or scored on what it is tested with."
                )


def check_frozen(kind: str, seed: int, hash12: str) -> None:
    """Raises `BadInput` when the world of this seed is not the one that was frozen; other seeds may be anything."""
    if (frozen := FROZEN.get(kind, {}).get(seed, hash12)) != hash12:
        raise BadInput(
            f"seed {seed}: the {kind} world's configuration hash is {hash12}, the table's was frozen at {frozen}; "
            "undo the change, or write its reason into CHANGES in experiments/table3/world.py and the new hash there."
        )


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path}: not a file of a trained world ({error}); remove the world and train it again."
        ) from error
