"""wp-score run in this process: what it printed, and its refusals."""

from __future__ import annotations

from click.testing import CliRunner
from where import DEVICE

from mergekit_wp.scoring.cli import main


def run(world, *arguments, out="out.safetensors", **changes):
    """Run wp-score in-process; returns (result, output path). A flag set to None is left out."""
    flags = {"base": world / "base", "expert": world / "expert", "pairs": world / "pairs.jsonl", "device": DEVICE}
    options = [f"--{k.replace('_', '-')}={v}" for k, v in {**flags, **changes}.items() if v is not None]
    path = world / out
    return CliRunner().invoke(main, [*map(str, arguments), *options, "--out", str(path)]), path


def refused(result, path, *said):
    assert result.exit_code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.output
    for part in said:
        assert part in errors[0], errors[0]
    assert "Traceback" not in result.output
    assert not path.exists()
    assert not list(path.parent.glob(".*partial*"))
