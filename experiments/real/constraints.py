"""Following instructions: plain requests, ten of IFEval's constraints, and an answer rewritten so that it complies.

What is learnt is the base's own answer to the plain request, changed as little as the constraint asks for, so that an
expert learns to comply and not another style. A constraint is checked by lm-eval's own code for IFEval
(`mergekit_wp.scoring.anchor.graders`).
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from experiments.miniature.items import Item

# fmt: off
TOPICS = (
    "a lighthouse", "honey", "bicycles", "the moon", "bread", "a library", "rain", "chess", "volcanoes", "cats",
    "a compass", "tea", "maps", "the ocean", "apples", "trains", "a garden", "snow", "music", "bees",
    "a bridge", "salt", "owls", "the desert", "paper", "a telescope", "cheese", "rivers", "soap", "windmills",
    "a calendar", "penguins", "glass", "soccer", "the heart", "potatoes", "clocks", "a violin", "ants", "wool",
    "a passport", "coffee", "dolphins", "the sun", "rice", "a museum", "mirrors", "horses", "gold", "kites",
    "a dictionary", "spiders", "batteries", "swimming", "the post office", "oranges", "a thermometer", "wolves",
    "silk", "earthquakes", "a lantern", "turtles", "ice", "dancing", "the stomach", "tomatoes", "magnets", "a drum",
    "butterflies", "leather", "a farmer", "chocolate", "whales", "stars", "sleep", "bananas", "a school", "fire",
    "eagles", "cotton", "a dentist", "pepper", "frogs", "the wind", "painting", "carrots", "a ladder", "light",
    "elephants", "rubber", "a nurse", "sugar", "sharks", "mountains", "running", "onions", "a tent", "sound",
)
REQUESTS = (
    "Tell me about {}.", "Explain what people should know about {}.", "Describe {} to a child.",
    "Why is it worth learning about {}?", "Write a short note about {}.", "Give a beginner some facts about {}.",
)
_PHRASES = ("That is all.", "Have a nice day.", "I hope this helps.", "Ask me if you need more.")
_TITLES = ("A short answer", "What to know", "In a few words", "A note")
# fmt: on


@dataclass(frozen=True)
class Constraint:
    """One type of IFEval: its name there, several wordings ({n} a number, {end} a phrase), and how an answer complies.

    `arguments` draws what a wording and the checker take; `comply` changes a plain answer.
    """

    ifeval: str
    wordings: tuple[str, ...]
    comply: Callable[[str, Mapping[str, Any]], str]
    arguments: Callable[[random.Random], dict[str, Any]] = lambda _rng: {}


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def _highlight(text: str, arguments: Mapping[str, Any]) -> str:
    """The first n long words, each between stars."""
    left = arguments["num_highlights"]
    words = text.split(" ")
    for i, word in enumerate(words):
        if left and len(re.sub(r"\W", "", word)) > 4:
            words[i] = re.sub(r"[\w'-]+", lambda found: f"*{found.group()}*", word, count=1)
            left -= 1
    return " ".join(words)


def _parts(text: str, count: int) -> list[str]:
    """The text in so many parts, sentence by sentence; one with too few sentences is cut between words."""
    pieces = _sentences(text)
    if len(pieces) < count:
        pieces = text.split()
    edges = [round(i * len(pieces) / count) for i in range(count + 1)]
    return [" ".join(pieces[a:b]) for a, b in itertools.pairwise(edges)]


def _sections(text: str, arguments: Mapping[str, Any]) -> str:
    parts = _parts(text, arguments["num_sections"])
    return "\n".join(f"SECTION {i}\n{part}" for i, part in enumerate(parts, start=1))


def _bullets(text: str, arguments: Mapping[str, Any]) -> str:
    return "\n".join(f"* {part}" for part in _parts(text, arguments["num_bullets"]))


def _postscript(text: str, _arguments: Mapping[str, Any]) -> str:
    *before, last = _parts(text, 2)
    return f"{' '.join(before)}\n\nP.S. {last}"


def _few(name: str, low: int, high: int, **fixed: Any) -> Callable[[random.Random], dict[str, Any]]:
    return lambda rng: {**fixed, name: rng.randint(low, high)}


CONSTRAINTS: dict[str, Constraint] = {
    "english_capital": Constraint(
        "change_case:english_capital",
        ("Use capital letters only.", "Your entire response should be in all capital letters.",
         "Write the whole answer in upper case."),
        lambda text, _a: text.upper(),
    ),
    "english_lowercase": Constraint(
        "change_case:english_lowercase",
        ("Use lowercase letters only.", "No capital letters are allowed in your response.",
         "Write everything in lower case."),
        lambda text, _a: text.lower(),
    ),
    "no_comma": Constraint(
        "punctuation:no_comma",
        ("Do not use any commas.", "Refrain from the use of commas in your entire response.",
         "Your answer must not contain a comma."),
        lambda text, _a: text.replace(",", ""),
    ),
    "quotation": Constraint(
        "startend:quotation",
        ("Wrap your entire response with double quotation marks.", "Put the whole answer in double quotes.",
         "Begin and end your answer with a double quotation mark."),
        lambda text, _a: '"' + text.replace('"', "") + '"',
    ),
    "end_phrase": Constraint(
        "startend:end_checker",
        ('Finish your response with this exact phrase: "{end_phrase}"',
         'The very last words of your answer must be: "{end_phrase}"', 'End with the sentence "{end_phrase}"'),
        lambda text, a: f"{text} {a['end_phrase']}",
        lambda rng: {"end_phrase": rng.choice(_PHRASES)},
    ),
    "title": Constraint(
        "detectable_format:title",
        ("Add a title wrapped in double angular brackets, such as <<poem of joy>>.",
         "Your answer must contain a title in double angular brackets, i.e. <<title>>.",
         "Start with a title between << and >>."),
        lambda text, _a: f"<<{_TITLES[len(text) % len(_TITLES)]}>>\n\n{text}",
    ),
    "highlights": Constraint(
        "detectable_format:number_highlighted_sections",
        ("Highlight at least {num_highlights} words with markdown, i.e. *highlighted*.",
         "Put at least {num_highlights} words between stars, like *this*.",
         "Mark {num_highlights} or more important words with a * on both sides."),
        _highlight,
        _few("num_highlights", 1, 3),
    ),
    "sections": Constraint(
        "detectable_format:multiple_sections",
        ("Your response must have {num_sections} sections. Mark the beginning of each with SECTION X, such as "
         "SECTION 1.", "Split the answer into {num_sections} parts headed SECTION 1, SECTION 2 and so on.",
         "Use {num_sections} sections, each starting with the word SECTION and its number."),
        _sections,
        _few("num_sections", 2, 3, section_spliter="SECTION"),
    ),
    "bullets": Constraint(
        "detectable_format:number_bullet_lists",
        ("Your answer must contain exactly {num_bullets} bullet points. Use markdown, such as: * This is a point.",
         "Answer with exactly {num_bullets} bullets that begin with a star.",
         "Give a list of {num_bullets} points, each on a line that starts with *."),
        _bullets,
        _few("num_bullets", 2, 3),
    ),
    "postscript": Constraint(
        "detectable_content:postscript",
        ("At the end of your response, add a postscript starting with P.S.",
         "Please explicitly add a postscript that begins with P.S.", "Close with a P.S. of one sentence."),
        _postscript,
        lambda _rng: {"postscript_marker": "P.S."},
    ),
}  # fmt: skip


@cache
def plain_requests() -> tuple[str, ...]:
    """Every plain request, in one order for ever."""
    return tuple(request.format(topic) for topic in TOPICS for request in REQUESTS)


def topic_of(request: str) -> str:
    """What a plain request is about, which decides the split it is in: no topic is both trained on and tested with."""
    return max((topic for topic in TOPICS if topic in request), key=len)


def instructed(request: str, name: str, rng: random.Random, own_answer: str = "") -> Item:
    """A plain request with constraint `name`, its wording and numbers drawn.

    `own_answer` is what the base says to the plain request; only what is trained on needs it.
    """
    constraint = CONSTRAINTS[name]
    arguments = constraint.arguments(rng)
    asked = rng.choice(constraint.wordings).format(**arguments)
    right = constraint.comply(own_answer, arguments) if own_answer else ""
    check = {"ifeval": constraint.ifeval, "kwargs": arguments}
    return Item(
        capability="instruction", task=name, key=f"instruction {topic_of(request)}", prompt=f"{request} {asked}",
        right=right, careless=own_answer, contrast=request, grading=check,
    )  # fmt: skip
