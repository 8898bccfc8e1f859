"""The steps of the demo: train the world, then what `wp-run` does with a pipeline file; its report has our lead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from experiments.demo.world_choice import WorldChoice
from experiments.miniature.lm_eval_tasks import SUITE
from mergekit_wp.execute import Step
from mergekit_wp.files import write_text
from mergekit_wp.hashing import readable
from mergekit_wp.pipeline.spec import Pipeline, read_pipeline
from mergekit_wp.pipeline.steps import pipeline_steps, write_derived

EXPERTS = ("instruction", "maths", "code")
MERGES = ("linear", "wp", "fit")


def write_pipeline(out: Path) -> Pipeline:
    """Write OUT/pipeline.yaml and what it implies; it names paths only, so it can be there before anything else."""
    world = out / "world"
    content: dict[str, Any] = {
        "out": str(out),
        "base": str(world / "base"),
        "experts": {
            name: {"model": str(world / name), "scoring": {"pairs": str(world / "pairs" / f"{name}.jsonl")}}
            for name in EXPERTS
        },
        "merges": {
            # With no weight for the base: naming it makes the merge's config and tokenizer the base's.
            "linear": {
                "merge_method": "linear",
                "expert_parameters": {"weight": 1.0},
                "base_parameters": {"weight": 0.0},
                "out_dtype": "bfloat16",  # as the world's models, which are not there yet when this is written
            },
            "wp": {"merge_method": "wp", "out_dtype": "bfloat16"},
            "fit": {"fit": {"family": "component"}, "out_dtype": "bfloat16"},
        },
        "evaluate": {
            "suite": str(readable(SUITE)),
            "include_path": str(world / "tasks"),
            "baseline": "linear",
            "flags": ["--log-samples"],  # the report shows some answers
        },
        # What a push would publish; nothing leaves the machine.
        "push": {"merge": "wp", "to": "you/miniature-wp", "license": "apache-2.0", "dry_run": True},
    }
    path = out / "pipeline.yaml"
    text = f"# What `make demo` runs after training: wp-run {path} --allow-code-execution\n"
    write_text(path, text + yaml.safe_dump(content, sort_keys=False, width=110))
    pipeline = read_pipeline(path)
    write_derived(pipeline)
    return pipeline


def demo_steps(pipeline: Pipeline, choice: WorldChoice) -> list[Step]:
    """Every step of the demo, in order; paths as the user wrote them."""
    out, module = pipeline.out, ("python", "-m")
    train = (*module, "experiments.demo.world_choice", str(out / "world"), *choice.flags())
    steps = [_of_the_demo(step, choice) for step in pipeline_steps(pipeline, allow_code=True)]
    return [
        Step("world", "world", "Train the base and three experts", train, (), (out / "world",), ("miniature",)),
        *steps,
    ]


def _of_the_demo(step: Step, choice: WorldChoice) -> Step:
    """Grading depends on the miniature's own graders too; the report has a lead of its own, and shows the training."""
    if step.stage == "evaluate":
        return replace(step, code=(*step.code, "miniature"))
    if step.stage == "report":
        command = ("python", "-m", "experiments.demo.build_report", str(step.outputs[0].parent), *choice.flags())
        return replace(step, command=command, code=(*step.code, "demo"))
    return step
