"""A scoring job: one expert against its base, from a YAML file or from flags."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import read_yaml_mapping
from mergekit_wp.scores import ACTIVATION_SIDE, CHOICES, OBJECTS

PLAIN = "{prompt}"
COMPONENTS = ("all", "heads", "neurons")  # or a file


@dataclass(frozen=True)
class ScoringJob:
    """What to score and how; checks itself (raises `BadInput` naming the field).

    base, expert  model folder or Hub name; the expert may be `base+lora`
    pairs         JSONL file, or builtin:instructions | builtin:maths | builtin:code
    template      text around every prompt; {prompt} stands for it
    chat_template   put prompts into the tokenizer's chat template (the expert's, else the base's) as a message of the
                  user: on, off, the name of one of several, or auto: the prompts that their pairs call `chat`
    system        system prompt of every chat
    layer         anchor layer l_a, counted from 0; None: two thirds of the depth; auto: where steering the base
                  recovers most of what the expert does; without meaning for kl, which has no anchor
    method        first order: writeback (ours, default), attr (the paper's, Eq. 11), atp (activation side, Eq. 58);
                  one component at a time: exact (Eq. 10), ap (activation side, Eq. 12)
    object        what ap and atp take from the expert's run. write (default): what the component writes, its activation
                  through the expert's o_proj or down_proj (App. A.5.0.4 says so of heads; we do the same with neurons,
                  so that both kinds are judged alike); activation: that activation through the base's
    utility       kl (Eq. 72, default: made the best merges), anchor (Eq. 5, the paper's scores), projection (Eq. 74),
                  or staged: anchor up to l_a, kl above; staged-projection: anchor up to l_a, projection above
    components    heads, neurons, all, or a file that names them: L5H3 is head 3 of layer 5, L5N97 its neuron 97
    layers        score the components of these layers alone, such as "0-5,7"; None: all
    top           [K, FILE]: score only the K highest heads and K highest neurons of an earlier score file
    rank          by what: mean over its tasks, or task: the K of each task together; -abs: by absolute value
    parts         keep what q and o, gate, up and down add to a score (attr and writeback)
    split         half: extraction and scoring prompts are disjoint (App. B.3); shared: the same. Without meaning for
                  kl, which has no direction to extract and scores on all prompts
    gap           sample: mean of ratios to each prompt's own gap (the paper); mean: ratio of means
    gap_floor     prompts whose |gap| is below it are dropped (cosine for anchor, nats for kl)
    samples       pairs a task, drawn with `seed`; None: all of a file, 100 of a built-in set
    batch_size    prompts a forward pass
    anchor_layers, anchor_prompts, anchor_tokens   with `layer: auto`, the candidates ("10-38"; None: a spread, then
                  those around its best, see `anchor.search`), how many prompts a task are answered, and the longest
                  answer
    allow_code_execution   with `layer: auto`, grade code by running it, in a limited process
    offload       none: both models on the device; stream: read layer by layer; auto: by free memory
    """

    base: str
    expert: str
    pairs: str
    template: str = PLAIN
    chat_template: str | bool = "auto"
    system: str | None = None
    layer: int | str | None = None
    method: str = "writeback"
    object: str | None = None
    utility: str = "kl"
    split: str = "half"
    gap: str = "sample"
    gap_floor: float = 1e-3
    components: str = "all"
    layers: str | int | None = None
    top: Sequence[Any] | None = None
    rank: str = "mean"
    parts: bool = False
    samples: int | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 16
    offload: str = "auto"
    anchor_layers: str | int | None = None
    anchor_prompts: int = 32
    anchor_tokens: int = 256
    allow_code_execution: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("base", "expert", "pairs"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise BadInput(f"{name}: a scoring job needs this field; give it in the YAML or as --{name}.")
        if isinstance(self.chat_template, bool):  # YAML reads on and off as true and false
            object.__setattr__(self, "chat_template", "on" if self.chat_template else "off")
        for name in ("chat_template", "system"):
            value = getattr(self, name)
            if not (value is None and name == "system") and (not isinstance(value, str) or not value.strip()):
                raise BadInput(f"{name}: found {value!r}, expected text.")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name}: found {shown(getattr(self, name))}, expected one of {', '.join(allowed)}.")
        if not isinstance(self.template, str) or "{prompt}" not in self.template:
            raise BadInput(f"template: found {shown(self.template)}, expected text that contains {{prompt}}.")
        least_of = {"samples": 1, "seed": 0, "batch_size": 1, "anchor_prompts": 1, "anchor_tokens": 1}
        if self.layer not in (None, "auto") and (type(self.layer) is not int or self.layer < 0):
            raise BadInput(f"layer: found {shown(self.layer)}, expected a whole number of at least 0, or auto.")
        for name, least in least_of.items():
            value = getattr(self, name)
            optional = name == "samples"
            if not (value is None and optional) and (type(value) is not int or value < least):
                raise BadInput(f"{name}: found {shown(value)}, expected a whole number of at least {least}.")
        number = isinstance(self.gap_floor, (int, float)) and not isinstance(self.gap_floor, bool)
        if not number or not 0 <= self.gap_floor < math.inf:
            raise BadInput(f"gap_floor: found {shown(self.gap_floor)}, expected a number of at least 0.")
        for name in ("parts", "allow_code_execution", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):  # "no" would be as good as true
                raise BadInput(f"{name}: found {shown(getattr(self, name))}, expected true or false.")
        for name in ("layers", "anchor_layers"):
            if type(getattr(self, name)) not in (str, int, type(None)):
                raise BadInput(f"{name}: found {shown(getattr(self, name))}, expected text such as 0-5,7.")
        if not isinstance(self.device, str) or not self.device.strip():
            raise BadInput(f"device: found {shown(self.device)}, expected auto, cpu or cuda:N.")
        self._check_subset()

    @property
    def directed(self) -> bool:
        """Whether the utility reads along a direction, so that there is one to extract and an anchor to place."""
        return self.utility != "kl"

    def reads(self) -> list[str]:
        """Everything that the job reads, models too, as it names them: paths, and names that are no paths here."""
        ranking = [str(self.top[1])] if self.top else []
        listed = [] if self.components in COMPONENTS else [self.components]
        return [self.base, self.expert, *map(str, read_reference(self.expert).sources), self.pairs, *ranking, *listed]

    def _check_subset(self) -> None:
        if self.top is not None:
            fits = isinstance(self.top, (list, tuple)) and len(self.top) == 2
            if not fits or type(self.top[0]) is not int or self.top[0] < 1 or not isinstance(self.top[1], str):
                raise BadInput(
                    f"top: found {shown(self.top)}, expected a number of at least 1 and a score file: [20, FILE]."
                )
        if not isinstance(self.components, str) or not self.components:
            raise BadInput(
                f"components: found {shown(self.components)}, expected all, heads, neurons or a file that names some."
            )
        if self.rank != "mean" and self.top is None:
            raise BadInput(f"rank: {self.rank} says how --top ranks, and there is no top; give one, or leave rank out.")
        self._check_method()

    def _check_method(self) -> None:
        if self.object not in (None, *OBJECTS):
            raise BadInput(f"object: found {shown(self.object)}, expected write or activation.")
        if self.object is not None and self.method not in ACTIVATION_SIDE:
            raise BadInput(f"object: {self.method} patches weights; only ap and atp have an object, leave it out.")
        if self.parts and self.method not in ("attr", "writeback"):
            raise BadInput(f"parts: a score by {self.method} has no parts; use attr or writeback.")
        if self.utility == "projection" and self.layer is not None:
            raise BadInput("layer: the projection utility reads the last layer; leave the layer out.")

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
