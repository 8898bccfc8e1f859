"""Models on the Hub: of a repository only the files of the model are downloaded, and every refusal is one sentence.

The model's files are its config, those of its tokenizer, and the weights that `weights` reads: not other formats'
copies of the weights (consolidated, original/, .bin), nor a training run's checkpoints. Without a network the Hub's
cache on this machine serves, if all of them are there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import Any

from mergekit_wp.checkpoint.references import Source, is_hub_name, read_reference
from mergekit_wp.checkpoint.weights import ADAPTER, ADAPTER_CONFIG, INDEX_SUFFIX, MODEL, SUFFIX, read_index, two_sets
from mergekit_wp.errors import BadInput
from mergekit_wp.files import disk_trouble

CHAT_TEMPLATES = "additional_chat_templates"
"""The folder in a model's where a tokenizer has chat templates beside its default one (`tool_use.jinja`)."""
# What transformers' AutoTokenizer looks for.
_TOKENIZER = re.compile(
    r"tokenizer(?:_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(?:json|txt)|merges\.txt"
    r"|normalizer\.json|chat_template\.json|tekken\.json|[^/]+\.(?:jinja|tiktoken|model)"
    rf"|{CHAT_TEMPLATES}/[^/]+\.jinja"
)
# And AutoConfig, GenerationConfig, processors, vLLM; a score file is an expert's own (see merge.shares).
_OTHERS = re.compile(
    r"config\.json|generation_config\.json|adapter_config\.json|quantize_config\.json|hf_quant_config\.json"
    r"|(?:pre)?processor_config\.json|wp/scores\.safetensors"
)


BESIDE = "wp/scores.safetensors"
"""Where in an expert's folder, or repository, its score file is looked for.

Not at the top of it: vLLM takes every .safetensors there for weights.
"""
_SCORES = re.compile(r"wp/scores/[^/]+\.safetensors")


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model's folder, by its path there, is the tokenizer's (chat templates included)."""
    return _TOKENIZER.fullmatch(name) is not None


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a model's folder."""
    found = sorted([*folder.iterdir(), *(folder / CHAT_TEMPLATES).glob("*.jinja")])
    return [path for path in found if is_tokenizer_file(path.relative_to(folder).as_posix()) and path.is_file()]


def download(source: Source, cache: str | None = None) -> Path:
    """The snapshot of a model on the Hub. cache: the folder of the Hub's cache, None for the usual one.

    Asked for again in one run, it is the same snapshot. Raises `BadInput`.
    """
    from huggingface_hub import constants

    return _download(source, cache or constants.HF_HUB_CACHE, constants.ENDPOINT, constants.HF_HUB_OFFLINE)


def folder_of(source: Source) -> Path:
    """Where a model's files lie: a folder as it is, a Hub name as its snapshot in the cache; the name where that is
    not."""
    if source.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        for file in ("config.json", "adapter_config.json"):
            found = try_to_load_from_cache(source.path, file, revision=source.revision)
            if isinstance(found, str):
                return Path(found).parent
    return Path(str(source))


def score_file(name: str) -> Path:
    """The score file that a name means; one on the Hub is downloaded.

        FILE                              of this machine; what is there always comes first
        hf://USER/NAME[@REVISION]/FILE    this file of a repository
        USER/NAME[@REVISION]              of a repository (hf://USER/NAME as well) `wp/scores.safetensors`, else the
                                          only file in `wp/scores`
    Raises `BadInput` for what is not there, and for a repository with several.
    """
    hub = name.removeprefix("hf://")
    if os.path.lexists(name) or (hub == name and (name.endswith(SUFFIX) or not is_hub_name(name))):
        return Path(name)
    owner, _, rest = hub.partition("/")
    repository, _, file = rest.partition("/")
    source = read_reference(f"{owner}/{repository}").model
    if source.kind != "hub":
        raise BadInput(f"{name}: expected hf://USER/NAME or hf://USER/NAME/FILE.safetensors.")
    from huggingface_hub import constants

    return _score_file(source, file, constants.HF_HUB_CACHE, constants.ENDPOINT)


def _score_file(source: Source, file: str, cache: str, endpoint: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    at: dict[str, Any] = {"revision": source.revision, "cache_dir": cache, "endpoint": endpoint}
    try:
        if not file:
            api = HfApi(endpoint=endpoint, library_name="mergekit-wp")
            file = _only_scores(source, api.list_repo_files(source.path, revision=source.revision))
        return Path(hf_hub_download(source.path, file, **at))
    except BadInput:
        raise
    except Exception as error:  # the Hub's client and its HTTP library raise many types
        unreached = isinstance(error, LocalEntryNotFoundError)
        if isinstance(error, EntryNotFoundError) and not unreached:
            raise BadInput(f"{source}: the repository has no file {file}; mend the name.") from error
        reached = error.__cause__ if unreached and isinstance(error.__cause__, Exception) else error
        try:  # what an earlier run has brought
            folder = Path(snapshot_download(source.path, local_files_only=True, **at))
        except Exception:
            raise explain(source, reached, endpoint) from error
        there = [str(path.relative_to(folder)) for path in folder.glob("wp/**/*.safetensors")]
        found = folder / (file or _only_scores(source, there))
        if not found.is_file():
            raise explain(source, reached, endpoint) from error
        return found


def _only_scores(source: Source, names: Iterable[str]) -> str:
    """The score file that a repository stands for. Raises `BadInput` where there is none, or several."""
    names = sorted(names)
    found = [name for name in names if name == BESIDE] or [name for name in names if _SCORES.fullmatch(name)]
    if len(found) != 1:
        several = f"has the score files {', '.join(found)}; name one, as hf://{source}/FILE"
        raise BadInput(
            f"{source}: {several if found else f'has no score file, neither {BESIDE} nor one in wp/scores'}."
        )
    return found[0]


def model_files(names: Iterable[str], read_shards: Callable[[], Iterable[str]]) -> list[str]:
    """Which of a repository's files are the model's; `read_shards` reads its index.

    Raises `BadInput` (a clause) when it has two sets of weights, or none in safetensors.
    """
    names = list(names)
    wanted = [name for name in names if is_tokenizer_file(name) or _OTHERS.fullmatch(name)]
    single, index, adapter = f"{MODEL}{SUFFIX}", f"{MODEL}{INDEX_SUFFIX}", f"{ADAPTER}{SUFFIX}"
    if index in names:
        shards = sorted(set(read_shards()))
        if single in names and shards != [single]:
            raise BadInput(two_sets(single, index, shards, names))
        return [*wanted, index, *shards]
    if single in names:
        return [*wanted, single]
    if ADAPTER_CONFIG in names:
        return [*wanted, *([adapter] if adapter in names else [])]
    if any(name.endswith(".bin") for name in names):
        raise BadInput("holds pickled .bin weights only, which are never opened; look for one with safetensors.")
    raise BadInput(f"has neither {single} nor {index}; it is no model for transformers.")


@lru_cache(maxsize=64)
def _download(source: Source, cache: str, endpoint: str, offline: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    at: dict[str, Any] = {"revision": source.revision, "cache_dir": cache, "endpoint": endpoint}

    def shards() -> Iterable[str]:
        return read_index(Path(hf_hub_download(source.path, f"{MODEL}{INDEX_SUFFIX}", **at))).values()

    try:
        names = HfApi(endpoint=endpoint, library_name="mergekit-wp").list_repo_files(
            source.path, revision=source.revision
        )
        wanted = [escape(name) for name in model_files(names, shards)]
        return Path(snapshot_download(source.path, allow_patterns=wanted, **at))
    except BadInput as error:
        raise BadInput(f"{source}: {error.message}") from error
    except RevisionNotFoundError as error:
        raise explain(source, error, endpoint) from error
    except Exception as error:  # the Hub's client and its HTTP library raise many types
        if trouble := disk_trouble(error):
            raise BadInput(
                f"{source}: cannot be written to the Hub's cache {cache} ({trouble}); make room there, or set HF_HOME."
            ) from error
        if (cached := _cached(source, cache)) is None:
            raise explain(source, error, endpoint) from error
        if missing := _missing(cached):
            raise BadInput(
                f"{source}: the Hub's cache on this machine holds it without {missing}, and {_why(error, offline)}; "
                f"download the rest while online (`hf download {source.path}`)."
            ) from error
        return cached


def _cached(source: Source, cache: str) -> Path | None:
    """The model's snapshot in the cache, complete or not."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", ADAPTER_CONFIG):
        found = try_to_load_from_cache(source.path, name, cache_dir=cache, revision=source.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _missing(folder: Path) -> str:
    """The weight files that an incomplete snapshot lacks; empty when it has them, or has none to read."""
    stem = MODEL if (folder / "config.json").is_file() else ADAPTER
    if any(os.path.isfile(folder / name) for name in (f"{stem}{SUFFIX}", "pytorch_model.bin", f"{ADAPTER}{SUFFIX}")):
        return ""
    index = folder / f"{stem}{INDEX_SUFFIX}"
    if not index.is_file():
        return f"{stem}{SUFFIX}"
    return ", ".join(sorted(name for name in set(read_index(index).values()) if not os.path.isfile(folder / name)))


def _why(error: Exception, offline: bool) -> str:
    return "HF_HUB_OFFLINE is set" if offline else f"the Hub does not give it now ({reason(error)})"


def explain(source: Source, error: Exception, endpoint: str) -> BadInput:
    """One sentence for whatever the Hub's client raised about a model."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    here = f"{source}: no such folder here"
    if isinstance(error, OfflineModeIsEnabled):
        return BadInput(
            f"{here}, nor is it in the Hub's cache, and HF_HUB_OFFLINE is set; download it while online "
            f"(`hf download {source.path}`)."
        )
    if isinstance(error, GatedRepoError):
        return BadInput(
            f"{source}: gated, and this account has no access to it; ask for it at {endpoint}/{source.path} and log in "
            "with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return BadInput(f"{source}: the Hub has the model, but no revision {source.revision} of it; mend the revision.")
    if isinstance(error, RepositoryNotFoundError):
        return BadInput(
            f"{here}, and the Hub has no model of this name that this account can see; mend the name, or log in with "
            "`hf auth login`."
        )
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return BadInput(
            f"{here}, and the Hub answered {error.response.status_code} ({reason(error)}); try again later."
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return BadInput(
            f"{source}: it cannot be written to the Hub's cache ({error}); make room there, or set HF_HOME."
        )
    return BadInput(
        f"{here}, nor is it in the Hub's cache on this machine, and the Hub did not give it ({reason(error)})."
    )


def reason(error: Exception) -> str:
    """What an error of the Hub's client says, with its type and without a secret."""
    return f"{type(error).__name__}: {clean(str(error))[:200]}"


def clean(text: str) -> str:
    """`text` in one line, without the token and without the signatures of upload addresses."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "<token>")
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "<token>", text)
    text = re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]+", r"\1?...", text)
    return " ".join(text.split())[:400]
