"""What decides a miniature world, and the hash that names it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from experiments.miniature.items import CAPABILITIES
from mergekit_wp.errors import BadInput

# Part of the hash: raise it whenever items, tokenizer, training or layout change what a configuration builds.
RECIPE = 3


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model is trained: linear warm-up, then a cosine down to zero.

    AdamW, or with `muon` Muon for the matrices inside the layers, which learns to copy names and figures from
    a request in about half the steps (measured) at the same rate.
    """

    steps: int
    batch_size: int
    learning_rate: float
    muon: bool = False
    warmup_share: float = 0.05

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise BadInput(f"World: {name} of a schedule must be above 0, found {getattr(self, name)}.")

    def rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        warmup = max(1, round(self.warmup_share * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


_BASE = Schedule(steps=1800, batch_size=16, learning_rate=2.5e-3, muon=True)
_EXPERT = Schedule(steps=80, batch_size=16, learning_rate=5e-4)
_FAR_EXPERT = Schedule(steps=320, batch_size=16, learning_rate=1e-3)


@dataclass(frozen=True)
class WorldConfig:
    """Everything that decides a world; its hash names the folder.

    `shares` is how the base's training texts divide among instruction, maths and code, `latent` how often
    their answers are right rather than careless, `plain_share` how many instruction requests have none.
    Raises `BadInput` when a field makes no sense.
    """

    seed: int = 0
    hidden_size: int = 160
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    mlp_size: int = 448
    initial_deviation: float = 0.06
    base: Schedule = _BASE
    expert: Schedule = _EXPERT
    shares: tuple[float, float, float] = (0.4, 0.3, 0.3)
    latent: tuple[float, float, float] = (0.3, 0.35, 0.35)
    plain_share: float = 0.2
    test_items: int = 240
    validation_items: int = 120
    scoring_prompts: int = 64

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise BadInput(f"World: seed must be at least 0, found {self.seed}.")
        for name in ("hidden_size", "layers", "heads", "kv_heads", "mlp_size", "scoring_prompts"):
            if getattr(self, name) < 1:
                raise BadInput(f"World: {name} must be at least 1, found {getattr(self, name)}.")
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise BadInput(f"World: hidden_size {self.hidden_size} must be heads ({self.heads}) times an even width.")
        if self.heads % self.kv_heads:
            raise BadInput(f"World: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads}).")
        if min(self.test_items, self.validation_items) < 6:
            raise BadInput("World: test_items and validation_items must be at least 6, one for each instruction.")
        for name in ("shares", "latent"):
            values = getattr(self, name)
            if len(values) != len(CAPABILITIES) or not all(0 < value <= 1 for value in values):
                raise BadInput(f"World: {name} must be {len(CAPABILITIES)} numbers above 0, at most 1; found {values}.")
        if not 0 <= self.plain_share < 1:
            raise BadInput(f"World: plain_share must be at least 0 and below 1, found {self.plain_share}.")

    @classmethod
    def far(cls, seed: int = 0) -> WorldConfig:
        """The same base with experts that went further from it, so that what one learnt disturbs the others."""
        return cls(seed=seed, expert=_FAR_EXPERT)

    @classmethod
    def smoke(cls, seed: int = 0) -> WorldConfig:
        """A world of the same layout that trains in seconds and knows nothing: for tests."""
        schedule = Schedule(steps=4, batch_size=4, learning_rate=1e-3)
        return cls(
            seed=seed, hidden_size=32, layers=2, heads=4, kv_heads=2, mlp_size=64, base=schedule,
            expert=schedule, test_items=12, validation_items=6, scoring_prompts=4,
        )  # fmt: skip

    @property
    def hash12(self) -> str:
        """Twelve hex digits that change with any field and with `RECIPE`."""
        text = json.dumps({"recipe": RECIPE, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
