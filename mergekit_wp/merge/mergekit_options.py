"""mergekit's own options of a merge, as wp-merge has them: stated here, so that help need not import mergekit.

Importing `mergekit.options` takes seconds. `tests/merge/test_merge_cli.py` holds these to it: the same names, kinds and
defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from mergekit_wp.console import hush
from mergekit_wp.errors import BadInput

if TYPE_CHECKING:
    from mergekit.options import MergeOptions


class _Size(click.ParamType):
    """A number of parameters such as 5B, 200M or 4096."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        from mergekit.common import parse_kmb

        try:
            return int(parse_kmb(value))
        except ValueError:
            self.fail(f"{value!r} is no number of parameters, such as 5B, 200M or 4096.", param, ctx)


def _switch(flag: str, text: str, default: bool = False) -> click.Option:
    return click.Option([f"--{flag}/--no-{flag}"], default=default, show_default=default, help=text)


def _value(flag: str, text: str, kind: Any = str, **more: Any) -> click.Option:
    return click.Option([f"--{flag}", *more.pop("also", ())], type=kind, help=text, **more)


GROUPS: dict[str, tuple[click.Option, ...]] = {
    "Storage": (
        _value("transformers-cache", "Override storage path for downloaded models."),
        _value("lora-merge-cache", "Path to store merged LORA models."),
    ),
    "Output Settings": (
        _value("out-shard-size", "Parameters in a file of the output (default: 5B).", _Size(), default=5_000_000_000),
        _switch("copy-tokenizer", "Copy a tokenizer to the output.", True),
        _switch("clone-tensors", "Clone tensors before saving, so that a layer may occur twice."),
        _switch("write-model-card", "Write mergekit's README.md.", True),
        _switch("safe-serialization", "Save output in safetensors; without it there is no audit.", True),
        click.Option(["--quiet/--no-quiet"], is_eager=True, callback=hush, help="Print errors only."),
    ),
    "Performance": (
        _switch("cuda", "Compute on a GPU."),
        _value("device", "Where to compute: cpu, cuda, cuda:1, auto (default: cpu)."),
        _switch("low-cpu-memory", "Keep results on the accelerator; useful if VRAM > RAM."),
        _switch("lazy-unpickle", "mergekit's; pickled weights are refused here."),
        _switch("read-to-gpu", "Read weights directly to the accelerator."),
        _switch("multi-gpu", "Several GPUs at once."),
        _value("num-threads", "Threads on the CPU.", int, also=("-j",)),
        click.Option(["--gpu-rich"], is_flag=True, help="--cuda --low-cpu-memory --read-to-gpu --multi-gpu."),
        _switch("async-write", "Write files while merging: faster, more memory."),
        _value("write-threads", "Threads that write.", int, default=1, show_default=True),
    ),
    "Dangerous Options": (
        _switch("trust-remote-code", "Run Python that comes with a model."),
        _switch("allow-crimes", "Allow mixing architectures."),
        _switch("unsafe-truncate-embeddings", "mergekit's: cut embeddings to the smallest vocabulary, unchecked."),
    ),
    "Miscellaneous": (
        _value("lora-merge-dtype", "Override dtype when applying LoRAs."),
        _value("random-seed", "Seed of methods that draw numbers, and of the audit's sample.", int),
        click.Option(["-v", "verbosity"], count=True, help="Say more; -vv still more."),
    ),
}
_DEVICES = ("cpu", "cuda", "xpu", "mps")
_SEEDS = 2**32  # numpy's, which mergekit seeds as well
NAMES = tuple(str(option.name) for options in GROUPS.values() for option in options)


def mergekit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the options above, of a click command; they come under their names."""
    known: list[click.Parameter] = getattr(command, "__click_params__", [])
    command.__click_params__ = [  # type: ignore[attr-defined]
        *reversed([option for options in GROUPS.values() for option in options]), *known
    ]  # fmt: skip
    return command


def merge_options(typed: Mapping[str, Any]) -> MergeOptions:
    """What mergekit takes, out of a command's parameters by name."""
    from mergekit.options import MergeOptions

    return MergeOptions(**{name: typed[name] for name in NAMES})


def check_options(options: MergeOptions) -> None:
    """Raise `BadInput` for a device that is not here or cannot merge, for threads that are none, and for a seed that
    the generators do not take."""
    import torch

    from mergekit_wp.memory import pick_device

    kind = pick_device(str(options.device)).type
    if kind not in _DEVICES:
        raise BadInput(f"device: {options.device!r} cannot hold weights; use one of {', '.join(_DEVICES)}.")
    if options.random_seed is not None and not 0 <= options.random_seed < _SEEDS:
        raise BadInput(f"random_seed: found {options.random_seed}, expected a whole number from 0 to {_SEEDS - 1}.")
    if options.multi_gpu and not torch.cuda.is_available():
        raise BadInput("multi_gpu: there is no GPU here; leave it out.")
    for name in ("num_threads", "write_threads"):
        if (threads := getattr(options, name)) is not None and threads < 1:
            raise BadInput(f"{name}: found {threads}, expected a whole number of at least 1.")
