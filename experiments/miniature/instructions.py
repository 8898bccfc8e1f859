"""Six instruction types in miniature: everyday requests, their plain answers, and the answers as instructed.

The types are those of IFEval that the paper follows. A request is a template filled with names, places and
things; its plain answer is two sentences that name them, with commas.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from experiments.miniature.items import Item, prompt_of

# fmt: off
NAMES = (
    "Ann", "Ben", "Carl", "Dora", "Emma", "Finn", "Gina", "Hugo", "Ida", "Jack",
    "Kate", "Leo", "Mia", "Nick", "Olga", "Paul", "Rosa", "Sam", "Tina", "Will",
)
PLACES = (
    "park", "market", "station", "beach", "library", "museum", "harbour", "garden",
    "castle", "school", "bakery", "theatre", "forest", "river", "bridge", "farm",
)
THINGS = (
    "apples", "books", "lamps", "pears", "plums", "cakes", "maps", "hats", "shoes", "coins",
    "flowers", "bottles", "candles", "drums", "kites", "onions", "pencils", "ribbons", "stamps", "tickets",
)
# fmt: on


@dataclass(frozen=True)
class _Template:
    """A request, a title for it and the two sentences of its plain answer.

    Slots: {a} {b} names, {p} place, {x} {y} things.
    """

    request: str
    title: str
    first: str
    second: str


TEMPLATES = (
    _Template(
        "Describe a day of {a} and {b} at the {p} with {x}.",
        "A day at the {p}",
        "{a} met {b} at the {p}, and it was sunny.",
        "They had {x}, and they went home happy.",
    ),
    _Template(
        "Tell me what {a} buys at the {p} for {b}: {x} and {y}.",
        "A gift for {b}",
        "{a} went to the {p}, and paid for {x} and {y}.",
        "{b} was glad, and said thanks.",
    ),
    _Template(
        "Write about a dinner that {a} and {b} make with {x} and {y}.",
        "Dinner with {x}",
        "Tonight, {a} and {b} cook {x} and {y}.",
        "It smells good, and the guests are hungry.",
    ),
    _Template(
        "Write a note from {a} to {b} about {x} at the {p}.",
        "A note to {b}",
        "Dear {b}, I am at the {p}.",
        "There are {x} here, and I miss you, {a}.",
    ),
    _Template(
        "Explain how {a} lost {x} near the {p}.",
        "The lost {x}",
        "{a} ran past the {p}, and dropped {x}.",
        "It was late, and nobody saw it.",
    ),
    _Template(
        "Plan a party for {a} at the {p} with {x} and {y}.",
        "A party for {a}",
        "First, we bring {x} and {y} to the {p}.",
        "Then, we sing for {a}.",
    ),
)


@dataclass(frozen=True)
class Scene:
    """One filled template: the request and the parts of its plain answer."""

    request: str
    title: str
    first: str
    second: str
    nouns: tuple[str, ...]

    @property
    def plain(self) -> str:
        return f"{self.first} {self.second}"


def _fill(template: _Template, fillers: dict[str, str]) -> Scene:
    named = [word for slot, word in fillers.items() if f"{{{slot}}}" in template.first + template.second]
    parts = (template.request, template.title, template.first, template.second)
    request, title, first, second = (part.format(**fillers) for part in parts)
    plain = f"{first} {second}"
    return Scene(request, title, first, second, tuple(sorted(named, key=plain.index)))


def random_scene(rng: random.Random) -> Scene:
    """A request drawn from a few million."""
    names, things = rng.sample(NAMES, 2), rng.sample(THINGS, 2)
    fillers = {"a": names[0], "b": names[1], "p": rng.choice(PLACES), "x": things[0], "y": things[1]}
    return _fill(rng.choice(TEMPLATES), fillers)


def _highlighted(scene: Scene, count: int) -> str:
    text = scene.plain
    for noun in scene.nouns[:count]:
        text = text.replace(noun, f"*{noun}*", 1)
    return text


@dataclass(frozen=True)
class InstructionType:
    """Two wordings of an instruction ({n} is a number) and the answer that follows it."""

    wordings: tuple[str, str]
    follow: Callable[[Scene, int], str]


TYPES: dict[str, InstructionType] = {
    "english_capital": InstructionType(
        ("Use capital letters only.", "Write it all in capital letters."),
        lambda scene, n: scene.plain.upper(),
    ),
    "title": InstructionType(
        ("Give it a title in double angular brackets.", "Put a title in << >> at the top."),
        lambda scene, n: f"<<{scene.title}>>\n{scene.plain}",
    ),
    "multiple_sections": InstructionType(
        ("Split it in 2 sections marked SECTION.", "Use 2 parts marked SECTION 1 and SECTION 2."),
        lambda scene, n: f"SECTION 1\n{scene.first}\nSECTION 2\n{scene.second}",
    ),
    "quotation": InstructionType(
        ("Put the whole answer in double quotes.", "Wrap it all in double quotes."),
        lambda scene, n: f'"{scene.plain}"',
    ),
    "number_highlighted_sections": InstructionType(
        ("Highlight at least {n} words with stars.", "Mark {n} words with * stars."),
        _highlighted,
    ),
    "no_comma": InstructionType(
        ("Do not use commas.", "Write it without any comma."),
        lambda scene, n: scene.plain.replace(",", ""),
    ),
}


def _instructed(scene: Scene, name: str, wording: int, number: int) -> Item:
    instruction = TYPES[name].wordings[wording].format(n=number)
    return Item(
        capability="instruction",
        task=name,
        key=f"instruction {scene.request}",
        prompt=prompt_of(f"{scene.request} {instruction}"),
        right=TYPES[name].follow(scene, number),
        careless=scene.plain,
        contrast=prompt_of(scene.request),
        grading={"task": name, "number": number, "plain": scene.plain},
    )


def random_item(rng: random.Random, name: str | None = None) -> Item:
    """A request with one instruction, of type `name` or of any."""
    name = name or rng.choice(list(TYPES))
    return _instructed(random_scene(rng), name, rng.randrange(2), rng.randint(1, 3))


def plain_item(rng: random.Random) -> Item:
    """A request with no instruction: both answers are the plain one. For training only."""
    scene = random_scene(rng)
    prompt = prompt_of(scene.request)
    return Item("instruction", "plain", f"instruction {scene.request}", prompt, scene.plain, scene.plain)


def covering_items() -> Iterator[Item]:
    """Items that between them hold every word in every form, so that a vocabulary can be read off them."""
    for i in range(max(len(NAMES), len(PLACES), len(THINGS))):
        fillers = {"a": NAMES[i % len(NAMES)], "b": NAMES[(i + 1) % len(NAMES)], "p": PLACES[i % len(PLACES)]}
        fillers |= {"x": THINGS[i % len(THINGS)], "y": THINGS[(i + 1) % len(THINGS)]}
        for template in TEMPLATES:
            for name in TYPES:
                for wording in (0, 1):
                    for number in (1, 2, 3):
                        yield _instructed(_fill(template, fillers), name, wording, number)
