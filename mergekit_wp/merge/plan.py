"""What mergekit is about to do, read from its task graph before any tensor is loaded.

mergekit plans a merge as one `ExecuteMergeMethodTask` an output tensor, gathered under one `FinalizeModel`.
A `PlannedTensor` is one of the former in plain words: which tensor of which checkpoint goes in, with which
score files, and what comes out. The checks (`checks`), the disk estimate and the audit all read this. A merge by
one of mergekit's own methods is planned in the same way, so that wp-merge can look at it beforehand.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_wp.autoload import METHODS
from mergekit_wp.checkpoint.adapters import check_merged
from mergekit_wp.checkpoint.folder import (
    Checkpoint,
    Fingerprint,
    content_digest,
    content_of,
    fingerprint_of,
    local_folder,
)
from mergekit_wp.checkpoint.references import Reference, reference_of
from mergekit_wp.checkpoint.vocabulary import head_is_tied, head_of
from mergekit_wp.checkpoint.weights import TensorHeader, read_header
from mergekit_wp.choices import COMPONENTS
from mergekit_wp.errors import BadInput
from mergekit_wp.merge.fitted import layer_weights, load_fit, order_of
from mergekit_wp.merge.shares import layer_shares, scores_beside

if TYPE_CHECKING:
    import torch
    from mergekit.common import ModelReference
    from mergekit.io.tasks import FinalizeModel
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

WP, WIDEN, AIM, PATCH = "wp", "widen", "aim", "wp_patch"
OURS = tuple(METHODS)
"""The methods of this package, by the names that recipes give them."""

FILES = ("scores", "activations", "fit", "components", "patch")
"""Parameters that name a file."""


def names_file(parameter: str, value: Any) -> bool:
    """Whether a recipe's parameter names a file; components may be a word instead."""
    named = parameter in FILES and isinstance(value, str) and bool(value)
    return named and (parameter != "components" or value not in COMPONENTS)


# safetensors' names of the dtypes that a merge can read, and torch's names of the same.
TORCH_DTYPE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class WeightFile(Checkpoint):
    """One safetensors file as a model (mergekit-pytorch names files); its folder holds the config.json."""

    @cached_property
    def tensors(self) -> dict[str, TensorHeader]:
        path = Path(self.name)
        if path.suffix != ".safetensors":
            raise BadInput(f"{path}: not a .safetensors file; pickled weights are never opened, convert them first.")
        return read_header(path)


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor. `sources` gives each input's tensor name in its own checkpoint, None if absent.

    base: where another method has none, the first model, which gives the shapes to compare with. Of a set patch the
    recipient, and the only expert is the donor, if there is one.
    """

    method: str
    output: str
    sources: Mapping[ModelReference, str | None]
    base: ModelReference
    experts: tuple[ModelReference, ...]
    scores: tuple[str, ...]
    """Of each expert, empty where it has none, as with a fit; () where the method takes none. So with the two below."""
    weights: tuple[float, ...]
    scales: tuple[float, ...]
    parameters: Mapping[str, Any]
    """The recipe's parameters of the method that are not an expert's own."""
    inputs: Mapping[ModelReference, Mapping[str, Any]]
    """Those that are, by any method, of every model that has some."""
    read_dtype: str | None
    """The recipe's `dtype`: inputs are converted to it as they are read."""
    write_dtype: str | None
    """The recipe's `out_dtype`."""
    realigned: bool
    """A `tokenizer:` in the recipe brings the rows of all inputs into one vocabulary."""
    tokens: frozenset[str]
    """Those whose rows that `tokenizer:` gives apart."""
    truncated: bool
    """--unsafe-truncate-embeddings cuts all inputs to the shortest."""
    optional: bool
    """mergekit leaves it out of the output where no input has it."""
    written: bool
    """The base's checkpoint has this tensor itself, not as a copy of its embeddings: the merged one shall have it."""

    @property
    def allow_mismatch(self) -> bool:
        return bool(self.parameters.get("allow_mismatch", False))

    @property
    def fit(self) -> str:
        """The fit file whose weights stand in the place of shares; empty without."""
        return str(self.parameters.get("fit") or "")

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that the method reads for it, beside the models."""
        shared = (str(value) for name, value in self.parameters.items() if names_file(name, value))
        return tuple(path for path in (*self.scores, *shared) if path)

    @property
    def models(self) -> tuple[ModelReference, ...]:
        return (self.base, *self.experts)

    @property
    def source(self) -> str:
        """The tensor's name in the base; its layer is that of every input once the checks have passed."""
        return self.sources[self.base] or self.output


@dataclass(frozen=True)
class MergePlan:
    """All output tensors of one merge; `out` is None when it happens in memory."""

    tensors: tuple[PlannedTensor, ...]
    checkpoints: Mapping[ModelReference, Checkpoint]
    out: Path | None
    _orders: dict[Any, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def method(self) -> str:
        return self.tensors[0].method

    @property
    def ours(self) -> bool:
        """The method is one of this package."""
        return self.method in OURS

    def published(self, model: ModelReference) -> Path:
        """Where a model as published lies: of `base+lora` the LoRA, not what mergekit merges the two into."""
        return _own_folder(model, self.checkpoints[model])

    def tokenizer_folder(self, model: ModelReference) -> Path:
        """Where mergekit looks for a model's tokenizer: of `base+lora` the base."""
        from mergekit.io.tasks import LoaderCache

        return local_folder(meaning_of(model).model, LoaderCache().hf_cache_dir)

    def header(self, model: ModelReference, name: str | None) -> TensorHeader | None:
        return self.checkpoints[model].tensors.get(name or "")

    def out_dtype(self, tensor: PlannedTensor) -> str:
        """The recipe's `out_dtype`, else its `dtype`, else the dtype of the base's tensor.

        mergekit would promote mixed inputs (float16 and bfloat16 give float32) and leave the config saying
        float16. Raises `BadInput` for a dtype that weights cannot have.
        """
        header = self.header(tensor.base, tensor.source)
        inherited = TORCH_DTYPE.get(header.dtype) if header else None
        given = [name.removeprefix("torch.") for name in (tensor.write_dtype, tensor.read_dtype) if name]
        for name in given:
            if name not in ITEM_BYTES:
                raise BadInput(f"the recipe's dtype {name} cannot hold weights; use one of {', '.join(ITEM_BYTES)}.")
        return given[0] if given else inherited or "float32"

    def nbytes(self) -> int:
        """Bytes that the merged weights will take on disk."""
        total = 0
        for tensor in self.tensors:
            header = self.header(tensor.base, tensor.source)
            if header and tensor.written:
                elements = 1
                for length in header.shape:
                    elements *= length
                total += elements * ITEM_BYTES[self.out_dtype(tensor)]
        return total

    def fingerprint(self, model: ModelReference) -> Fingerprint:
        """Of a LoRA: of base and adapter as published, not of whatever the two were merged into."""
        from mergekit.io.tasks import LoaderCache

        if model.lora is None:
            return self.checkpoints[model].fingerprint
        return fingerprint_of(meaning_of(model), LoaderCache().hf_cache_dir)

    def content(self, model: ModelReference) -> str:
        """As `content_of`; reads the whole model."""
        from mergekit.io.tasks import LoaderCache

        if model.lora is None:
            return content_digest(self.checkpoints[model].tensors)
        return content_of(meaning_of(model), LoaderCache().hf_cache_dir)

    def order(self, tensor: PlannedTensor) -> tuple[int, ...]:
        """The places of the tensor's experts in its fit file. Raises `BadInput` as `order_of`."""
        key = (tensor.fit, tensor.experts, tensor.allow_mismatch)
        if key not in self._orders:
            by_name = {str(expert): expert for expert in tensor.experts}
            prints = {name: [self.fingerprint(expert)] for name, expert in by_name.items()}
            self._orders[key] = order_of(
                load_fit(tensor.fit),
                prints,
                tensor.fit,
                tensor.allow_mismatch,
                lambda name: [self.content(by_name[name])],
            )
        return self._orders[key]

    def layer_weights(self, tensor: PlannedTensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How much of each expert the heads and the neurons of a layer take, [K, H] and [K, F], before any scale."""
        if tensor.fit:
            return layer_weights(load_fit(tensor.fit), self.order(tensor), layer)
        return layer_shares(tensor.scores, layer, tensor.weights)

    def rest_weights(self, tensor: PlannedTensor) -> list[float]:
        """How much of each expert everything takes that belongs to no component, before any scale."""
        fit = load_fit(tensor.fit)
        return [float(fit.rest[k]) for k in self.order(tensor)]


def merge_tasks(
    finalize: FinalizeModel, *, any_method: bool = False
) -> list[tuple[ExecuteMergeMethodTask, str | None]]:
    """The tasks of our methods (or any_method) that mergekit's last task waits for, each with its saved dtype."""
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    pairs = ((getattr(save, "tensor_task", None), save) for save in finalize.tensor_save_tasks)
    return [
        (task, getattr(save, "dtype", None))
        for task, save in pairs
        if isinstance(task, ExecuteMergeMethodTask) and (any_method or task.method_name in OURS)
    ]


def read_plan(finalize: FinalizeModel, *, any_method: bool = False) -> MergePlan | None:
    """The plan behind mergekit's last task; None when there is none, or another's method does the merging."""
    tasks = merge_tasks(finalize, any_method=any_method)
    return _plan(tasks, Path(finalize.writer_task.out_path)) if tasks else None


def read_task(task: ExecuteMergeMethodTask) -> MergePlan:
    """The plan of a single tensor, for merges in memory, which have no `FinalizeModel`."""
    return _plan([(task, None)], None)


def _plan(pairs: Iterable[tuple[ExecuteMergeMethodTask, str | None]], out: Path | None) -> MergePlan:
    checkpoints: dict[Any, Checkpoint] = {}
    beside: dict[Any, str] = {}
    tensors = tuple(_planned(task, save_dtype, checkpoints, beside) for task, save_dtype in pairs)
    return MergePlan(tensors, checkpoints, out)


def _planned(
    task: ExecuteMergeMethodTask, save_dtype: str | None, checkpoints: dict[Any, Checkpoint], beside: dict[Any, str]
) -> PlannedTensor:
    """One output tensor; opens the models that are not in `checkpoints` yet, and looks beside them for scores."""
    from mergekit.merge_methods.task_adapter import TensorDictWrapper
    from mergekit.tokenizer import PermutedVocabulary
    from mergekit.tokenizer.truncate import TruncatedVocabulary

    inputs: Any = task.gather_tensors
    candidates, read_dtype = _input_names(task)
    for model in task.model_order:
        if model not in candidates:
            raise BadInput(
                f"{task.output_weight.name}: {model} does not reach this tensor, because the first and the last "
                "slice of the recipe list different models; list the same models in both."
            )
        if model not in checkpoints:
            checkpoints[model] = _checkpoint(model, isinstance(inputs, TensorDictWrapper))
    sources = {
        model: next((name for name in names if name in checkpoints[model].tensors), None)
        for model, names in candidates.items()
        if model in checkpoints
    }
    base = task.base_model if task.base_model in sources else task.model_order[0]
    experts = tuple(model for model in task.model_order if model != base)
    own_names = [task.output_weight.name, *(task.output_weight.aliases or ())]
    given = [task.input_parameters[model] for model in experts] if task.method_name == WP else []
    fitted = bool(given) and bool(task.parameters["fit"])
    for model, own in zip(experts, given, strict=False):
        if not own["scores"] and not fitted and model not in beside:
            beside[model] = scores_beside(_own_folder(model, checkpoints[model]))
    return PlannedTensor(
        method=task.method_name,
        output=task.output_weight.name,
        sources=sources,
        base=base,
        experts=experts,
        scores=tuple(
            own["scores"] or ("" if fitted else beside[model]) for model, own in zip(experts, given, strict=False)
        ),
        weights=tuple(own["weight"] for own in given),
        scales=tuple(own["scale"] for own in given),
        parameters=dict(task.parameters.items()),
        inputs={model: dict(own.items()) for model, own in task.input_parameters.items()},
        read_dtype=read_dtype,
        write_dtype=save_dtype or task.out_dtype,
        realigned=isinstance(inputs, PermutedVocabulary),
        tokens=frozenset((inputs.tokens or {}).keys()) if isinstance(inputs, PermutedVocabulary) else frozenset(),
        truncated=isinstance(inputs, TruncatedVocabulary),
        optional=bool(task.output_weight.optional),
        written=not task.output_weight.optional
        or (sources[base] in own_names and not _is_copy_of_embeddings(task, checkpoints[base])),
    )


def _is_copy_of_embeddings(task: ExecuteMergeMethodTask, base: Checkpoint) -> bool:
    """Merged on its own, a tied head that is stored all the same could come out other than the embeddings."""
    return task.method_name in OURS and task.output_weight.name == head_of(base) and head_is_tied(base)


def _input_names(task: ExecuteMergeMethodTask) -> tuple[dict[ModelReference, list[str]], str | None]:
    """The names that each input may have the tensor under, and the dtype that it is read in."""
    from mergekit.merge_methods.task_adapter import TensorDictWrapper

    inputs: Any = task.gather_tensors
    if isinstance(inputs, TensorDictWrapper):
        return {model: [inputs.tensors[model].tensor_name] for model in inputs.tensors}, task.dtype
    # Under a tokenizer config or --unsafe-truncate-embeddings the gathering lies one level deeper.
    gather = getattr(inputs, "gather_tensors", inputs)
    names = {
        model: [info.name, *(info.aliases or ()), *(info.tied_names or ())]
        for model, info in gather.weight_info.items()
    }
    return names, gather.dtype


def meaning_of(model: ModelReference) -> Reference:
    """What a model of mergekit's means: its parts as they are, with nothing left to divide."""
    return reference_of(model.model.model_dump(), model.lora.model_dump() if model.lora else None)


def _own_folder(model: ModelReference, checkpoint: Checkpoint) -> Path:
    """Where the expert as published lies: of `base+lora` the LoRA, not what mergekit merges the two into."""
    from mergekit.io.tasks import LoaderCache

    lora = meaning_of(model).lora
    return local_folder(lora, LoaderCache().hf_cache_dir) if lora else checkpoint.folder


def _checkpoint(model: ModelReference, is_file: bool) -> Checkpoint:
    """The files that mergekit itself will read: downloaded already, and merged if the model is a LoRA."""
    from mergekit.io.tasks import LoaderCache

    if is_file:
        path = Path(model.model.path)
        if set("@+") & set(str(path)):
            raise BadInput(f"{path}: mergekit-pytorch cannot take a path that holds `@` or `+`; rename it.")
        return WeightFile(str(path), path.parent)
    if (model.lora or model.model.revision) and os.path.isdir(str(model)):
        other = f"the model {model.model}" + (f" with the LoRA {model.lora}" if model.lora else "")
        raise BadInput(
            f"{model}: there is a folder of this name, and mergekit reads {other} instead; write the folder as "
            f"`{{model: {{path: {model}}}}}` in the recipe, or merge with wp-merge, which takes the folder."
        )
    cache = LoaderCache()
    folder = Path(cache.get(model).index.base_path)
    if model.lora and cache.lora_cache_dir:
        check_merged(model, Path(cache.lora_cache_dir), folder, cache.lora_merge_dtype)
    return Checkpoint(str(model), folder)
