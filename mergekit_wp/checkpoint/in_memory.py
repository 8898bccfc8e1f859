"""Models of transformers that are already in memory, seen as a model folder whose weights are theirs.

Config and tokenizer lie in a small folder that lasts as long as the block (`held`); the tensors are those of the
module, under the names that `save_pretrained` would give them, and are neither copied nor changed.

The fingerprint is computed of what is in memory, never taken over from the folder that the model once came from: its
weights may have changed since. Where that folder is at hand and every one of its tensors has exactly the numbers that
are in memory (in whatever dtype: float32 in memory holds bfloat16 of a file without loss), it is that folder's, so that
a merge knows the folder again.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mergekit_wp.checkpoint.folder import Checkpoint, Fingerprint, content_digest, local_folder
from mergekit_wp.checkpoint.hub import tokenizer_files
from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.checkpoint.weights import HeldTensor, TensorHeader
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.geometry import Geometry, text_name
from mergekit_wp.outputs import scratch

_ROWS = 4096  # compared at a time


@dataclass(frozen=True, eq=False)
class LiveModel(Checkpoint):
    """`model` is a causal LM of transformers; `folder` has its config and tokenizer alone."""

    model: Any = None

    @cached_property
    def tensors(self) -> dict[str, TensorHeader]:
        return {name: HeldTensor.of(tensor) for name, tensor in saved_tensors(self.model).items()}

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @cached_property
    def fingerprint(self) -> Fingerprint:
        origin = _origin(self.model)
        if origin is not None and origin.resolved_config == self.resolved_config and _equal(origin, self):
            return origin.fingerprint
        return replace(super().fingerprint, files=content_digest(self.tensors))


@contextmanager
def held(model: Any, role: str, tokenizer: Any = None) -> Iterator[LiveModel]:
    """A model in memory as a checkpoint, inside the block; `role` names it in errors (base, expert).

    tokenizer: in the place of the one in the folder that the model came from.
    Raises `BadInput` for what is no whole model of transformers in memory.
    """
    name = _check(model, role)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    with scratch("wp-held-") as folder:
        config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        elif (source := _home(model)) is not None:
            for file in tokenizer_files(source):
                (target := folder / file.relative_to(source)).parent.mkdir(exist_ok=True)
                shutil.copy(file, target)
        yield LiveModel(name, folder, model)


def live_geometry(model: Any, role: str) -> Geometry:
    """The shapes of a model in memory; `role` names it in errors. Raises `BadInput` as `held`."""
    _check(model, role)
    return Geometry.from_config({**model.config.to_dict(), "architectures": [type(model).__name__]}, where=role)


def saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` would write, under its names; nothing is copied."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    saved: dict[str, torch.Tensor] = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    return dict(saved)


def plain_tensors(tensors: Mapping[str, Any]) -> dict[str, str]:
    """The decoder's tensors: the name in a plain causal LM -> the name here (see `geometry.text_name`)."""
    return {plain: name for name in tensors if (plain := text_name(name))}


def _check(model: Any, role: str) -> str:
    """What the model is called. Raises `BadInput`."""
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        remedy = "; of a PEFT model, take what its merge_and_unload() gives" if hasattr(model, "peft_config") else ""
        raise BadInput(
            f"{role}: found {shown(type(model).__name__)}, expected a model folder, a Hub name or a causal LM of "
            f"transformers{remedy}."
        )
    if getattr(model, "peft_config", None):
        raise BadInput(f"{role}: has adapters over its weights; merge them into it (peft's merge_and_unload) first.")
    places = {parameter.device for parameter in model.parameters()}
    if len(places) != 1 or next(iter(places)).type == "meta":
        raise BadInput(
            f"{role}: its weights are on {', '.join(sorted(map(str, places)))}, expected one device; load it onto one, "
            "or give its folder, from which layers are streamed."
        )
    name = str(model.name_or_path or "")
    plain = name.strip() and read_reference(name).lora is None and name.isprintable()
    return name if plain else f"{type(model).__name__} in memory"


def _home(model: Any) -> Any:
    """The folder that the model came from; None where there is none at hand."""
    name = str(model.name_or_path or "")
    if not name.strip():
        return None
    reference = read_reference(name)
    commit = getattr(model.config, "_commit_hash", None)
    if reference.lora is None and reference.model.kind == "hub" and commit:
        reference = read_reference(f"{reference.model.path}@{commit}")
    try:
        return local_folder(reference.model)
    except BadInput:
        return None


def _origin(model: Any) -> Checkpoint | None:
    """The folder that it came from as a checkpoint, if it can be read as one."""
    folder = _home(model)
    if folder is None:
        return None
    checkpoint = Checkpoint(str(folder), folder)
    try:
        checkpoint.tensors, checkpoint.resolved_config  # noqa: B018  (both are cached)
    except BadInput:
        return None
    return checkpoint


def _equal(origin: Checkpoint, live: LiveModel) -> bool:
    """Whether the folder's tensors are those in memory, number for number, and all of them."""
    ours = live.tensors | {name: HeldTensor.of(t) for name, t in live.model.state_dict().items() if text_name(name)}
    plain = plain_tensors(ours)
    pairs = {}
    for name, header in origin.tensors.items():
        own = name if name in ours else plain.get(text_name(name) or "")
        if own is None or ours[own].shape != header.shape:
            return False
        pairs[name] = own
    theirs = {text_name(name) or name for name in origin.tensors}
    if not {text_name(name) or name for name in live.tensors} <= theirs:
        return False
    return all(_same(origin.tensors[name], name, ours[own]) for name, own in pairs.items())


def _same(stored: TensorHeader, name: str, held: TensorHeader) -> bool:
    """Whether two tensors of one shape hold equal numbers, a few rows at a time."""
    if not stored.shape:
        return bool(stored.part(name, ...) == held.part(name, ...).cpu())
    for first in range(0, stored.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        one, other = stored.part(name, rows), held.part(name, rows).cpu()
        equal = torch.equal(one, other) if one.dtype == other.dtype else torch.equal(one.double(), other.double())
        if not equal:
            return False
    return True
