"""What this package uses of mergekit that mergekit promises nobody: why its version is pinned in pyproject.toml.

A new version of mergekit is taken on by making this pass, and then the tests of the merge.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import tomllib
from pathlib import Path

import pytest

# module, what of it, and who leans on it. A name with a dot is an attribute; one in brackets a field or a parameter.
PARTS = [
    ("mergekit.merge_methods.registry", "_METHODS", "merge/checked: whether a method of ours is registered"),
    ("mergekit.merge_methods.registry", "register", "merge/checked: registers methods, after the module has run"),
    ("mergekit.evo.genome", "METHOD_PARAM_MAPS", "autoload: what mergekit-evolve may search"),
    ("mergekit.io.tasks", "FinalizeModel.arguments", "merge/seams: where the checks run"),
    ("mergekit.io.tasks", "FinalizeModel[tensor_save_tasks]", "merge/plan: every output tensor"),
    ("mergekit.io.tasks", "FinalizeModel[writer_task]", "merge/plan: the output folder"),
    ("mergekit.io.tasks", "TensorWriterTask[out_path]", "merge/plan: the output folder"),
    ("mergekit.io.tasks", "SaveTensor[tensor_task]", "merge/plan: how a tensor comes about"),
    ("mergekit.io.tasks", "SaveTensor[dtype]", "merge/plan: the dtype written"),
    ("mergekit.io.tasks", "GatherTensors[weight_info]", "merge/plan: names of the inputs"),
    ("mergekit.io.tasks", "GatherTensors[dtype]", "merge/plan: the dtype read"),
    ("mergekit.io.tasks", "LoaderCache.get", "merge/plan, merge/recipe: the files that mergekit reads"),
    ("mergekit.io.tasks", "LoaderCache.setup", "merge/recipe: with the merge's options"),
    ("mergekit.io.tasks", "LoaderCache.loaders", "merge/recipe: a LoRA's base stands in for it in a dry run"),
    ("mergekit.io.lazy_tensor_loader", "ShardedTensorIndex[base_path]", "merge/plan: the folder that is read"),
    ("mergekit.merge_methods.task_adapter", "ExecuteMergeMethodTask.execute", "merge/seams: one tensor"),
    ("mergekit.merge_methods.task_adapter", "ExecuteMergeMethodTask[method_name]", "merge/seams"),
    ("mergekit.merge_methods.task_adapter", "ExecuteMergeMethodTask[gather_tensors]", "merge/plan"),
    ("mergekit.merge_methods.task_adapter", "ExecuteMergeMethodTask[model_order]", "merge/plan"),
    ("mergekit.merge_methods.task_adapter", "ExecuteMergeMethodTask[base_model]", "merge/plan"),
    ("mergekit.merge_methods.task_adapter", "ExecuteMergeMethodTask[output_weight]", "merge/plan"),
    ("mergekit.merge_methods.task_adapter", "ExecuteMergeMethodTask[input_parameters]", "merge/plan, merge/seams"),
    ("mergekit.merge_methods.task_adapter", "ExecuteMergeMethodTask[parameters]", "merge/plan, merge/seams"),
    ("mergekit.merge_methods.task_adapter", "ExecuteMergeMethodTask[out_dtype]", "merge/plan, merge/seams"),
    ("mergekit.merge_methods.task_adapter", "ExecuteMergeMethodTask[dtype]", "merge/plan"),
    ("mergekit.merge_methods.task_adapter", "TensorDictWrapper[tensors]", "merge/plan: mergekit-pytorch's inputs"),
    ("mergekit.tokenizer", "PermutedVocabulary[gather_tensors]", "merge/plan: rows brought into one vocabulary"),
    ("mergekit.tokenizer.truncate", "TruncatedVocabulary[gather_tensors]", "merge/plan: rows cut to the shortest"),
    ("mergekit.merge", "_model_out_config", "merge/recipe: planning as run_merge does"),
    ("mergekit.merge", "_set_chat_template", "merge/recipe: what a chat template may be"),
    ("mergekit.config", "MergeConfiguration.model_fields", "merge/recipe_fields: which fields a recipe may have"),
    ("mergekit.tokenizer", "PermutedVocabulary[tokens]", "merge/plan: tokens whose rows the recipe gives apart"),
    ("mergekit.merge", "run_merge(config_source)", "merge/cli: the recipe as it was written"),
    ("mergekit.plan", "MergePlanner.plan_to_disk", "merge/recipe: planning as run_merge does"),
    ("mergekit.architecture", "get_architecture_info", "merge/recipe: planning as run_merge does"),
    ("mergekit.common", "ModelReference.merged", "scoring/models: a LoRA in its base"),
    ("mergekit.common", "ModelReference.local_path", "scoring/models, merge/recipe"),
    ("mergekit.common", "ModelReference.lazy_loader", "merge/recipe: a LoRA's base in a dry run"),
]


@pytest.mark.parametrize(("module", "part", "who"), PARTS, ids=[f"{module}.{part}" for module, part, _who in PARTS])
def test_it_is_there(module, part, who):
    gone = (
        f"mergekit {importlib.metadata.version('mergekit')} has no {part} in {module}, which {who.split(':')[0]} uses"
    )
    name, _, inside = part.rstrip(")]").replace("(", "[").partition("[")
    try:
        found = importlib.import_module(module)
        for step in name.split("."):
            found = getattr(found, step)
    except (ImportError, AttributeError):
        pytest.fail(gone)
    if not inside:
        return
    fields = getattr(found, "model_fields", None) or getattr(found, "__dataclass_fields__", None)
    if inspect.isfunction(found) or fields is None:
        fields = inspect.signature(found).parameters
    assert inside in fields, gone


def test_pyproject_pins_the_version_that_this_was_checked_with():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (pin,) = (each for each in project["dependencies"] if each.startswith("mergekit"))
    assert pin == f"mergekit=={importlib.metadata.version('mergekit')}"
