"""A LoRA merged whole into its base, so that the result computes what peft computes with the adapter beside it.

mergekit's own merge differs from that in two cases. An adapter trained with added tokens brings embeddings of more rows
than the base has. And an adapter of one end of a model whose head and embeddings are one tensor changes that end alone
while peft runs it; merged into the one tensor, it would change both.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mergekit_wp.checkpoint.folder import Checkpoint, fingerprint_of, local_folder
from mergekit_wp.checkpoint.quantised import plain_config
from mergekit_wp.checkpoint.references import Reference, reference_of
from mergekit_wp.checkpoint.weights import ADAPTER, ADAPTER_CONFIG, SUFFIX, TensorHeader, read_tensors
from mergekit_wp.errors import BadInput, out_of_memory, reason_of
from mergekit_wp.files import explained
from mergekit_wp.hashing import digest_of, sha256_of

if TYPE_CHECKING:
    from mergekit.common import ModelReference

_FACTORS = re.compile(r"\.(embed_tokens|lm_head)\.lora_")
# Names of an adapter's tensors that have one row (or column) a token, and which axis that is.
_BY_TOKEN = {
    re.compile(r"\.(embed_tokens|lm_head)\.(modules_to_save\.|original_module\.|base_layer\.)?weight$"): 0,
    re.compile(r"\.lm_head\.lora_B\.weight$"): 0,
    re.compile(r"\.embed_tokens\.lora_embedding_A$"): 1,
}

# In a merged folder: the digest of what it was made of. mergekit knows it by the names of the two alone.
_MADE_OF = "wp_made_of.json"


def adds_to_an_end(tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether an adapter of these tensors adds a product of factors to the embeddings or to the output head."""
    return any(_FACTORS.search(f".{name}") for name in tensors)


def vocabulary_rows(tensors: Mapping[str, TensorHeader]) -> int | None:
    """The vocabulary rows that an adapter of these tensors was made for; None where it does not show."""
    for name, header in tensors.items():
        for pattern, axis in _BY_TOKEN.items():
            if pattern.search(f".{name}"):
                return header.shape[axis]
    return None


def merge_lora(reference: Reference, cache: Path, remote_code: bool) -> Path:
    """As `merged_folder`, of a reference with a LoRA."""
    from mergekit.common import ModelReference

    return merged_folder(ModelReference.model_validate(reference.for_mergekit()), cache, remote_code)


def merged_folder(model: ModelReference, cache: Path, remote_code: bool, dtype: str | None = None) -> Path:
    """The folder of a LoRA merged into its base, made now unless `cache` has it: where mergekit, too, will find it.

    One of other files, or in another dtype, is made anew. It has the stored dtype unless mergekit's `dtype` names
    another. Raises `BadInput` when a part is missing or the two do not fit.
    """
    folder, reference = _place(model, cache), _reference(model)
    reference.check()
    base, adapter = map(local_folder, reference.sources)
    made_of = _made_of(reference, adapter, dtype)
    if _stamp_in(folder) == made_of:
        return folder
    tensors = read_tensors(adapter, ADAPTER)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explained(folder):
            _merge(base, adapter, vocabulary_rows(tensors), remote_code, dtype).save_pretrained(partial)
            (partial / _MADE_OF).write_text(json.dumps(made_of), encoding="utf-8")
    except Exception as error:  # peft raises many types for an adapter that does not fit
        if isinstance(error, BadInput):
            raise
        if out_of_memory(error):
            raise BadInput(f"{model}: too little memory to merge the LoRA into its base; free some.") from error
        raise BadInput(f"{model}: the LoRA could not be merged into its base ({reason_of(error)}).") from error
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def check_merged(model: ModelReference, cache: Path, folder: Path, dtype: str | None = None) -> None:
    """Raise `BadInput` where a `folder` that mergekit found in its cache of merged LoRAs was made of other files than
    are there now, or in another dtype. Of one that mergekit made itself, the times of the files tell."""
    if folder != _place(model, cache):
        return
    base, adapter = map(local_folder, (reference := _reference(model)).sources)
    if (stamp := _stamp_in(folder)) is not None:
        stale = stamp != _made_of(reference, adapter, dtype)
    else:
        made = min((file.stat().st_mtime_ns for file in folder.glob(f"*{SUFFIX}")), default=0)
        stale = any(file.stat().st_mtime_ns > made for part in (base, adapter) for file in part.glob(f"*{SUFFIX}"))
    if stale:
        raise BadInput(
            f"{folder}: this merge of {model} was made before its base or LoRA was last written, or in another dtype; "
            "delete that folder, or let wp-merge make it anew."
        )


def _place(model: ModelReference, cache: Path) -> Path:
    """Where mergekit keeps and looks for the merge of the two."""
    assert model.lora is not None
    return cache / f"{model.model._unique_id()}_{model.lora._unique_id()}"


def _reference(model: ModelReference) -> Reference:
    assert model.lora is not None
    return reference_of(model.model.model_dump(), model.lora.model_dump())


def _made_of(reference: Reference, adapter: Path, dtype: str | None) -> str:
    """SHA-256 of all that a merged folder depends on: both models' fingerprints and files, the LoRA's settings, dtype.

    A fingerprint only samples weights; the times of the files tell what it misses.
    """
    found = fingerprint_of(reference)
    return digest_of([str(found), found.files, *sha256_of([adapter / ADAPTER_CONFIG]), str(dtype)])


def _stamp_in(folder: Path) -> Any:
    try:
        return json.loads((folder / _MADE_OF).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _merge(base: Path, adapter: Path, rows: int | None, remote_code: bool, dtype: str | None) -> Any:
    """The merged model. `rows`: those that the adapter was made for."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = plain_config(Checkpoint(str(base), base), remote_code)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(base), config=config, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=remote_code
    )
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft's, of complications with tied ends: they are met here
        adapted: Any = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
        if tied:
            _part_ends(adapted.get_base_model())
        merged = adapted.merge_and_unload()
    if tied:
        _join_equal_ends(merged)
    return merged


def _part_ends(model: Any) -> None:
    """Give the output head its own copy of a weight that it shares with the embeddings, below what peft has wrapped."""
    shared = {parameter.data_ptr() for parameter in model.get_input_embeddings().parameters()}
    for module in model.get_output_embeddings().modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.data_ptr() in shared:
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _join_equal_ends(model: Any) -> None:
    """One tensor again where the adapter changed both ends alike; else the config says that they are apart."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    model.config.tie_word_embeddings = torch.equal(embeddings.weight, head.weight)
    if model.config.tie_word_embeddings:
        head.weight = embeddings.weight
