"""A tiny merge made by wp-merge, with cards of its parents, to be published."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from click.testing import CliRunner
from merge_world import World
from warm import warm

TOKEN = "hf_LoopbackTokenThatIsNoSecret1234"
REPO = "alice/merge"


def build(root: Path) -> World:
    """root/w: base, e0, e1, their scores; root/w/out: their merge by wp-merge, with its certificate."""
    world = World(root / "w", "llama", experts=2).build()
    for folder in (world.base, world.expert(0), world.expert(1)):
        licence(folder, "apache-2.0")
    (world.base / "NOTICE.txt").write_text("keep this notice\n")
    merge(world, world.recipe(), "out")
    return world


def merge(world: World, recipe: Path, out: str, *options: str) -> Path:
    from mergekit.io.tasks import LoaderCache

    from mergekit_wp.merge.cli import main

    LoaderCache.loaders.clear()
    arguments = [str(recipe), str(world.root / out), "--quiet", *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return world.root / out


def licence(folder: Path, name: str | None) -> None:
    """A card that states this licence, or a card without one."""
    text = "---\nlibrary_name: transformers\n" + (f"license: {name}\n" if name else "") + "---\n# Model\n"
    (folder / "README.md").write_text(text)


def write_results(folder: Path, fingerprint: str, model: Path, other: str = "/home/bob/models/base") -> Path:
    """A results.json as wp-eval writes it: two rows on two tasks; the second row is the model."""
    measured = {
        "task": "t",
        "dtype": "float32",
        "device": "cpu",
        "limit": None,
        "versions": {"lm-eval": "0.4.13", "torch": "2.13.0"},
        "date": "2026-11-21T10:00:00+00:00",
    }
    tasks = [{"column": c, "task": c.lower(), "metric": "acc,none"} for c in ("Maths", "Code")]

    def row(name, reference, print_, value):
        cells = {t["column"]: {"value": value, "stderr": 0.01, "difference": None, "samples": 4} for t in tasks}
        cells["Average"] = {"value": value, "stderr": 0.01, "difference": None}
        return {
            "name": name, "model": reference, "fingerprint": print_, "limit": None, "cells": cells,
            "measured": {t["column"]: measured for t in tasks},
        }  # fmt: skip

    content = {
        "suite": str(folder / "suites" / "mine.yaml"),
        "suite_content": {"name": "mine", "tasks": tasks},
        "versions": {"lm-eval": "0.4.13"},
        "unit": "fraction",
        "baseline": "base",
        "limit": None,
        "columns": tasks,
        "rows": [row("base", other, "0" * 64, 0.25), row("wp", str(model), fingerprint, 0.75)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def wp_push(*arguments: object, url: str = "", code: int = 0, **environment: str) -> str:
    """The command in a process of its own; what it printed on both streams."""
    variables = {
        "HF_ENDPOINT": url or "http://127.0.0.1:9",
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    done = warm().command("mergekit_wp.push.cli", *arguments, **{**variables, **environment})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])
