"""Component geometry: which rows and columns of which tensor belong to which head and neuron.

This is the one module that knows. Scoring, merging, analysis and tests all ask it (METHOD.md 1; Eq. 9 and
App. A.1, A.4 of Sun et al., arXiv 2604.13694).

Hugging Face stores a linear layer as W[out, in] with y = x W^T, so a component owns:

    head (l, h)    rows    h*d_h .. (h+1)*d_h of q_proj (and of its bias), the same columns of o_proj
    neuron (l, j)  row j of gate_proj and up_proj (and of their biases), column j of down_proj

Keys and values are shared by the query heads of a KV group and belong to no component, nor do norms,
embeddings, the LM head and the biases of o_proj and down_proj.

Legend: L layers, H query heads, K key/value heads, r = H/K heads a group, d_h head width, F MLP width,
D residual width, V vocabulary rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from mergekit_wp.errors import BadInput, shown

Kind = Literal["head", "kv", "neuron"]

# The head width when config.json leaves it unsaid; None means hidden_size / heads. (Which projections carry
# a bias needs no table: the checkpoint's own tensor names decide.)
_DEFAULT_HEAD_DIM: dict[str, int | None] = {
    "LlamaForCausalLM": None,
    "MistralForCausalLM": None,
    "Qwen2ForCausalLM": None,
    "Qwen3ForCausalLM": 128,
    "Gemma2ForCausalLM": 256,
}
SUPPORTED = tuple(_DEFAULT_HEAD_DIM)

_SLOT = re.compile(
    r"^model\.layers\.(?P<layer>\d+)\.(?P<module>self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
    r"\.(?P<what>weight|bias)$"
)
_KIND_AND_AXIS: dict[str, tuple[Kind, int]] = {
    "q_proj": ("head", 0),
    "k_proj": ("kv", 0),
    "v_proj": ("kv", 0),
    "o_proj": ("head", 1),
    "gate_proj": ("neuron", 0),
    "up_proj": ("neuron", 0),
    "down_proj": ("neuron", 1),
}
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class TensorSlot:
    """How one tensor is cut into components: axis 0 cuts rows, axis 1 columns."""

    layer: int
    kind: Kind
    axis: int


def slot_of(name: str) -> TensorSlot | None:
    """The slot of a tensor by its checkpoint name; None when the tensor belongs to no component or group.

    The biases of o_proj and down_proj add to the whole residual stream, so they are nobody's.
    """
    match = _SLOT.match(name)
    if match is None:
        return None
    kind, axis = _KIND_AND_AXIS[match["module"].split(".")[1]]
    if match["what"] == "bias" and axis == 1:
        return None
    return TensorSlot(int(match["layer"]), kind, axis)


@dataclass(frozen=True)
class Geometry:
    """The shapes of one model that decide where its components lie (all counts, no units)."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    d_model: int
    vocabulary: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "architecture":
                if value not in SUPPORTED:
                    raise BadInput(_unsupported(str(value)))
            elif type(value) is not int or value < 1:
                raise BadInput(f"geometry field {name}: found {shown(value)}, expected a positive whole number.")
        if self.heads % self.kv_heads:
            raise BadInput(f"geometry: {self.heads} query heads cannot be shared out over {self.kv_heads} KV heads.")

    @property
    def group_size(self) -> int:
        """r: query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> Geometry:
        """Read the geometry from a config.json mapping; `where` names the file in errors.

        Raises `BadInput` for an architecture outside `SUPPORTED` (so also for fused QKV and mixtures of
        experts) and for missing or impossible fields.
        """
        named = config.get("architectures") or ["none"]
        if not isinstance(named, list):
            raise BadInput(f"{where}: found architectures {named!r}, expected a list of one name; mend the file.")
        architecture = named[0]
        if architecture not in SUPPORTED:
            raise BadInput(f"{where}: {_unsupported(architecture)}")
        if config.get("num_experts") or config.get("num_local_experts"):
            raise BadInput(f"{where}: mixtures of experts are not supported; use a dense model.")
        try:
            heads = config["num_attention_heads"]
            hidden = config["hidden_size"]
            default = _DEFAULT_HEAD_DIM[architecture] or hidden // heads
            return cls(
                architecture=architecture,
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or default,
                neurons=config["intermediate_size"],
                d_model=hidden,
                vocabulary=config["vocab_size"],
            )
        except KeyError as error:
            raise BadInput(f"{where}: the field {error.args[0]} is missing; is this a causal LM?") from error
        except (TypeError, ZeroDivisionError) as error:
            raise BadInput(f"{where}: a shape field is not a positive whole number ({error}).") from error
        except BadInput as error:
            raise BadInput(f"{where}: {error.message}") from error

    def differences(self, other: Geometry) -> list[str]:
        """Readable differences that make two models unmergeable (vocabulary rows may differ: not listed)."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name} {mine[name]} against {theirs[name]}"
            for name in mine
            if name != "vocabulary" and mine[name] != theirs[name]
        ]

    def head_slice(self, head: int) -> slice:
        """The rows of q_proj (columns of o_proj) that head `head` owns."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    def columns(self, kind: str, components_C: torch.Tensor) -> torch.Tensor:
        """Which columns of o_proj (heads) or down_proj (neurons) each component owns: [C] -> [C, d_h] or [C, 1]."""
        width = self.head_dim if kind == "heads" else 1
        return components_C[:, None] * width + torch.arange(width)

    def owned_slices(self, kind: Literal["head", "neuron"], layer: int, index: int) -> list[tuple[str, Any]]:
        """(tensor name, index expression) of every slice that one component owns, biases included.

        A tensor that the checkpoint does not have (a bias) is listed all the same: skip what is absent.
        """
        where = self.head_slice(index) if kind == "head" else slice(index, index + 1)
        prefix = f"model.layers.{layer}."
        rows, column = {
            "head": (("self_attn.q_proj",), "self_attn.o_proj"),
            "neuron": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        }[kind]
        owned: list[tuple[str, Any]] = []
        for module in rows:
            owned += [(f"{prefix}{module}.weight", (where, slice(None))), (f"{prefix}{module}.bias", where)]
        return [*owned, (f"{prefix}{column}.weight", (slice(None), where))]

    def expand(self, slot: TensorSlot, heads_H: torch.Tensor, neurons_F: torch.Tensor) -> torch.Tensor:
        """Spread per-component weights of one layer along the slot's axis of its tensor.

        heads_H: [..., H]; neurons_F: [..., F]. Returns [..., H*d_h] for q_proj and o_proj, [..., K*d_h] for
        k_proj and v_proj (the mean over the query heads of the group, METHOD.md 4), [..., F] for the MLP.
        """
        if slot.kind == "neuron":
            return neurons_F
        if slot.kind == "kv":
            grouped = heads_H.unflatten(-1, (self.kv_heads, self.group_size))
            return grouped.mean(-1).repeat_interleave(self.head_dim, dim=-1)
        return heads_H.repeat_interleave(self.head_dim, dim=-1)

    def sum_per_head(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H*d_h] -> [..., H]: add up what the rows (or columns) of each head contribute."""
        return x.unflatten(-1, (self.heads, self.head_dim)).sum(-1)


def _unsupported(architecture: str) -> str:
    return (
        f"architecture {architecture} is not supported (expected one of {', '.join(SUPPORTED)}); fused QKV "
        "projections and mixtures of experts are not handled."
    )
