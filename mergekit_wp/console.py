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
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    "wp-pairs": "mergekit_wp.scoring.convert",
    "wp-score": "mergekit_wp.scoring.cli",
    "wp-scores": "mergekit_wp.scores_cli",
    "wp-anchor": "mergekit_wp.scoring.anchor.cli",
    "wp-answers": "mergekit_wp.eval.greedy_answers",
    "wp-fit": "mergekit_wp.fit.cli",
    "wp-aim": "mergekit_wp.calibrate",
    "wp-merge": "mergekit_wp.merge.cli",
    "wp-patch": "mergekit_wp.merge.patch_cli",
    "wp-eval": "mergekit_wp.eval.cli",
    "wp-push": "mergekit_wp.push.cli",
    "wp-compare": "mergekit_wp.eval.compare",
    "wp-study": "mergekit_wp.study.cli",
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
    check_safetensors_name(option.opts[0], path)
    return path


def check_safetensors_name(option: str, path: str) -> None:
    """Raise `BadInput` for the name of a file to write that says it is something else."""
    if os.path.splitext(path)[1].lower() in _OTHER_FORMATS and not os.path.isdir(path):
        raise BadInput(f"{option} {path}: the file is safetensors; give it a name that ends in .safetensors.")


class ProgressBars:
    """A tqdm bar for each part of the run, with the time left; lines now and then where nobody watches."""

    def __init__(self, shown: bool):
        self.shown = shown
        self.part: Any = None

    def __enter__(self) -> StartProgress | None:
        return self.start if self.shown else None

    def start(self, total: int, what: str, unit: str) -> Tick:
        self.close()
        if not sys.stderr.isatty():
            self.part = ProgressLines(total, what, lambda line: echo(line, err=True))
            return self.part.advance
        from tqdm import tqdm

        self.part = tqdm(total=total, desc=what, unit=unit, unit_scale=True, mininterval=0.5)
        return self.advance

    def advance(self, done: float) -> None:
        """Parts of a prompt add up to a little more or less than it."""
        self.part.update(min(done, self.part.total - self.part.n))

    def close(self) -> None:
        if self.part is not None:
            self.part.close()

    def __exit__(self, *_error: object) -> None:
        self.close()


LINES_EVERY_S = 30.0


class ProgressLines:
    """Says every half minute how far a part is and how much longer it takes, whether or not it moved meanwhile."""

    def __init__(self, total: float, what: str, say: Callable[[str], object]) -> None:
        self.total, self.what, self.say = total, what, say
        self.done, self.begun = 0.0, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(LINES_EVERY_S,), daemon=True)
        self._thread.start()

    def advance(self, done: float) -> None:
        self.done += done

    def close(self) -> None:
        """No line comes after this."""
        self._over.set()
        self._thread.join()

    def line(self) -> str:
        share = min(self.done / self.total, 1.0) if self.total else 1.0
        elapsed = time.monotonic() - self.begun
        left = f"about {duration(elapsed / share * (1 - share))} left" if share else "time left not known yet"
        return f"{self.what}: {percent(share)}, {left}"

    def _watch(self, seconds: float) -> None:
        while not self._over.wait(seconds):
            self.say(self.line())


def percent(share: float, digits: int = 0) -> str:
    """A share in percent; in whole ones it does not round to nothing or to all: `under 1 %`, `over 99 %`."""
    if digits:
        return f"{100 * share:.{digits}f} %"
    share = round(share, 9)  # shares that sum to 1 do so within float64's rounding
    if 0 < abs(share) < 0.005:
        return "under 1 %" if share > 0 else "above -1 %"
    if 0.995 <= share < 1:
        return "over 99 %"
    return f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """In the two largest units that say something: 40 s, 3 min, 2 h 10 min."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


_QUIET = {
    "MERGEKIT_WP_QUIET": "1",  # for processes of ours
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


@contextmanager
def silence() -> Iterator[None]:
    """Inside the block nothing but errors is said, by whatever library; best entered before they are imported."""
    before = {name: os.environ.get(name) for name in _QUIET}
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            _mute()
            yield
    finally:
        logging.disable(disabled)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def silence_as_parent() -> None:
    """For a process that one of our commands started: quiet if that is."""
    if os.environ.get("MERGEKIT_WP_QUIET"):
        _mute()


def _mute() -> None:
    os.environ.update(_QUIET)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def hush(context: click.Context, _option: click.Parameter, quiet: bool) -> bool:
    """Callback of an eager --quiet: silence until the command ends."""
    if quiet:
        context.with_resource(silence())
    return quiet


def json_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `--json`, the command's `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def say_nothing(_line: str) -> None:
    """In the place of `echo` where only errors are asked for."""


def quiet_option(text: str = "Print errors only.") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `--quiet`, before anything heavy is imported."""
    return click.option("--quiet", is_flag=True, is_eager=True, callback=hush, help=text)


def take_terminal(shown: bool) -> None:
    """Leave the terminal to our own lines and bars; `shown` unless errors alone are asked for."""
    _hush_transformers(bars=shown and sys.stderr.isatty())
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
    import datasets

    _hush_transformers(bars=False)
    for name in ("lm_eval.api.task", "lm_eval.evaluator_utils"):
        logging.getLogger(name).addFilter(_says_something)
    datasets.disable_progress_bars()


def _hush_transformers(bars: bool) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    if not bars:
        transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _says_something(record: logging.LogRecord) -> bool:
    """Not lm-eval's advice on its own command, nor, for every model, that a metric counts for some items only."""
    text = record.getMessage()
    return "Custom kwargs can be passed" not in text and "not scored on the same number" not in text
