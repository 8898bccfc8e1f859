"""Run tasks on one model, in this very process: load it, ask it, grade it, one task after another.

Both wp-eval's child processes (see `process`) and workers that grade many models in one process call `measure`.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from mergekit_wp.errors import BadInput, out_of_memory
from mergekit_wp.eval import backends, stderr
from mergekit_wp.eval.cache import Entry, plain
from mergekit_wp.eval.context import count_cut
from mergekit_wp.eval.first_space import keep_first_space
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.settings import Settings, versions
from mergekit_wp.eval.tasks import ReadyTask
from mergekit_wp.files import write_text
from mergekit_wp.foreign import file_part
from mergekit_wp.records import now

Say = Callable[[str], None]
OnDone = Callable[[ReadyTask, Entry], None]


def measure(model: EvalModel, tasks: list[ReadyTask], settings: Settings, say: Say, on_done: OnDone) -> None:
    """Load the model and run the tasks; `on_done` gets each one's entry as soon as it is known.

    Raises `BadInput` when the model cannot be loaded or holds a NaN, or when memory runs out.
    """
    with _loaded(model, settings) as lm:
        for task in tasks:
            say(f"{model.name}: {task.spec.task} ...")
            try:
                entry = _evaluate(lm, model, task, settings)
            except Exception as error:
                if out_of_memory(error):
                    raise BadInput(
                        f"{model.reference}: out of memory on {settings.device} in {task.spec.task}; use a smaller "
                        "--batch-size (hf), --max-model-len or gpu_memory_utilization (vllm), or a larger device."
                    ) from error
                raise
            on_done(task, entry)


def samples_file(model: EvalModel, task: ReadyTask, settings: Settings) -> Path | None:
    """Where the answers of this model to this task are logged; None when they are not to be."""
    if settings.samples is None:
        return None
    key = settings.key(model)[:12]
    found = sorted(settings.samples.glob(f"*-{key}"))  # under whatever row name it was first evaluated
    folder = found[0] if found else settings.samples / f"{file_part(model.name)}-{key}"
    return folder / f"{file_part(task.spec.task)}-{task.key[:12]}.jsonl"


def _evaluate(lm: Any, model: EvalModel, task: ReadyTask, settings: Settings) -> Entry:
    from lm_eval.evaluator import evaluate

    started, spec = time.monotonic(), task.spec
    leaves = list(task.loaded["tasks"].values())
    _seed(leaves)
    backends.ask_alike(leaves, settings.backend)
    log = samples_file(model, task, settings)
    errors_lacking = any(stderr.lacking(leaf) for leaf in leaves)
    # Not `simple_evaluate`: at every call it looks over the machine's hardware (3 s) and asks git for a hash.
    output: Any = evaluate(
        lm,
        task.loaded,
        limit=settings.limit,
        log_samples=errors_lacking or log is not None,
        system_instruction=spec.system_instruction,
        apply_chat_template=spec.apply_chat_template,
        fewshot_as_multiturn=spec.multiturn,
        confirm_run_unsafe_code=settings.allow_code,
    )
    if errors_lacking:
        stderr.add_missing(output["results"], task.loaded, output["samples"])
    if log is not None:
        _write_samples(log, output["samples"])
    counts = [n["effective"] for n in output["n-samples"].values()]
    return {
        "task": spec.task,
        "results": plain(output["results"][spec.task]),
        "samples": sum(counts) if counts else None,
        "limit": settings.limit,
        "num_fewshot": plain(output["n-shot"].get(spec.task)),
        "cut_prompts": count_cut(lm, leaves, settings.backend.name),
        **_how(lm, model, task, settings),
        "seconds": round(time.monotonic() - started, 1),
        "date": now(),
    }


def _how(lm: Any, model: EvalModel, task: ReadyTask, settings: Settings) -> Entry:
    """What a reader needs to measure the same again."""
    template = lm.chat_template(True) if task.spec.apply_chat_template else None
    return {
        "backend": settings.backend.name,
        "backend_options": plain(dict(settings.backend.options)),
        **backends.describe(lm, settings.backend, device=settings.device, dtype=settings.dtype_of(model)),
        "batch_size": "auto" if settings.backend.name == "vllm" else settings.batch_size,
        "chat_template": sha256(template.encode()).hexdigest() if template else None,
        "system_instruction": task.spec.system_instruction,
        "versions": versions(settings.backend),
    }


def _write_samples(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """One JSON object a line: the task, the item, what was asked, what came, how it was graded."""
    lines = [json.dumps(plain({"task": name, **item})) for name, items in samples.items() for item in items]
    write_text(path, "".join(line + "\n" for line in lines))


def _seed(leaves: list[Any]) -> None:
    """The seeds that lm-eval's own command sets, for each task anew: the order of tasks changes nothing."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for leaf in leaves:
        leaf.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextmanager
def _loaded(model: EvalModel, settings: Settings) -> Iterator[Any]:
    """The model in lm-eval's backend; its memory is given back before the next one loads."""
    dtype = settings.dtype_of(model)
    if settings.backend.name == "vllm":
        _check_stored_weights(model, dtype)
    lm = backends.load(
        settings.backend,
        model.folder,
        device=settings.device,
        dtype=dtype,
        batch_size=settings.batch_size,
        trust_remote_code=settings.trust_remote_code,
    )
    if not settings.progress_bars:
        for request in ("generate_until", "loglikelihood", "loglikelihood_rolling"):
            setattr(lm, request, partial(getattr(lm, request), disable_tqdm=True))
    try:
        if settings.backend.name == "hf":
            keep_first_space(lm)
            _check_finite(model, lm.model.named_parameters())
        yield lm
    finally:
        backends.unload(lm)


def _check_stored_weights(model: EvalModel, dtype: str) -> None:
    """The same check from disk, since vLLM keeps the weights to itself: a NaN answers nonsense for hours."""
    import torch
    from safetensors import safe_open

    from mergekit_wp.checkpoint import Checkpoint

    kind = getattr(torch, dtype) if dtype != "auto" else None
    headers = Checkpoint.open(str(model.folder)).tensors
    for file in sorted({header.file for header in headers.values()}):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118  (not a dict)
                tensor = stream.get_tensor(name)
                if tensor.is_floating_point():
                    _check_finite(model, [(name, tensor.to(kind) if kind else tensor)])


def _check_finite(model: EvalModel, weights: Any) -> None:
    import torch

    for name, weight in weights:
        if not torch.isfinite(weight).all():
            raise _not_finite(model, name, weight.dtype)


def _not_finite(model: EvalModel, name: str, dtype: Any) -> BadInput:
    """Whether a weight is so in its file, or only in the dtype that it was brought to."""
    import torch
    from safetensors import safe_open

    from mergekit_wp.checkpoint import Checkpoint

    header = Checkpoint.open(str(model.folder)).tensors.get(name)
    if header is not None:
        with safe_open(header.file, framework="pt") as stream:
            if torch.isfinite(stream.get_tensor(name)).all():
                kind, end = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
                return BadInput(
                    f"{model.reference}: the weight {name} holds numbers that {kind} does not, which ends at {end:g}; "
                    f"use --dtype {'float32' if kind == 'bfloat16' else 'bfloat16'}."
                )
    return BadInput(f"{model.reference}: the weight {name} holds a NaN or an infinity; make it again.")
