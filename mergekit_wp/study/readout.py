"""What a vector of the residual stream says in words: through a model's final norm and output head, as both are stored.

A vector w, brought to a mean square of 1, goes through the architecture's own code from the final norm on: RMS norms
scale by a positive number, so tokens rank as in W_U (gamma * w), which is also their order by how much each logit grows
when a little of w is added to the final stream while the norm's scale is held. Ranked by what the head puts out, before
soft-capping and scaling, which keep the order as far as they can tell numbers apart. Only the final norm and the head
are read, the head some rows at a time; embeddings and layers are not.

Rows of the head that stand for no token of the tokenizer (padding up to a round number, say) are not ranked: whatever
lies there is nobody's word.

What a component writes into the stream is W_o or W_down times its activation; where the layer has a norm after the
block (Gemma, OLMo), each channel times that norm's weight, its scale, a positive number, left out.

Legend: N vectors, D residual width, V rows of the head, n of them with a token, K words of a vector,
G groups of vectors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mergekit_wp.geometry import HEAD, PROJECTIONS, Component, Geometry, Kind, text_tower
from mergekit_wp.scoring.models.layerwise import ResidentStack
from mergekit_wp.scoring.models.streaming import skeleton
from mergekit_wp.study.drift_sums import StoredModel

WORDS = 10  # of a vector
_TILE = 1 << 22  # numbers of a matrix that are read at a time
_LOGITS = 1 << 24  # logits that are held at a time
_FINAL_NORM = "model.norm.weight"
_WRITES = {Kind.HEAD: PROJECTIONS["o"], Kind.NEURON: PROJECTIONS["down"]}
_AFTER = {Kind.HEAD: "post_attention_layernorm", Kind.NEURON: "post_feedforward_layernorm"}


@dataclass(frozen=True)
class Reading:
    """Of N vectors: ids of the words at either end, strongest first; by how many standard deviations the first word is
    above the mean of all, NaN for a zero vector; the sign under which each was read; of G groups the sizes of words,
    the sum of softmax(logits) over vectors as far as each counts there."""

    high_NK: torch.Tensor
    low_NK: torch.Tensor
    peak_N: torch.Tensor
    sign_N: torch.Tensor
    size_Gn: torch.Tensor


class Readout:
    """One model's final norm and head. `ids_n`: the rows with a token, ascending."""

    def __init__(self, stored: StoredModel, tokens: Sequence[int] | None = None) -> None:
        """`tokens`: ids that the tokenizer knows; None: all rows. Raises as `skeleton`."""
        self.stored = stored
        model: Any = skeleton(stored.checkpoint.name, stored.checkpoint, torch.float32, remote_code=False)
        self._head = _StoredHead(stored)
        model.lm_head = self._head
        self._stack = ResidentStack(model, torch.device("cpu"), torch.float32)
        self._load(text_tower(model).norm, _FINAL_NORM)
        rows = stored.shape(HEAD)[0]
        known = range(rows) if tokens is None else sorted({t for t in tokens if t < rows})
        self.ids_n = torch.tensor(list(known), dtype=torch.long)

    def _load(self, module: nn.Module, name: str) -> None:
        weight_D = self.stored.rows(name, 0, self.stored.shape(name)[0]).float()
        module.load_state_dict({"weight": weight_D}, assign=True)

    @torch.no_grad()
    def read(
        self, vector_ND: torch.Tensor, *, either: torch.Tensor | None = None, share_GN: torch.Tensor | None = None
    ) -> Reading:
        """The words of each vector, of one at least.

        either: bool [N], of which the sign is not known: they are read under the one that gives the higher peak
        share_GN: of G groups, how much each vector counts in the group's word sizes
        """
        count = len(vector_ND)
        either_N = torch.zeros(count, dtype=torch.bool) if either is None else either
        share_GN = torch.zeros(0, count) if share_GN is None else share_GN
        size_Gn = torch.zeros(len(share_GN), len(self.ids_n), dtype=torch.float64)
        found: list[tuple[torch.Tensor, ...]] = []
        words = min(WORDS, len(self.ids_n))
        for place_N in torch.arange(count).split(max(1, _LOGITS // self.stored.shape(HEAD)[0])):
            part_ND = vector_ND[place_N]
            raw_Nn, logits_Nn = self._logits(part_ND)
            turned_N = either_N[place_N] & (_peak(-raw_Nn) > _peak(raw_Nn))
            sign_N = 1 - 2 * turned_N.float()
            raw_Nn *= sign_N[:, None]  # all that follows a vector is odd: its negative reads as the negative of this
            logits_Nn *= sign_N[:, None]
            size_Gn += share_GN[:, place_N].double() @ logits_Nn.softmax(-1).double()
            high_NK, low_NK = (self.ids_n[raw_Nn.topk(words, largest=up).indices] for up in (True, False))
            found.append((high_NK, low_NK, _peak(raw_Nn).masked_fill(~part_ND.any(1), torch.nan), sign_N))
        high_NK, low_NK, peak_N, sign_N = (torch.cat(each) for each in zip(*found, strict=True))
        return Reading(high_NK, low_NK, peak_N, sign_N, size_Gn)

    def _logits(self, vector_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head puts out [N, n], and the model's logits [N, n]."""
        size_N1 = vector_ND.square().mean(1, keepdim=True).sqrt()
        unit_ND = vector_ND.float() / size_N1.where(size_N1 > 0, 1.0)
        logits_NV = self._stack.logits(unit_ND, self.stored.shape(HEAD)[0])
        return self._head.seen_NV[:, self.ids_n], logits_NV[:, self.ids_n]

    @torch.no_grad()
    def written(self, geometry: Geometry, wanted: Sequence[tuple[Component, torch.Tensor]]) -> torch.Tensor:
        """What each of N components writes [N, D] with activations of its own: d_h of a head, one of a neuron."""
        places: dict[tuple[Kind, int], list[int]] = defaultdict(list)
        for place, (component, _) in enumerate(wanted):
            places[component.kind, component.layer].append(place)
        found_ND = torch.zeros(len(wanted), geometry.d_model)
        for (kind, layer), own in places.items():
            name = f"model.layers.{layer}.{_WRITES[kind]}.weight"
            columns_Cw = geometry.columns(kind, torch.tensor([wanted[place][0].index for place in own]))
            active_Cw = torch.stack([wanted[place][1].float() for place in own])
            spread_QC = torch.zeros(self.stored.shape(name)[1], len(own)).scatter_(0, columns_Cw.T, active_Cw.T)
            for first, rows_RQ in _tiles(self.stored, name):
                found_ND[own, first : first + len(rows_RQ)] = (rows_RQ @ spread_QC).T
            found_ND[own] *= self._scale(kind, layer, geometry.d_model)
        return found_ND

    def _scale(self, kind: Kind, layer: int, width: int) -> torch.Tensor:
        """By what the norm after a block multiplies each channel [D]; 1 where there is none."""
        module = self._stack.tower.layers[layer]
        if not hasattr(module, _AFTER[Kind.NEURON]):  # Llama's post_attention_layernorm stands before the MLP
            return torch.ones(width)
        norm = getattr(module, _AFTER[kind])
        self._load(norm, f"model.layers.{layer}.{_AFTER[kind]}.weight")
        scale_D: torch.Tensor = norm(torch.ones(width))
        return scale_D


def _peak(raw_Nn: torch.Tensor) -> torch.Tensor:
    raw_Nn = raw_Nn.double()
    return ((raw_Nn.amax(1) - raw_Nn.mean(1)) / raw_Nn.std(1)).float()


class _StoredHead(nn.Module):
    """Stands in for the output head: reads its rows as it goes, and keeps what it put out."""

    def __init__(self, stored: StoredModel) -> None:
        super().__init__()
        self._stored = [stored]  # a list, lest a copy of the module copy it
        self.seen_NV = torch.zeros(0)

    def forward(self, normed_N1D: torch.Tensor) -> torch.Tensor:
        parts = [normed_N1D @ rows_RD.T for _first, rows_RD in _tiles(self._stored[0], HEAD)]
        out_N1V = torch.cat(parts, -1)
        self.seen_NV = out_N1V[:, 0]
        return out_N1V


def _tiles(stored: StoredModel, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, some rows in float32) of a matrix."""
    count, width = stored.shape(name)
    step = max(1, _TILE // width)
    for first in range(0, count, step):
        yield first, stored.rows(name, first, min(first + step, count)).float()


class TokenNames:
    """How the tokens of a tokenizer read."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = sorted(set(tokenizer.get_vocab().values()))

    def name(self, token: int) -> str:
        """A token's text, spaces as \N{OPEN BOX}; where it is no text by itself, the vocabulary's spelling of it."""
        raw = str(self._tokenizer.convert_ids_to_tokens(token))
        if raw.startswith("\N{LOWER ONE EIGHTH BLOCK}"):  # SentencePiece's space, which decoding takes off
            text = raw.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        else:
            text = self._tokenizer.convert_tokens_to_string([raw])
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            text = raw
        return text.replace(" ", "\N{OPEN BOX}")

    def names(self, tokens: torch.Tensor) -> list[str]:
        return [self.name(token) for token in tokens.tolist()]
