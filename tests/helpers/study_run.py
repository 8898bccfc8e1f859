"""wp-study as a command in a test, and what holds of each of its parts that may be killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from mergekit_wp.study.cli import main


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done.output


def killed_at(number: int, work: Callable, made: list[int], place: int) -> Callable:
    """`work`, but that its `number`th call is as far as the run gets; `made` is told how much each call was given, by
    the length of its argument at `place`."""

    def counted(*arguments, **options):
        made.append(len(arguments[place]))
        if len(made) == number:
            raise KeyboardInterrupt
        return work(*arguments, **options)

    return counted


def goes_on(study: Path, part: str, folder: Path, made: list[int], number: int) -> tuple[Path, list[int]]:
    """A part whose `number`th piece of work was killed goes on: what was done is not done again, what is written is
    what an unbroken run writes, and what was kept is gone. Returns the OUT of the one that was killed, and how much
    each piece of the unbroken one had."""
    out, whole, begun = folder / "out", folder / "whole", len(made)
    run(study, "--out", out, "--only", part, code=1)
    assert len(made) == begun + number
    assert all(path.name.startswith(f".{part}") for path in out.iterdir())
    run(study, "--out", out, "--only", part)
    assert sorted(path.name for path in out.iterdir()) == [part, "study.html"], "what was kept is gone"
    finished = len(made)
    run(study, "--out", whole, "--only", part, "--quiet")
    assert sum(made[finished:]) == sum(made[begun:finished]) - made[begun + number - 1]
    for path in (whole / part).iterdir():
        assert path.read_bytes() == (out / part / path.name).read_bytes(), path.name
    assert run(study, "--out", out, "--only", part, "--plan").startswith(f"{part}: done")
    return out, made[finished:]
