"""The steps of the demo as data: a command, what it reads, what it writes, and whether that is still right.

A step is done when a stamp of its last run says that its command, its inputs and the code behind it had the
content that they have now, and that its outputs are what it wrote. Content, not dates: a fresh clone or a
touched file redoes nothing, and an edited recipe, score or line of code redoes what depends on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import yaml

import mergekit_wp
from mergekit_wp.demo.world import WorldChoice
from mergekit_wp.files import write_text

EXPERTS = ("instruction", "maths", "code")
MERGES = ("linear", "wp")
_PACKAGE = Path(mergekit_wp.__file__).parent


@dataclass(frozen=True)
class Step:
    """One command. `code` names the subpackages whose source it depends on, beside the shared modules."""

    name: str
    title: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    code: str

    def text(self) -> str:
        """The command as a person types it."""
        return shlex.join(self.command)

    def input_digest(self) -> str:
        sources = sorted([*_PACKAGE.glob("*.py"), *(_PACKAGE / self.code).glob("*.py")])
        return _digest_of([self.text(), *(digest(path) for path in [*self.inputs, *sources])])

    def is_done(self, stamps: Path) -> bool:
        try:
            stamp = json.loads((stamps / f"{self.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        now = {str(path): digest(path) for path in self.outputs if path.exists()}
        return stamp == {"inputs": self.input_digest(), "outputs": now} and len(now) == len(self.outputs)

    def run(self, stamps: Path) -> None:
        """Run the command and stamp it. Raises `click.ClickException` when it fails or leaves no output."""
        for output in self.outputs:  # a merge adds to a folder that is there; begin with none
            if output.is_dir() and not output.is_symlink():
                shutil.rmtree(output)
        inputs = self.input_digest()  # before the run: what changes while it runs makes it stale
        code = subprocess.run([*_program(self.command[0]), *self.command[1:]], check=False).returncode
        missing = [str(path) for path in self.outputs if not path.exists()]
        if code or missing:
            what = f"exit code {code}" if code else f"{', '.join(missing)} missing"
            raise click.ClickException(
                f"the step `{self.title}` failed ({what}); its own message is above. Once that is mended, "
                "run the demo again: finished steps are skipped."
            )
        outputs = {str(path): digest(path) for path in self.outputs}
        stamp = {"inputs": inputs, "outputs": outputs}
        write_text(stamps / f"{self.name}.json", json.dumps(stamp, indent=2) + "\n")


def demo_steps(out: Path, choice: WorldChoice, suite: Path) -> list[Step]:
    """Every step of the demo, in order; paths as the user wrote them."""
    world, results = out / "world", tuple(out / "eval" / f"results.{kind}" for kind in ("json", "csv", "md"))
    module = ("python", "-m")
    steps = [
        Step(
            "world",
            "Train the base and three experts",
            (*module, "mergekit_wp.demo.world", str(world), *choice.flags()),
            (),
            (world,),
            "miniature",
        )
    ]
    steps += [_score_step(world, out, expert) for expert in EXPERTS]
    steps += [_merge_step(world, out, method) for method in MERGES]
    models = {name: world / name for name in ("base", *EXPERTS)} | {m: out / "merges" / m for m in MERGES}
    evaluate = ["wp-eval", str(suite), *(f"{name}={path}" for name, path in models.items())]
    evaluate += ["--include-path", str(world / "tasks"), "--allow-code-execution", "--out", str(out / "eval")]
    inputs = (suite, world / "tasks", *models.values())
    steps.append(Step("eval", "Grade every model", tuple(evaluate), inputs, results, "eval"))
    report = (*module, "mergekit_wp.demo.report", str(out), *choice.flags())
    inputs = (results[0], *(score_file(out, expert) for expert in EXPERTS), *_recipes(out))
    steps.append(Step("report", "Write the report", report, inputs, (out / "report.html",), "demo"))
    return steps


def write_recipes(out: Path) -> None:
    """The two recipes; they name paths only, so they can be written before anything else exists."""
    world = out / "world"
    linear = {
        "merge_method": "linear",
        "base_model": str(world / "base"),
        # The base has no weight: naming it makes the merge's config and tokenizer the base's.
        "models": [
            {"model": str(world / name), "parameters": {"weight": 0.0 if name == "base" else 1.0}}
            for name in ("base", *EXPERTS)
        ],
        "tokenizer": {"source": "base"},  # one expert has a row more than the base
        "dtype": "bfloat16",
    }
    wp = {
        "merge_method": "wp",
        "base_model": str(world / "base"),
        "models": [
            {"model": str(world / name), "parameters": {"scores": str(score_file(out, name))}} for name in EXPERTS
        ],
        "dtype": "bfloat16",
    }
    for path, recipe in zip(_recipes(out), (linear, wp), strict=True):
        write_text(path, yaml.safe_dump(recipe, sort_keys=False))


def score_file(out: Path, expert: str) -> Path:
    return out / "scores" / f"{expert}.safetensors"


def _recipes(out: Path) -> tuple[Path, ...]:
    return tuple(out / "recipes" / f"{method}.yaml" for method in MERGES)


def _score_step(world: Path, out: Path, expert: str) -> Step:
    base, model, pairs = world / "base", world / expert, world / "pairs" / f"{expert}.jsonl"
    command = ["wp-score", "--base", str(base), "--expert", str(model), "--pairs", str(pairs)]
    command += ["--out", str(score_file(out, expert))]
    inputs, outputs = (base, model, pairs), (score_file(out, expert),)
    return Step(f"score-{expert}", f"Score the {expert} expert", tuple(command), inputs, outputs, "scoring")


def _merge_step(world: Path, out: Path, method: str) -> Step:
    recipe, merged = out / "recipes" / f"{method}.yaml", out / "merges" / method
    inputs = [recipe, *(world / name for name in ("base", *EXPERTS))]
    if method == "wp":
        inputs += [score_file(out, expert) for expert in EXPERTS]
    command = ("mergekit-yaml", str(recipe), str(merged), "--quiet")
    title = f"Merge by {method}, with the stock mergekit-yaml"
    return Step(f"merge-{method}", title, command, tuple(inputs), (merged,), "merge")


def digest(path: Path) -> str:
    """SHA-256 of a file's content, or of all files below a folder with their names; "" if there is none."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        return _digest_of([f"{file.relative_to(path)}={digest(file)}" for file in files])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def readable(path: Path) -> Path:
    """The path relative to the working directory where it lies below it, as a person would type it."""
    relative = Path(os.path.relpath(path))
    return path if relative.parts[:1] == ("..",) else relative


def _digest_of(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _program(name: str) -> list[str]:
    """How to start a command of this very installation, whatever PATH says."""
    if name == "python":
        return [sys.executable]
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise click.ClickException(f"there is no `{name}` beside {sys.executable}; run `make venv`.")
    return [found]
