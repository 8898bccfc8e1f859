"""How every command of this package begins and ends; the console scripts start here.

Ctrl-C says `Aborted!` (exit code 1) wherever it strikes, also while packages are imported, where it may come out as
another error. SIGTERM unwinds as Ctrl-C does, so that nothing half-written is left (exit code 143). Output that cannot
be written, because its disk is full, is one sentence (exit code 1). Nothing heavy is imported here.

And what commands share: help with options under headings, a command as it was typed, a check of names, the progress
bar, and silence from the libraries.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource

from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import echo

Tick = Callable[[float], object]
"""Told of what is done, in the units of a part."""
StartProgress = Callable[[int, str, str], Tick]
"""Called with (total, what, unit) at the start of a part."""
no_progress: StartProgress = lambda _total, _what, _unit: lambda _done: None  # noqa: E731

MODULES = {
    "wp-score": "mergekit_wp.scoring.cli",
    "wp-scores": "mergekit_wp.scores_cli",
    "wp-anchor": "mergekit_wp.scoring.anchor.cli",
    "wp-aim": "mergekit_wp.merge.calibrate",
    "wp-merge": "mergekit_wp.merge.cli",
    "wp-eval": "mergekit_wp.eval.cli",
    "wp-push": "mergekit_wp.push.cli",
    "wp-compare": "mergekit_wp.eval.compare",
    "wp-run": "mergekit_wp.pipeline.cli",
}


def main() -> None:
    """Run the command that this process was started as."""
    name = os.path.basename(sys.argv[0]).removesuffix(".exe").removesuffix("-script.py")
    run(MODULES[name])


def run(module: str) -> None:
    """Run the click command `main` of a module, from its import to the last byte of its output."""
    interrupted = False

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background of a shell it is ignored
        signal.signal(signal.SIGINT, interrupt)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        import_module(module).main()
    except KeyboardInterrupt:
        _stop("Aborted!")
    except SystemExit as leaving:
        if interrupted and leaving.code not in (0, 1, None):
            _stop("Aborted!")
        raise
    except Exception as error:
        if interrupted:
            _stop("Aborted!")
        from mergekit_wp.errors import out_of_memory, reason_of
        from mergekit_wp.files import disk_trouble
        from mergekit_wp.foreign import one_line

        if out_of_memory(error):
            _stop(f"Error: out of memory ({one_line(reason_of(error))}); free some, or use a larger machine.")
        if (trouble := disk_trouble(error)) is None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer has nowhere to go
        _stop(f"Error: the output cannot be written ({trouble}); free some room, or write elsewhere.")


def _terminate(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
    sys.exit(128 + number)


def _stop(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(1)


class GroupedCommand(click.Command):
    """A click command whose `groups` map a heading to parameter names; the rest comes under Miscellaneous."""

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.groups = groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        heading = {name: title for title, names in self.groups.items() for name in names}
        for title in dict.fromkeys([*self.groups, "Miscellaneous"]):
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


class ProgressBars:
    """A tqdm bar for each part of the run, with the time left; lines now and then where nobody watches."""

    def __init__(self, shown: bool):
        self.shown = shown
        self.bar: Any = None

    def __enter__(self) -> StartProgress | None:
        return self.start if self.shown else None

    def start(self, total: int, what: str, unit: str) -> Tick:
        from tqdm import tqdm

        self.close()
        seconds = 0.5 if sys.stderr.isatty() else 30
        self.bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True, mininterval=seconds)
        return self.advance

    def advance(self, done: float) -> None:
        """Parts of a prompt add up to a little more or less than it."""
        self.bar.update(min(done, self.bar.total - self.bar.n))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __exit__(self, *_error: object) -> None:
        self.close()


def take_terminal(watched: bool, shown: bool) -> None:
    """Leave the terminal to our own lines and bar: `watched` by a person, `shown` unless errors alone are asked for."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    if not watched:
        transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    log = logging.getLogger("mergekit_wp")
    log.setLevel(logging.INFO if shown else logging.ERROR)
    log.handlers, log.propagate = [_Echo()], False


class _Echo(logging.Handler):
    """What the run has to say, as lines of the terminal's error stream."""

    def emit(self, record: logging.LogRecord) -> None:
        echo(record.getMessage(), err=True)


def quieten(bars: bool) -> None:
    """No bars (unless `bars`), no advice of the libraries' own; must run before they are first imported."""
    if not bars:
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    for name in ("lm_eval.api.task", "lm_eval.evaluator_utils"):
        logging.getLogger(name).addFilter(_says_something)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _says_something(record: logging.LogRecord) -> bool:
    """Not lm-eval's advice on its own command, nor, for every model, that a metric counts for some items only."""
    text = record.getMessage()
    return "Custom kwargs can be passed" not in text and "not scored on the same number" not in text
