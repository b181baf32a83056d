"""Captions of scenes as people write them: synonyms, word order, numerals, "without", typos.

`caption` describes a scene's stated attributes (scene.with_stated_attributes) in one of many ways;
`plain_caption` in the plainest. Both mean the same to the text encoders, which are trained on `caption`.
"""

from __future__ import annotations

import random
import string

from .scene import Item, Scene

SHAPE_WORDS = {
    "circle": ("circle", "ball", "disc", "sphere", "dot", "round"),
    "square": ("square", "box", "block", "cube", "tile"),
    "triangle": ("triangle", "pyramid", "wedge"),
    "diamond": ("diamond", "rhombus", "lozenge"),
    "star": ("star",),
    "heart": ("heart", "love heart"),
    "cross": ("cross", "plus", "plus sign"),
}
COLOR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden", "lemon"),
    "green": ("green", "emerald"),
    "blue": ("blue", "cobalt", "royal blue"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
BACKGROUND_WORDS = {
    "gray": ("gray", "grey"),
    "beige": ("beige", "cream", "sand-coloured"),
    "mint": ("mint", "mint green", "light green", "pale green", "green"),
    "lavender": ("lavender", "lilac", "light purple", "purple"),
    "sky": ("sky", "sky blue", "light blue", "pale blue", "blue"),
    "navy": ("navy", "dark blue", "navy blue"),
}
NUMBER_WORDS = {2: ("two", "2", "a pair of"), 3: ("three", "3"), 4: ("four", "4")}
PLACE_WORDS = {
    "center": ("in the center", "in the middle", "in the centre", "centered", "at the center"),
    "left": ("on the left", "at the left", "left", "on the left side", "to the left"),
    "right": ("on the right", "at the right", "right", "on the right side", "to the right"),
    "top": ("at the top", "top", "in the upper part", "up high"),
    "bottom": ("at the bottom", "bottom", "in the lower part", "down low"),
    "top left": ("in the top left", "top left", "in the upper left corner", "at the top left"),
    "top right": ("in the top right", "top right", "in the upper right corner", "at the top right"),
    "bottom left": ("in the bottom left", "bottom left", "in the lower left corner", "at the bottom left"),
    "bottom right": (
        "in the bottom right",
        "bottom right",
        "in the lower right corner",
        "at the bottom right",
    ),
}
RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "underneath", "beneath"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
NO_SHADOW = ("without a shadow", "no shadow", "without shadow", "without any shadow", "without shadows")
OPENINGS = (
    "",
    "",
    "",
    "",
    "a picture of ",
    "an image of ",
    "a photo of ",
    "draw ",
    "please draw ",
    "i want ",
)


def article(words: str) -> str:
    """The words with "a" or "an" in front."""
    return f"{'an' if words[:1] in 'aeiou' else 'a'} {words}"


def plural(word: str) -> str:
    """The plural of a shape's name."""
    endings = {
        "box": "boxes",
        "cross": "crosses",
        "plus": "pluses",
        "rhombus": "rhombuses",
        "round": "rounds",
    }
    return endings.get(word, f"{word}s")


class Phrasing:
    """Chooses words: without `rng` the first of each list, else any, the first most often."""

    def __init__(self, rng: random.Random | None) -> None:
        self.rng = rng

    def pick(self, words: tuple[str, ...]) -> str:
        """One of the words."""
        if self.rng is None or self.rng.random() < 0.5:
            return words[0]
        return self.rng.choice(words)

    def chance(self, share: float) -> bool:
        """True in that share of calls; never without `rng`."""
        return self.rng is not None and self.rng.random() < share

    def thing(self, item: Item, count: int = 1) -> str:
        """The object without its article: "large red circle", "red circles"."""
        size = self.pick(SIZE_WORDS[item.size]) if item.size in SIZE_WORDS else ""
        color = self.pick(COLOR_WORDS[item.color]) if item.color else ""
        shape = self.pick(SHAPE_WORDS[item.shape]) if item.shape else "shape"
        if color and size and self.chance(0.1):
            size, color = color, size
        noun = plural(shape) if count > 1 else shape
        if color and self.chance(0.06):
            return " ".join(word for word in (size, noun, "in", color) if word)
        return " ".join(word for word in (size, color, noun) if word)

    def with_article(self, item: Item) -> str:
        """The object, usually with its article."""
        words = self.thing(item)
        return words if self.chance(0.15) else "the " + words if self.chance(0.06) else article(words)

    def objects(self, scene: Scene) -> str:
        """The objects and their relation, without the place of a single one."""
        if scene.kind == "single":
            return self.with_article(scene.items[0])
        if scene.kind == "count":
            return (
                f"{self.pick(NUMBER_WORDS[len(scene.items)])} {self.thing(scene.items[0], len(scene.items))}"
            )
        first, second = scene.items
        one, two = self.with_article(first), self.with_article(second)
        if scene.relation is None:
            return f"{one} {self.pick(('and', 'and', 'with', 'next to', 'and also', '&'))} {two}"
        if self.chance(0.3):
            one, two, relation = two, one, OPPOSITE[scene.relation]
        else:
            relation = scene.relation
        between = self.pick(RELATION_WORDS[relation])
        if self.chance(0.15):
            return f"{between} {two} is {one}"
        if self.chance(0.12) and relation in ("left", "right"):
            return f"{one} on the {relation} and {two} on the {OPPOSITE[relation]}"
        return f"{one} {'is ' if self.chance(0.15) else ''}{between} {two}"

    def exclusions(self, scene: Scene) -> list[str]:
        """Phrases for an excluded color and for no shadow."""
        parts = []
        if scene.without:
            color = COLOR_WORDS[scene.without][0]
            parts.append(self.pick((f"not {color}", f"but not {color}", f"no {color}", f"without {color}")))
        if not scene.shadow:
            parts.append(self.pick(NO_SHADOW))
        return parts


def _phrase(scene: Scene, words: Phrasing) -> str:
    what = words.objects(scene)
    where = words.pick(PLACE_WORDS[scene.place]) if scene.place else ""
    exclusions = " ".join(words.exclusions(scene))
    ground = ""
    if scene.background:
        named = words.pick(BACKGROUND_WORDS[scene.background])
        noun = words.pick(("background", "wall", "backdrop", "ground"))
        ground = named + " " + noun
        if words.chance(0.3):
            return ", ".join(part for part in (what, where, exclusions, ground) if part)
        if words.chance(0.25):
            opening = article(ground) + " with"
            return ", ".join(part for part in (f"{opening} {what}", where, exclusions) if part)
        ground = words.pick(("on", "in front of", "against")) + " " + article(ground)
    tail = " ".join(part for part in (where, ground) if part)
    if where and words.chance(0.2):
        return ", ".join(part for part in (where, what, ground, exclusions) if part)
    if tail and words.chance(0.4):
        return ", ".join(part for part in (what, where, ground, exclusions) if part)
    return ", ".join(part for part in (f"{what} {tail}".strip(), exclusions) if part)


def caption(scene: Scene, rng: random.Random) -> str:
    """A random caption of a scene's stated attributes: one in eight has a typo, some are in capitals."""
    if not scene.items:
        return ""
    text = _phrase(scene, Phrasing(rng))
    if text.startswith(("a ", "an ", "the ", "two", "three", "four", "2", "3", "4")):
        text = rng.choice(OPENINGS) + text
    if rng.random() < 0.12:
        text = misspell(text, rng)
    chance = rng.random()
    if chance < 0.2:
        text += "."
    return text.upper() if chance > 0.97 else text.capitalize() if chance > 0.85 else text


def plain_caption(scene: Scene) -> str:
    """The plainest caption: "a red circle left of a blue square on a gray background"."""
    return _phrase(scene, Phrasing(None)) if scene.items else ""


def misspell(text: str, rng: random.Random) -> str:
    """The text with one typo in a word of four letters or more: a letter lost, doubled, swapped or wrong."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if not long:
        return text
    i = rng.choice(long)
    word = words[i]
    while words[i] == word:
        k = rng.randrange(1, len(word) - 1)
        words[i] = rng.choice(
            (
                word[:k] + word[k + 1 :],
                word[:k] + word[k] + word[k:],
                word[:k] + word[k + 1] + word[k] + word[k + 2 :],
                word[:k] + rng.choice(string.ascii_lowercase) + word[k + 1 :],
            )
        )
    return " ".join(words)
