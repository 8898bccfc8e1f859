"""What our commands share: help with options under headings, a command as it was typed, a check of names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from mergekit_wp.errors import BadInput


class GroupedCommand(click.Command):
    """A click command whose `groups` map a heading to parameter names; the rest comes under Miscellaneous."""

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.groups = groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        heading = {name: title for title, names in self.groups.items() for name in names}
        for title in [*self.groups, "Miscellaneous"]:
            chosen = [
                p
                for p in self.get_params(ctx)
                if isinstance(p, click.Option) and heading.get(p.name or "", "Miscellaneous") == title
            ]
            if records := [record for p in chosen if (record := p.get_help_record(ctx))]:
                with formatter.section(title):
                    formatter.write_dl(records)


def typed(context: click.Context, name: str) -> list[str]:
    """The words of a command line that asks for the same: name, arguments, then every option that was given."""
    words, options = [name], []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        values = [str(one) for one in (value if isinstance(value, tuple) else (value,))]
        if isinstance(parameter, click.Argument):
            words += values
        elif context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE:
            flag = max(parameter.opts, key=len)
            is_flag = isinstance(parameter, click.Option) and parameter.is_flag
            options += [flag] if is_flag else [word for one in values for word in (flag, one)]
    return words + options


_OTHER_FORMATS = (
    ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".h5", ".gguf", ".onnx", ".json", ".jsonl",
    ".csv", ".tsv", ".yaml", ".yml", ".txt", ".md", ".html", ".zip",
)  # fmt: skip


def names_safetensors(_context: click.Context, option: click.Parameter, path: str) -> str:
    """Callback of an option that names a file to write. Raises `BadInput` for a name that says it is something else."""
    if os.path.splitext(path)[1].lower() in _OTHER_FORMATS and not os.path.isdir(path):
        raise BadInput(f"{option.opts[0]} {path}: the file is safetensors; give it a name that ends in .safetensors.")
    return path
