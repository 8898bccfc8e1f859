"""A recipe as wp-merge reads it: mergekit's YAML, with its troubles in one sentence and its plan before the merge."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from mergekit_wp.checkpoint.adapters import merged_folder
from mergekit_wp.checkpoint.folder import Checkpoint, local_folder
from mergekit_wp.checkpoint.references import Reference, with_recipe_models
from mergekit_wp.checkpoint.vocabulary import tokenizer_in
from mergekit_wp.documents import MOST_YAML_BYTES
from mergekit_wp.errors import BadInput, reason_of, shown
from mergekit_wp.files import read_text, read_yaml_documents, read_yaml_mapping
from mergekit_wp.foreign import logger
from mergekit_wp.merge.plan import (
    AIM,
    FILES,
    PATCH,
    WIDEN,
    WP,
    MergePlan,
    meaning_of,
    names_file,
    read_plan,
)
from mergekit_wp.merge.recipe_fields import check_entries, check_fields, check_slices

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

LOG = logger(__name__)

# mergekit would ignore any other in silence.
_PARAMETERS = {
    WP: ("scores", "weight", "scale", "fit", "allow_mismatch"),
    WIDEN: ("t", "s"),
    AIM: ("activations", "omega"),
    PATCH: ("scores", "top", "rank", "task", "layers", "components", "remove", "patch", "allow_mismatch"),
}
_OF_EXPERTS = {WP: ("scores", "weight", "scale")}
"""Which of them may stand under a model; mergekit looks for the others everywhere but there."""
_OF_PLANNING = (ValueError, RuntimeError, LookupError, OSError, TypeError, AttributeError, AssertionError)
# mergekit-evolve writes these into every recipe; they mean nothing to these methods.
_OF_EVOLVE = ("normalize", "int8_mask")


def files_of(content: Any) -> list[str]:
    """Every file beside models that a recipe's content names (score, fit, activations files, ...), once, in order."""
    if isinstance(content, list):
        return list(dict.fromkeys(name for item in content for name in files_of(item)))
    if not isinstance(content, dict):
        return []
    own = [value for key, value in content.items() if names_file(key, value)]
    return list(
        dict.fromkeys([*own, *(n for v in content.values() if isinstance(v, list | dict) for n in files_of(v))])
    )


@dataclass(frozen=True)
class Recipe:
    """`text` is the file as written; `content` its YAML with the paths of score and activations files found."""

    path: Path
    text: str
    content: dict[str, Any]

    @property
    def method(self) -> str:
        return str(self.content.get("merge_method"))

    def without_scores(self, files: Collection[Path]) -> Recipe:
        """The recipe without those of its score and fit files; nothing else of it changes."""
        content = copy.deepcopy(self.content)
        absolute = {file.absolute() for file in files}
        for parameters in _parameters(content):
            for kind in ("scores", "fit"):
                if isinstance(name := parameters.get(kind), str) and Path(name).absolute() in absolute:
                    del parameters[kind]
        return replace(self, content=content)

    def score_files(self) -> set[str]:
        """Every score and fit file that it names."""
        return {
            str(found[kind]) for found in _parameters(self.content) for kind in ("scores", "fit") if found.get(kind)
        }

    def config(self) -> MergeConfiguration:
        """A fresh configuration: mergekit's planner rewrites the one it is given."""
        from mergekit.config import MergeConfiguration

        return self._by_mergekit(lambda: MergeConfiguration.model_validate(copy.deepcopy(self.content)))

    def reads(self) -> list[str]:
        """Every file and folder that the recipe names, LoRAs on their own, and Hub names as they are."""
        models = [meaning_of(model) for model in self.config().referenced_models()]
        parts = [str(source) for model in models for source in model.sources]
        return [*parts, *(file for parameters in _parameters(self.content) for file in files_of(parameters))]

    def prepare(self, options: MergeOptions, *, merge_loras: bool) -> None:
        """Open every model the way mergekit will, so that a missing or pickled one is refused at once.

        merge_loras: False (a dry run) looks at a LoRA's base in its place, which has the same tensors.
        """
        from mergekit.common import ModelReference
        from mergekit.io.tasks import LoaderCache

        download_alike()
        cache = LoaderCache()
        cache.setup(options)
        kinds: dict[str, str] = {}
        for model in self.config().referenced_models():
            reference = meaning_of(model)
            reference.check()
            found = Checkpoint.of(reference.model, options.transformers_cache)  # refuses what cannot be merged
            self._check_layers(model, found.text_config.get("num_hidden_layers"))
            kinds.setdefault(", ".join(map(str, found.config.get("architectures") or ["?"])), reference.text)
            if model.lora and merge_loras:
                merged_folder(model, Path(cache.lora_cache_dir or ""), cache.trust_remote_code, cache.lora_merge_dtype)
                self._by_mergekit(lambda model=model: cache.get(model))  # type: ignore[misc]
            elif model.lora:
                bare = ModelReference(model=model.model)
                cache.loaders[model] = bare.lazy_loader(cache_dir=options.transformers_cache)
        self._check_tokenizer(options.transformers_cache)
        if len(kinds) > 1 and self.method in (WP, WIDEN, AIM, PATCH) and not options.allow_crimes:
            (one, of_one), (other, of_other), *_ = kinds.items()  # mergekit would advise --allow-crimes, to no avail
            raise BadInput(
                f"{self.path}: {of_one} is a {one} and {of_other} a {other}; {self.method} merges models that were "
                "tuned from one base, so list such alone."
            )

    def _check_layers(self, model: ModelReference, count: Any) -> None:
        """Raise `BadInput` for a slice of layers that a model does not have; count: how many those are."""
        for source in (source for piece in self.config().slices or () for source in piece.sources):
            if source.model == model and isinstance(count, int) and source.layer_range[1] > count:
                raise BadInput(
                    f"{self.path}: layer_range {list(source.layer_range)} of {meaning_of(model).text}, which "
                    f"has {count} layers; end it there at most."
                )

    def _check_tokenizer(self, cache: str | None) -> None:
        """What mergekit would only find when all is merged: a chat template that is none, a tokenizer that is not
        there, a token that has no embedding to come from. Raises `BadInput`."""
        from mergekit.merge import _set_chat_template

        config = self.config()
        if config.chat_template not in (None, "auto"):
            self._by_mergekit(lambda: _set_chat_template(SimpleNamespace(), config))
        source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
        if source not in (None, "union", "base"):
            meaning_of(source).check()
        for token, about in ((config.tokenizer and config.tokenizer.tokens) or {}).items():
            where = f"{self.path}: tokenizer, tokens, {shown(token)}"
            if about.source is None:
                raise BadInput(f"{where}: has no source; name a model, or write `{{kind: zero}}`.")
            if getattr(about.source, "kind", None) == "zero":
                continue
            model = getattr(about.source, "model", None) if hasattr(about.source, "kind") else about.source
            if model not in config.referenced_models():
                raise BadInput(f"{where}: its source {model} is none of the models of this merge; name one of them.")
            opened = Checkpoint.of(meaning_of(model).model, cache)
            tokenizer = tokenizer_in(opened.folder)
            ids = {} if tokenizer is None else tokenizer.get_vocab()
            wanted = getattr(about.source, "token", None) or token
            number = getattr(about.source, "token_id", None)
            found = ids.get(wanted, -1) if number is None else number
            if not 0 <= found < int(opened.text_config.get("vocab_size", found + 1)):
                what = f"the token {shown(wanted)}" if number is None else f"a row {number}"
                raise BadInput(f"{where}: {model} does not have {what}; name a token or a model that has it.")

    def plan(self, out: Path, options: MergeOptions) -> MergePlan:
        """What mergekit would do, by whatever method. Reads headers only."""
        from mergekit.architecture import get_architecture_info
        from mergekit.io.tasks import FinalizeModel
        from mergekit.merge import _model_out_config
        from mergekit.plan import MergePlanner

        def plan() -> MergePlan:
            config = self.config()
            architecture = get_architecture_info(config, options)
            out_config = _model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
            planner = MergePlanner(config, architecture, options=options, out_model_config=out_config)
            targets = planner.plan_to_disk(out_path=str(out))
            finalize = next(task for task in targets if isinstance(task, FinalizeModel))
            found = read_plan(finalize, any_method=True)
            if found is None:
                raise ValueError("there is no tensor to merge")
            return found

        planned: MergePlan = self._by_mergekit(plan)
        names = {str(name) for tensor in planned.tensors for name in (tensor.output, *tensor.sources.values())}
        for word in dict.fromkeys(_filters(self.content)):
            if word != "*" and not any(word in name for name in names):
                LOG.warning("%s: the filter %s is in the name of no tensor, and chooses none.", self.path, shown(word))
        return planned

    def _by_mergekit(self, step: Callable[[], Any]) -> Any:
        """Run a step of mergekit's own planning; what it finds wrong with the recipe becomes one sentence."""
        try:
            return step()
        except _OF_PLANNING as error:
            raise BadInput(f"{self.path}: mergekit cannot carry out this recipe: {reason_of(error, 400)}.") from error


def read_recipe(path: str, text: str | None = None) -> Recipe:
    """Read and complete a recipe. Raises `BadInput`, naming the file, for anything but a YAML mapping with a
    `merge_method` that mergekit has, and for fields and parameters that mergekit would ignore.

    text: what the file will hold, where it is still to be written."""
    content = read_yaml_mapping(path, "recipe", text)
    _check_content(path, content)
    for parameters in _parameters(content) if content["merge_method"] in _PARAMETERS else ():
        for name in FILES:
            file = parameters.get(name)
            beside = Path(path).absolute().parent / str(file)
            if names_file(name, file) and not os.path.exists(str(file)) and os.path.exists(beside):
                parameters[name] = str(beside)
    if text is None:
        text = read_text(path, MOST_YAML_BYTES)
    return Recipe(Path(path), text, with_recipe_models(content, _for_mergekit))


def _check_content(path: str, content: dict[str, Any]) -> None:
    """Raise `BadInput` for what mergekit would take in silence, and for a method that it does not have."""
    if "merge_method" not in content:
        raise BadInput(f"{path}: the recipe has no merge_method; write `merge_method: {WP}`.")
    method = content["merge_method"]
    known = _parameters_of(path, method)
    check_fields(path, content)
    check_slices(path, content)
    if method in _PARAMETERS:
        for parameters in _parameters(content, of_models=True):
            if shared := sorted((set(parameters) & set(known)) - set(_OF_EXPERTS.get(method, ()))):
                raise BadInput(
                    f"{path}: `{shared[0]}` stands under a model, where mergekit does not look for it; it is of the "
                    "whole merge, so write it into the recipe's own `parameters`."
                )
    for parameters in _parameters(content):
        if unknown := sorted(set(parameters) - {*known, *_OF_EVOLVE}):
            raise BadInput(
                f"{path}: unknown parameter {unknown[0]}; merge_method {method} knows {', '.join(known) or 'none'}."
            )
    if method in _PARAMETERS:
        check_entries(path, with_recipe_models(content, _for_mergekit), _OF_EXPERTS.get(method, ()))


def check_stock_recipe() -> None:
    """Read the recipe of a running `mergekit-yaml` as wp-merge would, and those of a `mergekit-multi` that are by a
    method of ours, for what these take in silence: of two equal keys the last, fields and parameters that nobody knows.
    Raises `BadInput`.

    Nothing is done in other commands, and where the recipe came through a pipe and is gone.
    """
    context = click.get_current_context(silent=True)
    path = None if context is None else context.params.get("config_file")
    if context is None or not isinstance(path, str) or not os.path.isfile(path):
        return
    if context.command.name == "mergekit-yaml":
        read_recipe(path)
    elif context.command.name == "mergekit-multimerge":
        for number, content in enumerate(read_yaml_documents(path, "file of recipes"), 1):
            content.pop("name", None)
            if content.get("merge_method") in _PARAMETERS:
                _check_content(f"{path}, document {number}", content)


def _for_mergekit(meaning: Reference, value: Any) -> dict[str, Any]:
    """The mapping that mergekit cannot misread, with whatever else the recipe says in one."""
    return {**(value if isinstance(value, dict) else {}), **meaning.for_mergekit()}


def _parameters_of(path: str, method: Any) -> tuple[str, ...]:
    """The parameters that a merge method knows. Raises `BadInput` for a method that there is not."""
    if isinstance(method, str) and method in _PARAMETERS:
        return _PARAMETERS[method]
    from mergekit.merge_methods.registry import registered_methods

    specs = {found.spec.name: found.spec for found in registered_methods()}
    if not isinstance(method, str) or method not in specs:
        names = sorted({*specs, *_PARAMETERS})
        raise BadInput(f"{path}: mergekit has no merge_method {shown(method)} here; it has {', '.join(names)}.")
    return tuple(p.name for p in (*specs[method].shared_parameters, *specs[method].input_parameters))


def _parameters(node: Any, of_models: bool = False) -> Iterator[dict[str, Any]]:
    """Every `parameters:` mapping of the recipe, wherever mergekit allows one; of_models: those of a model alone."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key != "parameters" or not isinstance(value, dict):
                yield from _parameters(value, of_models)
            elif not of_models or "model" in node:
                yield value
    elif isinstance(node, list):
        for item in node:
            yield from _parameters(item, of_models)


def _filters(node: Any) -> Iterator[str]:
    """Every `filter:` of the recipe's parameters."""
    if isinstance(node, dict):
        if isinstance(node.get("filter"), str) and "value" in node:
            yield node["filter"]
        node = list(node.values())
    for item in node if isinstance(node, list) else ():
        yield from _filters(item)


_lock = threading.Lock()


_downloading = False


def download_alike() -> None:
    """Let mergekit take models from the Hub by our own helper; idempotent.

    Its own would take every .safetensors of a repository: other formats' copies and training checkpoints too.
    """
    global _downloading
    from mergekit.common import ModelReference

    with _lock:
        if not _downloading:
            ModelReference.local_path = _downloaded(ModelReference.local_path)
            _downloading = True


def _downloaded(original: Callable[..., str]) -> Callable[..., str]:
    @wraps(original)
    def local_path(self: Any, cache_dir: str | None = None, ignore_lora: bool = False) -> str:
        source = meaning_of(self).model
        if source.kind == "folder":
            return original(self, cache_dir, ignore_lora)
        return str(local_folder(source, cache_dir))

    return local_path
