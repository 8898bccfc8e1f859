"""What all commands have in common: help at once, a version, options of ours beside mergekit's."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from typing import Union, get_args, get_origin

import click
import pytest
from click.testing import CliRunner

from mergekit_wp import __version__
from mergekit_wp.console import MODULES

COMMANDS = {name: import_module(module).main for name, module in MODULES.items()}


def test_help_imports_nothing_heavy():
    """All helps in one interpreter; torch alone would take seconds of it."""
    heavy = ["torch", "transformers", "mergekit", "lm_eval", "numpy", "huggingface_hub", "datasets"]
    code = (
        "import sys; from importlib import import_module; from click.testing import CliRunner\n"
        f"for module in {list(MODULES.values())}:\n"
        "    done = CliRunner().invoke(import_module(module).main, ['--help'])\n"
        "    assert done.exit_code == 0 and 'Usage:' in done.output, module\n"
        f"    print([name for name in {heavy} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["[]"] * len(MODULES), done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_version(name):
    done = CliRunner().invoke(COMMANDS[name], ["--version"])
    assert done.exit_code == 0
    assert __version__ in done.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option_once(name):
    text = CliRunner().invoke(COMMANDS[name], ["--help"]).output
    headings = [line for line in text.splitlines() if line.endswith(":") and line[:1] != " "]
    assert len(headings) == len(set(headings))
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert text.count(f"{max(parameter.opts, key=len)} ") + text.count(f"{max(parameter.opts, key=len)}\n")


def test_the_options_of_mergekit_are_mergekits():
    """The same names, kinds and defaults, though stated here so that help need not import mergekit."""
    from mergekit.options import MergeOptions

    from mergekit_wp.merge.mergekit_options import NAMES, merge_options

    assert sorted(NAMES) == sorted(MergeOptions.model_fields)
    context = COMMANDS["wp-merge"].make_context("wp-merge", ["recipe.yaml", "out"])
    options = {each.name: each for each in COMMANDS["wp-merge"].params}
    for name, field in MergeOptions.model_fields.items():
        assert context.params[name] == field.default, name
        kinds = get_args(field.annotation) if get_origin(field.annotation) is Union else (field.annotation,)
        kind = {"boolean": bool, "text": str, "integer": int, "integer range": int, "size": int}[
            options[name].type.name
        ]
        assert kind in kinds, name
    assert merge_options(context.params) == MergeOptions()
    more = ["--gpu-rich", "--out-shard-size", "20M", "-j", "3", "--no-copy-tokenizer", "-vv"]
    typed = COMMANDS["wp-merge"].make_context("wp-merge", ["recipe.yaml", "out", *more]).params
    options = MergeOptions(
        gpu_rich=True, out_shard_size=20_000_000, num_threads=3, copy_tokenizer=False, verbosity=2
    )  # fmt: skip
    assert merge_options(typed) == options
