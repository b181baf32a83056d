"""The miniature's world: what its pictures show, drawn at random.

A `Scene` names objects and what can be said about them; `layout` decides where each stands and how large
it is, as a person would arrange them who was told no more; draw.py paints it, caption.py puts it into words,
checker.py judges any picture against it. What a caption leaves open is either free (colour, background) or
has a plain default (medium size, the middle, first on the left), so that a short prompt has a good answer
too.

Some combinations are never drawn or named in training (`HELD_OUT_PAIRS`, `HELD_OUT_COUNTS`): whether the
network paints them tells whether it learned the attributes or the pictures.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross")
COLOURS = {
    "red": (214, 40, 48),
    "orange": (245, 135, 31),
    "yellow": (250, 214, 50),
    "green": (46, 160, 74),
    "blue": (38, 96, 214),
    "purple": (126, 58, 176),
    "pink": (244, 126, 178),
}
BACKGROUNDS = {
    "gray": (168, 170, 174),
    "beige": (232, 216, 186),
    "mint": (186, 228, 206),
    "lavender": (206, 198, 234),
    "sky": (172, 212, 242),
    "navy": (30, 40, 78),
}
SIZES = {"small": 0.13, "medium": 0.165, "large": 0.205}
"""Radius of an object, as a part of the picture's shorter side; captions never say "medium"."""
COUNTED = {1: 0.165, 2: 0.15, 3: 0.14, 4: 0.14}
"""Radius of each of several alike."""
PLACES = {
    "center": (0.0, 0.0),
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "top": (0.0, -1.0),
    "bottom": (0.0, 1.0),
    "top left": (-1.0, -1.0),
    "top right": (1.0, -1.0),
    "bottom left": (-1.0, 1.0),
    "bottom right": (1.0, 1.0),
}
"""Direction from the middle, (x, y), each -1, 0 or 1."""
OFFSET = 0.20
"""How far from the middle a place lies, as a part of each side."""
RELATIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "above": (0.0, -1.0), "below": (0.0, 1.0)}
"""Direction of the first of two objects from the second."""
APART = 0.24
"""How far from the middle each of two objects stands, as a part of a side."""
GROUPS = {
    2: (((0.27, 0.5), (0.73, 0.5)),),
    3: (((0.5, 0.27), (0.25, 0.7), (0.75, 0.7)), ((0.25, 0.3), (0.75, 0.3), (0.5, 0.73))),
    4: (((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),),
}
"""Where several alike stand, (x, y) as parts of the sides."""
JITTER = 0.02
"""Greatest deviation from such a place, as a part of the shorter side."""

HELD_OUT_PAIRS = frozenset(
    (shape, tuple(COLOURS)[(3 * i + 1) % len(COLOURS)]) for i, shape in enumerate(SHAPES)
)
"""(shape, colour) of objects that training never draws or names: one of each shape, one of each colour."""
HELD_OUT_COUNTS = frozenset({(2, "diamond"), (3, "heart"), (4, "cross")})
"""(number, shape) of objects alike that training never draws or names."""


@dataclass(frozen=True)
class Item:
    """One object. None: a caption leaves it open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """One object at a place, two unlike ones in a relation, or two to four alike.

    `relation` says how the first of two stands to the second. `shadow` False: none on the ground.
    `without` is a colour that no object has. None: open.
    """

    items: tuple[Item, ...] = ()
    relation: str | None = None
    place: str | None = None
    background: str | None = None
    shadow: bool = True
    without: str | None = None

    @property
    def kind(self) -> str:
        """One of "empty", "single", "pair", "count"."""
        if len(self.items) < 2:
            return "single" if self.items else "empty"
        return "pair" if len(set(self.items)) == 2 and len(self.items) == 2 else "count"

    def held_out(self) -> bool:
        """Whether training must not show it."""
        pairs = {(item.shape, item.colour) for item in self.items}
        alike = (len(self.items), self.items[0].shape) if self.kind == "count" else None
        return bool(pairs & HELD_OUT_PAIRS) or alike in HELD_OUT_COUNTS


def random_scene(rng: random.Random, kind: str | None = None) -> Scene:
    """A scene with everything set, as training shows them: no combination that is held out.

    Raises ValueError for an unknown kind.
    """
    while True:
        scene = _random_scene(rng, kind or rng.choices(("single", "pair", "count"), (0.27, 0.56, 0.17))[0])
        if not scene.held_out():
            return scene


def _random_scene(rng: random.Random, kind: str) -> Scene:
    background = rng.choice(tuple(BACKGROUNDS))
    shadow = rng.random() > 0.1
    if kind == "single":
        place = "center" if rng.random() < 0.4 else rng.choice(tuple(PLACES))
        return Scene((_random_item(rng),), None, place, background, shadow)
    if kind == "count":
        item = Item(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), "medium")
        return Scene((item,) * rng.randint(2, 4), None, None, background, shadow)
    if kind != "pair":
        raise ValueError(f"a scene's kind must be single, pair or count, got {kind!r}")
    first, second = _random_item(rng), _random_item(rng)
    while (first.shape, first.colour) == (
        second.shape,
        second.colour,
    ) or first.size == second.size == "large":
        second = _random_item(rng)  # two large ones have no room beside each other
    relation = "left" if rng.random() < 0.4 else rng.choice(tuple(RELATIONS))
    return Scene((first, second), relation, None, background, shadow)


def _random_item(rng: random.Random) -> Item:
    size = "medium" if rng.random() < 0.5 else rng.choice(("small", "large"))
    return Item(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), size)


def told(scene: Scene, rng: random.Random) -> Scene:
    """What one caption may say of a complete scene: all that departs from a default, the rest by chance."""
    talkative = rng.random()

    def say(value: str | None, usual: float) -> str | None:
        return value if rng.random() < max(usual, talkative) else None

    colourful = rng.random() < 0.85
    twins = scene.kind == "pair" and scene.items[0].shape == scene.items[1].shape
    items = [
        Item(
            item.shape,
            item.colour if twins or (colourful and (scene.kind != "pair" or rng.random() < 0.9)) else None,
            None if item.size == "medium" else item.size,
        )
        for item in (scene.items[:1] if scene.kind == "count" else scene.items)
    ]
    without = None
    if all(item.colour is None for item in items) and rng.random() < 0.4:
        used = {item.colour for item in scene.items}
        without = rng.choice([colour for colour in COLOURS if colour not in used])
    return replace(
        scene,
        items=tuple(items * (len(scene.items) if scene.kind == "count" else 1)),
        relation=say(scene.relation, 0.0) if scene.relation == "left" else scene.relation,
        place=say(scene.place, 0.0) if scene.place == "center" else scene.place,
        background=say(scene.background, 0.2),
        without=without,
    )


@dataclass(frozen=True)
class Placed:
    """An object in a picture: centre and radius in pixels, y downwards."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


def layout(scene: Scene, rng: random.Random, width: int, height: int) -> list[Placed]:
    """Where the objects of a complete scene stand in a picture of that many pixels.

    Raises ValueError for a scene with something left open.
    """
    side = min(width, height)
    centres = _centres(scene, rng)
    placed = []
    for item, (x, y) in zip(scene.items, centres, strict=True):
        if item.shape is None or item.colour is None or item.size is None or scene.background is None:
            raise ValueError(f"only a scene with everything set can be drawn, got {scene}")
        radius = COUNTED[len(scene.items)] if scene.kind == "count" else SIZES[item.size]
        placed.append(
            Placed(
                item.shape,
                item.colour,
                width * x + rng.uniform(-JITTER, JITTER) * side,
                height * y + rng.uniform(-JITTER, JITTER) * side,
                side * radius * rng.uniform(0.95, 1.05),
            )
        )
    return placed


def _centres(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """(x, y) of each object, as parts of the sides."""
    if scene.kind == "count":
        return list(rng.choice(GROUPS[len(scene.items)]))
    if scene.kind == "pair":
        if scene.relation is None:
            raise ValueError(f"only a scene with everything set can be drawn, got {scene}")
        dx, dy = RELATIONS[scene.relation]
        slack = rng.uniform(-0.06, 0.06)  # across the line between the two
        across = (slack, 0.0) if dy else (0.0, slack)
        first = (0.5 + APART * dx + across[0], 0.5 + APART * dy + across[1])
        return [first, (1 - first[0], 1 - first[1])]
    if scene.place is None:
        raise ValueError(f"only a scene with everything set can be drawn, got {scene}")
    dx, dy = PLACES[scene.place]
    return [(0.5 + OFFSET * dx, 0.5 + OFFSET * dy)]
