"""A scoring job: one expert against its base, from a YAML file or from flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mergekit_wp.errors import BadInput
from mergekit_wp.files import read_yaml_mapping

METHODS = ("writeback", "attr")
UTILITIES = ("staged", "anchor", "kl")
CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "utility": UTILITIES,
    "split": ("half", "shared"),
    "gap": ("sample", "mean"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class ScoringJob:
    """What to score and how; checks itself (raises `BadInput` naming the field).

    base, expert  model folder or Hub name; the expert may be `base+lora`
    pairs         JSONL file, or builtin:instructions | builtin:maths | builtin:code
    template      text around every prompt; {prompt} stands for it
    layer         anchor layer l_a, counted from 0; None: two thirds of the depth
    method        writeback (ours, default) or attr (the paper's first order, Eq. 11)
    utility       anchor (Eq. 5), kl (Eq. 72), or staged: anchor up to l_a, kl above
    split         half: extraction and scoring prompts are disjoint (App. B.3); shared: the same
    gap           sample: mean of ratios to each prompt's own gap (the paper); mean: ratio of means
    gap_floor     prompts whose |gap| is below it are dropped (cosine for anchor, nats for kl)
    samples       pairs a task, drawn with `seed`; None: all of a file, 100 of a built-in set
    batch_size    prompts a forward pass
    """

    base: str
    expert: str
    pairs: str
    template: str = "{prompt}"
    layer: int | None = None
    method: str = "writeback"
    utility: str = "staged"
    split: str = "half"
    gap: str = "sample"
    gap_floor: float = 1e-3
    samples: int | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 16
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("base", "expert", "pairs"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise BadInput(f"{name}: a scoring job needs this field; give it in the YAML or as --{name}.")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(allowed)}.")
        if not isinstance(self.template, str) or "{prompt}" not in self.template:
            raise BadInput(f"template: found {self.template!r}, expected text that contains {{prompt}}.")
        for name, least in (("layer", 0), ("samples", 1), ("seed", 0), ("batch_size", 1)):
            value = getattr(self, name)
            optional = name in ("layer", "samples")
            if not (value is None and optional) and (type(value) is not int or value < least):
                raise BadInput(f"{name}: found {value!r}, expected a whole number of at least {least}.")
        if isinstance(self.gap_floor, bool) or not isinstance(self.gap_floor, (int, float)) or self.gap_floor < 0:
            raise BadInput(f"gap_floor: found {self.gap_floor!r}, expected a number of at least 0.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> ScoringJob:
        """Build from YAML content; `where` names the file in errors."""
        known = {f.name for f in fields(cls)}
        if unknown := [key for key in values if key not in known]:
            raise BadInput(f"{where}: unknown field {unknown[0]!r}; expected {', '.join(sorted(known))}.")
        try:
            return cls(**{"base": "", "expert": "", "pairs": "", **values})
        except BadInput as error:
            raise BadInput(f"{where}: {error.message}" if where else error.message) from error


def load_job(path: str | None, flags: Mapping[str, Any]) -> ScoringJob:
    """A job from a YAML file (or none), with the flags that were given laid over it."""
    values = read_yaml_mapping(path, "scoring job") if path else {}
    return ScoringJob.from_mapping({**values, **flags}, where=path or "")
