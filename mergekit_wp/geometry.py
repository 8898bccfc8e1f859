"""Component geometry: which rows and columns of which tensor belong to which head and neuron.

This is the one module that knows, and where the decoder lies in a model of each architecture: in its checkpoint
(`text_name`) and in memory (`text_tower`). Scoring, merging, analysis and tests all ask it (METHOD.md 1; Eq. 9 and
App. A.1, A.4 of Sun et al., arXiv 2604.13694).

Hugging Face stores a linear layer as W[out, in] with y = x W^T, so a component owns:

    head (l, h)    rows    h*d_h .. (h+1)*d_h of q_proj (and of its bias), the same columns of o_proj
    neuron (l, j)  row j of gate_proj and up_proj (and of their biases), column j of down_proj

Some architectures keep several of these in one tensor, one after the other (`FUSED`): qkv_proj has the rows of q, then
those of k, then of v; gate_up_proj those of gate, then of up. The rows there are owned as they are apart.

Keys and values are shared by the query heads of a KV group and belong to no component, nor do norms,
embeddings, the LM head and the biases of o_proj and down_proj.

Legend: L layers, H query heads, K key/value heads, r = H/K heads a group, d_h head width, F MLP width,
D residual width, V vocabulary rows.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal

import torch

from mergekit_wp.documents import strict
from mergekit_wp.errors import BadInput, shown


class Kind(StrEnum):
    """The two kinds of components, as scores, masks and score files name them."""

    HEAD = "heads"
    NEURON = "neurons"


_LETTERS = {"H": Kind.HEAD, "N": Kind.NEURON}
_COMPONENT = re.compile(r"L(\d{1,9})([HN])(\d{1,9})")


@dataclass(frozen=True)
class Component:
    """A head or a neuron; `index` counts within the layer, both from 0.

    score: where it comes from a ranking, else NaN; components are equal whatever theirs are.

    >>> Component.parse("L5N97").kind
    <Kind.NEURON: 'neurons'>
    >>> Component(Kind.HEAD, 5, 3, score=0.25)
    L5H3 (0.25)
    """

    kind: Kind
    layer: int
    index: int
    score: float = dataclasses.field(default=math.nan, compare=False)

    @classmethod
    def parse(cls, text: str) -> Component:
        """The component of this name. Raises `BadInput` for any other text."""
        match = _COMPONENT.fullmatch(text)
        if match is None:
            raise BadInput(f"found {shown(text)}, expected a head (L5H3) or a neuron (L5N97).")
        return cls(_LETTERS[match[2]], int(match[1]), int(match[3]))

    @property
    def name(self) -> str:
        """`L5H3`, `L5N97`: what `wp-score --components FILE` reads."""
        letter = next(letter for letter, kind in _LETTERS.items() if kind == self.kind)
        return f"L{self.layer}{letter}{self.index}"

    def __repr__(self) -> str:
        return self.name if math.isnan(self.score) else f"{self.name} ({self.score:.3g})"

    def check(self, geometry: Geometry) -> None:
        """Raise `BadInput` for one that a model of this geometry does not have."""
        if self.layer >= geometry.layers or self.index >= geometry.count(self.kind):
            raise BadInput(
                f"{self.name} is not in this model, which has layers 0 to {geometry.layers - 1}, heads 0 to "
                f"{geometry.heads - 1} and neurons 0 to {geometry.neurons - 1}."
            )


@dataclass(frozen=True)
class Family:
    """What one architecture does otherwise than Llama.

    head_dim   its head width where config.json leaves it unsaid; None is hidden_size / heads
    heads_mix  a norm runs over the queries of all heads at once (OLMo), so a head's rows of q_proj also scale what the
               other heads ask
    wrapper    its decoder is the text tower among others (vision), and a causal LM of another family by itself
    """

    head_dim: int | None = None
    heads_mix: bool = False
    wrapper: bool = False


# Which projections carry a bias, are fused or are followed by a norm needs no table: tensor names and the
# architecture's own code decide.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "MinistralForCausalLM": Family(),
    "Ministral3ForCausalLM": Family(head_dim=128),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(head_dim=128),
    "Gemma2ForCausalLM": Family(head_dim=256),
    "Gemma3ForCausalLM": Family(head_dim=256),
    "Olmo2ForCausalLM": Family(heads_mix=True),
    "Olmo3ForCausalLM": Family(heads_mix=True),
    "SmolLM3ForCausalLM": Family(),
    "GraniteForCausalLM": Family(),
    "Phi3ForCausalLM": Family(),
    "Gemma3ForConditionalGeneration": Family(wrapper=True),
    "Mistral3ForConditionalGeneration": Family(wrapper=True),
    "LlavaForConditionalGeneration": Family(wrapper=True),
}
SUPPORTED = tuple(FAMILIES)

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""The modules of a decoder layer that components are cut from."""

FUSED = {
    "self_attn.qkv_proj": ("q", "k", "v"),
    "mlp.gate_up_proj": ("gate", "up"),
}
"""Modules that hold several of `PROJECTIONS`, in this order along their rows."""

Share = Literal["head", "kv", "neuron"]
_SHARE_AND_AXIS: dict[str, tuple[Share, int]] = {
    "q": ("head", 0),
    "k": ("kv", 0),
    "v": ("kv", 0),
    "o": ("head", 1),
    "gate": ("neuron", 0),
    "up": ("neuron", 0),
    "down": ("neuron", 1),
}
_PARTS = {path: (key,) for key, path in PROJECTIONS.items()} | FUSED
_SLOT = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<module>\w+\.\w+)\.(?P<what>weight|bias)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# Wrappers are stored as they were first published, language_model.model.* and language_model.lm_head, or as
# transformers has them in memory since 4.52, model.language_model.* and lm_head.
_TEXT_NAME = re.compile(
    r"(?:model\.language_model|language_model\.model|model)\.(?P<model>(?:embed_tokens|layers|norm)\..*)"
    r"|(?:language_model\.)?(?P<head>lm_head\..*)"
)


def text_name(name: str) -> str | None:
    """What a tensor, on disk or in memory, is called in a plain causal LM; None for what is not of its decoder."""
    match = _TEXT_NAME.fullmatch(name)
    if match is None:
        return None
    return match["head"] or f"model.{match['model']}"


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor's name speaks of; None for embeddings, final norm, LM head and other towers."""
    match = _LAYER.match(text_name(name) or "")
    return int(match[1]) if match else None


def is_vocabulary(name: str) -> bool:
    """Whether a tensor's rows are tokens: the embeddings, the LM head."""
    return text_name(name) in (EMBEDDINGS, HEAD)


def text_tower(model: Any) -> Any:
    """The module of a loaded causal LM that has `embed_tokens`, the decoder's `layers` and the final `norm`."""
    return getattr(model.model, "language_model", model.model)


def text_config(config: Mapping[str, Any], where: str = "config.json") -> Mapping[str, Any]:
    """What describes the decoder: `config` itself, or of a wrapper its text_config with the defaults filled in.

    Raises `BadInput` for a text tower that is no supported causal LM.
    """
    if not FAMILIES.get(_architecture(config, where), Family()).wrapper:
        return config
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from mergekit_wp.checkpoint.model_config import decoder  # it knows this module

    text = decoder(config, where)
    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text["model_type"], text["model_type"])
    family = FAMILIES.get(own)
    if family is None or family.wrapper or family.heads_mix:
        raise BadInput(f"{where}: in text_config, {_unsupported(own)}")
    return text


def auto_name(config: Mapping[str, Any], where: str = "config.json") -> str:
    """The name of `auto_class`, without importing transformers."""
    wrapper = FAMILIES.get(_architecture(config, where), Family()).wrapper
    return "AutoModelForImageTextToText" if wrapper else "AutoModelForCausalLM"


def auto_class(config: Mapping[str, Any], where: str = "config.json") -> Any:
    """The class of transformers that loads a model of this config with its output head."""
    import transformers

    return getattr(transformers, auto_name(config, where))


def _architecture(config: Mapping[str, Any], where: str) -> str:
    named = config.get("architectures") or ["none"]
    if not isinstance(named, list):
        raise BadInput(f"{where}: found architectures {named!r}, expected a list of one name; mend the file.")
    return str(named[0])


@dataclass(frozen=True)
class TensorSlot:
    """How one tensor is cut into components: axis 0 cuts rows, axis 1 columns.

    parts  keys of `PROJECTIONS`: those that lie along the axis one after the other (one, unless fused)
    """

    layer: int
    parts: tuple[str, ...]
    axis: int

    @property
    def shares(self) -> tuple[Share, ...]:
        """Whose the rows or columns of each part are."""
        return tuple(_SHARE_AND_AXIS[part][0] for part in self.parts)


def slot_of(name: str) -> TensorSlot | None:
    """The slot of a tensor by its checkpoint name; None when the tensor belongs to no component or group.

    The biases of o_proj and down_proj add to the whole residual stream, so they are nobody's.
    """
    match = _SLOT.fullmatch(text_name(name) or "")
    parts = _PARTS.get(match["module"]) if match else None
    if match is None or parts is None:
        return None
    axis = _SHARE_AND_AXIS[parts[0]][1]
    if match["what"] == "bias" and axis == 1:
        return None
    return TensorSlot(int(match["layer"]), parts, axis)


@strict
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

        Raises `BadInput` for an architecture outside `SUPPORTED` (so also for mixtures of experts and hybrids) and for
        missing or impossible fields.
        """
        architecture = _architecture(config, where)
        if architecture not in SUPPORTED:
            raise BadInput(f"{where}: {_unsupported(architecture)}")
        family, config = FAMILIES[architecture], text_config(config, where)
        for name, trouble in _REFUSED.items():
            if config.get(name):
                raise BadInput(f"{where}: `{name}` is {config[name]!r}; {trouble}.")
        try:
            heads = config["num_attention_heads"]
            hidden = config["hidden_size"]
            default = family.head_dim or hidden // heads
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

    @property
    def heads_mix(self) -> bool:
        """A head's rows of q_proj change what other heads ask, too (see `Family`)."""
        return FAMILIES[self.architecture].heads_mix

    def columns(self, kind: Kind, components_C: torch.Tensor) -> torch.Tensor:
        """Which columns of o_proj (heads) or down_proj (neurons) each component owns: [C] -> [C, d_h] or [C, 1]."""
        width = self.width(kind)
        return components_C[:, None] * width + torch.arange(width, device=components_C.device)

    def width(self, kind: Kind) -> int:
        """How many rows of each of its projections a component owns. Raises `ValueError` for another kind."""
        return {Kind.HEAD: self.head_dim, Kind.NEURON: 1}[Kind(kind)]

    def count(self, kind: Kind) -> int:
        """Components of a kind in a layer. Raises `ValueError` for another kind."""
        return {Kind.HEAD: self.heads, Kind.NEURON: self.neurons}[Kind(kind)]

    def lengths(self, slot: TensorSlot) -> list[int]:
        """How many rows (or columns) each of the slot's projections takes along its axis."""
        rows = {"head": self.heads * self.head_dim, "kv": self.kv_heads * self.head_dim, "neuron": self.neurons}
        return [rows[share] for share in slot.shares]

    def expand(self, slot: TensorSlot, heads_H: torch.Tensor, neurons_F: torch.Tensor) -> torch.Tensor:
        """Spread per-component weights of one layer along the slot's axis of its tensor.

        heads_H: [..., H]; neurons_F: [..., F]. Returns [..., H*d_h] for q_proj and o_proj, [..., K*d_h] for
        k_proj and v_proj (the mean over the query heads of the group, METHOD.md 4), [..., F] for the MLP; for a fused
        tensor these one after the other.
        """
        return torch.cat([self._expand(share, heads_H, neurons_F) for share in slot.shares], -1)

    def _expand(self, share: Share, heads_H: torch.Tensor, neurons_F: torch.Tensor) -> torch.Tensor:
        if share == "neuron":
            return neurons_F
        if share == "kv":
            heads_H = heads_H.unflatten(-1, (self.kv_heads, self.group_size)).mean(-1)
        return heads_H.repeat_interleave(self.head_dim, dim=-1)

    def owned(self, slot: TensorSlot, heads_H: torch.Tensor, neurons_F: torch.Tensor) -> torch.Tensor:
        """Which rows (or columns) of the slot's tensor the marked components of its layer own, bool along its axis.

        heads_H: bool [H]; neurons_F: bool [F]. Keys and values are nobody's, whoever is marked.
        """
        nobody = torch.zeros(self.kv_heads * self.head_dim, dtype=torch.bool, device=heads_H.device)
        parts = [nobody if share == "kv" else self._expand(share, heads_H, neurons_F) for share in slot.shares]
        return torch.cat(parts)

    def owned_slices(self, kind: Kind, layer: int, index: int) -> list[tuple[str, Any]]:
        """(tensor name, index expression) of every slice that one component owns, biases included.

        Names are those of a plain causal LM (see `text_name`). A tensor that the checkpoint does not have (a bias, a
        fused one) is listed all the same: skip what is absent. Raises `ValueError` for another kind.
        """
        width, prefix = self.width(kind), f"model.layers.{layer}."
        share, first = ("head", index * width) if kind == Kind.HEAD else ("neuron", index)
        owned: list[tuple[str, Any]] = []
        for path in _PARTS:
            slot = slot_of(f"{prefix}{path}.weight")
            assert slot is not None  # these are the names that have one
            begin = 0
            for own, length in zip(slot.shares, self.lengths(slot), strict=True):
                where = slice(begin + first, begin + first + width)
                begin += length
                if own != share:
                    continue
                if slot.axis:
                    owned.append((f"{prefix}{path}.weight", (slice(None), where)))
                else:
                    owned += [(f"{prefix}{path}.weight", (where, slice(None))), (f"{prefix}{path}.bias", where)]
        return owned

    def sum_per_head(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H*d_h] -> [..., H]: add up what the rows (or columns) of each head contribute."""
        return x.unflatten(-1, (self.heads, self.head_dim)).sum(-1)


_REFUSED = {
    "num_experts": "mixtures of experts are not supported, so use a dense model",
    "num_local_experts": "mixtures of experts are not supported, so use a dense model",
    "use_bidirectional_attention": "prompts are read from left to right alone, so use a causal LM",
}


def _unsupported(architecture: str) -> str:
    return (
        f"architecture {architecture} is not supported (expected one of {', '.join(SUPPORTED)}); mixtures of experts, "
        "hybrids of attention with something else and encoder-decoders are not handled."
    )
