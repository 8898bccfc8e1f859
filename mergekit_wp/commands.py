"""How every command of this package begins and ends; the console scripts start here.

Ctrl-C says `Aborted!` (exit code 1) wherever it strikes, also while packages are imported, where it may come out as
another error. SIGTERM unwinds as Ctrl-C does, so that nothing half-written is left (exit code 143). Output that cannot
be written, because its disk is full, is one sentence (exit code 1). Nothing heavy is imported here.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import FrameType

MODULES = {
    "wp-score": "mergekit_wp.scoring.cli",
    "wp-anchor": "mergekit_wp.scoring.anchor_cli",
    "wp-aim": "mergekit_wp.scoring.calibrate",
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
