"""What must be there before any weights load: each check is cheap, and says in one sentence how to get what is not.

Data sets and consent to code are checked with the tasks (see `tasks`), the backend when it is chosen (`backends`).
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.vocabulary import head_against_config
from mergekit_wp.checkpoint.weights import strays
from mergekit_wp.console import percent
from mergekit_wp.errors import BadInput, reason_of
from mergekit_wp.eval import process
from mergekit_wp.eval.backends import Backend, answer_tokens, context_length
from mergekit_wp.eval.completeness import check_complete
from mergekit_wp.eval.measure import Settings
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.eval.tasks import ReadyTask, check_word_lists
from mergekit_wp.memory import free_memory
from mergekit_wp.scoring.models.offload import parameter_bytes

_VLLM_SHARE = 0.92  # of a GPU's memory, vLLM 0.32's own default
# vllm/v1/attention/backends/cpu_attn.py of vLLM 0.32, which finds out only at the first prompt (`make test-vllm`
# compares).
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def check_parallel(backend: Backend, device: str) -> None:
    """As many GPUs as the backend is to use, and ray for several copies. Raises `BadInput`."""
    if backend.name != "vllm":
        return
    shared, copies = backend.parallel
    if shared * copies > 1 and device.startswith("cuda:"):
        raise BadInput(
            f"device {device} is one GPU, and {shared * copies} are asked for; "
            "name them in the environment variable CUDA_VISIBLE_DEVICES and leave --device out."
        )
    if device.startswith("cuda") and shared * copies > torch.cuda.device_count():
        raise BadInput(
            f"tensor_parallel_size {shared} times data_parallel_size {copies} takes {shared * copies} GPUs; "
            f"this machine shows {torch.cuda.device_count()}."
        )
    if copies > 1 and find_spec("ray") is None:
        raise BadInput(f"data_parallel_size {copies}: copies of a model are run by ray; pip install ray.")


def check_tasks(tasks: list[ReadyTask]) -> None:
    """The word lists of graders, also of those that a task takes over from another. Raises `BadInput`."""
    for task in tasks:
        check_word_lists(task.spec.task, {f for leaf in task.loaded["tasks"].values() for f in _folders(leaf)})


def _folders(leaf: Any) -> set[Path]:
    """The folders of the Python functions that a task names."""
    functions = [value for value in vars(leaf.config).values() if inspect.isfunction(value)]
    return {Path(file).parent for file in map(inspect.getsourcefile, functions) if file}


def check_model(model: EvalModel, tasks: list[ReadyTask], settings: Settings) -> None:
    """Chat template, tensors, context length and how the model divides among GPUs. Raises `BadInput`."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(str(model.folder), trust_remote_code=settings.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(str(model.folder), trust_remote_code=settings.trust_remote_code)
    if settings.backend.name == "vllm" and (others := strays(model.folder)):
        raise BadInput(
            f"{model.reference}: vLLM would load {others[0]} beside model.safetensors, and take its tensors for the "
            "model's; move it out of the folder, or run with --backend hf."
        )
    for task in tasks:
        if task.spec.apply_chat_template:
            _check_template(model, task, tokenizer)
    _check_head(model, settings.backend)
    check_complete(Checkpoint(model.reference, model.folder), settings.trust_remote_code)
    _check_context(model, tasks, settings.backend, context_length(config, tokenizer), _stretch(config))
    _check_heads(model, getattr(config, "text_config", None) or config, settings)


def _check_head(model: EvalModel, backend: Backend) -> None:
    """The output head is there (transformers would make one up), and the backend uses it."""
    trouble = head_against_config(Checkpoint(model.reference, model.folder))
    if trouble and backend.name == "vllm":
        raise BadInput(trouble)


_NO_TEMPLATE = "or set `apply_chat_template: false` in the suite"


def check_has_template(name: str, tokenizer: Any, task: str) -> None:
    """Raise `BadInput` where there is no template that the task could apply; `name`: the model's."""
    templates = tokenizer.chat_template
    if not templates:
        raise BadInput(
            f"{name}: its tokenizer has no chat template, which task {task} applies; put a chat_template.jinja into "
            f"the folder, {_NO_TEMPLATE}."
        )
    if isinstance(templates, dict) and "default" not in templates:
        raise BadInput(
            f"{name}: its tokenizer has chat templates named {', '.join(sorted(templates))} and none named default, "
            f"which task {task} applies; name one of them so in the folder, {_NO_TEMPLATE}."
        )


def _check_template(model: EvalModel, task: ReadyTask, tokenizer: Any) -> None:
    """The tokenizer has a template, and it takes the messages that the task will put into it."""
    check_has_template(model.reference, tokenizer, task.spec.task)
    spec = task.spec
    few = any(leaf.get_config("num_fewshot") for leaf in task.loaded["tasks"].values())
    turn = [{"role": "user", "content": "a question"}]
    shots = [*turn, {"role": "assistant", "content": "an answer"}] if spec.multiturn and few else []
    said = [{"role": "system", "content": spec.system_instruction}] if spec.system_instruction else []
    if _template_error(tokenizer, [*said, *shots, *turn]) is None:
        return
    if trouble := _template_error(tokenizer, [*shots, *turn]):
        raise BadInput(
            f"{model.reference}: its chat template cannot be applied to the messages of task {spec.task} ({trouble}); "
            f"mend it in the folder, {_NO_TEMPLATE}."
        )
    # lm-eval would leave the instruction out, and the figure would say that it was there.
    raise BadInput(
        f"{model.reference}: its chat template takes no system message, and task {spec.task} has a "
        "`system_instruction`; take that out of the suite."
    )


def _template_error(tokenizer: Any, chat: list[dict[str, str]]) -> str | None:
    """What the template says against these messages; None where it takes them."""
    try:
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author
        return reason_of(error)
    return None


def _check_heads(model: EvalModel, config: Any, settings: Settings) -> None:
    """How attention heads divide among GPUs, and whether vLLM's attention for CPUs has their size."""
    heads = getattr(config, "num_attention_heads", None)
    shared, _ = settings.backend.parallel
    if heads and heads % shared:
        raise BadInput(
            f"{model.reference}: its {heads} attention heads cannot be divided among {shared} GPUs; "
            "choose a --tensor-parallel that divides them."
        )
    if heads and settings.backend.name == "vllm" and settings.device == "cpu":
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        if size not in VLLM_CPU_HEAD_SIZES:
            raise BadInput(
                f"{model.reference}: its attention heads have {size} dimensions, and on a CPU vLLM computes "
                f"{', '.join(map(str, VLLM_CPU_HEAD_SIZES))}; run with --backend hf, or on a GPU."
            )


def _check_context(model: EvalModel, tasks: list[ReadyTask], backend: Backend, own: int, stretch: float) -> None:
    asked = backend.max_model_len
    if asked is not None and asked > own * stretch:
        raise BadInput(
            f"{model.reference}: its context is {own} tokens, and max_model_len is {asked}; lower --max-model-len."
        )
    length = asked or own
    for task in tasks:
        for name, leaf in task.loaded["tasks"].items():
            longest = answer_tokens(leaf.get_config("generation_kwargs"))
            if leaf.OUTPUT_TYPE == "generate_until" and longest >= length:
                raise BadInput(
                    f"{model.reference}: an answer to {name} may have {longest} tokens (`max_gen_toks`), which "
                    f"leaves no room for a prompt in a context of {length}; lower `max_gen_toks` in the suite"
                    + (", or raise --max-model-len." if asked and asked < own else ".")
                )


def _stretch(config: Any) -> float:
    """By how much a config stretches its positions: the context may be longer than it says by that much."""
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    return max(1.0, float(factor)) if isinstance(factor, int | float) else 1.0


def check_memory(model: EvalModel, settings: Settings) -> None:
    """The weights against the free memory of where they are to go. Raises `BadInput`."""
    if settings.backend.options.get("parallelize"):
        return  # accelerate puts layers wherever there is room
    named = settings.dtype_of(model)
    dtype = getattr(torch, named) if named != "auto" else torch.float32
    need = parameter_bytes(Checkpoint.open(str(model.folder)), dtype)
    shared, copies = settings.backend.parallel
    places: dict[str, tuple[int, int]]
    if not settings.device.startswith("cuda"):
        places = {settings.device: (free_memory(torch.device("cpu")), 0)}
        need *= copies
    else:
        first = int(settings.device.partition(":")[2] or 0)
        places = process.ask(gpu_memory, first, shared * copies) or {}
        need //= shared
    for place, (free, total) in places.items():
        share = settings.backend.options.get("gpu_memory_utilization", _VLLM_SHARE)
        if settings.backend.name == "vllm" and free < share * total:
            raise BadInput(
                f"{place} has {_gb(free)} free of {_gb(total)}, and vLLM takes {percent(share)} of all at once; end "
                "what else runs there, or set a smaller `gpu_memory_utilization` in the suite's backend_options."
            )
        if need > free:
            raise BadInput(
                f"{model.reference}: its weights take {_gb(need)} in {named}, and {_gb(free)} of memory are free on "
                f"{place}; free some, use a smaller --dtype, or a larger machine."
            )


def gpu_memory(first: int, count: int) -> dict[str, tuple[int, int]]:
    """(free, total) bytes of each GPU from `first`. Starts CUDA, so call it in a process of its own."""
    return {f"cuda:{i}": torch.cuda.mem_get_info(i) for i in range(first, first + count)}


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
