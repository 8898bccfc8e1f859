"""Writes the recipes of `recipes/` from its table.yaml: `make recipes`, or `python experiments/write_recipes.py
[FOLDER]`.

13b-COMBINATION.yaml is the merge by scores (wp), 13b-COMBINATION-METHOD.yaml the same experts by another method.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
Table = dict[str, Any]

_COMMAND = "python -c \"from transformers import *; {}.from_pretrained('NAME'{}).save_pretrained('FOLDER')\""
_CONVERT = f"""
A model is a Hub name or a local folder. Only safetensors are read: convert a checkpoint of pickled .bin files
once, and write the FOLDER {{here}} instead of the NAME:
     {_COMMAND.format("AutoModelForCausalLM", ", dtype='auto'")}
     {_COMMAND.format("AutoTokenizer", "")}
"""
_MERGE = """
{look}. Look before you merge: {what}. Writes nothing.
     wp-merge {recipe} {out} --dry-run
{merge}. Merge{place}, with mergekit's own command or with ours, which also audits
   the result. Either needs 26 GB of disk for the output; add --cuda to do the arithmetic on a GPU.
     mergekit-yaml {recipe} {out}{options}
     wp-merge      {recipe} {out}{options}
"""


def main(folder: Path) -> None:
    """Write every recipe into `folder`, which must exist."""
    for name, text in recipes(read_table()).items():
        (folder / name).write_text(text, encoding="utf-8")


def read_table() -> Table:
    table: Table = yaml.safe_load((RECIPES / "table.yaml").read_text(encoding="utf-8"))
    return table


def recipes(table: Table) -> dict[str, str]:
    """File name to text of all recipes of the table."""
    return {
        file_name(combination, method): _comment(table, combination, method)
        + "\n"
        + _recipe(table, combination, method)
        for combination in table["combinations"]
        for method in table["methods"]
    }


def file_name(combination: str, method: str) -> str:
    """The recipe's file; Weight Patching is what this package is about, so it goes without a suffix."""
    return f"13b-{combination}.yaml" if method == "wp" else f"13b-{combination}-{method}.yaml"


def _comment(table: Table, combination: str, method: str) -> str:
    """What the merge is, why its parameters are what they are, and the commands."""
    settings, members = table["methods"][method], table["combinations"][combination]
    name, jobs = file_name(combination, method), [table["experts"][member]["job"] for member in members]
    title = f"Llama-2-13B: {' + '.join(members)}, by {settings['title']}. One of the 28 merges of the Weight Patching"
    lines = [title, "paper (arXiv 2604.13694), Table 3. Written by `make recipes` from table.yaml: change that.", ""]
    if "why" in settings:
        lines += [*textwrap.wrap(settings["why"], 116), ""]
    if method == "wp":
        lines.append("1. Score each expert, once; the score files serve every recipe here:")
        lines += [f"     wp-score scoring/{job}.yaml --out scores/{job}.safetensors" for job in jobs]
    steps = _MERGE.format(
        look=2 if method == "wp" else 1,
        merge=3 if method == "wp" else 2,
        what="all checks, and each expert's share of each layer" if method == "wp" else "all checks",
        place=", from the folder that holds scores/" if method == "wp" else "",
        recipe=f"recipes/{name}",
        out=f"merged/{name.removesuffix('.yaml')}",
        options=" --random-seed 0" if settings.get("random") else "",
    )
    lines += [*steps.strip("\n").split("\n")]
    lines += _CONVERT.format(here="here and in its scoring job" if method == "wp" else "here").rstrip("\n").split("\n")
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _recipe(table: Table, combination: str, method: str) -> str:
    """The recipe itself, as text, for the sake of its comments."""
    settings = table["methods"][method]
    lines = [f"merge_method: {method}", f"base_model: {table['base']}", "models:"]
    for member in table["combinations"][combination]:
        expert = table["experts"][member]
        own = {"scores": f"scores/{expert['job']}.safetensors"} if method == "wp" else settings.get("expert", {})
        lines += [f"  - model: {expert['model']}  # {expert['what']}", *_parameters(own, "    ")]
    if "base" in settings:
        lines += [f"  - model: {table['base']}", *_parameters(settings["base"], "    ")]
    lines += _parameters(settings.get("shared", {}), "")
    if not settings.get("ours"):
        lines.append("tokenizer: {source: base}  # experts with added tokens are brought to the base's 32,000 rows")
        lines.append("dtype: float32  # of the arithmetic; without it, differences would be rounded to 16 bits")
    kept = "rounded once to this; leave it out to keep the base's dtype"
    lines.append(f"out_dtype: {table['out_dtype']}" + (f"  # sums are float32, {kept}" if settings.get("ours") else ""))
    if method == "wp":
        lines.append("# parameters:")
        lines.append("#   allow_mismatch: true  # accept scores that were made for other copies of these models")
    return "\n".join(lines) + "\n"


def _parameters(values: dict[str, Any], indent: str) -> list[str]:
    if not values:
        return []
    rows = yaml.safe_dump(values, sort_keys=False).rstrip("\n").split("\n")
    return [f"{indent}parameters:", *(f"{indent}  {row}" for row in rows)]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RECIPES)
