"""wp-push: a merge, its recipe, its score files and its results to a model repository on the Hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from mergekit_wp import __version__
from mergekit_wp.console import GroupedCommand, quiet_option, say_nothing
from mergekit_wp.errors import BadInput
from mergekit_wp.foreign import echo, echo_lines
from mergekit_wp.outputs import claim, refuse_inputs

_EPILOG = """\b
Examples:
  wp-push merged/im alice/llama-2-13b-im --results runs/eval --dry-run
  wp-push merged/im alice/llama-2-13b-im --results runs/eval --private
  wp-push scores alice/llama-2-13b-scores --scores-only
  wp-push merged/im alice/im --parent ./wizardlm-13b=WizardLMTeam/WizardLM-13B-V1.2 --license llama2

The token comes from `hf auth login` or HF_TOKEN. A push that was cut off goes on when it is run again.
"""


@click.command(
    "wp-push",
    cls=GroupedCommand,
    groups={
        "What is published": ("results", "recipe", "parents", "licence", "licence_name", "licence_link", "scores_only"),
        "How": ("private", "dry_run"),
    },
    epilog=_EPILOG,
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="USER/NAME")
@click.option(
    "--results", multiple=True, type=click.Path(path_type=Path), metavar="DIR", help="Output folder of wp-eval."
)
@click.option(
    "--recipe", type=click.Path(path_type=Path), metavar="YAML", help="The recipe, where it is not in FOLDER."
)
@click.option(
    "--parent",
    "parents",
    multiple=True,
    metavar="FOLDER=USER/NAME",
    help="The Hub name of a parent that the recipe has as a folder.",
)
@click.option(
    "--license",
    "licence",
    metavar="ID",
    help="Licence of the merge (apache-2.0, llama2, ...), if you answer for it where the parents' do not tell.",
)
@click.option("--license-name", "licence_name", metavar="NAME", help="Name of the terms, with --license other.")
@click.option(
    "--license-link", "licence_link", metavar="URL", help="Where those terms are; default: as a parent has it."
)
@click.option("--scores-only", is_flag=True, help="FOLDER is a score file, or a folder of them: publish these alone.")
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.option("--dry-run", is_flag=True, help="Write the card, list every file; leave the network alone.")
@quiet_option("Print errors and the address alone.")
@click.version_option(__version__)
def main(
    folder: Path,
    repo_id: str,
    results: tuple[Path, ...],
    recipe: Path | None,
    parents: tuple[str, ...],
    licence: str | None,
    licence_name: str | None,
    licence_link: str | None,
    scores_only: bool,
    private: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Publish the merge in FOLDER as the model USER/NAME, with a card that says how it was made and measured.

    With --scores-only, score files are published without a model, in a repository of their own.

    Nothing is published that wp-merge's audit did not pass; a folder without its certificate is audited first. What is
    added to the model is written to FOLDER.push; FOLDER itself stays as it is.
    """
    if dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
    from mergekit_wp.push.publish import Request, prepare, publish
    from mergekit_wp.push.scores_only import prepare_scores
    from mergekit_wp.push.stage import stage_of

    check_name(repo_id)
    refuse_inputs(stage_of(folder), [*results, *([recipe] if recipe else [])])
    claim(stage_of(folder))
    request = Request(folder, repo_id, results, recipe, parents, licence, licence_name, licence_link)
    make, what = (prepare_scores, "the scores") if scores_only else (prepare, "the merge")
    say = say_nothing if quiet else echo
    if dry_run:
        publication = make(request, None, say)
        if quiet:
            return
        echo_lines(publication.listing())
        echo(f"the card is {publication.card}; nothing was sent. Without --dry-run, this would be {repo_id}.")
        return
    echo(publish(request, private, sys.stderr.isatty() and not quiet, say, make, what))


def check_name(repo_id: str) -> None:
    """Whether a repository can have this name. Raises `BadInput`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        named = repo_id.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise BadInput(f"{repo_id}: expected USER/NAME, in letters, digits, `-`, `_` and `.`, such as alice/my-merge.")


if __name__ == "__main__":
    main()
