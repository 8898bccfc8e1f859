"""`merge` from Python: folders into a folder, as wp-merge does it; state dicts or modules into a state dict.

A folder is merged through a recipe, with every check and the audit of wp-merge, and holds the recipe. In memory the
same kernel runs tensor by tensor; what can be checked there is: fingerprints, shapes, what is missing or would be
left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mergekit_wp.checkpoint.folder import Fingerprint, content_digest, fingerprint_tensors
from mergekit_wp.checkpoint.hub import score_file
from mergekit_wp.checkpoint.in_memory import held, plain_tensors
from mergekit_wp.checkpoint.vocabulary import align_rows
from mergekit_wp.checkpoint.weights import HeldTensor, TensorHeader
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.fit_file import Fit, read_fit
from mergekit_wp.foreign import file_parts, logger
from mergekit_wp.geometry import EMBEDDINGS, HEAD, Geometry, TensorSlot, is_vocabulary, slot_of, text_name
from mergekit_wp.merge.fitted import fitted_weights, order_of
from mergekit_wp.merge.kernel import NotFiniteError, merge_fitted, merge_tensor
from mergekit_wp.merge.made_for import OF_A_FIT, check_fingerprint
from mergekit_wp.merge.shares import check_complete, held_shares
from mergekit_wp.outputs import claimed, refuse_inputs
from mergekit_wp.scores import Scores, read_scores

LOG = logger(__name__)
State = dict[str, torch.Tensor]
_Kernel = Callable[[torch.Tensor, Sequence[torch.Tensor], TensorSlot | None, torch.dtype], torch.Tensor]
"""One tensor of the merge from the base's and the experts', with the slot that it has and the dtype of the result."""
_DTYPES = ("float64", "float32", "float16", "bfloat16")


def merge(
    base: Any,
    experts: Mapping[str, Any] | Sequence[Any],
    scores: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    fit: Any = None,
    scale: float | Mapping[str, float] | Sequence[float] = 1.0,
    weight: float | Mapping[str, float] | Sequence[float] = 1.0,
    out: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    allow_mismatch: bool = False,
    audit: bool = True,
    overwrite: bool = False,
    **options: Any,
) -> Path | State:
    """Merge experts of one base by their scores or by a fit (`merge_method: wp`; METHOD.md 4, Eq. 17-18, and 6).

    base, experts   all of them folders or Hub names; or all state dicts (with the names that they have in their files)
                    or modules of transformers. Experts by name, or in a list (0, 1, ...)
    scores          of each expert, by name or in the same order: a `Scores`, a score file, or one on the Hub; of
                    folders None takes those in the experts' own folders
    fit             in the place of scores: a `Fit` or a fit file, of these experts in any order
    scale, weight   as in a recipe, one number for all or one an expert; no weight beside a fit
    out             the folder to write, of folders; returned. A `Scores` given is kept beside it, in OUT.scores, a
                    `Fit` in OUT.fit.safetensors
    dtype           of the result; None: the base's
    allow_mismatch  take scores, or a fit, of other models than these (a warning)
    audit, overwrite, options   as of wp-merge (options of mergekit by name: cuda=True, lazy_unpickle=True, ...)
    Returns the folder's path; in memory, a state dict with the base's names and shapes, to the bit what the folder
    would hold. Raises `BadInput`, and of a folder `AuditFailed`; nothing half-written is left.

    >>> merged = merge(base, {"maths": expert, "code": other}, [s, s_other], scale=1.5)
    >>> merged.keys() == base.state_dict().keys()
    True
    """
    named = dict(experts) if isinstance(experts, Mapping) else {str(k): each for k, each in enumerate(experts)}
    if not named:
        raise BadInput("experts: there are none; give one or more.")
    files = _each(scores, named, "scores")
    scales, weights = (_numbers(value, named, what) for value, what in ((scale, "scale"), (weight, "weight")))
    if fit is not None and (scores is not None or set(weights) != {1.0}):
        what = "weight" if scores is None else "scores"
        raise BadInput(f"{what}: goes without a fit, which has all weights; leave it out (`scale` multiplies them).")
    folders = [isinstance(model, (str, os.PathLike)) for model in (base, *named.values())]
    if all(folders):
        if out is None:
            raise BadInput("out: name the folder to write; a merge of folders is a folder.")
        recipe = _Recipe(str(base), {k: str(v) for k, v in named.items()}, scales, weights, dtype, allow_mismatch)
        return _merge_folders(recipe, files, fit, Path(out).absolute(), audit, overwrite, options)
    if any(folders):
        raise BadInput("base, experts: some are folders and some are in memory; give all of one kind.")
    if out is not None or options:
        raise BadInput(
            f"{'out' if out is not None else next(iter(options))}: goes with folders; what is in memory is returned."
        )
    if dtype is not None and dtype not in _DTYPES:
        raise BadInput(f"dtype: found {shown(dtype)}, expected one of {', '.join(_DTYPES)}.")
    own, states = _Held.of(base, "base"), [_Held.of(expert, name) for name, expert in named.items()]
    if fit is not None:
        kernel = _by_fit(own, states, fit, scales, allow_mismatch)
    else:
        kernel = _by_scores(own, states, files, scales, weights, allow_mismatch)
    return _merge_states(own, states, kernel, dtype)


@dataclass(frozen=True)
class _Recipe:
    base: str
    experts: dict[str, str]
    scales: list[float]
    weights: list[float]
    dtype: str | None
    allow_mismatch: bool

    def text(self, files: Sequence[str | None], fit: str | None) -> str:
        """The YAML that wp-merge would be given; what is left at its default is not written."""
        models = []
        for model, file, scale, weight in zip(self.experts.values(), files, self.scales, self.weights, strict=True):
            own: dict[str, Any] = {} if file is None else {"scores": file}
            own |= {} if scale == 1.0 else {"scale": scale}
            own |= {} if weight == 1.0 else {"weight": weight}
            models.append({"model": model, **({"parameters": own} if own else {})})
        content: dict[str, Any] = {"merge_method": "wp", "base_model": self.base, "models": models}
        if self.dtype is not None:
            content["dtype"] = self.dtype
        shared = ({"fit": fit} if fit else {}) | ({"allow_mismatch": True} if self.allow_mismatch else {})
        if shared:
            content["parameters"] = shared
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _merge_folders(
    recipe: _Recipe,
    files: Sequence[Any],
    fit: Any,
    out: Path,
    audit: bool,
    overwrite: bool,
    options: Mapping[str, Any],
) -> Path:
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions

    from mergekit_wp.merge import register
    from mergekit_wp.merge.cli import carry_out, refuse_existing
    from mergekit_wp.merge.mergekit_options import check_options
    from mergekit_wp.merge.recipe import read_recipe

    if unknown := sorted(set(options) - set(MergeOptions.model_fields)):
        raise BadInput(
            f"{unknown[0]}: neither an option of merge nor of mergekit ({', '.join(MergeOptions.model_fields)})."
        )
    register()
    LoaderCache.loaders.clear()  # a folder may have been written anew since the last merge of this process
    with ExitStack() as undo, claimed(out):
        paths = _paths(recipe, files, out, undo)
        fit_file = out.with_name(f"{out.name}.fit.safetensors")
        fit_path = None if fit is None else _path(fit, fit_file, undo) if isinstance(fit, Fit) else os.fspath(fit)
        loaded = read_recipe(f"{out}, recipe", recipe.text(paths, fit_path))
        refuse_inputs(out, loaded.reads())
        refuse_existing(out, overwrite)
        asked = MergeOptions(**{"quiet": True, **options})
        check_options(asked)
        with _threads(asked.num_threads):
            carry_out(loaded, out, asked, audit, LOG.info)
        undo.pop_all()
    return out


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Inside the block torch has as many threads; None: as many as it had."""
    before = torch.get_num_threads()
    if count is None:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _paths(recipe: _Recipe, files: Sequence[Any], out: Path, undo: ExitStack) -> list[str | None]:
    """Where each expert's score file lies; those in memory are written beside `out`, and removed by `undo`."""
    beside = out.with_name(f"{out.name}.scores")
    paths: list[str | None] = []
    for name, file in zip(file_parts(recipe.experts), files, strict=True):
        if isinstance(file, Scores):
            paths.append(_path(file, beside / f"{name}.safetensors", undo))
        else:
            paths.append(None if file is None else str(score_file(os.fspath(file))))
    return paths


def _path(held: Scores | Fit, path: Path, undo: ExitStack) -> str:
    """Where what was in memory now lies; `undo` removes it, and its folder if that was made for it."""
    made = [each for each in (path, path.parent) if not each.exists()]
    held.save(path)
    undo.callback(_remove, made)
    return str(path)


def _remove(made: Sequence[Path]) -> None:
    for path in made:
        if path.is_file():
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _merge_states(own: _Held, states: Sequence[_Held], kernel: _Kernel, dtype: str | None) -> State:
    for state in states:
        state.check_covered(own)
        state.check_head(own)
    merged: State = {}
    tied_head = _copied_head(own.tensors)
    for name, tensor in own.tensors.items():
        inputs = [state.like(name, tensor, tied_head) for state in states]
        out_dtype = tensor.dtype if dtype is None else getattr(torch, dtype)
        try:
            merged[name] = kernel(tensor, inputs, slot_of(name), out_dtype)
        except NotFiniteError:
            raise BadInput(
                f"{name}: an expert holds a NaN or an infinity there, or the merge more than {out_dtype}."
            ) from None
        except ValueError as error:
            raise BadInput(f"{name}: does not have the shape that the weights were made for ({error}).") from error
    return merged


def _by_scores(
    own: _Held, states: Sequence[_Held], files: Sequence[Any], scales: list[float], weights: list[float], allow: bool
) -> _Kernel:
    """The kernel by score files, which are of these very models. Raises `BadInput` where they are not."""
    if not any(weights):
        raise BadInput("weight: those of all experts are 0; give one of them a weight above 0.")
    read = [_scores(file, state.name) for file, state in zip(files, states, strict=True)]
    for scores, state in zip(read, states, strict=True):
        check_complete(scores, f"scores of {state.name}")
        if different := scores.meta.geometry.differences(read[0].meta.geometry):
            raise BadInput(
                f"scores of {state.name}: made for another shape than those of {states[0].name}: "
                f"{'; '.join(different)}."
            )
        own.check_layers(scores.meta.geometry, f"scores of {state.name}")
        for role, which, scored in (("base", own, scores.meta.base), ("expert", state, scores.meta.expert)):
            which.check(role, scored, f"scores of {state.name}", allow)

    def kernel(
        base: torch.Tensor, inputs: Sequence[torch.Tensor], slot: TensorSlot | None, dtype: torch.dtype
    ) -> torch.Tensor:
        alpha_Kn = None if slot is None else held_shares(read, slot, weights)
        return merge_tensor(base, inputs, alpha_Kn, 0 if slot is None else slot.axis, weights, scales, dtype)

    return kernel


def _by_fit(own: _Held, states: Sequence[_Held], fit: Any, scales: list[float], allow: bool) -> _Kernel:
    """The kernel by a fit, which is of these very models. Raises `BadInput` where it is not."""
    read = fit if isinstance(fit, Fit) else read_fit(fit)
    own.check_layers(read.meta.geometry, "fit")
    own.check("base", read.meta.base, "fit", allow, *OF_A_FIT)
    prints, by_name = {state.name: state.prints for state in states}, {state.name: state for state in states}
    order = order_of(read, prints, "fit", allow, lambda name: by_name[name].contents())

    def kernel(
        base: torch.Tensor, inputs: Sequence[torch.Tensor], slot: TensorSlot | None, dtype: torch.dtype
    ) -> torch.Tensor:
        axis = 0 if slot is None else slot.axis
        return merge_fitted(base, inputs, fitted_weights(read, order, slot), axis, scales, dtype)

    return kernel


@dataclass(frozen=True)
class _Held:
    """One model in memory: what it is called, its tensors, its fingerprints (of a tied model, with and without the head
    beside the embeddings: both are saved so), and the tensors as saved that these are of."""

    name: str
    tensors: Mapping[str, torch.Tensor]
    prints: Sequence[Fingerprint]
    saved: Sequence[Mapping[str, TensorHeader]]

    @classmethod
    def of(cls, model: Any, name: str) -> _Held:
        """Raises `BadInput` for what is neither a state dict of plain weights nor a model of transformers."""
        if isinstance(model, Mapping):
            tensors = dict(model)
            if odd := [
                key for key, t in tensors.items() if not (isinstance(t, torch.Tensor) and t.is_floating_point())
            ]:
                raise BadInput(f"{name}: {shown(odd[0])} is no tensor of plain numbers; give a state dict of weights.")
            if not plain_tensors(tensors):
                raise BadInput(
                    f"{name}: no tensor in it is named like a causal LM's (model.layers.0...); give its state dict."
                )
            saved = _as_saved(tensors)
            return cls(name, tensors, [Fingerprint("", fingerprint_tensors(each)) for each in saved], saved)
        with held(model, name) as live:
            state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
            return cls(name, state, [live.fingerprint], [live.tensors])

    def contents(self) -> list[str]:
        """What `content_digest` may give of the model once it is saved."""
        return [content_digest(each) for each in self.saved]

    def check(self, role: str, scored: Any, where: str, allow: bool, *words: str) -> None:
        """Raise `BadInput` unless the scores, or what `words` say, are of this model."""
        fitting = [found for found in self.prints if found.tensors == scored.tensors]
        check_fingerprint((fitting or self.prints)[0], role, self.name, scored, where, allow, *words)

    def check_layers(self, made_for: Geometry, where: str) -> None:
        """Raise `BadInput` unless scores, or a fit, are of as many layers as this model has."""
        layers = len({slot.layer for name in self.tensors if (slot := slot_of(name))})
        if layers != made_for.layers:
            raise BadInput(f"{where}: made for {made_for.layers} layers, and the {self.name} has {layers}.")

    def check_covered(self, base: _Held) -> None:
        """Raise `BadInput` for a tensor that the base does not have, and that a merge would leave out."""
        known = {text_name(name) or name for name in base.tensors}
        for name in self.tensors:
            if (text_name(name) or name) in known or name == _copied_head(self.tensors):
                continue
            raise BadInput(f"{self.name}: has a tensor {name}, and the base has none; the merge would leave it out.")

    def check_head(self, base: _Held) -> None:
        """Raise `BadInput` for an output head of its own, where the base's is the very tensor of its embeddings."""
        ours, theirs = plain_tensors(base.tensors), plain_tensors(self.tensors)
        if HEAD not in ours or EMBEDDINGS not in ours or HEAD not in theirs:
            return
        tied = base.tensors[ours[HEAD]].data_ptr() == base.tensors[ours[EMBEDDINGS]].data_ptr()
        if tied and _copied_head(self.tensors) is None:
            raise BadInput(
                f"{self.name}: has its own {theirs[HEAD]}, while the base ties it to its embeddings; the merge would "
                "lose one of the two, so use an expert tuned from this base."
            )

    def like(self, name: str, base: torch.Tensor, tied_head: str | None) -> torch.Tensor:
        """The tensor of this name with the base's rows, on its device. Raises `BadInput` where it does not fit.

        tied_head: the name of the base's output head where that is its embeddings once more (`_copied_head`).
        """
        own: str | None = name
        if name not in self.tensors:
            plain = plain_tensors(self.tensors)
            # Of a tied model the embeddings alone are saved.
            own = plain.get(text_name(name) or "") or (plain.get(EMBEDDINGS) if name == tied_head else None)
        if own is None:
            raise BadInput(f"{self.name}: the tensor {name} is missing, and the merge needs it of every model.")
        tensor = self.tensors[own].to(base.device)
        if is_vocabulary(name) and tensor.shape[1:] == base.shape[1:]:
            tensor = align_rows(tensor, base)
        if tensor.shape != base.shape:
            raise BadInput(
                f"{self.name}: {own} has shape {list(tensor.shape)}, expected the base's {list(base.shape)}."
            )
        return tensor


def _as_saved(tensors: Mapping[str, torch.Tensor]) -> list[Mapping[str, TensorHeader]]:
    """The tensors; of a tied model also without the head, which is the embeddings once more."""
    whole, head = {key: HeldTensor.of(tensor) for key, tensor in tensors.items()}, _copied_head(tensors)
    return [whole] if head is None else [whole, {key: tensor for key, tensor in whole.items() if key != head}]


def _copied_head(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of an output head that is the embeddings once more; None where there is none."""
    plain = plain_tensors(tensors)
    head, embeddings = plain.get(HEAD), plain.get(EMBEDDINGS)
    same = head and embeddings and torch.equal(tensors[head], tensors[embeddings])
    return head if same else None


def _scores(file: Any, name: str) -> Scores:
    if file is None:
        raise BadInput(f"scores: there are none of the expert {name}; give one for each.")
    return file if isinstance(file, Scores) else read_scores(file)


def _each(values: Any, named: Mapping[str, Any], what: str) -> list[Any]:
    """One value an expert, in the order of the experts; None stands for none."""
    if values is None:
        return [None] * len(named)
    if isinstance(values, Mapping):
        if set(values) != set(named):
            raise BadInput(
                f"{what}: of {', '.join(map(str, values))}, and the experts are {', '.join(named)}; name each once."
            )
        return [values[name] for name in named]
    one = isinstance(values, (str, os.PathLike)) or not hasattr(values, "__len__")
    if one or len(values) != len(named):
        count = 1 if one else len(values)
        raise BadInput(
            f"{what}: found {count} for {len(named)} experts; give a list with one for each, in their order."
        )
    return list(values)


def _numbers(values: Any, named: Mapping[str, Any], what: str) -> list[float]:
    single = isinstance(values, str) or not isinstance(values, (Mapping, Sequence))
    single &= values is not None and getattr(values, "ndim", 0) == 0
    found = [values] * len(named) if single else _each(values, named, what)
    return [_number(value, what) for value in found]


def _number(value: Any, what: str) -> float:
    """Of Python, or a single one of numpy or torch."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    if not good or (what == "weight" and value < 0):
        raise BadInput(f"{what}: found {shown(value)}, expected a number{' of at least 0' * (what == 'weight')}.")
    return float(value)
