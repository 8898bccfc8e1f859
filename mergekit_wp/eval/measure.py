"""Run tasks on one model, in this very process: load it, ask it, grade it, one task after another.

First `Settings`, how models are run and which part of that a result is kept under; then the cache, a file a model and
settings with the results of each task that is finished; then the run. Both wp-eval's child processes (see `process`)
and workers that grade many models in one process call `measure`.

`keep_first_space`: a Llama-style tokenizer writes a space as part of the word after it and leaves it out where a text
begins. lm-eval decodes an answer by itself, so one space is lost at its beginning; HumanEval's answers begin with an
indentation, and every program is then a syntax error.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit_wp.console import ProgressLines
from mergekit_wp.documents import MOST_JSON_BYTES, now, parse_json
from mergekit_wp.errors import BadInput, out_of_memory
from mergekit_wp.eval import backends
from mergekit_wp.eval import standard_error as stderr
from mergekit_wp.eval.backends import Backend, count_cut, resolve_dtype
from mergekit_wp.eval.datafiles import revisions
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.tasks import ReadyTask
from mergekit_wp.files import read_text, write_text
from mergekit_wp.foreign import file_part

_VERSIONS = ("lm-eval", "transformers", "torch")


@dataclass(frozen=True)
class Settings:
    """How models are run. What changes answers enters the cache's key: dtype, limit, versions, backend.

    Device, batch size and the number of GPUs are recorded with each result but not part of the key: they change
    the rounding, which moves an answer now and then, and a cached result should outlive a move to a GPU.
    `samples` is the folder for per-sample logs, or None for none.
    """

    device: str
    dtype: str
    batch_size: int | str
    limit: int | None
    allow_code: bool
    trust_remote_code: bool
    progress_bars: bool
    backend: Backend = field(default_factory=Backend)
    samples: Path | None = None

    def key(self, model: EvalModel) -> str:
        parts = [
            model.fingerprint, self.dtype_of(model), self.limit, self.trust_remote_code, versions(self.backend),
            self.backend.name, self.backend.answering_options(),
        ]  # fmt: skip
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def dtype_of(self, model: EvalModel) -> str:
        """The dtype this model runs in."""
        return resolve_dtype(model.folder, self.dtype)


def versions(backend: Backend) -> dict[str, str]:
    """The packages whose version can change an answer."""
    return {name: version(name) for name in _VERSIONS} | backend.versions()


Entry = dict[str, Any]  # a task's results as lm-eval gave them, and how they came about


def cache_file(cache: Path, model: EvalModel, key: str) -> Path:
    """The file of this model under this key, under whatever row name it was first evaluated."""
    found = sorted(cache.glob(f"*-{key[:20]}.json"))
    return found[0] if found else cache / f"{file_part(model.name)}-{key[:20]}.json"


def read_cache(path: Path) -> dict[str, Entry]:
    """Finished tasks by key; a file that is not ours or was damaged counts as nothing done."""
    try:
        tasks = parse_json(read_text(path, MOST_JSON_BYTES))["tasks"]
        return {key: entry for key, entry in tasks.items() if _is_entry(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_entry(entry: Entry) -> bool:
    samples = entry.get("samples", "")
    return isinstance(entry.get("results"), dict) and (samples is None or type(samples) is int)


def write_cache(path: Path, model: EvalModel, done: dict[str, Entry]) -> None:
    """All finished tasks of a model, whole or not at all."""
    content = {"model": model.reference, "fingerprint": model.fingerprint, "tasks": done}
    write_text(path, json.dumps(plain(content), indent=2) + "\n")


def plain(value: Any) -> Any:
    """The same content in JSON's own types: numpy scalars become numbers, what JSON lacks becomes text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


_SPACE = "\u2581"  # how such tokenizers write a space within a token


def keep_first_space(lm: Any) -> None:
    """Make lm-eval's class for transformers decode answers as continuations; other tokenizers are left alone."""
    anchor = _anchor(lm.tokenizer)
    if anchor is None:
        return
    decode: Callable[..., str] = lm.tok_decode
    word = decode([anchor])

    def continued(tokens: Any, skip_special_tokens: bool = True) -> str:
        if not isinstance(tokens, list):
            return decode(tokens, skip_special_tokens=skip_special_tokens)
        return decode([anchor, *tokens], skip_special_tokens=skip_special_tokens).removeprefix(word)

    lm.tok_decode = continued


def _anchor(tokenizer: Any) -> int | None:
    """A token to put before an answer; None if this tokenizer loses no space."""
    words = ((token, i) for token, i in tokenizer.get_vocab().items() if token[:1] == _SPACE and token[1:].isalpha())
    anchor = next((i for _, i in sorted(words)), None)
    if anchor is None or tokenizer.decode([anchor]).startswith(" "):
        return None
    return anchor


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
                with _told(lm, f"{model.name}: {task.spec.task}", settings, say):
                    entry = _evaluate(lm, model, task, settings)
            except Exception as error:
                if out_of_memory(error):
                    raise BadInput(
                        f"{model.reference}: out of memory on {settings.device} in {task.spec.task}; use a smaller "
                        "--batch-size (hf), --max-model-len or gpu_memory_utilization (vllm), or a larger device."
                    ) from error
                raise
            on_done(task, entry)


_REQUESTS = ("generate_until", "loglikelihood", "loglikelihood_rolling")


@contextmanager
def _told(lm: Any, what: str, settings: Settings, say: Say) -> Iterator[None]:
    """Inside the block it is said now and then how far the model is with the requests of its task, and how much longer
    it takes; not where lm-eval's bars do.

    lm-eval's models tell their `cache_hook` of every answer, as soon as they have it. By transformers they have a batch
    at once, so that in between its `generate` tells of tokens; by vLLM they have all at once, so there it is vLLM that
    tells.
    """
    engine: Any = getattr(lm, "model", None)  # vLLM's copies of a model are in processes of their own
    if settings.progress_bars or engine is None:
        yield
        return
    hook, asked = lm.cache_hook, {name: getattr(lm, name) for name in _REQUESTS}
    counter = _AnswerCounter(hook)
    generate: Any = getattr(engine, "generate", None)
    if settings.backend.name == "vllm":
        bar = backends.silent_bar(counter.answered)
        engine.generate = lambda *prompts, **how: generate(*prompts, **(how | {"use_tqdm": bar}))
    else:
        lm.cache_hook = counter
        if generate is not None:
            engine.generate = backends.telling_of_tokens(generate, counter.on_the_way)

    def counting(ask: Callable[..., Any]) -> Callable[..., Any]:
        def counted(requests: Any, *rest: Any, **more: Any) -> Any:
            counter.begin(lines := ProgressLines(len(requests), what, say))
            try:
                return ask(requests, *rest, **more)
            finally:
                lines.close()

        return counted

    for name, ask in asked.items():
        setattr(lm, name, counting(ask))
    try:
        yield
    finally:
        lm.cache_hook = hook
        for name, ask in asked.items():
            setattr(lm, name, ask)
        if generate is not None:
            engine.generate = generate


class _AnswerCounter:
    """Tells how many answers there are; may take the place of lm-eval's CacheHook, which it passes them on to."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.lines: ProgressLines | None = None
        self.known = 0

    def begin(self, lines: ProgressLines) -> None:
        self.lines, self.known = lines, 0

    def answered(self, count: int) -> None:
        self.known += count
        self.on_the_way(0)

    def on_the_way(self, count: float) -> None:
        """So many answers' worth of tokens are there of those that are not known yet."""
        if self.lines is not None:
            self.lines.done = self.known + count

    def add_partial(self, *answer: Any) -> None:
        self.answered(1)
        self.hook.add_partial(*answer)


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
        **({"data": task.data} if task.data else {}),
        **({"revisions": found} if (found := revisions(leaves)) else {}),
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
        for request in _REQUESTS:
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

    from mergekit_wp.checkpoint.folder import Checkpoint

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

    from mergekit_wp.checkpoint.folder import Checkpoint

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
