"""What is known about a few licences, and which one a merge of models under several may carry.

`LICENCE_IDS` are those that the Hub knows; of all others it takes `other` with a name and a link. Source:
https://huggingface.co/docs/hub/repositories-licenses (huggingface/hub-docs, docs/hub/repositories-licenses.md), as of
22 August 2026, in its order, without `unknown`, which is no licence to publish under, and without `other`.

This is bookkeeping, not legal advice: it knows a short list of licence ids, stops at everything else, and whoever
publishes decides. The ids are the Hub's (https://huggingface.co/docs/hub/repositories-licenses).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from mergekit_wp.errors import BadInput

OTHER = "other"
_IDS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
grok2-community gemma
"""
LICENCE_IDS = tuple(_IDS.split())


# Of these, the one with the most conditions names a merge of several; the others' notices go with it.
_PERMISSIVE = ("cc0-1.0", "unlicense", "mit", "isc", "bsd-2-clause", "bsd-3-clause", "apache-2.0")

_KEEP_NOTICE = "keep its copyright notice and licence text"
_META = "pass on a copy of the agreement and Meta's notice, and follow its acceptable use policy"
_NAMED = "show “Built with {0}”, begin the model's name with “{1}”, " + _META

# What each asks of who redistributes a changed copy, in short; the text of the licence is what counts.
# Sources: choosealicense.com (software licences); creativecommons.org/licenses (deed and section 3 of each);
# section 1.b of Meta's agreements (github.com/meta-llama/llama, llama-models); ai.google.dev/gemma/terms, section 3.1.
NEEDS: dict[str, str] = {
    "cc0-1.0": "nothing",
    "unlicense": "nothing",
    "mit": _KEEP_NOTICE,
    "isc": _KEEP_NOTICE,
    "bsd-2-clause": _KEEP_NOTICE,
    "bsd-3-clause": _KEEP_NOTICE,
    "apache-2.0": "keep licence and NOTICE, and say what was changed",
    "gpl-3.0": "pass it on under the same licence",
    "agpl-3.0": "pass it on under the same licence",
    "cc-by-4.0": "name the authors and say what was changed",
    "cc-by-sa-4.0": "name the authors, say what was changed, pass it on under the same licence",
    "cc-by-nc-4.0": "not for commercial use; name the authors and say what was changed",
    "cc-by-nc-sa-4.0": "not for commercial use; name the authors, pass it on under the same licence",
    "llama2": _META,
    "llama3": _NAMED.format("Meta Llama 3", "Llama 3"),
    "llama3.1": _NAMED.format("Llama", "Llama"),
    "llama3.2": _NAMED.format("Llama", "Llama"),
    "llama3.3": _NAMED.format("Llama", "Llama"),
    "gemma": "pass on the Gemma Terms of Use with their notice and use restrictions, and say what was changed",
}
_FORBIDS = ("cc-by-nd-4.0", "cc-by-nc-nd-4.0")  # no redistribution of changed copies
_NAME_BEGINS = {"llama3": "llama-3", "llama3.1": "llama", "llama3.2": "llama", "llama3.3": "llama"}
NOTICES: dict[str, str] = {
    "llama2": "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
    "Reserved.",
    "llama3": "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All "
    "Rights Reserved.",
    "llama3.1": "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All "
    "Rights Reserved.",
    "llama3.2": "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc. All "
    "Rights Reserved.",
    "llama3.3": "Llama 3.3 is licensed under the Llama 3.3 Community License, Copyright © Meta Platforms, Inc. All "
    "Rights Reserved.",
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
}


@dataclass(frozen=True)
class Licence:
    """A parent's licence as its card states it: no `ids` if it states none, `where` the card was found or not.

    Of several ids, all count: the card does not say whether they hold together or one of choice. `name` and `link`
    are the card's `license_name` and `license_link`, the terms behind `other`.
    """

    ids: tuple[str, ...]
    where: str
    gated: bool = False
    name: str | None = None
    link: str | None = None

    @property
    def text(self) -> str:
        """The licence for a person; empty if none is known."""
        terms = ", ".join(filter(None, (self.name, self.link)))
        return " and ".join(self.ids) + (f" ({terms})" if self.ids and terms else "")


@dataclass(frozen=True)
class Decision:
    """The merge's licence, or why none can be told."""

    id: str | None
    trouble: str = ""


def decide(parents: Sequence[tuple[str, Licence]]) -> Decision:
    """The licence that a merge of these (name, licence) may carry, by what this list knows.

    Permissive ones yield to the one that is not; two different ones that are not permissive disagree.
    """
    troubles: dict[str, list[str]] = {}
    for name, licence in parents:
        if trouble := _trouble(licence):
            troubles.setdefault(trouble, []).append(name)
    if troubles:
        return Decision(None, "; ".join(f"{', '.join(names)} {trouble}" for trouble, names in troubles.items()))
    ids = {name for _, licence in parents for name in licence.ids}
    others = sorted(ids - set(_PERMISSIVE))
    if len(others) > 1:
        listed = "; ".join(f"{name} under {licence.text}" for name, licence in parents)
        return Decision(None, f"the parents' licences disagree ({listed})")
    return Decision(others[0] if others else max(ids, key=_PERMISSIVE.index))


def _trouble(licence: Licence) -> str:
    if not licence.ids:
        return f"without a known licence ({licence.where})"
    if any(name in _FORBIDS for name in licence.ids):
        return f"under {licence.text}, which forbids passing on changed copies"
    if any(name not in NEEDS for name in licence.ids):
        return f"under {licence.text}, of which wp-push knows nothing"
    return ""


@dataclass(frozen=True)
class Terms:
    """What the card says the merge is published under: an id of the Hub's list; for `other`, its name and link."""

    id: str
    name: str | None = None
    link: str | None = None


def chosen(id: str, name: str | None, link: str | None, parents: Sequence[Licence]) -> Terms:
    """The terms that the command line asks for; of `other`, name and link are the parents' where they agree.

    Raises `BadInput` for an id that the Hub does not know, for `other` without a name, and for a name without `other`.
    """
    if id not in (*LICENCE_IDS, OTHER):
        near = get_close_matches(id.lower(), LICENCE_IDS, n=3)
        raise BadInput(
            f"--license {id}: no id of the Hub's list (https://huggingface.co/docs/hub/repositories-licenses); "
            + (f"is it {' or '.join(near)}? " if near else "")
            + "Terms that are not on it are `other`, with --license-name and --license-link."
        )
    if id != OTHER:
        if name or link:
            raise BadInput(f"--license-name and --license-link go with --license other, found --license {id}.")
        return Terms(id)
    stated = {(licence.name, licence.link) for licence in parents if OTHER in licence.ids and licence.name}
    if name is None and len(stated) == 1:
        name, known = next(iter(stated))
        link = link or known
    if not name:
        found = (
            f"the parents name {' and '.join(sorted(str(own) for own, _ in stated))}" if stated else "no parent has any"
        )
        raise BadInput(f"--license other: its terms need a name, and {found}; add --license-name and --license-link.")
    return Terms(OTHER, name, link)


def name_trouble(licence: str, name: str) -> str:
    """What a licence's rule for names says against `name`; empty if nothing."""
    begins = _NAME_BEGINS.get(licence)
    if begins is None or name.lower().replace("_", "-").replace(" ", "-").startswith(begins):
        return ""
    return f"{licence} asks that the model's name begin with {begins.title()}; this one is called {name}"
