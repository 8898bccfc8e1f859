"""Looking ahead: what would stop a later stage is said before the first one starts, or is planned.

Each step is checked by its own stage's means: its command line is parsed by the command that it names, and then come
the checks that this command makes before it loads weights. What an earlier step is still to write is left out, and
so is what would have to be downloaded; once that is here, the same is asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click

from mergekit_wp.checkpoint.references import read_reference, recipe_models
from mergekit_wp.errors import BadInput
from mergekit_wp.execute import Step
from mergekit_wp.files import read_yaml_mapping


@dataclass(frozen=True)
class Ahead:
    """What is known while nothing has run.

    texts: files that are written before a run, as they will be; made: what steps that are due will write;
    absent: models that would have to be downloaded; network: whether the Hub may be asked
    """

    texts: Mapping[Path, str]
    made: frozenset[Path]
    absent: frozenset[str]
    network: bool

    def mapping(self, path: Path, what: str) -> dict[str, Any]:
        """A YAML that is there, or will be."""
        return read_yaml_mapping(path, what, self.texts.get(path))

    def at_hand(self, *models: str) -> bool:
        """Whether these models can be looked into now; a misspelt folder can, and is then refused."""
        return not any(model in self.absent or Path(model) in self.made for model in models)


def troubles_of(steps: Sequence[Step], ahead: Ahead) -> list[str]:
    """What would stop these steps, a sentence each with the pipeline's field before it; the first of every step."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # each step will say what it has to
    troubles: list[str] = []
    for step in steps:
        try:
            with _one_sentence(step):
                _CHECKS[step.stage](step, ahead)
        except BadInput as error:
            troubles.append(error.message)
    return list(dict.fromkeys(troubles))  # flags are those of every step of a stage


def _score(step: Step, ahead: Ahead) -> None:
    from mergekit_wp.scoring.cli import main
    from mergekit_wp.scoring.config import ScoringJob
    from mergekit_wp.scoring.score import pairs_of, prepare

    typed = _typed(main, step)
    given = {item.name: typed[item.name] for item in fields(ScoringJob) if typed.get(item.name) is not None}
    job = ScoringJob.from_mapping({**ahead.mapping(Path(typed["job_file"]), "scoring job"), **given}, where="")
    merged = [] if job.at is None else recipe_models(ahead.mapping(Path(job.at), "recipe"))
    sources = [source for model in (read_reference(job.expert), *merged) for source in model.sources]
    if ahead.at_hand(job.base, *map(str, sources)):
        prepare(job)
    else:
        pairs_of(job)


def _fit(step: Step, ahead: Ahead) -> None:
    from mergekit_wp.fit.cli import main
    from mergekit_wp.fit.job import FitJob
    from mergekit_wp.scoring.score import pairs_of, prepare

    typed = _typed(main, step)
    given = {item.name: typed[item.name] for item in fields(FitJob) if typed.get(item.name) is not None}
    job = FitJob.from_mapping({**ahead.mapping(Path(typed["job_file"]), "fit job"), **given}, where="")
    for expert in job.models:
        scoring = job.scoring(expert)
        if ahead.at_hand(job.base, *map(str, read_reference(expert.expert).sources)):
            prepare(scoring)
        else:
            pairs_of(scoring)
    if job.keep is not None:
        pairs_of(job.keeping())


def _merge(step: Step, ahead: Ahead) -> None:
    from mergekit_wp.merge import register
    from mergekit_wp.merge.checks import check_plan, check_room
    from mergekit_wp.merge.cli import main
    from mergekit_wp.merge.mergekit_options import check_options, merge_options
    from mergekit_wp.merge.plan import meaning_of
    from mergekit_wp.merge.recipe import read_recipe

    typed = _typed(main, step)
    register()
    path, out = Path(typed["recipe"]), Path(typed["out_path"]).absolute()
    recipe = read_recipe(str(path), ahead.texts.get(path))
    models = [meaning_of(model) for model in recipe.config().referenced_models()]
    if not ahead.at_hand(*(str(source) for model in models for source in model.sources)):
        return
    options = merge_options(typed)
    check_options(options)
    recipe.prepare(options, merge_loras=False)
    known = recipe.without_scores(ahead.made)
    awaited = known.score_files() != recipe.score_files()
    plan = known.plan(out, options)
    if awaited:  # and what lies in an expert's own folder is not what will be used
        given = known.score_files()
        tensors = [replace(t, scores=tuple(p if p in given else "" for p in t.scores)) for t in plan.tensors]
        plan = replace(plan, tensors=tuple(tensors))
    check_plan(replace(plan, out=None), awaited=awaited)
    check_room(plan.nbytes(), out, touch=False)


def _evaluate(step: Step, ahead: Ahead) -> None:
    from transformers import AutoTokenizer

    from mergekit_wp.checkpoint.folder import Checkpoint, local_folder
    from mergekit_wp.eval.cli import check_asked, main
    from mergekit_wp.eval.models import tokenizer_folder
    from mergekit_wp.eval.preflight import check_has_template
    from mergekit_wp.eval.suite import read_suite

    typed = _typed(main, step)
    templated = [task.task for task in read_suite(typed["suite_file"]).tasks if task.apply_chat_template]
    for model in check_asked(typed).values():
        meaning = read_reference(model)
        if ahead.at_hand(*map(str, meaning.sources)):
            meaning.check()
            folder = Checkpoint.of(meaning.model).folder
            if templated:
                own = folder if meaning.lora is None else tokenizer_folder(folder, local_folder(meaning.lora))
                tokenizer = AutoTokenizer.from_pretrained(str(own), trust_remote_code=typed["trust_remote_code"])
                check_has_template(model, tokenizer, templated[0])


def _push(step: Step, ahead: Ahead) -> None:
    from mergekit_wp.push.cli import check_name, main
    from mergekit_wp.push.publish import Request, check_request

    typed = _typed(main, step)
    check_name(typed["repo_id"])
    licence = {name: typed[name] for name in ("licence", "licence_name", "licence_link")}
    request = Request(typed["folder"], typed["repo_id"], parents=typed["parents"], **licence)
    recipe = step.inputs[1]  # as wp-merge will be given it: the folder with its own is not there yet
    check_request(request, ahead.mapping(recipe, "recipe"), network=ahead.network and not typed["dry_run"])


_CHECKS: dict[str, Callable[[Step, Ahead], None]] = {
    "score": _score,
    "fit": _fit,
    "merge": _merge,
    "evaluate": _evaluate,
    "report": lambda _step, _ahead: None,  # it reads what the steps before it are checked for
    "push": _push,
}


def _typed(command: click.Command, step: Step) -> dict[str, Any]:
    """The arguments of a step as its command parses them. Raises what click does for those that it refuses."""
    name, *words = step.command
    with command.make_context(name, words) as context:
        return dict(context.params)


@contextmanager
def _one_sentence(step: Step) -> Iterator[None]:
    """What a check finds, with the field of the pipeline before it."""
    place = {"score": "experts", "fit": "merges", "merge": "merges"}.get(step.stage, step.stage)
    field = f"{place}.{step.name.partition('-')[2]}" if place != step.stage else place
    try:
        yield
    except click.UsageError as error:
        raise BadInput(f"`{step.stage}.flags`: {error.format_message()}") from error
    except click.exceptions.Exit as error:  # --help, --version
        raise BadInput(f"`{step.stage}.flags`: these flags end the command before it does anything.") from error
    except click.ClickException as error:
        raise BadInput(f"`{field}`: {error.format_message()}") from error
