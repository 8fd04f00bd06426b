"""Which emoji are in the dataset, what they are called, and which are held out. Everything follows from a rule or a hash.

A concept is an emoji that every style has, whose name in Noto's set has one or two words, and that is in

- Noto's categories Animals & Nature, Food & Drink, Smileys & Emotion, or Objects, or
- its category Travel & Places and Unicode's block Transport and Map Symbols, which holds vehicles, mostly.

This leaves out people, activities, places, weather, clocks, flags, arrows, signs and lettering.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

CATEGORIES = ("Animals & Nature", "Food & Drink", "Smileys & Emotion", "Objects")
PLACES, TRANSPORT = "Travel & Places", range(0x1F680, 0x1F700)
MOST_WORDS = 2
HELD_OUT = 0.13  # chance of each pair; a concept keeps one at most, so that about a tenth of all pairs are held out


@dataclass(frozen=True)
class Concept:
    """An emoji.

    Attributes:
        key: Its key in the icon sets, such as "fire-engine".
        name: Its name in plain words, such as "fire engine".
        code_point: Its code points in hexadecimal, such as "1f692".
        held_out: The style in which it is held out, or None. All other styles are trained on.
    """

    key: str
    name: str
    code_point: str
    held_out: str | None

    def caption(self, style: str) -> str:
        """What a person would type, such as "fire engine, noto style"."""
        return f"{self.name}, {style} style"


def concepts(categories: dict[str, list[str]], keys: dict[str, str], sets: dict[str, Container[str]]) -> list[Concept]:
    """The concepts by the rule above, in the order of a hash, so that the first of them are a fair sample.

    Args:
        categories: The keys of Noto's icons in each category (metadata.json).
        keys: The key of each code point in Noto's set (chars.json).
        sets: The keys that each style has, by its name.
    """
    category = {key: name for name, members in categories.items() for key in members}
    found = []
    for code_point, key in keys.items():
        name = re.sub(r"(?<!\b\w)-", " ", key)  # "t-shirt" keeps its hyphen
        moves = category[key] == PLACES and int(code_point.partition("-")[0], 16) in TRANSPORT
        chosen = (moves or category[key] in CATEGORIES) and len(name.split()) <= MOST_WORDS
        if chosen and all(key in icons for icons in sets.values()):
            found.append(Concept(key, name, code_point, held_out_style(name, sets)))
    return sorted(found, key=lambda concept: _fraction(concept.name))


def held_out_style(name: str, styles: Iterable[str]) -> str | None:
    """The style in which a concept is held out, by a hash of the pair; None if it is held out in no style."""
    chances = {style: _fraction(f"{style}/{name}") for style in styles}
    first = min(chances, key=chances.__getitem__)
    return first if chances[first] < HELD_OUT else None


def _fraction(text: str) -> float:
    """A hash of a text, in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
