"""Instructions for edits as people write them: synonyms, word order, "it", "should be", capitals, typos.

Words for shapes, colors, sizes and backgrounds are those of caption.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .caption import (
    BACKGROUND_WORDS,
    COLOR_WORDS,
    PLACE_WORDS,
    RELATION_WORDS,
    SHAPE_WORDS,
    Phrasing,
    article,
    misspell,
)
from .scene import Item

SIDE_WORDS = {
    "left": ("on the left", "to the left"),
    "right": ("on the right", "to the right"),
    "top": ("at the top", "on top"),
    "bottom": ("at the bottom", "below"),
}
NIGHT = ("make it night", "make it dark", "turn it to night", "night time", "at night", "it should be night")


@dataclass(frozen=True)
class Named:
    """An object to refer to: what it is, whether that is unique, and its side of the other object, if any."""

    item: Item
    alone: bool
    shape_is_unique: bool
    color_is_unique: bool
    side: str | None = None


class Instructions:
    """Random instructions, one method per kind of edit; the first phrase of a list is the most frequent."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.words = rng, Phrasing(rng)

    def reference(self, one: Named) -> str:
        """Words that single the object out: "it", "the star", "the red one", "the one on the left"."""
        shape = self.words.pick(SHAPE_WORDS[str(one.item.shape)])
        color = self.words.pick(COLOR_WORDS[str(one.item.color)])
        ways = [f"the {color} {shape}"]
        if one.shape_is_unique:
            ways += [f"the {shape}", f"the {shape}"]
        if one.color_is_unique and not one.alone:
            ways += [f"the {color} one"]
        if one.side is not None:
            ways += [f"the one {self.words.pick(SIDE_WORDS[one.side])}"]
        if one.alone:
            ways += ["it", "the object"]
        return self.rng.choice(ways)

    def recolor(self, one: Named, color: str) -> str:
        """ "make the star red"."""
        what, name = self.reference(one), self.words.pick(COLOR_WORDS[color])
        return self._write(
            f"make {what} {name}",
            f"change {what} to {name}",
            f"turn {what} {name}",
            f"paint {what} {name}",
            f"color {what} {name}",
            f"{what} should be {name}",
            f"{what} in {name}",
        )

    def recolor_all(self, count: int, color: str) -> str:
        """ "make both red"."""
        name = self.words.pick(COLOR_WORDS[color])
        what = self.rng.choice(("both", "them", "all of them") if count == 2 else ("all of them", "them"))
        return self._write(
            f"make {what} {name}",
            f"turn {what} {name}",
            f"paint {what} {name}",
            f"{'they' if what == 'them' else what} should be {name}",
        )

    def replace_shape(self, one: Named, shape: str) -> str:
        """ "turn the star into a heart"."""
        what, name = self.reference(one), article(self.words.pick(SHAPE_WORDS[shape]))
        return self._write(
            f"turn {what} into {name}",
            f"replace {what} with {name}",
            f"make {what} {name}",
            f"change {what} to {name}",
            f"swap {what} for {name}",
            f"{what} should be {name}",
        )

    def move(self, one: Named, place: str) -> str:
        """ "move it to the top left"."""
        what, where = self.reference(one), self.words.pick(PLACE_WORDS[place])
        short = "the middle" if place == "center" else f"the {place}"
        return self._write(
            f"move {what} to {short}",
            f"put {what} {where}",
            f"place {what} {where}",
            f"{what} should be {where}",
        )

    def resize(self, one: Named, larger: bool) -> str:
        """ "make the star bigger"."""
        what = self.reference(one)
        word = self.rng.choice(("bigger", "larger") if larger else ("smaller", "smaller", "tinier"))
        verb = self.rng.choice(("enlarge", "grow") if larger else ("shrink",))
        return self._write(f"make {what} {word}", f"{verb} {what}", f"{what} should be {word}")

    def add(self, item: Item, place: str) -> str:
        """ "add a small blue heart on the right"."""
        what, where = self.words.with_article(item), self.words.pick(PLACE_WORDS[place])
        return self._write(f"add {what} {where}", f"put {what} {where}", f"{where}, add {what}")

    def add_beside(self, item: Item, relation: str, one: Named) -> str:
        """ "add a blue heart left of the star"."""
        where = f"{self.words.pick(RELATION_WORDS[relation])} {self.reference(one)}"
        what = self.words.with_article(item)
        return self._write(f"add {what} {where}", f"put {what} {where}", f"{where}, add {what}")

    def remove(self, one: Named) -> str:
        """ "remove the square"."""
        what = self.reference(one)
        return self._write(
            f"remove {what}",
            f"delete {what}",
            f"take away {what}",
            f"erase {what}",
            f"get rid of {what}",
            f"without {what}",
        )

    def background(self, color: str) -> str:
        """ "change the background to navy", or "make it night" for navy."""
        if color == "navy" and self.rng.random() < 0.4:
            return self._write(*NIGHT)
        name = self.words.pick(BACKGROUND_WORDS[color])
        noun = self.words.pick(("background", "wall", "backdrop"))
        return self._write(
            f"change the {noun} to {name}",
            f"make the {noun} {name}",
            f"{name} {noun}",
            f"the {noun} should be {name}",
        )

    def combine(self) -> str:
        """ "the shape of the first in the color of the second"."""
        return self._write(
            "the shape of the first in the color of the second",
            "the first in the color of the second",
            "make the first the color of the second",
            "give the first the color of the second",
        )

    def _write(self, *phrases: str) -> str:
        """One of the phrases, some with punctuation, capitals or a typo."""
        text = self.words.pick(phrases)
        if self.rng.random() < 0.05:
            text = misspell(text, self.rng)
        if self.rng.random() < 0.08:
            text = f"please {text}"
        chance = self.rng.random()
        if chance < 0.2:
            text += "!" if chance < 0.03 else "."
        return text.upper() if chance > 0.97 else text.capitalize() if chance > 0.85 else text
