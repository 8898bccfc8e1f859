"""wp-push --scores-only: score files without a model, in a small repository of their own, which `read_scores` reads.

The files are checked as for a merge, folders of this machine are taken out of their metadata, and the last look for
secrets is the same. A repository that holds anything else (a model, say) is left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_wp.errors import BadInput
from mergekit_wp.files import write_text
from mergekit_wp.foreign import code, markdown
from mergekit_wp.hashing import FileDigests
from mergekit_wp.push import stage as staging
from mergekit_wp.push.card import scores_section
from mergekit_wp.push.licences import Terms, chosen
from mergekit_wp.push.names import Names
from mergekit_wp.push.parents import Parent, find_parents
from mergekit_wp.push.publish import Publication, Request, Say, say_secrets
from mergekit_wp.push.retry import retry
from mergekit_wp.push.upload import UploadFile
from mergekit_wp.scores import ModelId, ScoreMeta, read_scores

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_OURS = re.compile(r"README\.md|\.gitattributes|wp/scores/[^/]+\.safetensors")


def prepare_scores(request: Request, api: HfApi | None, say: Say) -> Publication:
    """Check the score files and write what goes to the Hub into FOLDER.push. api: None leaves the network alone.

    Raises `BadInput` for what is no score file, for options of a model, and for a repository that holds something else.
    """
    if request.results or request.recipe:
        raise BadInput("--results and --recipe speak of a merge; leave them out with --scores-only.")
    files = {str(path): path for path in _score_files(request.folder)}
    metas = {name: read_scores(path).meta for name, path in files.items()}
    if api is not None:
        _check_repository(api, request.repo_id)
    named = [(meta.base, meta.expert, *(meta.at.experts if meta.at else ())) for meta in metas.values()]
    models = [_reference(model) for group in named for model in group]
    parents = find_parents({"models": [{"model": model} for model in dict.fromkeys(models)]}, request.parents)
    stage, placed = staging.open_stage(request.folder), staging.place(files)
    names = Names(request.folder, request.repo_id, parents, placed)
    staging.stage_files(stage, files, placed, names)
    public = [(target, read_scores(stage / target).meta) for target in placed.values()]
    write_text(stage / "README.md", _card(request.repo_id, public, parents, _terms(request)))
    digests = FileDigests(stage / staging.DIGESTS, say)
    sources = {"README.md": stage / "README.md", **{target: stage / target for target in placed.values()}}
    items = _items(sources, digests(list(sources.values())))
    say_secrets(items, say)
    return Publication(items, (), stage / "README.md")


def _score_files(path: Path) -> list[Path]:
    """The file itself, or every .safetensors of the folder."""
    if os.path.isfile(path):
        return [path]
    found = sorted(path.glob("*.safetensors")) if os.path.isdir(path) else []
    if not found:
        raise BadInput(f"{path}: no score file, nor a folder with one; name what wp-score wrote.")
    return found


def _reference(model: ModelId) -> str:
    return f"{model.name}@{model.revision}" if model.revision else model.name


def _items(sources: Mapping[str, Path], digests: Mapping[Path, str]) -> list[UploadFile]:
    return [UploadFile(name, path, path.stat().st_size, digests[path]) for name, path in sorted(sources.items())]


def _check_repository(api: HfApi, repo_id: str) -> None:
    """Raise `BadInput` for a repository that holds anything but scores: its card would be replaced."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = retry(lambda: api.list_repo_files(repo_id))
    except RepositoryNotFoundError:
        return
    if other := [name for name in there if not _OURS.fullmatch(name)]:
        raise BadInput(
            f"{repo_id}: holds more than scores ({other[0]}), and --scores-only would replace its card; name a "
            "repository of their own."
        )


def _terms(request: Request) -> Terms | None:
    if request.licence is not None:
        return chosen(request.licence, request.licence_name, request.licence_link, ())
    if request.licence_name or request.licence_link:
        raise BadInput("--license-name and --license-link go with --license other; add it, or leave them out.")
    return None


def _card(repo_id: str, scores: Sequence[tuple[str, ScoreMeta]], parents: Sequence[Parent], terms: Terms | None) -> str:
    """The README.md: which files, of which models, and how to read them."""
    from huggingface_hub import ModelCard, ModelCardData

    linked = {parent.shown: f"[{parent.hub}](https://huggingface.co/{parent.hub})" for parent in parents if parent.hub}
    more: dict[str, Any] = {}
    if terms is not None:
        stated = {"license": terms.id, "license_name": terms.name, "license_link": terms.link}
        more = {key: value for key, value in stated.items() if value}
    data = ModelCardData(tags=["weight-patching", "interpretability"], **more)
    pairs = dict.fromkeys((meta.expert.name, meta.base.name) for _, meta in scores)
    of = [f"{linked.get(expert, code(expert))} against {linked.get(base, code(base))}" for expert, base in pairs]
    listed = "\n".join(f"- {text}" for text in of)
    first = scores[0][0]
    name = repo_id if len(scores) == 1 else f"hf://{repo_id}/{first}"
    body = f"""# {markdown(repo_id.partition("/")[2])}

Weight Patching scores ([arXiv 2604.13694](https://arxiv.org/abs/2604.13694)) of every head and neuron, made by
mergekit-wp. No model is in this repository. Scores of:

{listed}

{scores_section(scores)}

## Use

```python
from mergekit_wp import read_scores

scores = read_scores("{name}")
scores.top(10)
```

A merge takes them as `scores:` of the expert, once downloaded; it checks by fingerprint that they are of these
models."""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))
