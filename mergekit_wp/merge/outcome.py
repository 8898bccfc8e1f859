"""What of the result is not arithmetic: its config and code made to fit its tensors, and why one is not finite.

mergekit writes the base's config.json, with another dtype and vocabulary size at most, and copies the files of its
tokenizer. Here the rest is brought in line with what was written: the dtype is that of the tensors; an entry about
quantised weights goes, since those that were merged are not quantised; code of its own that the base names (`auto_map`)
comes along, or, where the base itself lacks it, is not named; chat templates beside the default one come along; and no
folder of the machine that made the base is left.

A merged tensor with a NaN or an infinity comes of a damaged input, or of a value that the dtype does not hold
(`why_not_finite`).
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.hub import CHAT_TEMPLATES, tokenizer_files
from mergekit_wp.checkpoint.quantised import MARKS
from mergekit_wp.errors import BadInput
from mergekit_wp.files import inside, read_json_mapping, write_text
from mergekit_wp.foreign import logger
from mergekit_wp.merge.audit_slices import read_slice
from mergekit_wp.merge.plan import TORCH_DTYPE, MergePlan, PlannedTensor

if TYPE_CHECKING:
    from mergekit.common import ModelReference


LOG = logger(__name__)

_PATHS = ("_name_or_path",)
# What names code of the model's own: `auto_map: {AutoModelForCausalLM: modeling_acme.AcmeForCausalLM}`.
_NAMING_CODE = ("config.json", "tokenizer_config.json")


def settle(folder: Path, plan: MergePlan) -> None:
    """Bring the merged folder's texts in line with its tensors; idempotent. Raises `BadInput` where one is not JSON."""
    base = plan.checkpoints[plan.tensors[0].base].folder
    _bring_templates(base, folder)
    for name in _NAMING_CODE:
        path = folder / name
        if not path.is_file():
            continue
        before = path.read_text(encoding="utf-8")
        content = read_json_mapping(path, "config")
        if name == "config.json":
            _agree(content, _stored(folder, plan))
        _bring_code(content, base, folder)
        if content != json.loads(before):
            write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _bring_templates(base: Path, folder: Path) -> None:
    """Copy the chat templates beside the default one, which mergekit leaves out where it copies the base's tokenizer
    (one that it writes itself has them)."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        whose = [path.read_bytes() if (path := place / name).is_file() else None for place in (base, folder)]
        if whose[0] != whose[1]:
            return  # another tokenizer, or one template in the place of all
    for path in tokenizer_files(base) if (folder / "tokenizer_config.json").is_file() else ():
        target = folder / path.relative_to(base)
        if path.parent.name != CHAT_TEMPLATES or target.exists():
            continue
        try:
            source = inside(base, path)
        except BadInput as error:  # the merge is made already, and goes without it
            LOG.warning("%s The merged model does not have this chat template.", error.message)
            continue
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def _stored(folder: Path, plan: MergePlan) -> Counter[str]:
    """Bytes of each dtype, in torch's names, as written (as planned, where the weights are pickled)."""
    stored: Counter[str] = Counter()
    if any(folder.glob("*.safetensors")):
        for header in Checkpoint(str(folder), folder).tensors.values():
            stored[TORCH_DTYPE.get(header.dtype, header.dtype)] += header.end - header.start
    else:
        stored.update(plan.out_dtype(tensor) for tensor in plan.tensors)
    return stored


def _agree(config: dict[str, Any], stored: Counter[str]) -> None:
    """dtype, quantisation and paths, of the whole and of what is nested in it (`text_config`)."""
    for nested in config.values():
        if isinstance(nested, dict) and {"dtype", "torch_dtype"} & nested.keys():
            _agree(nested, stored)
    said = config.pop("torch_dtype", None)
    said = config.get("dtype") or said
    # Tensors may be mixed (norms in float32): then what the base's config says of them, if one of them is that.
    config["dtype"] = said if said in stored else stored.most_common(1)[0][0]
    for name in (*_PATHS, *(MARKS if stored.keys() <= set(TORCH_DTYPE.values()) else ())):
        config.pop(name, None)


def _bring_code(content: dict[str, Any], base: Path, folder: Path) -> None:
    """Copy the modules that `auto_map` names, and theirs; forget what the base itself does not have."""
    named = content.get("auto_map")
    if not isinstance(named, dict):
        return
    for key, value in list(named.items()):
        modules = [str(v).rpartition(".")[0] for v in (value if isinstance(value, list) else [value]) if v]
        # `user/model--modeling_acme.AcmeForCausalLM` is looked up on the Hub.
        local = [module for module in modules if "--" not in module]
        try:
            files = [file for module in local for file in code_files(base, module)]
        except BadInput:  # a link out of the folder: the merge is made already, and goes without it
            files = []
        if len(files) < len(local) or not all(file.is_file() for file in files):
            LOG.warning("%s: names code of its own, %s, that is not there; the merged model does not.", base, value)
            del named[key]
            continue
        for file in files:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    if not named:
        del content["auto_map"]


def code_files(folder: Path, module: str) -> list[Path]:
    """A module's file and those that it imports relatively; [] for a name that is not a file of the folder.

    Raises `BadInput` for one that is a link to somewhere else.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    file = folder / f"{module}.py"
    if not re.fullmatch(r"[A-Za-z_]\w*", module) or not file.is_file():
        return []
    imported = (Path(name) for name in get_relative_import_files(str(file)))
    files = [file, *(path for path in imported if re.fullmatch(r"\w+", path.stem) and path.parent == folder)]
    return [inside(folder, path) if path.is_file() else path for path in files]


_ROWS = 1024


def why_not_finite(plan: MergePlan, tensor: PlannedTensor) -> BadInput:
    """One sentence, after reading the inputs of this tensor once more as they are stored."""
    largest = {model: _largest(plan, tensor, model) for model in tensor.models}
    if damaged := [str(model) for model, size in largest.items() if not math.isfinite(size)]:
        return BadInput(
            f"{' and '.join(damaged)}: {tensor.source} holds a NaN or an infinity; download or save that checkpoint "
            "again."
        )
    names = {str(name).removeprefix("torch.") for name in (tensor.read_dtype, plan.out_dtype(tensor)) if name}
    narrow = min(names, key=lambda name: torch.finfo(getattr(torch, name)).max)
    limit = torch.finfo(getattr(torch, narrow)).max
    model, size = max(largest.items(), key=lambda item: item[1])
    what = f"{model}: {tensor.source} holds {size:.6g}" if size > limit else f"the merged {tensor.output} holds more"
    return BadInput(
        f"{what}, and {narrow} ends at {limit:.6g}; write `dtype: bfloat16` or `dtype: float32` in the recipe."
    )


def _largest(plan: MergePlan, tensor: PlannedTensor, model: ModelReference) -> float:
    """The largest magnitude, NaN if there is one."""
    checkpoint, name = plan.checkpoints[model], tensor.sources[model] or ""
    rows = checkpoint.tensors[name].shape[0]
    parts = [read_slice(checkpoint, name, (slice(r, r + _ROWS),)).abs().max() for r in range(0, rows, _ROWS)]
    return float(torch.stack(parts).max())
