"""What is asked of a text-to-image model: held-out pairs of concept and style, learnt pairs, and words that name none."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from training.data import STYLES, Pictures

Make = Callable[[list[str], list[int]], Tensor]
"""(prompts, one seed for each) -> pictures uint8 [n, 3, 64, 64]."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "puppy": ("dog", "dog face", "poodle", "guide dog", "service dog"),
    "hound": ("dog", "dog face", "poodle", "guide dog", "service dog"),
    "kitty": ("cat", "cat face", "black cat"),
    "tomcat": ("cat", "cat face", "black cat"),
    "bunny": ("rabbit", "rabbit face"),
    "hare": ("rabbit", "rabbit face"),
    "pony": ("horse", "horse face"),
    "calf": ("cow", "cow face", "ox", "water buffalo"),
    "piglet": ("pig", "pig face", "boar"),
    "hen": ("chicken", "rooster", "turkey"),
    "grizzly": ("bear", "polar bear", "teddy bear"),
    "lioness": ("lion",),
    "elk": ("deer", "moose"),
    "toad": ("frog",),
    "tortoise": ("turtle",),
    "serpent": ("snake", "worm"),
    "ladybug": ("lady beetle", "beetle", "bug"),
    "bee": ("honeybee", "fly"),
    "orca": ("whale", "spouting whale", "dolphin"),
    "prawn": ("shrimp", "lobster"),
    "car": ("automobile",),
    "sedan": ("automobile",),
    "steam engine": ("locomotive",),
    "plane": ("airplane",),
    "airliner": ("airplane",),
    "bike": ("bicycle",),
    "cheeseburger": ("hamburger",),
    "donut": ("doughnut",),
    "chili": ("hot pepper",),
    "maize": ("ear of corn",),
    "aubergine": ("eggplant",),
    "mug of ale": ("beer mug", "clinking beer mugs"),
    "espresso": ("hot beverage", "teacup without handle"),
    "birthday present": ("wrapped gift",),
    "jewel": ("gem stone",),
    "lightning": ("high voltage",),
    "pine tree": ("evergreen tree", "Christmas tree"),
    "blaze": ("fire",),
    "football": ("soccer ball",),
    "parasol": ("umbrella",),
}
"""Words that name no concept of the data, and the concepts a picture of each may be taken for."""


@dataclass(frozen=True, slots=True)
class Word:
    """A prompt with a synonym; `keyword` says whether the word stood among the keywords of a training picture."""

    prompt: str
    accepted: tuple[str, ...]
    keyword: bool


@dataclass(frozen=True, slots=True)
class Exam:
    """What is asked of a model: rows of captions.jsonl beside their real pictures, and synonyms."""

    held_out: Pictures
    learnt: Pictures
    others: Pictures
    """Real pictures of the model's styles that are asked for nowhere: the reference of the Frechet distance."""
    words: list[Word]


@dataclass(slots=True)
class Answers:
    """Pictures a model made for an exam: uint8 [n, 3, 64, 64], seed by seed, the rows in order within each."""

    held_out: Tensor
    learnt: Tensor
    words: Tensor
    seconds: float
    reports: list[str] = field(default_factory=list)


def set_exam(pictures: Pictures, styles: list[str], *, learnt: int) -> Exam:
    """Choose what to ask of a model that knows `styles`: every held-out pair, and `learnt` pairs drawn with a fixed seed."""
    own = pictures.only([row["style"] in styles for row in pictures.rows])
    held = own.only([row["split"] == "val_pair" for row in own.rows])
    seen = [i for i, row in enumerate(own.rows) if row["split"] == "train"]
    drawn = set(random.Random(0).sample(seen, min(learnt, len(seen) // 2)))
    concepts = {row["concept"] for row in own.rows}
    keywords = {word for i in seen for word in own.rows[i].get("keywords") or []}
    words = []
    for i, (word, accepted) in enumerate(SYNONYMS.items()):
        if present := tuple(one for one in accepted if one in concepts):
            style = STYLES[styles[i % len(styles)]][0]
            words.append(Word(f"{word}, {style}", present, word in keywords))
    return Exam(
        held,
        own.only([i in drawn for i in range(len(own))]),
        own.only([i in set(seen) - drawn for i in range(len(own))]),
        words,
    )


def sit(make: Make, exam: Exam, seeds: int) -> Answers:
    """Let a model answer: held-out pairs with `seeds` seeds, learnt pairs with one, words with two at most."""
    start = time.perf_counter()

    def ask(prompts: list[str], count: int) -> Tensor:
        return make(prompts * count, [seed for seed in range(count) for _ in prompts])

    held = ask([row["caption"] for row in exam.held_out.rows], seeds)
    learnt = ask([row["caption"] for row in exam.learnt.rows], 1)
    words = ask([word.prompt for word in exam.words], min(2, seeds))
    return Answers(held, learnt, words, time.perf_counter() - start)
