"""Everything that can be known before the first tensor is read, and one clear sentence for each trouble.

In order, for the methods of this package: every expert has one score file, where the method takes one; the models
have one shape and the score files theirs; the fingerprints say that the scores are of these models; every output
tensor is made of the same layer of every input, of the same shape (vocabulary rows aside), in a dtype that can be
merged; nothing that a checkpoint has is left out; the output fits on the disk and its folder can be written.

For mergekit's own methods, which wp-merge runs too, only what mergekit itself would stumble over later: a missing
tensor, shapes that differ, a full disk.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_wp.checkpoint.adapters import adds_to_an_end
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.quantised import MARKS
from mergekit_wp.checkpoint.vocabulary import (
    differences,
    embeddings_of,
    head_against_config,
    head_equals_embeddings,
    head_is_tied,
    head_of,
    listed,
)
from mergekit_wp.checkpoint.weights import ADAPTER, read_tensors
from mergekit_wp.errors import BadInput
from mergekit_wp.files import writable_folder
from mergekit_wp.foreign import logger
from mergekit_wp.geometry import EMBEDDINGS, FAMILIES, SUPPORTED, is_vocabulary, layer_of, slot_of, text_name
from mergekit_wp.merge.activations import check_activations
from mergekit_wp.merge.chosen import check_one_set, check_patch
from mergekit_wp.merge.fitted import load_fit
from mergekit_wp.merge.made_for import OF_A_FIT, check_fingerprint
from mergekit_wp.merge.plan import AIM, PATCH, TORCH_DTYPE, WIDEN, WP, MergePlan, PlannedTensor, meaning_of
from mergekit_wp.merge.shares import BESIDE, load_scores
from mergekit_wp.scores import ModelId

if TYPE_CHECKING:
    from mergekit.common import ModelReference

LOG = logger(__name__)

# Buffers that old checkpoints store and that transformers recomputes.
_RECOMPUTED = ("rotary_emb.inv_freq",)
# Room for config, tokenizer and shard headers beside the weights.
_SLACK_BYTES = 64 * 2**20


def check_plan(plan: MergePlan, *, awaited: bool = False) -> None:
    """All checks of a whole merge. Raises `BadInput` at the first trouble; logs a warning for the rest.

    awaited: experts without a score file are still to get one.
    """
    if plan.ours:
        check_known(plan)
        check_inputs(plan, awaited=awaited)
        check_axes(plan)
        check_nothing_dropped(plan)
        check_layer_types(plan)
    else:
        for tensor in plan.tensors:
            check_any_tensor(plan, tensor)
    if plan.out is not None:
        check_room(plan.nbytes(), plan.out)


def check_inputs(plan: MergePlan, *, awaited: bool = False) -> None:
    """The checks that hold for each output tensor, or for each distinct set of models and scores."""
    check_fit_alone(plan.tensors)
    if not awaited:
        check_scores_given([tensor for tensor in plan.tensors if tensor.method == WP and not tensor.fit])
    groups = {(t.base, t.experts, t.scores, t.fit, t.allow_mismatch): t for t in plan.tensors}
    if any(tensor.method == PATCH for tensor in plan.tensors):
        check_one_set(plan)
    for tensor in groups.values():
        check_models(plan, tensor)
        if tensor.method == PATCH:
            check_patch(plan, tensor, awaited)
    for tensor in plan.tensors:
        check_tensor(plan, tensor)


def check_fit_alone(tensors: Sequence[PlannedTensor]) -> None:
    """A fit has all weights of all experts: one file for the whole merge, with neither scores nor shares beside it."""
    if len(files := sorted({tensor.fit for tensor in tensors})) > 1:
        some = "is given for some tensors alone" if not files[0] else f"and {files[0]} are given"
        raise BadInput(
            f"fit: {files[-1]} {some}; a fit file has the weights of the whole merge, so write a single path under the "
            "recipe's own `parameters`, and neither a list nor a filter."
        )
    for tensor in tensors if files[-1:] != [""] else ():
        for expert, path, weight in zip(tensor.experts, tensor.scores, tensor.weights, strict=True):
            if path:
                raise BadInput(
                    f"{expert}: the scores {path} are given beside the fit {tensor.fit}, whose weights stand in the "
                    "place of what scores give; keep one of the two."
                )
            if weight != 1:
                raise BadInput(
                    f"{expert}: `weight` is {weight:g} beside the fit {tensor.fit}; it says how a component is shared "
                    "out, and fitted weights are taken as they are, so leave it out (`scale` multiplies them)."
                )


def check_scores_given(tensors: Iterable[PlannedTensor]) -> None:
    """Every expert has a score file, and one only: a list would be read as a gradient over the layers."""
    seen: dict[ModelReference, str] = {}
    for tensor in tensors:
        for expert, path in zip(tensor.experts, tensor.scores, strict=True):
            if not path:
                raise BadInput(
                    f"{expert}: no scores are given for this expert; write `parameters: {{scores: FILE}}` under "
                    f"it in the recipe, with the FILE that wp-score made for it, or put that file at {BESIDE} in the "
                    "expert's own folder (mergekit-evolve: with --no-reshard)."
                )
            if seen.setdefault(expert, path) != path:
                raise BadInput(
                    f"{expert}: two score files are given, {seen[expert]} and {path}; one file holds all layers "
                    "of an expert, so write a single path and not a list or a filter."
                )


def check_models(plan: MergePlan, tensor: PlannedTensor) -> None:
    """Shapes of base and experts, and where they come from."""
    base = plan.checkpoints[tensor.base]
    for expert in tensor.experts:
        checkpoint = plan.checkpoints[expert]
        if different := checkpoint.geometry.differences(base.geometry):
            raise BadInput(f"{expert}: not of the shape of the base {tensor.base}: {'; '.join(different)}.")
    if tensor.fit:
        check_fit(plan, tensor)
    elif tensor.scores:
        check_scores(plan, tensor)
    if tensor.method == AIM:
        check_activations(plan, tensor)
    _check_config(plan, tensor.base)
    for expert in tensor.experts:
        if lineage := plan.checkpoints[expert].lineage_differences(base):
            LOG.warning(
                "%s: its config differs from the base's in what the model computes (%s); the merged model gets the "
                "base's.",
                expert,
                "; ".join(lineage),
            )


def _check_ends(plan: MergePlan, tensor: PlannedTensor) -> None:
    """Embeddings and head of every model are there, and what the base's config says of them will hold of the merge."""
    for model in tensor.models:
        checkpoint = plan.checkpoints[model]
        _check_adapter(plan, model)
        head_equals_embeddings(checkpoint)  # refuses a model that lacks one of the two
        if embeddings_of(checkpoint) is None and head_of(checkpoint):
            raise BadInput(
                f"{model}: stores its embeddings under the name {head_of(checkpoint)} alone, where mergekit does not "
                "look for them; load it with transformers, save it, and merge that."
            )
    if trouble := head_against_config(plan.checkpoints[tensor.base]):
        raise BadInput(f"{trouble[:-1]}; the merge would inherit this.")


def _check_adapter(plan: MergePlan, model: ModelReference) -> None:
    """A LoRA's factors on one end of a model that has one tensor for both: mergekit would merge them into both."""
    if not model.lora or not adds_to_an_end(read_tensors(plan.published(model), ADAPTER)):
        return
    if head_is_tied(Checkpoint.of(meaning_of(model).model)):
        raise BadInput(
            f"{model}: this LoRA adds to the embeddings or the output head of its base, where these are one tensor, "
            "and would change both; score and merge it over a copy of the base that stores lm_head.weight as well and "
            "has `tie_word_embeddings: false` in its config.json."
        )


def _check_token_ids(plan: MergePlan, tensor: PlannedTensor, expert: ModelReference) -> None:
    """Row i means one token in base and expert (a `tokenizer:` in the recipe sees to that itself)."""
    base = plan.checkpoints[tensor.base]
    rows = min(base.geometry.vocabulary, plan.checkpoints[expert].geometry.vocabulary)
    if (found := differences(base.folder, plan.published(expert), rows)) is None:
        return
    if found.moved:
        token, (ours, theirs) = next(iter(found.moved.items()))
        raise BadInput(
            f"{expert}: its tokenizer gives {len(found.moved)} tokens other ids than that of the base {tensor.base} "
            f"({token!r}: {theirs} against {ours}), so the merge would mix embeddings of different tokens; add "
            "`tokenizer: {source: base}` to the recipe, or put the right tokenizer into that folder."
        )
    if found.renamed:
        index, (our_name, their_name) = next(iter(found.renamed.items()))
        LOG.warning(
            "%s: %d ids stand for other tokens in its tokenizer than in that of %s (%d: %r against %r); the merge "
            "mixes their embeddings.",
            *(expert, len(found.renamed), tensor.base, index, their_name, our_name),
        )
    if found.own:
        LOG.warning(
            "%s: %d tokens of its own (%s) are left out; the merged model has the vocabulary of %s.",
            *(expert, len(found.own), listed(found.own), tensor.base),
        )


def _check_config(plan: MergePlan, model: ModelReference) -> None:
    """The base's config, which the merged model gets, speaks of the tensors that are there."""
    base = plan.checkpoints[model]
    layers = {slot.layer for name in base.tensors if (slot := slot_of(name))}
    if layers and len(layers) != base.geometry.layers:
        raise BadInput(
            f"{model}: config.json says num_hidden_layers {base.geometry.layers}, and there are tensors of "
            f"{len(layers)} layers; put the right number into the config."
        )
    name = embeddings_of(base)
    if name and (rows := base.tensors[name].shape[0]) != base.geometry.vocabulary:
        raise BadInput(
            f"{model}: config.json says vocab_size {base.geometry.vocabulary}, and {name} has {rows} rows; put the "
            "right number into the config."
        )
    for name in MARKS:
        if base.config.get(name):
            LOG.warning(
                "%s: config.json has a %s, and the tensors are not quantised; the merged model gets none.", model, name
            )


def check_scores(plan: MergePlan, tensor: PlannedTensor) -> None:
    """The score files are of these very models."""
    base = plan.checkpoints[tensor.base]
    for expert, path in zip(tensor.experts, tensor.scores, strict=True):
        if not path:  # awaited, or `check_scores_given` would have said so
            continue
        meta = load_scores(path).meta
        if different := meta.geometry.differences(base.geometry):
            raise BadInput(
                f"{path}: these scores were made for another shape than {tensor.base}: {'; '.join(different)}; "
                "score these models with wp-score."
            )
        for role, model, scored in (("base", tensor.base, meta.base), ("expert", expert, meta.expert)):
            _check_fingerprint(plan, role, model, scored, path, tensor.allow_mismatch)


def check_fit(plan: MergePlan, tensor: PlannedTensor) -> None:
    """The fit file is of this very base, and of these experts and no other."""
    meta, base = load_fit(tensor.fit).meta, plan.checkpoints[tensor.base]
    if different := meta.geometry.differences(base.geometry):
        raise BadInput(
            f"{tensor.fit}: these weights were fitted for another shape than {tensor.base}: {'; '.join(different)}; "
            "fit these models with wp-fit."
        )
    found, allow = plan.fingerprint(tensor.base), tensor.allow_mismatch
    check_fingerprint(found, "base", str(tensor.base), meta.base, tensor.fit, allow, *OF_A_FIT)
    plan.order(tensor)


def _check_fingerprint(
    plan: MergePlan, role: str, model: ModelReference, scored: ModelId, path: str, allow: bool
) -> None:
    check_fingerprint(plan.fingerprint(model), role, str(model), scored, path, allow)


def check_tensor(plan: MergePlan, tensor: PlannedTensor) -> None:
    """One output tensor: its inputs exist, are of one layer, of one shape, and of a dtype that can be merged."""
    if text_name(tensor.output) == EMBEDDINGS:
        _check_ends(plan, tensor)
        # A set patch mixes no embeddings: all of them are the recipient's.
        for expert in () if tensor.realigned or tensor.method == PATCH else tensor.experts:
            _check_token_ids(plan, tensor, expert)
    headers = {model: plan.header(model, tensor.sources[model]) for model in tensor.models}
    for model, header in headers.items():
        if header is None:
            raise _missing(plan, model, tensor)
        if header.dtype not in TORCH_DTYPE:
            raise BadInput(
                f"{model}: {tensor.sources[model]} has dtype {header.dtype}, expected one of "
                f"{', '.join(TORCH_DTYPE)}; merge the unquantised checkpoint."
            )
    if tensor.weights and not any(tensor.weights):
        raise BadInput(
            f"{tensor.output}: the weights of all experts are 0; give one of them a weight above 0, or take it out."
        )
    layers = {model: layer_of(name or "") for model, name in tensor.sources.items()}
    if len(set(layers.values())) > 1:
        listed = ", ".join(f"layer {layer} of {model}" for model, layer in layers.items())
        raise BadInput(
            f"{tensor.output}: the recipe's slices would mix {listed}; an expert's change is one against the "
            "base's same layer, so give every source of a slice the same layer_range."
        )
    shapes = {model: header.shape for model, header in headers.items() if header}
    for model, shape in shapes.items():
        _check_shape(tensor, model, shape, shapes[tensor.base])
    if not tensor.written and tensor.method != PATCH:
        _check_tied(plan, tensor)
    plan.out_dtype(tensor)


def _check_shape(
    tensor: PlannedTensor, model: ModelReference, shape: tuple[int, ...], base_shape: tuple[int, ...]
) -> None:
    if is_vocabulary(tensor.output) and shape[1:] == base_shape[1:]:
        if shape[0] < base_shape[0] and tensor.truncated:
            raise BadInput(
                f"{model}: {tensor.sources[model]} has {shape[0]} rows, fewer than the {base_shape[0]} of the base "
                f"{tensor.base}, to which --unsafe-truncate-embeddings would cut the base's as well; leave that out, "
                "since rows are brought in line without it."
            )
        return
    if shape != base_shape:
        raise BadInput(
            f"{model}: {tensor.sources[model]} has shape {list(shape)}, expected the base's {list(base_shape)}."
        )


def _check_tied(plan: MergePlan, tensor: PlannedTensor) -> None:
    """The base has no such tensor (a tied LM head), so none is written: the experts may not have another one."""
    for expert in tensor.experts:
        if not head_equals_embeddings(plan.checkpoints[expert]):
            raise BadInput(
                f"{expert}: has its own {tensor.output}, while the base {tensor.base} ties it to its embeddings; "
                "the merge would lose it, so use an expert tuned from this base, or as the base a copy of it that "
                f"stores {tensor.output} and has `tie_word_embeddings: false` in its config.json."
            )


def _missing(plan: MergePlan, model: ModelReference, tensor: PlannedTensor) -> BadInput:
    """What to say of a tensor that mergekit asks for and a model does not have."""
    stored = plan.checkpoints[model].tensors
    same = next((name for name in stored if text_name(name) and text_name(name) == text_name(tensor.output)), None)
    towers = next((name for name in stored if "vision_tower." in name), None)
    if same or (towers and "vision_tower." in tensor.output):
        return BadInput(
            f"{model}: mergekit asks for {tensor.output}, and this checkpoint calls its tensors otherwise "
            f"({same or towers}); load the published model with transformers, put these weights into it and save "
            "it, which keeps the published names."
        )
    return BadInput(f"{model}: the tensor {tensor.output} is missing, and the merge needs it of every model.")


def check_known(plan: MergePlan) -> None:
    """Refuse wrappers that mergekit has no definition of: it infers one for a single tower, not for several."""
    from mergekit.architecture.json_definitions import NAME_TO_ARCH

    base = plan.checkpoints[plan.tensors[0].base]
    architecture = base.geometry.architecture
    if FAMILIES[architecture].wrapper and architecture not in NAME_TO_ARCH:
        raise BadInput(
            f"{base.name}: mergekit {importlib.metadata.version('mergekit')} has no definition of {architecture}, and "
            "would give its tensors other names; it can be scored, and of models with several towers "
            f"{' and '.join(sorted(name for name in SUPPORTED if FAMILIES[name].wrapper and name in NAME_TO_ARCH))} "
            "can be merged."
        )


def check_axes(plan: MergePlan) -> None:
    """WIDEN takes matrices apart by column: a vision tower's convolution has none."""
    for tensor in plan.tensors:
        header = plan.header(tensor.base, tensor.source)
        if tensor.method == WIDEN and header and len(header.shape) > 2:
            raise BadInput(
                f"{tensor.base}: {tensor.source} has {len(header.shape)} axes, and merge_method widen knows vectors "
                "and matrices alone; merge this model by wp, or by a method of mergekit."
            )


def check_any_tensor(plan: MergePlan, tensor: PlannedTensor) -> None:
    """For any method: the models have this tensor, in one shape (mergekit finds out when it comes to it)."""
    headers = {model: plan.header(model, tensor.sources[model]) for model in tensor.models}
    first = next((header for header in headers.values() if header), None)
    for model, header in headers.items():
        if header is None and not tensor.optional:
            raise _missing(plan, model, tensor)
        if header is None or first is None or header.shape == first.shape or tensor.realigned or tensor.truncated:
            continue
        if is_vocabulary(tensor.output) and header.shape[1:] == first.shape[1:]:
            raise BadInput(
                f"{model}: {tensor.sources[model]} has {header.shape[0]} rows, another model {first.shape[0]}; "
                f"merge_method {tensor.method} needs `tokenizer: {{source: base}}` in the recipe."
            )
        raise BadInput(
            f"{model}: {tensor.sources[model]} has shape {list(header.shape)}, expected {list(first.shape)} as in the "
            "other models; merge models of one shape."
        )
    plan.out_dtype(tensor)


def check_nothing_dropped(plan: MergePlan) -> None:
    """Refuse to leave out what mergekit's definition of the architecture does not list (biases in llama.json)."""
    used: dict[ModelReference, set[str]] = {model: set() for model in plan.checkpoints}
    for tensor in plan.tensors:
        for model, name in tensor.sources.items():
            used[model].add(name or "")
    for model, names in used.items():
        layers = {layer_of(name) for name in names} | {None}  # whole layers may be left out by slices
        dropped = sorted(
            name
            for name in plan.checkpoints[model].tensors
            if name not in names and layer_of(name) in layers and not name.endswith(_RECOMPUTED)
        )
        whole = {text_name(tensor.output) or tensor.output for tensor in plan.tensors}
        if dropped and all((text_name(name) or name) in whole for name in dropped):
            raise BadInput(
                f"{model}: is not among the models of every slice, and mergekit takes the embeddings of the first "
                f"slice's models and the final norm and head of the last's, so its {dropped[0]} would be left out; "
                "list the same models in all slices."
            )
        if dropped:
            raise BadInput(
                f"{model}: mergekit would silently leave out {len(dropped)} tensors that it does not know in this "
                f"architecture, such as {dropped[0]}; this checkpoint cannot be merged."
            )


def check_layer_types(plan: MergePlan) -> None:
    """Where layers differ in kind (sliding and full attention), slices may not move one onto another's place."""
    moves = {
        (layer_of(tensor.output), layer_of(tensor.source)): tensor.base
        for tensor in plan.tensors
        if layer_of(tensor.source) is not None
    }
    base = plan.tensors[0].base
    layers = plan.checkpoints[base].geometry.layers
    if all(to == source for to, source in moves) and len(moves) == layers:
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(plan.checkpoints[base].folder)).get_text_config()
    types = getattr(config, "layer_types", None)
    if not types:
        return
    if len(moves) != layers:
        raise BadInput(
            f"{base}: its config lists the attention type of each of {layers} layers, and mergekit would leave "
            f"that list as it is for the recipe's {len(moves)}; keep the number of layers."
        )
    for to, source in sorted((a, b) for a, b in moves if a is not None and b is not None):
        if types[to] != types[source]:
            raise BadInput(
                f"{base}: the recipe's slices would put layer {source} ({types[source]}) in the place of layer {to} "
                f"({types[to]}); move layers only onto places of their own attention type."
            )


def check_room(nbytes: int, out: Path, *, touch: bool = True) -> None:
    """The output folder can be made and written, and its disk has room for `nbytes`.

    touch: prove the first by making a file and removing it; False (a dry run) asks for the permission only.
    """
    anchor = writable_folder(out)
    try:
        if touch:
            with tempfile.TemporaryFile(dir=anchor):
                pass
        free = shutil.disk_usage(anchor).free
    except OSError as error:
        raise BadInput(
            f"{out}: cannot write there ({error.strerror or error}); choose another output folder."
        ) from error
    if free < nbytes + _SLACK_BYTES:
        raise BadInput(
            f"{out}: the merged model takes {size_text(nbytes + _SLACK_BYTES)}, and {size_text(free)} are free there; "
            "make room or choose another disk."
        )


def size_text(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
